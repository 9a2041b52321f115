"""One small model of each family that has rules, and what is asked of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import diffusers_models, timm_models


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    # Of each rule that applies: how many modules of the model it takes.
    replaced: dict[str, int]
    # Whether the rules keep every rounding where the ops round as torch's do.
    same_steps: bool = True

    def make(self) -> nn.Module:
        """With scales that tell channels apart: many start as constants, often zero."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and (parameter == parameter.flatten()[0]).all():
                    parameter.add_(0.5 * torch.randn_like(parameter))
        return model


def loss_of(outputs: Any) -> torch.Tensor:
    tensors = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
    return sum(tensor.float().square().mean() for tensor in tensors if isinstance(tensor, torch.Tensor))


def transformers_model(config_name: str, model_name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model_name)(getattr(transformers, config_name)(**config))

    return build


def image(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(3, 3, size, size)}


_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "drop_path_rate": 0.3,
}
_CONV = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "drop_path_rate": 0.3}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}

FAMILIES = {
    "dinov2": Family(transformers_model("Dinov2Config", "Dinov2Model", **_VIT), image(), {"dinov2": 2}),
    "dinov2-swiglu": Family(
        transformers_model("Dinov2Config", "Dinov2Model", **_VIT | {"use_swiglu_ffn": True, "drop_path_rate": 0.0}),
        image(),
        {"dinov2": 2},
    ),
    "dinov2-with-registers": Family(
        transformers_model("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", **_VIT), image(), {"dinov2": 2}
    ),
    "dinov3": Family(transformers_model("DINOv3ViTConfig", "DINOv3ViTModel", **_VIT), image(), {"dinov3": 2}),
    "beit": Family(
        transformers_model("BeitConfig", "BeitModel", **_VIT, use_relative_position_bias=True, hidden_dropout_prob=0.2),
        image(),
        {"beit": 2},
    ),
    "data2vec-vision": Family(
        transformers_model("Data2VecVisionConfig", "Data2VecVisionModel", **_VIT), image(), {"beit": 2}
    ),
    "convnext": Family(
        transformers_model("ConvNextConfig", "ConvNextModel", **_CONV, layer_scale_init_value=0.5), image(), {"convnext": 3}
    ),
    "convnextv2": Family(
        transformers_model("ConvNextV2Config", "ConvNextV2Model", **_CONV), image(), {"convnextv2": 3}, same_steps=False
    ),
    "dinov3-convnext": Family(
        transformers_model(
            "DINOv3ConvNextConfig", "DINOv3ConvNextModel", hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, drop_path_rate=0.3
        ),
        image(),
        {"dinov3-convnext": 4},
    ),
    "swin": Family(
        transformers_model("SwinConfig", "SwinModel", **_SWIN, drop_path_rate=0.3, hidden_dropout_prob=0.1),
        image(16),
        {"swin": 3},
    ),
    "swin-padded": Family(
        transformers_model("SwinConfig", "SwinModel", **_SWIN | {"image_size": 24}, drop_path_rate=0.0), image(22), {"swin": 3}
    ),
}


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def _words() -> dict[str, Any]:
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(0, 50, (3, 7)), "attention_mask": mask}


_GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}

# Older releases have other attentions, which no rule knows.
ATTENTION_IS_KNOWN = tuple(map(int, importlib.metadata.version("transformers").split(".")[:2])) >= (5, 24)

if ATTENTION_IS_KNOWN:
    eager = {"attn_implementation": "eager", "use_cache": False}
    FAMILIES |= {
        "gpt2-eager": Family(transformers_model("GPT2Config", "GPT2Model", **_GPT2, **eager), _words, {"gpt2-attention": 2}),
        "t5-eager": Family(
            transformers_model("T5Config", "T5Model", **_T5, **eager),
            lambda: _words() | {"decoder_input_ids": torch.randint(0, 50, (3, 5))},
            {"t5-attention": 3},
        ),
    }


# timm needs torchvision, which there is not for every torch.
if installed("timm", "torchvision"):
    FAMILIES |= {name: Family(*parts) for name, parts in timm_models.MODELS.items()}
if installed("diffusers"):
    FAMILIES |= {name: Family(*parts) for name, parts in diffusers_models.MODELS.items()}

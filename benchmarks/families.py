"""Blocks of real models, as their libraries build them: shallow, and with activations as large as in use."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from safe_inplace.nn import functional as forms


@dataclass(frozen=True)
class Scale:
    """How much of a model is built: tokens of a stream are batch * side * side."""

    batch: int
    side: int
    width: int
    depth: int = 1

    def stream(self, channels: int, side: int) -> Scale:
        """Another width and resolution with as many elements in the stream."""
        elements = self.batch * self.side**2 * self.width
        return replace(self, batch=max(1, round(elements / (side**2 * channels))), side=side, width=channels)

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)

    @property
    def classic(self) -> Scale:
        """As the first stage of the usual pyramids, a quarter of an image's resolution."""
        return self if self.side < 14 else self.stream(96, 56)


def for_device(device: torch.device) -> Scale:
    """On the CPU the width of the smallest models and a stream of 16 MiB in float32, on a GPU one of 64 MiB."""
    return Scale(128, 16, 128) if device.type == "cpu" else Scale(64, 16, 1024, depth=4)


TINY = Scale(batch=2, side=8, width=16)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One model of a library. Where it has no rule, `tried` is what one would be: (class, forward)."""

    name: str
    library: str
    build: Callable[[Scale], nn.Module]
    inputs: Callable[[Scale], Inputs]
    tried: tuple[str, Callable[..., Any]] | None = None

    @property
    def installed(self) -> bool:
        # timm needs torchvision, which there is not for every torch.
        needed = ("timm", "torchvision") if self.library == "timm" else (self.library,)
        return all(importlib.util.find_spec(name) for name in needed)

    @property
    def version(self) -> str:
        return f"{self.library} {importlib.metadata.version(self.library)}"

    def make(self, scale: Scale) -> nn.Module:
        """With scales that tell channels apart: many start as constants, often zero, and hide what is computed wrong."""
        torch.manual_seed(0)
        model = self.build(scale)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and (parameter == parameter.flatten()[0]).all():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model


def _transformers(config: str, model: str, arguments: Callable[[Scale], Inputs]) -> Callable[[Scale], nn.Module]:
    def build(scale: Scale) -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, model)(getattr(library, config)(**arguments(scale)))

    return build


def _timm(module: str, name: str, arguments: Callable[[Scale], Inputs]) -> Callable[[Scale], nn.Module]:
    def build(scale: Scale) -> nn.Module:
        # No classes: what is measured are the blocks.
        return getattr(importlib.import_module(f"timm.models.{module}"), name)(num_classes=0, **arguments(scale))

    return build


def _diffusers(name: str, arguments: Callable[[Scale], Inputs]) -> Callable[[Scale], nn.Module]:
    return lambda scale: getattr(importlib.import_module("diffusers"), name)(**arguments(scale))


PATCH = 4


def _vit(**arguments: Any) -> Callable[[Scale], Inputs]:
    return lambda scale: {
        "hidden_size": scale.width,
        "num_hidden_layers": scale.depth,
        "num_attention_heads": scale.heads,
        "intermediate_size": 4 * scale.width,
        "image_size": PATCH * scale.side,
        "patch_size": PATCH,
        **arguments,
    }


def _conv(scale: Scale) -> Inputs:
    return {"hidden_sizes": [scale.classic.width], "depths": [2 * scale.depth], "num_stages": 1}


def _swin(scale: Scale) -> Inputs:
    scale = scale.classic
    return {
        "image_size": PATCH * scale.side,
        "embed_dim": scale.width,
        "depths": [2 * scale.depth],
        "num_heads": [max(1, scale.width // 32)],
        "window_size": min(7, scale.side),
    }


def _timm_vit(**arguments: Any) -> Callable[[Scale], Inputs]:
    return lambda scale: {
        "img_size": PATCH * scale.side,
        "patch_size": PATCH,
        "embed_dim": scale.width,
        "depth": scale.depth,
        "num_heads": scale.heads,
        **arguments,
    }


def _timm_conv(**arguments: Any) -> Callable[[Scale], Inputs]:
    return lambda scale: {"depths": (2 * scale.depth, 0, 0, 0), "dims": (scale.classic.width,) * 4, **arguments}


def _language(**names: str) -> Callable[[Scale], Inputs]:
    def arguments(scale: Scale) -> Inputs:
        sizes = {"width": scale.width, "depth": scale.depth, "heads": scale.heads, "inner": 4 * scale.width}
        return {name: sizes[size] for name, size in names.items()} | {"vocab_size": 512, "use_cache": False}

    return arguments


def _joint(scale: Scale) -> Inputs:
    return {
        "num_attention_heads": scale.heads,
        "attention_head_dim": scale.width // scale.heads,
        "joint_attention_dim": scale.width,
        "pooled_projection_dim": scale.width,
    }


def _latent(scale: Scale) -> Inputs:
    return {
        "sample_size": 2 * scale.side,
        "patch_size": 2,
        "in_channels": 4,
        "num_attention_heads": scale.heads,
        "attention_head_dim": scale.width // scale.heads,
    }


def _image(name: str, *, classic: bool = False) -> Callable[[Scale], Inputs]:
    def inputs(scale: Scale) -> Inputs:
        scale = scale.classic if classic else scale
        return {name: torch.randn(scale.batch, 3, PATCH * scale.side, PATCH * scale.side)}

    return inputs


def _tokens(scale: Scale) -> Inputs:
    return {"input_ids": torch.randint(0, 512, (scale.batch, scale.side**2))}


def _long_texts(scale: Scale) -> Inputs:
    """As many tokens in fewer texts, one of which is shorter: what attention does grows with their length."""
    made = _tokens(scale.stream(scale.width, 2 * scale.side))
    mask = torch.ones_like(made["input_ids"])
    mask[0, -8:] = 0
    return made | {"attention_mask": mask}


def _noise(scale: Scale) -> Inputs:
    shape = (scale.batch, 4, 2 * scale.side, 2 * scale.side)
    return {"hidden_states": torch.randn(shape), "timestep": torch.randint(0, 1000, (scale.batch,))}


def _text(scale: Scale) -> Inputs:
    return {"encoder_hidden_states": torch.randn(scale.batch, scale.side**2 // 4, scale.width)}


def _flux_inputs(scale: Scale) -> Inputs:
    tokens = scale.side**2
    return {
        "hidden_states": torch.randn(scale.batch, tokens, 16),
        **_text(scale),
        "pooled_projections": torch.randn(scale.batch, scale.width),
        "timestep": torch.rand(scale.batch),
        "img_ids": torch.randint(0, scale.side, (tokens, 3)),
        "txt_ids": torch.zeros(tokens // 4, 3, dtype=torch.long),
    }


def gpt2(self: Any, hidden_states: Tensor, *positional: Any, encoder_attention_mask: Any = None, **keywords: Any) -> Tensor:
    cache, mask, *_ = positional
    middle = forms.scaled_residual(
        hidden_states, lambda: self.attn(self.ln_1(hidden_states), cache, mask, **keywords)[0], branch_first=True
    )
    return forms.scaled_residual(middle, lambda: self.mlp(self.ln_2(middle)))


def llama(self: Any, hidden_states: Tensor, **keywords: Any) -> Tensor:
    middle = forms.scaled_residual(
        hidden_states, lambda: self.self_attn(hidden_states=self.input_layernorm(hidden_states), **keywords)[0]
    )
    return forms.scaled_residual(middle, lambda: self.mlp(self.post_attention_layernorm(middle)))


_GPT2 = _language(n_embd="width", n_layer="depth", n_head="heads", n_inner="inner")
_LLAMA = _language(hidden_size="width", num_hidden_layers="depth", num_attention_heads="heads", intermediate_size="inner")
_EAGER = {"attn_implementation": "eager"}
_T5 = _language(d_model="width", num_layers="depth", num_heads="heads", d_ff="inner")
_BEIT = _vit(use_relative_position_bias=True)

FAMILIES = [
    Family("Dinov2", "transformers", _transformers("Dinov2Config", "Dinov2Model", _vit()), _image("pixel_values")),
    Family("DINOv3", "transformers", _transformers("DINOv3ViTConfig", "DINOv3ViTModel", _vit()), _image("pixel_values")),
    Family("BEiT", "transformers", _transformers("BeitConfig", "BeitModel", _BEIT), _image("pixel_values")),
    Family(
        "Data2Vec",
        "transformers",
        _transformers("Data2VecVisionConfig", "Data2VecVisionModel", _BEIT),
        _image("pixel_values"),
    ),
    Family(
        "ConvNeXt",
        "transformers",
        _transformers("ConvNextConfig", "ConvNextModel", _conv),
        _image("pixel_values", classic=True),
    ),
    Family(
        "ConvNeXtV2",
        "transformers",
        _transformers("ConvNextV2Config", "ConvNextV2Model", _conv),
        _image("pixel_values", classic=True),
    ),
    Family("Swin", "transformers", _transformers("SwinConfig", "SwinModel", _swin), _image("pixel_values", classic=True)),
    Family("GPT-2", "transformers", _transformers("GPT2Config", "GPT2Model", _GPT2), _tokens, ("GPT2Block", gpt2)),
    Family(
        "GPT-2, eager",
        "transformers",
        _transformers("GPT2Config", "GPT2Model", lambda scale: _GPT2(scale) | _EAGER),
        _long_texts,
    ),
    Family(
        "T5, eager",
        "transformers",
        _transformers("T5Config", "T5EncoderModel", lambda scale: _T5(scale) | _EAGER),
        _long_texts,
    ),
    Family("Llama", "transformers", _transformers("LlamaConfig", "LlamaModel", _LLAMA), _tokens, ("LlamaDecoderLayer", llama)),
    Family(
        "DeiT III",
        "timm",
        _timm("vision_transformer", "VisionTransformer", _timm_vit(init_values=1e-6, no_embed_class=True)),
        _image("x"),
    ),
    Family("ViT", "timm", _timm("vision_transformer", "VisionTransformer", _timm_vit()), _image("x")),
    Family("BEiT (timm)", "timm", _timm("beit", "Beit", _timm_vit(init_values=0.1, use_rel_pos_bias=True)), _image("x")),
    Family("EVA", "timm", _timm("eva", "Eva", _timm_vit()), _image("x")),
    Family("EVA, norm after", "timm", _timm("eva", "Eva", _timm_vit(use_post_norm=True)), _image("x")),
    Family("CaiT", "timm", _timm("cait", "Cait", _timm_vit(init_values=1e-5)), _image("x")),
    Family("XCiT", "timm", _timm("xcit", "Xcit", lambda scale: _timm_vit()(scale) | {"patch_size": 8}), _image("x")),
    Family("ConvNeXt (timm)", "timm", _timm("convnext", "ConvNeXt", _timm_conv()), _image("x", classic=True)),
    Family(
        "ConvNeXtV2 (timm)",
        "timm",
        _timm("convnext", "ConvNeXt", _timm_conv(use_grn=True, ls_init_value=None)),
        _image("x", classic=True),
    ),
    Family(
        "PoolFormer",
        "timm",
        _timm(
            "metaformer",
            "MetaFormer",
            lambda scale: {
                "depths": (2 * scale.depth,),
                "dims": (scale.classic.width,),
                "layer_scale_init_values": 1e-5,
                "res_scale_init_values": (None,),
                "use_mlp_head": False,
            },
        ),
        _image("x", classic=True),
    ),
    Family(
        "SD3",
        "diffusers",
        _diffusers(
            "SD3Transformer2DModel",
            lambda scale: {
                **_latent(scale),
                **_joint(scale),
                "num_layers": 1 + scale.depth,
                "caption_projection_dim": scale.width,
                "out_channels": 4,
                "pos_embed_max_size": 2 * scale.side,
            },
        ),
        lambda scale: {
            **_noise(scale),
            **_text(scale),
            "pooled_projections": torch.randn(scale.batch, scale.width),
        },
    ),
    Family(
        "Flux",
        "diffusers",
        _diffusers(
            "FluxTransformer2DModel",
            lambda scale: {
                **_joint(scale),
                "patch_size": 1,
                "in_channels": 16,
                "num_layers": scale.depth,
                "num_single_layers": scale.depth,
                "axes_dims_rope": tuple(scale.width // scale.heads // 8 * part for part in (2, 3, 3)),
            },
        ),
        _flux_inputs,
    ),
    Family(
        "DiT",
        "diffusers",
        _diffusers(
            "DiTTransformer2DModel",
            lambda scale: {**_latent(scale), "num_layers": scale.depth, "num_embeds_ada_norm": 8},
        ),
        lambda scale: {**_noise(scale), "class_labels": torch.randint(0, 8, (scale.batch,))},
    ),
    Family(
        "PixArt",
        "diffusers",
        _diffusers(
            "PixArtTransformer2DModel",
            lambda scale: {
                **_latent(scale),
                "num_layers": scale.depth,
                "caption_channels": scale.width,
                "cross_attention_dim": scale.width,
                "out_channels": 8,
            },
        ),
        lambda scale: {
            **_noise(scale),
            **_text(scale),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
]

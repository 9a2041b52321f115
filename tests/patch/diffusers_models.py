"""Small models of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _diffusers(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**arguments)

    return build


def _sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([3, 700]),
    }


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.rand(2),
        "img_ids": torch.randint(0, 4, (16, 3)),
        "txt_ids": torch.zeros(5, 3, dtype=torch.long),
    }


def _labelled_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([0, 1]),
    }


def _pixart_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "timestep": torch.tensor([3, 700]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


_SMALL = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
_JOINT = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "out_channels": 4}

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], dict[str, int], bool]] = {
    "sd3": (
        _diffusers("SD3Transformer2DModel", **_SMALL, **_JOINT, pos_embed_max_size=8),
        _sd3_inputs,
        {"sd3": 2, "ada-layer-norm-zero": 3, "ada-layer-norm-continuous": 2},
        True,
    ),
    "sd3.5": (
        _diffusers(
            "SD3Transformer2DModel",
            **_SMALL,
            **_JOINT,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        _sd3_inputs,
        {"sd3": 2, "ada-layer-norm-zero": 2, "ada-layer-norm-zero-x": 1, "ada-layer-norm-continuous": 2},
        True,
    ),
    "flux": (
        _diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
        _flux_inputs,
        {"flux": 1, "flux-single": 1, "ada-layer-norm-zero": 2, "ada-layer-norm-zero-single": 1, "ada-layer-norm-continuous": 1},
        True,
    ),
    "dit": (
        _diffusers("DiTTransformer2DModel", **_SMALL, num_embeds_ada_norm=8, dropout=0.0),
        _labelled_inputs,
        {"basic-transformer-block": 2, "ada-layer-norm-zero": 2},
        True,
    ),
    "pixart": (
        _diffusers("PixArtTransformer2DModel", **_SMALL, caption_channels=16, cross_attention_dim=16, out_channels=8),
        _pixart_inputs,
        {"basic-transformer-block": 2},
        True,
    ),
}

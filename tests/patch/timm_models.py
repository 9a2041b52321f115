"""Small models of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _timm(module: str, name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import importlib

        return getattr(importlib.import_module(f"timm.models.{module}"), name)(num_classes=4, **arguments)

    return build


def _image(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.randn(3, 3, size, size)}


_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
_CONV = {"depths": (1, 2, 1, 1), "dims": (8, 16, 16, 16)}

# The builder, the inputs, what is replaced, and whether all roundings stay.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], dict[str, int], bool]] = {
    "timm-vit": (
        _timm("vision_transformer", "VisionTransformer", **_VIT, init_values=0.5, drop_path_rate=0.4),
        _image(16),
        {"timm-vit": 2},
        True,
    ),
    "timm-vit-plain": (_timm("vision_transformer", "VisionTransformer", **_VIT), _image(16), {"timm-vit": 2}, True),
    "timm-eva": (_timm("eva", "Eva", **_VIT, init_values=0.5, drop_path_rate=0.4), _image(16), {"timm-eva": 2}, True),
    "timm-eva-post-norm": (
        _timm("eva", "Eva", **_VIT, use_post_norm=True, drop_path_rate=0.4),
        _image(16),
        {"timm-eva-post-norm": 2},
        True,
    ),
    "timm-beit": (
        _timm("beit", "Beit", **_VIT, init_values=0.5, drop_path_rate=0.4, use_shared_rel_pos_bias=True),
        _image(16),
        {"timm-beit": 2},
        True,
    ),
    "timm-beit-plain": (_timm("beit", "Beit", **_VIT, init_values=None), _image(16), {"timm-beit": 2}, True),
    "timm-cait": (
        _timm("cait", "Cait", **_VIT, init_values=0.5, drop_path_rate=0.4),
        _image(16),
        {"timm-cait": 2, "timm-cait-class": 2},
        True,
    ),
    "timm-xcit": (
        _timm("xcit", "Xcit", **_VIT | {"img_size": 32, "patch_size": 8}, eta=0.5, drop_path_rate=0.4),
        _image(32),
        {"timm-xcit": 2, "timm-xcit-class": 2},
        True,
    ),
    "timm-convnext": (
        _timm("convnext", "ConvNeXt", **_CONV, ls_init_value=0.5, drop_path_rate=0.4),
        _image(32),
        {"timm-convnext": 5},
        True,
    ),
    "timm-convnextv2": (
        _timm("convnext", "ConvNeXt", **_CONV, ls_init_value=None, use_grn=True, conv_mlp=True),
        _image(32),
        {"timm-convnext": 5, "timm-grn": 5},
        False,
    ),
    "timm-metaformer": (
        _timm(
            "metaformer",
            "MetaFormer",
            depths=(1, 2),
            dims=(8, 16),
            layer_scale_init_values=0.5,
            res_scale_init_values=(None, 1.0),
            drop_path_rate=0.4,
        ),
        _image(32),
        {"timm-metaformer": 3},
        True,
    ),
}

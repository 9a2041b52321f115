"""The submodules that rules compute themselves, and what of them the functional forms take."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .rules import IDENTITY, Leaf

LAYER_SCALE = Leaf(("f637826bd7c7",), name="LayerScale of transformers")
DROP_PATH = Leaf(("8d87231de8cf",), name="DropPath of transformers")
OLDER_DROP_PATH = Leaf(("577d8b741adf",), {"drop_path": ("3ab1a727734f",)}, name="DropPath of transformers before 5.12")
TIMM_LAYER_SCALE = Leaf(("f08223a76e8d",), name="LayerScale of timm")
TIMM_DROP_PATH = Leaf(("4ccba6d84ff0",), {"drop_path": ("bb223011d7af",)}, name="DropPath of timm")
METAFORMER_SCALE = Leaf(("fe9a369bec43",), name="Scale of timm's MetaFormer")
GRN = Leaf(("91ed2bea9f08",), name="GRN of transformers")

OPTIONAL_DROP_PATH = (DROP_PATH, OLDER_DROP_PATH, IDENTITY)
OPTIONAL_TIMM_DROP_PATH = (TIMM_DROP_PATH, IDENTITY)
OPTIONAL_TIMM_LAYER_SCALE = (TIMM_LAYER_SCALE, IDENTITY)

# A class that calls one of these is worth a word in the report.
TELLING = (LAYER_SCALE, DROP_PATH, OLDER_DROP_PATH, TIMM_LAYER_SCALE, TIMM_DROP_PATH)


def drop_path(module: Any) -> dict[str, Any]:
    """What a DropPath of transformers draws, as arguments of ``scaled_residual``."""
    if isinstance(module, nn.Identity):
        return {}
    return {"drop_path": module.drop_prob, "training": module.training, "draws": "rand"}


def timm_drop_path(module: Any) -> dict[str, Any]:
    """What a DropPath of timm draws, as arguments of ``scaled_residual``."""
    if isinstance(module, nn.Identity):
        return {}
    return {"drop_path": module.drop_prob, "training": module.training, "scale_by_keep": module.scale_by_keep}


def parameter(module: Any, name: str) -> Tensor | None:
    """A LayerScale's parameter; None where the layer scale is left out."""
    return None if isinstance(module, nn.Identity) else getattr(module, name)

"""The submodules that rules compute themselves, and how: the residual behind them, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..nn import functional as forms
from .replace import inlined, patch_of
from .rules import IDENTITY, Leaf


def _drop_path(module: Any) -> dict[str, Any]:
    return {"drop_path": module.drop_prob, "training": module.training, "draws": "rand"}


def _timm_drop_path(module: Any) -> dict[str, Any]:
    return {"drop_path": module.drop_prob, "training": module.training, "scale_by_keep": module.scale_by_keep}


def _is_scale(value: Any) -> bool:
    return isinstance(value, (Tensor, int, float))


def _scale_obstacle(attribute: str) -> Callable[[Any], str | None]:
    def obstacle(module: Any) -> str | None:
        if getattr(module, "inplace", False):
            return "writes in place"
        value = getattr(module, attribute, None)
        return None if _is_scale(value) else f"scales by a {type(value).__name__}"

    return obstacle


def _drop_path_obstacle(module: Any) -> str | None:
    drop = getattr(module, "drop_prob", None)
    known = isinstance(drop, Tensor) or (isinstance(drop, (int, float)) and 0 <= drop <= 1)
    return None if known else f"drops with the probability {drop}"


LAYER_SCALE = Leaf(
    ("f637826bd7c7",),
    name="LayerScale of transformers",
    takes=lambda module: {"gamma": module.lambda1},
    wants=_scale_obstacle("lambda1"),
)
DROP_PATH = Leaf(("8d87231de8cf",), name="DropPath of transformers", takes=_drop_path, wants=_drop_path_obstacle)
OLDER_DROP_PATH = Leaf(
    ("577d8b741adf",),
    {"drop_path": ("3ab1a727734f",)},
    name="DropPath of transformers before 5.12",
    takes=_drop_path,
    wants=_drop_path_obstacle,
)
TIMM_LAYER_SCALE = Leaf(
    ("f08223a76e8d",),
    name="LayerScale of timm",
    takes=lambda module: {"gamma": module.gamma},
    wants=_scale_obstacle("gamma"),
)
TIMM_DROP_PATH = Leaf(
    ("4ccba6d84ff0",),
    {"drop_path": ("bb223011d7af",)},
    name="DropPath of timm",
    takes=_timm_drop_path,
    wants=_drop_path_obstacle,
)
METAFORMER_SCALE = Leaf(
    ("fe9a369bec43",),
    name="Scale of timm's MetaFormer",
    takes=lambda module: {"gamma": module.scale.view(module.shape)},
    wants=_scale_obstacle("scale"),
)
GRN = Leaf(("91ed2bea9f08",), name="GRN of transformers")

OPTIONAL_DROP_PATH = (DROP_PATH, OLDER_DROP_PATH, IDENTITY)
OPTIONAL_TIMM_DROP_PATH = (TIMM_DROP_PATH, IDENTITY)
OPTIONAL_TIMM_LAYER_SCALE = (TIMM_LAYER_SCALE, IDENTITY)

# A class that calls one of these is worth a word in the report.
TELLING = (LAYER_SCALE, DROP_PATH, OLDER_DROP_PATH, TIMM_LAYER_SCALE, TIMM_DROP_PATH)


def residual(
    block: Any,
    x: Tensor,
    branch: Callable[[], Tensor],
    *names: str,
    gamma: Callable[[], Tensor | None] = lambda: None,
    branch_first: bool = False,
) -> Tensor:
    """``x`` plus the branch, which goes through the submodules of these names first, after it was scaled by ``gamma``.

    All that is computed here is looked at once the branch is there, as in the plain lines: what runs in it may change the block.
    """
    made = [branch()]
    given: dict[str, Any] = {"gamma": gamma()}
    known = given["gamma"] is None or _is_scale(given["gamma"])
    found = _inlined(block, *names) if known else None
    if found is None:
        hidden = made.pop() if given["gamma"] is None else made.pop() * given["gamma"]
        for name in names:
            hidden = getattr(block, name)(hidden)
        return hidden + x if branch_first else x + hidden
    for module, leaf in found:
        given |= leaf.takes(module)
    return forms.scaled_residual(x, made.pop, branch_first=branch_first, **given)


def grn(block: Any, hidden: Callable[[], Tensor], name: str = "grn") -> Tensor:
    """The GRN of this name, of what the function computes."""
    made = [hidden()]
    if _inlined(block, name) is None:
        return getattr(block, name)(made.pop())
    module = getattr(block, name)
    return forms.grn(made.pop, module.weight, module.bias)


def _inlined(block: Any, *names: str) -> list[tuple[Any, Leaf]] | None:
    """The submodules and what they are; None where one of them is not what the rule takes it for, or no rule holds any more."""
    patch = patch_of(type(block))
    found = None if patch is None else inlined(block, patch.rule, names)
    return None if isinstance(found, str) else found

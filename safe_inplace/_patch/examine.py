"""What can be replaced in a model, and why the rest of what looks like it cannot."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .leaves import TELLING
from .replace import inlined_obstacle, patch_of, patched_class
from .rules import RULES, Rule, rules_for
from .structure import innermost, structure_of


@dataclass(frozen=True)
class Found:
    """A module that a rule knows or nearly knows: without a reason it can be replaced."""

    path: str
    module: nn.Module
    rule: Rule | None
    reason: str | None


def find(model: nn.Module, only: Iterable[str] | None) -> Iterator[Found]:
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model is {what}; it must be a torch.nn.Module, a model that has been built")
    patterns = None if only is None else [only] if isinstance(only, str) else list(only)
    inlined: set[int] = set()
    told: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in inlined:
            continue
        found = _examine(path, module)
        # What a block was refused for is said once.
        if found is None or not _wanted(found, patterns) or (found.rule is None and id(module) in told):
            continue
        if found.rule is not None:
            children = {id(module._modules.get(name)) for name in found.rule.inlines}
            if found.reason is None or patch_of(type(module)) is not None:
                inlined |= children
            else:
                told |= children
        yield found


def _forward_of(cls: type) -> Any:
    # The class of a scripted module has none to be asked for.
    return getattr(cls, "forward", None)


def _wanted(found: Found, patterns: list[str] | None) -> bool:
    names = [found.path, type(found.module).__name__, *([found.rule.name] if found.rule else [])]
    return patterns is None or any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _examine(path: str, module: nn.Module) -> Found | None:
    cls = type(module)
    patch = patch_of(cls)
    if patch is not None:
        return Found(path, module, patch.rule, "replaced already")
    function = innermost(_forward_of(cls))
    rule = rules_for(structure_of(function))
    if rule is None:
        reason = _nearly(module, function)
        return Found(path, module, None, reason) if reason else None
    return Found(path, module, rule, _obstacle(module, function, rule))


def _obstacle(module: nn.Module, function: object, rule: Rule) -> str | None:
    own = module.__dict__.get("forward")
    if own is not None:
        return f"the forward of this instance was replaced{_origin(own)}"
    if is_parametrized(module):
        # Their removal gives the module the class below its own, and takes the parameters' names off its own.
        return "its parameters are parametrized"
    for reason in (rule.obstacle(function), rule.argument_obstacle(function), rule.wants(module)):  # type: ignore[arg-type]
        if reason is not None:
            return f"it {reason}"
    reason = inlined_obstacle(module, rule) or _quantised(module, rule)
    if reason is None:
        try:
            patched_class(type(module), rule)
        except TypeError as error:
            reason = str(error)
    return reason


def _quantised(module: nn.Module, rule: Rule) -> str | None:
    """The ops take what the rule reads itself as it is: numbers that stand for others must not be multiplied."""
    for name in ("", *rule.inlines):
        owner = module._modules[name] if name else module
        for key, value in owner.named_parameters(recurse=False):  # type: ignore[union-attr]
            path = f"{name}.{key}" if name else key
            if not value.is_floating_point():
                return f"{path} is quantised: numbers of {value.dtype}"
            if not _is_plain(value):
                return f"{path} is a {type(value).__name__}, which may be quantised"
    return None


def _is_plain(value: Tensor) -> bool:
    kind = type(value)
    return kind in (Tensor, nn.Parameter) or kind.__module__.startswith("torch.distributed.")


def _nearly(module: nn.Module, function: object) -> str | None:
    """Whether it is a class that a rule was written for, or one with a LayerScale or a DropPath of its own."""
    cls = type(module)
    known = [owner for owner in cls.__mro__ if _is_home(owner)]
    below = [name for name, child in module.named_children() if structure_of(_forward_of(type(child))) in _TELLING]
    if not known and (not below or cls.__module__.startswith("torch.")):
        return None
    structure = structure_of(function)  # type: ignore[arg-type]
    if known and "forward" in cls.__dict__ and cls is not known[0]:
        return f"a subclass of {known[0].__name__} with a forward of its own"
    if known and getattr(function, "__module__", None) != known[0].__module__:
        return f"the forward of {known[0].__name__} was replaced{_origin(function)}"
    if structure is None:
        return "its source cannot be read"
    if known:
        return f"its forward is not one that is known (structure {structure}): another version of the library"
    return f"it has {below[0]}, but its forward is not one that is known (structure {structure})"


_TELLING = {structure for leaf in TELLING for structure in leaf.structures}


def _is_home(cls: type) -> bool:
    library = cls.__module__.split(".")[0]
    homes = (home for rule in RULES for home in rule.homes)
    return any(home.split(".")[0] == library and home.rsplit(".", 1)[1] == cls.__name__ for home in homes)


def _origin(function: object) -> str:
    while not hasattr(function, "__qualname__") and hasattr(function, "func"):
        function = function.func
    name, module = getattr(function, "__qualname__", type(function).__qualname__), getattr(function, "__module__", None)
    return f" by {module}.{name}" if module and module != torch.nn.Module.__module__ else f" by {name}"

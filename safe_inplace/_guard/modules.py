"""Where in a network: the path of a module, and the name of a parameter. Looked up when a report is made, and only then."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch.nn import Module

from .. import _C

# Of each module that was found: the one that holds it, and its name there.
_parents: weakref.WeakKeyDictionary[Module, list[tuple[weakref.ref[Module], str]]] = weakref.WeakKeyDictionary()


def _live_modules() -> list[Module]:
    """All modules that there are: nothing in a module, or in its tensors, says who holds it."""
    classes: set[type] = set()
    subclasses: list[type] = [Module]
    while subclasses:
        found = subclasses.pop()
        if found not in classes:
            classes.add(found)
            subclasses += type.__subclasses__(found)
    # Millions of objects may be asked, so the question is a short one; and of the type: a proxy's __class__ is another's.
    return [thing for thing in gc.get_objects() if type(thing) in classes]


def _look() -> None:
    _parents.clear()
    modules = _live_modules()
    for module in modules:
        _parents.setdefault(module, [])
    for module in modules:
        for name, child in module.__dict__.get("_modules", {}).items():
            if child is not None:
                _parents.setdefault(child, []).append((weakref.ref(module), name))


def _parent(module: Module) -> tuple[Module, str] | None:
    for reference, name in _parents.get(module, ()):
        parent = reference()
        if parent is not None and parent._modules.get(name) is module:
            return parent, name
    return None


def _path(module: Module) -> str:
    """From the outermost module that holds it."""
    names: list[str] = []
    seen = {id(module)}
    while (found := _parent(module)) is not None and id(found[0]) not in seen:
        module, name = found
        seen.add(id(module))
        names.append(name)
    return ".".join(reversed(names))


def named(module: Module) -> tuple[str, str]:
    """Its path, and what it is in words."""
    if _parent(module) is None:
        _look()
    words = type(module).__name__
    if type(module).__module__.startswith("torch.nn.") and not module._modules:
        words += f"({module.extra_repr()})"
    return _path(module), words


def _holds(module: Module, memory: int) -> bool:
    return any(
        type(state) in (torch.Tensor, torch.nn.Parameter)
        and state.layout == torch.strided
        and state.untyped_storage().data_ptr() == memory
        for kind in ("_buffers", "_parameters")
        for state in module.__dict__.get(kind, {}).values()
    )


def is_of_a_module(value: torch.Tensor, called: Module | None) -> bool:
    """Whether it lies in a buffer or a parameter of some module. `called`, whose call saved it, is asked first, which no
    gc.freeze() hides; then those that are known, then all there are."""
    if value.layout != torch.strided or type(value) is not torch.Tensor:
        return False
    memory = value.untyped_storage().data_ptr()
    if called is not None and _holds(called, memory):
        return True
    for again in (False, True):
        if again:
            _look()
        if any(_holds(module, memory) for module in list(_parents)):
            return True
    return False


def _same_memory(parameter: Any, value: torch.Tensor) -> bool:
    return parameter is not None and _C.guard_overlap(parameter, value)


def parameter_name(value: torch.Tensor, look: bool) -> str | None:
    """The name of the parameter that a value is, or is a view of; where no known module has it, and `look`, of all there are."""
    for again in (False, True) if look else (False,):
        if again:
            _look()
        for module in list(_parents):
            for name, parameter in module.__dict__.get("_parameters", {}).items():
                if _same_memory(parameter, value):
                    path = _path(module)
                    return f"{path}.{name}" if path else name
    return None

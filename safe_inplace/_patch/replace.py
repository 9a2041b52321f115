"""How a module comes to run a rule's forward: its class becomes a subclass of its own class.

The object stays what it was: its attributes, hooks, parameters and state dict, and every copy of it, however it is made, runs the
forward with its own parameters. Other instances of the class, and the class, do not change.
"""

from __future__ import annotations

import copyreg
import types
import weakref
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as torch_module

from .rules import Forward, Leaf, Rule, rules_for
from .structure import innermost, structure_of

_classes: weakref.WeakValueDictionary[tuple[type, Forward, Rule], type] = weakref.WeakValueDictionary()

# Of a function and the leaves that it may be: the functions that it calls, as they were when it was found to be one of them.
_verified: dict[tuple[Forward, tuple[Leaf, ...]], tuple[tuple[str, Any], ...]] = {}


class Patch:
    """What a patched class says of itself."""

    def __init__(self, rule: Rule, base: Any) -> None:
        self.rule, self.base = rule, base
        self.decorated: Forward = base.forward
        self.original = innermost(self.decorated)
        self.helpers = tuple(zip(rule.helpers, rule.called_by(self.original), strict=True))
        # How often the rule's forward ran, and the plain one for which reason.
        self.runs: Counter[str] = Counter()

    def chosen(self, module: nn.Module) -> Forward:
        """The forward that runs in this call."""
        if self.base.forward is not self.decorated:
            self.runs[f"the forward of {self.base.__name__} was replaced"] += 1
            return self.base.forward
        # A compiler fuses the plain formula with its neighbours, a tracer writes it down.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_fx_symbolic_tracing():
            return self.original
        # A bound method that somebody has kept comes here after the module got its class back.
        if patch_of(type(module)) is not self:
            return self.original
        reason = self._obstacle(module)
        self.runs[reason or ""] += 1
        return self.rule.forward if reason is None else self.original

    def _obstacle(self, module: nn.Module) -> str | None:
        """Why the plain forward must run in this call; None where the rule's may."""
        if not all(self.original.__globals__.get(name) is helper for name, helper in self.helpers):
            return f"a function that {self.base.__name__} calls was replaced"
        return inlined_obstacle(module, self.rule)


def inlined_obstacle(module: nn.Module, rule: Rule) -> str | None:
    """Why the submodules that the rule computes itself are not what it takes them for; None where they are."""
    # Who watches all modules sees all values as they are in the plain model, also where nothing is inlined.
    if torch_module._has_any_global_hook():
        return "a hook on all modules"
    for name, leaves in rule.inlines.items():
        child = module._modules.get(name)
        if child is None:
            return f"no submodule {name}"
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return f"a hook on {name}"
        kind = type(child)
        if "forward" in child.__dict__ or kind.__call__ is not nn.Module.__call__ or child._compiled_call_impl is not None:
            return f"{name} has a forward of its own"
        function = kind.forward
        helpers = _verified.get((function, leaves))
        if helpers is None:
            reason = _verify(function, leaves)
            if reason is not None:
                return f"{name} is a {kind.__name__}, which {reason}"
        elif not all(function.__globals__.get(called) is helper for called, helper in helpers):
            return f"{name} calls a function that was replaced"
    return None


def _verify(function: Any, leaves: tuple[Leaf, ...]) -> str | None:
    reason: str | None = "is not known"
    inner = innermost(function)
    if inner is not function:
        return "has a forward that is decorated"
    for leaf in leaves:
        reason = leaf.obstacle(function)
        if reason is None:
            _verified[function, leaves] = tuple(zip(leaf.helpers, leaf.called_by(function), strict=True))
            return None
    return reason


def redecorate(outer: Any, inner: Forward, replacement: Forward) -> Forward:
    """The decorators of a function, around another one: each closure that has the old one gets the new one."""
    if outer is inner:
        return replacement
    below = outer.__wrapped__
    if not isinstance(outer, types.FunctionType) or not any(_holds(cell, below) for cell in outer.__closure__ or ()):
        raise TypeError("a decorator of its forward keeps it where nothing else can be put")
    new_below, itself = redecorate(below, inner, replacement), types.CellType()
    cells = tuple(
        types.CellType(new_below) if _holds(cell, below) else itself if _holds(cell, outer) else cell
        for cell in outer.__closure__ or ()
    )
    again = types.FunctionType(outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, cells)
    itself.cell_contents = again
    again.__kwdefaults__ = outer.__kwdefaults__
    again.__dict__.update(outer.__dict__)
    again.__wrapped__ = new_below  # type: ignore[attr-defined]
    again.__module__, again.__qualname__, again.__doc__ = outer.__module__, outer.__qualname__, outer.__doc__
    return again


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:
        return False


def _make_forward(_patch: Patch) -> Forward:
    original = _patch.original

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _patch.chosen(self)(self, *args, **kwargs)

    # In the library's module, where TorchScript looks for the names in the source that it reads, which is the plain one's.
    forward = types.FunctionType(call.__code__, original.__globals__, original.__name__, None, call.__closure__)
    forward.__wrapped__ = original  # type: ignore[attr-defined]
    forward.__module__, forward.__qualname__, forward.__doc__ = original.__module__, original.__qualname__, original.__doc__
    return redecorate(_patch.decorated, original, forward)


def patched_class(base: Any, rule: Rule) -> type:
    """The class of an instance of `base` that runs the rule's forward. Raises TypeError where there can be none."""
    key = (base, base.forward, rule)
    known = _classes.get(key)
    if known is not None:
        return known
    patch = Patch(rule, base)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # Older protocols name the class, and no module has it under its name.
        made: Any = super(result, self).__reduce_ex__(max(protocol, 2))
        if type(self) is result and made[0] is copyreg.__newobj__ and made[1] == (result,):  # type: ignore[attr-defined]
            return (_new, (base,), *made[2:])
        return made

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_safe_inplace_patch": patch,
        "forward": _make_forward(patch),
    }
    result: Any = type(base)(base.__name__, (base,), namespace)
    _classes[key] = result
    return result


def _new(base: Any) -> Any:
    """An instance, unpickled. The library may be another version here: then another rule's, or a plain one."""
    function = innermost(base.forward)
    rule = rules_for(structure_of(function))
    if rule is None or rule.obstacle(function) or rule.argument_obstacle(function):
        return base.__new__(base)
    return base.__new__(patched_class(base, rule))


def patch_of(cls: type) -> Patch | None:
    """The patch of a class, or of the one below a class that was made of it since (``fully_shard``)."""
    return getattr(cls, "_safe_inplace_patch", None)


def replace(module: nn.Module, rule: Rule) -> Patch:
    cls: Any = patched_class(type(module), rule)
    object.__setattr__(module, "__class__", cls)
    return cls._safe_inplace_patch


def put_back(module: nn.Module) -> None:
    cls = type(module)
    patch = patch_of(cls)
    if patch is not None:
        object.__setattr__(module, "__class__", _without(cls, patch))


def _without(cls: Any, patch: Patch) -> Any:
    if cls.__dict__.get("_safe_inplace_patch") is patch:
        return patch.base
    # What was made on top of the patched class is made again on top of the plain one.
    bases = tuple(_without(base, patch) if patch_of(base) is patch else base for base in cls.__bases__)
    own = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
    if "forward" in own and innermost(own["forward"]) is patch.original:
        # A decorator that the class puts around the forward of each subclass; it will again.
        del own["forward"]
    return type(cls)(cls.__name__, bases, own)


def _original_of(module: nn.Module) -> Forward:
    # Not by its patch, which another thread may take off meanwhile.
    return innermost(type(module).forward)


def function_of(module: nn.Module, name: str) -> Any:
    """A function of the library that the plain forward of this patched module calls by its global name."""
    return _original_of(module).__globals__[name]


def calling(module: nn.Module, **others: Forward) -> Forward:
    """The plain forward of this patched module, which meets these functions under the global names of the library's."""
    original = _original_of(module)
    # Copied at each call, which takes some microseconds: what else the library's module has may change.
    globals_ = original.__globals__ | others
    forward = types.FunctionType(original.__code__, globals_, original.__name__, original.__defaults__, original.__closure__)
    forward.__kwdefaults__ = original.__kwdefaults__
    return forward

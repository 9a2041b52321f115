"""How a module comes to run a rule's forward: its class becomes a subclass of its own class.

The object stays what it was: its attributes, hooks, parameters and state dict, and every copy of it, however it is made, runs the
forward with its own parameters. Other instances of the class, and the class, do not change.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import threading
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules import module as torch_module
from torch.utils import checkpoint

from .rules import LIBRARIES, Forward, Leaf, Rule, rules_for
from .structure import innermost, structure_of

# Held for as long as a model is looked at and its modules change.
changing = threading.RLock()

_classes: weakref.WeakValueDictionary[tuple[type, Forward, Rule], type] = weakref.WeakValueDictionary()
# These stay though no module has them: what was compiled for a class is of no use for the next one that is made in its place.
_latest: deque[type] = deque(maxlen=64)

# Of a function and the leaves that it may be: which it is, and the functions that it calls, as they were when that was found.
_verified: dict[tuple[Forward, tuple[Leaf, ...]], tuple[Leaf, tuple[tuple[str, Any], ...]]] = {}

_LIBRARIES = {"torch", *LIBRARIES}

# What leads from a call of a module to its forward: a tool that watches all calls puts itself in the place of one of them.
_CALL, _CALL_IMPL = nn.Module._wrapped_call_impl, nn.Module._call_impl


class Patch:
    """What a patched class says of itself."""

    def __init__(self, rule: Rule, base: Any) -> None:
        self.rule, self.base = rule, base
        self.decorated: Forward = base.forward
        self.original = innermost(self.decorated)
        self.helpers = tuple(zip(rule.helpers, rule.called_by(self.original), strict=True))
        # How often the rule's forward ran, and the plain one for which reason.
        self.runs: Counter[str] = Counter()
        self.forward = _make_forward(self)
        self._calling: types.FunctionType | None = None

    def replacement(self) -> Forward | None:
        """What was put in the place of the class's forward since, with the decorators that it has."""
        if self.base.forward is self.decorated:
            return None
        self.runs[f"the forward of {self.base.__name__} was replaced"] += 1
        return self.base.forward

    def chosen(self, module: nn.Module) -> Forward:
        """The forward that runs in this call, inside of the decorators."""
        # A compiler fuses the plain formula with its neighbours, a tracer writes it down.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_fx_symbolic_tracing():
            return self.original
        # A bound method that somebody has kept comes here after the module got its class back.
        if patch_of(type(module)) is not self:
            return self.original
        reason = self._obstacle(module)
        self.runs[reason or ""] += 1
        return self.rule.forward if reason is None else self.original

    def calling(self, others: dict[str, Forward]) -> Forward:
        """The plain forward among other globals."""
        original = self.original
        globals_ = original.__globals__ | others
        if self._calling is None:
            self._calling = types.FunctionType(
                original.__code__, globals_, original.__name__, original.__defaults__, original.__closure__
            )
            self._calling.__kwdefaults__ = original.__kwdefaults__
        # What else the library's module has may have changed. The function stays, and with it what the interpreter knows of it.
        self._calling.__globals__.update(globals_)
        return self._calling

    def _obstacle(self, module: nn.Module) -> str | None:
        """Why the plain forward must run in this call; None where the rule's may."""
        # It takes what is saved when it computes again for what was saved before, one by one; by then the module may have got
        # its class back, or a hook.
        if _checkpointed():
            return "a checkpoint that computes again what is saved"
        if not all(self.original.__globals__.get(name) is helper for name, helper in self.helpers):
            return f"a function that {self.base.__name__} calls was replaced"
        return inlined_obstacle(module, self.rule)


def _checkpointed() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == checkpoint.__name__


def inlined_obstacle(module: nn.Module, rule: Rule) -> str | None:
    """Why the submodules that the rule computes itself are not what it takes them for; None where they are."""
    found = inlined(module, rule, rule.inlines)
    return found if isinstance(found, str) else None


def inlined(module: nn.Module, rule: Rule, names: Iterable[str]) -> str | list[tuple[Any, Leaf]]:
    """Those of the submodules that the rule computes itself which have these names, and what they are; or why one of them is not
    what the rule takes it for."""
    # Who watches all modules sees all values as they are in the plain model, also where nothing is inlined.
    if torch_module._has_any_global_hook():
        return "a hook on all modules"
    found = []
    for name in names:
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module) or module._modules.get(name) is not child:
            return f"no submodule {name}"
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return f"a hook on {name}"
        kind = type(child)
        called_as_ever = kind.__call__ is _CALL and kind._call_impl is _CALL_IMPL and "_call_impl" not in child.__dict__
        if "forward" in child.__dict__ or not called_as_ever or child._compiled_call_impl is not None:
            return f"{name} has a forward of its own"
        leaves = rule.inlines[name]
        function: Any = getattr(kind, "forward", None)
        known = _verified.get((function, leaves)) or _verify(function, leaves)
        if isinstance(known, str):
            return f"{name} is a {kind.__name__}, which {known}"
        leaf, helpers = known
        if not all(function.__globals__.get(called) is helper for called, helper in helpers):
            return f"{name} calls a function that was replaced"
        reason = leaf.wants(child)
        if reason is not None:
            return f"{name} {reason}"
        found.append((child, leaf))
    return found


def _verify(function: Any, leaves: tuple[Leaf, ...]) -> str | tuple[Leaf, tuple[tuple[str, Any], ...]]:
    """What `_verified` has of the function from now on; or why it is none of the leaves, in words that follow its name."""
    if innermost(function) is not function:
        return "has a forward that is decorated"
    reason = ""
    for leaf in leaves:
        obstacle = leaf.obstacle(function)
        if obstacle is None:
            _verified[function, leaves] = known = leaf, tuple(zip(leaf.helpers, leaf.called_by(function), strict=True))
            return known
        reason = obstacle
    return reason


def redecorate(outer: Any, inner: Forward, replacement: Forward) -> Forward:
    """The decorators of a function, around another one: each closure that has the old one gets the new one."""
    if outer is inner:
        return replacement
    below = outer.__wrapped__
    if not isinstance(outer, types.FunctionType) or not any(_holds(cell, below) for cell in outer.__closure__ or ()):
        raise TypeError("a decorator of its forward keeps it where nothing else can be put")
    new_below, itself = redecorate(below, inner, replacement), types.CellType()
    itself.cell_contents = again = _with_cells(
        outer, lambda cell: types.CellType(new_below) if _holds(cell, below) else itself if _holds(cell, outer) else cell
    )
    again.__wrapped__ = new_below  # type: ignore[attr-defined]
    return again


def _with_cells(function: types.FunctionType, changed: Callable[[types.CellType], types.CellType]) -> types.FunctionType:
    """The function, closed over something else."""
    again = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(map(changed, function.__closure__ or ())),
    )
    again.__kwdefaults__ = function.__kwdefaults__
    return _described_as(again, function)


def _holds(cell: types.CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:
        return False


def _make_forward(_patch: Patch) -> Forward:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _patch.chosen(self)(self, *args, **kwargs)

    inside = redecorate(_patch.decorated, _patch.original, _in_place_of(_patch.original, call, _patch.original))

    # Outside of the decorators: what comes in the place of all of them has its own.
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (_patch.replacement() or inside)(self, *args, **kwargs)

    return _in_place_of(_patch.original, forward, inside)


def _in_place_of(original: Forward, function: Any, around: Forward) -> Forward:
    # In the library's module, where TorchScript looks for the names in the source that it reads, which is the plain one's.
    made = types.FunctionType(function.__code__, original.__globals__, original.__name__, None, function.__closure__)
    return _described_as(made, around)


def _described_as(made: types.FunctionType, function: Any) -> types.FunctionType:
    functools.update_wrapper(made, function)
    # From Python 3.14 on that hands on what evaluates the annotations, and not those that somebody has set.
    if getattr(function, "__annotate__", None) is None:
        made.__annotations__ = function.__annotations__
    return made


def patched_class(base: Any, rule: Rule) -> type:
    """The class of an instance of `base` that runs the rule's forward. Raises TypeError where there can be none."""
    key = (base, base.forward, rule)
    known = _classes.get(key)
    if known is not None:
        return known
    # That of transformers decorates each forward, and only the outermost of these acts. Another's may decorate one that is
    # decorated already, or keep a list of the classes there are.
    hears = base.__init_subclass__
    if inspect.ismethod(hears) and hears.__module__.split(".")[0] not in _LIBRARIES:
        raise TypeError(f"its class does something of its own with each subclass ({hears.__func__.__qualname__})")
    kind = type(base)
    if kind is not type and kind.__module__.split(".")[0] not in {"abc", *_LIBRARIES}:
        raise TypeError(f"its class is made by a metaclass of its own ({kind.__qualname__})")
    patch = Patch(rule, base)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        # Older protocols name the class, and no module has it under its name.
        made: Any = super(result, self).__reduce_ex__(max(protocol, 2))
        if type(self) is not result or isinstance(made, str):
            return made
        function, arguments, *state = made
        if function is copyreg.__newobj__ and arguments[0] is result:  # type: ignore[attr-defined]
            return (_new, (base, *arguments[1:]), *state)
        # By a way of the class's own: what comes of it is plain.
        plain = tuple(base if argument is result else argument for argument in arguments)
        return (base if function is result else function, plain, *state)

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_safe_inplace_patch": patch,
        "forward": patch.forward,
    }
    result: Any = kind(base.__name__, (base,), namespace)
    _classes[key] = result
    _latest.append(result)
    return result


def _new(base: Any, *arguments: Any) -> Any:
    """An instance, unpickled. The library may be another version here: then another rule's, or a plain one."""
    function = innermost(base.forward)
    rule = rules_for(structure_of(function))
    if rule is None or rule.obstacle(function) or rule.argument_obstacle(function):
        return base.__new__(base, *arguments)
    try:
        with changing:
            cls = patched_class(base, rule)
    except TypeError:  # as patch() leaves such a class alone
        cls = base
    return base.__new__(cls, *arguments)


def patch_of(cls: type) -> Patch | None:
    """The patch of a class, or of the one below a class that was made of it since (``fully_shard``)."""
    return getattr(cls, "_safe_inplace_patch", None)


def replace(module: nn.Module, rule: Rule) -> Patch:
    cls: Any = patched_class(type(module), rule)
    object.__setattr__(module, "__class__", cls)
    return cls._safe_inplace_patch


def put_back(module: nn.Module) -> None:
    with changing:
        cls = type(module)
        patch = patch_of(cls)
        if patch is not None:
            object.__setattr__(module, "__class__", _without(cls, patch))


def _without(cls: Any, patch: Patch) -> Any:
    if cls.__dict__.get("_safe_inplace_patch") is patch:
        return patch.base
    # What was made on top of the patched class is made again on top of the plain one.
    bases = tuple(_without(base, patch) if patch_of(base) is patch else base for base in cls.__bases__)
    itself = types.CellType()
    own = {
        name: _of_class(value, cls, itself)
        for name, value in cls.__dict__.items()
        if name not in ("__dict__", "__weakref__")
    }
    if "forward" in own and innermost(own["forward"]) is patch.original:
        # A decorator around the forward that it found below.
        own["forward"] = redecorate(own["forward"], patch.forward, patch.base.forward)
    itself.cell_contents = made = type(cls)(cls.__name__, bases, own)
    return made


def _of_class(value: Any, cls: type, itself: types.CellType) -> Any:
    """What a class defines, for the one that is made in its place: ``super()`` finds its class in a cell."""
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_of_class(value.__func__, cls, itself))
    if type(value) is property:
        get, set_, delete = (_of_class(part, cls, itself) for part in (value.fget, value.fset, value.fdel))
        return property(get, set_, delete, value.__doc__)
    if isinstance(value, types.FunctionType) and any(_holds(cell, cls) for cell in value.__closure__ or ()):
        return _with_cells(value, lambda cell: itself if _holds(cell, cls) else cell)
    return value


def function_of(module: nn.Module, name: str) -> Any:
    """A function of the library that the plain forward of this patched module calls by its global name."""
    return _plain(module).__globals__[name]


def calling(module: nn.Module, **others: Forward) -> Forward:
    """The plain forward of this patched module, which meets these functions, the same at each call, under the library's names."""
    patch = patch_of(type(module))
    return _plain(module) if patch is None else patch.calling(others)


def _plain(module: nn.Module) -> Forward:
    patch = patch_of(type(module))
    if patch is not None:
        return patch.original
    # Another thread took the patch off meanwhile. What was made on top of the class may have a forward of its own.
    forwards = [innermost(cls.__dict__["forward"]) for cls in type(module).__mro__ if "forward" in cls.__dict__]
    return next(forward for forward in forwards if rules_for(structure_of(forward)) is not None)

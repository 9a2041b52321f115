"""The steps of a program: its backward passes, or the outermost calls of its modules where it has none."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeGuard

import torch
from torch.nn.modules import module as modules
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from .fresh import PLAIN, is_one_of, own_hooks

# Of these first steps all values are compared: later ones have gone apart by rounding.
COMPARED = 2

_CALL = torch.nn.Module._call_impl.__code__

Named = list[tuple[str, torch.Tensor]]


class _Counted:
    """Attributes, since Dynamo compiles anew what depends on a module's numbers."""

    passes = 0
    calls = 0


def current() -> int:
    return _Counted.passes or -_Counted.calls


def distinct(steps: set[int]) -> int:
    """How many steps there are among what `current` returned, now that the program is through."""
    return len({max(step, 0) for step in steps} if _Counted.passes else steps)


def are_counted() -> bool:
    return _Counted.passes > 0 or _Counted.calls > 0


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction(), _disable_current_modes():  # what modes see is the program's own
        plain = tensor.detach()
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        for dim, stride in enumerate(plain.stride()):
            if stride == 0 and plain.size(dim) > 1:  # expanded: one is like the others
                plain = plain.narrow(dim, 0, 1)
        return plain.to("cpu", copy=True)


def _is_kept(value: Any) -> TypeGuard[torch.Tensor]:
    """It has values of its own that can be compared."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return is_one_of(value, PLAIN) and not (value.is_nested or value.is_meta or value.is_quantized or wrapped(value))


def _leaves(value: Any) -> Iterator[Any]:
    waiting: list[Any] = [value]
    known: list[Any] = []
    while waiting:
        for leaf in _pytree.tree_leaves(waiting.pop(0)):
            if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
                yield leaf
            elif not any(leaf is each for each in known):  # one may hold itself
                known.append(leaf)
                waiting.append([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])


def _is_outermost(frame: FrameType | None) -> bool:
    """Of a module's call. Counted on the stack: a call may end by what no hook is told of, or in another thread."""
    calls = 0
    while frame is not None and calls < 2:
        calls += frame.f_code is _CALL
        frame = frame.f_back
    return calls < 2


def is_gradient(name: str) -> bool:
    return not name.startswith(("output ", "loss "))


class Record:
    """What a run of the program computed in its first steps, and how long each step took."""

    def __init__(self) -> None:
        self.passes: list[Named] = []  # what backward began with, and the gradients it left
        self.calls: list[Named] = []  # what the outermost modules returned
        self.ends: dict[str, list[float]] = {"passes": [], "calls": []}
        self._modules = WeakIdKeyDictionary()  # that were called

    def called(self, module: torch.nn.Module, output: Any) -> None:
        self.ends["calls"].append(time.perf_counter())
        if len(self.passes) < COMPARED:
            self._modules[module] = None
        if len(self.calls) < COMPARED:
            tensors = [each for each in _leaves(output) if _is_kept(each)]
            self.calls.append([(f"output {i}", _copy(tensor)) for i, tensor in enumerate(tensors)])

    def passed(self, roots: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
        self.ends["passes"].append(time.perf_counter())
        if len(self.passes) < COMPARED:
            known: dict[int, str] = {}
            for module in self._modules:
                for name, parameter in module.named_parameters():
                    known.setdefault(id(parameter), f"{type(module).__name__}.{name}")
            names = [known.get(id(leaf), f"leaf {tuple(leaf.shape)}") for leaf in leaves]
            gradients = [(name, _copy(leaf.grad)) for name, leaf in zip(names, leaves, strict=True) if _is_kept(leaf.grad)]
            # Leaves of no module: by what backward gave them, since nothing else tells which is which.
            gradients.sort(key=lambda named: (named[0], named[1].norm().item()))
            self.passes.append([(f"loss {i}", _copy(root)) for i, root in enumerate(roots)] + gradients)

    def leaves_of(self, roots: list[torch.Tensor]) -> list[torch.Tensor]:
        if len(self.passes) >= COMPARED:
            return []
        seen: set[Any] = set()
        leaves = []
        waiting = [root.grad_fn for root in roots]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == "torch::autograd::AccumulateGrad":
                leaves.append(node.variable)  # type: ignore[attr-defined]
            waiting += [following for following, _ in node.next_functions]
        return leaves


@contextmanager
def counted(record: Record | None = None) -> Iterator[None]:
    """Counts the steps of what runs within, and records them."""
    backward = torch.autograd.backward

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and _is_outermost(sys._getframe()):
            _Counted.calls += 1
            if record is not None:
                record.called(module, output)

    @functools.wraps(backward)
    def passing(tensors: Any, *args: Any, **kwargs: Any) -> None:
        roots = [each for each in _pytree.tree_leaves(tensors) if isinstance(each, torch.Tensor)]
        leaves = record.leaves_of(roots) if record is not None else []
        try:
            backward(tensors, *args, **kwargs)
        finally:
            _Counted.passes += 1
        if record is not None:
            record.passed(roots, leaves)

    with ExitStack() as stack:
        stack.callback(modules.register_module_forward_hook(after).remove)
        own_hooks.append(after)
        stack.callback(own_hooks.remove, after)
        stack.callback(setattr, torch.autograd, "backward", backward)
        torch.autograd.backward = passing  # type: ignore[assignment]
        yield

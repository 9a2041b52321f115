"""The plain tensors that a tensor subclass is made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .say import say_once


def parts_of(tensor: torch.Tensor, arrived: bool = False) -> Iterator[torch.Tensor]:
    """The plain tensors that a traceable wrapper subclass is made of (DTensor, jagged nested tensors, ...). With `arrived`,
    what a collective is still bringing is waited for."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if isinstance(tensor, (FakeTensor, FunctionalTensor)) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    if not torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        yield tensor
        return
    if not hasattr(tensor, "__tensor_flatten__"):
        say_once(
            f"type {type(tensor)}",
            f"safe_inplace.guard: {type(tensor).__name__} does not tell where its memory is; only its version is checked.",
        )
        return
    if arrived and hasattr(tensor, "trigger_wait"):  # AsyncCollectiveTensor
        with _disable_current_modes():
            value = tensor.trigger_wait()
        yield from parts_of(value, arrived)
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # a DTensor names its mesh, too
            yield from parts_of(part, arrived)


def written_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A write leaves alone what describes the values: nested tensors of one structure share their offsets, and indices
    lie beside values of the tensor's own dtype."""
    if tensor.layout == torch.jagged and hasattr(tensor, "_values"):
        return list(parts_of(tensor._values))  # type: ignore[arg-type]
    parts = list(parts_of(tensor))
    if any(part.dtype == tensor.dtype for part in parts):
        parts = [part for part in parts if part.dtype == tensor.dtype or part.dtype not in (torch.int32, torch.int64)]
    return parts

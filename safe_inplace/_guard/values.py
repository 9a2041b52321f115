"""A saved value: its size, its bytes, a copy of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import _C
from .sites import is_compiled, site_of
from .words import short


def value_of(saved: _C.Saved) -> dict[str, Any]:
    """The fields of a hazard that tell of the value."""
    value = saved.value
    saved_by = saved.op and short(saved.op)
    if saved_by is None:
        # No operator was running: an autograd.Function, named as the line that called it does.
        save = site_of(saved.place)
        if is_compiled(saved.place[0]):
            saved_by = "torch.compile"
        else:
            saved_by = save.expression.split("(")[0] if save else "autograd.Function"
    return {
        "saved_by": saved_by,
        "shape": shape_of(value),
        "dtype": value.dtype,
        "device": value.device,
        "nbytes": bytes_of(value),
        "used": saved.unpacked > 0,
    }


def shape_of(value: torch.Tensor) -> tuple[int | str, ...]:
    """A size that differs from one part of a nested tensor to the next is written as torch does, or *."""
    if value.is_nested and value.layout == torch.strided:
        columns = value._nested_tensor_size().t().tolist()
        return (value.size(0), *(column[0] if len(set(column)) == 1 else "*" for column in columns))
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def bytes_of(value: torch.Tensor) -> int:
    if value.layout == torch.sparse_coo:
        return value._indices().nbytes + value._values().nbytes
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return value.crow_indices().nbytes + value.col_indices().nbytes + value.values().nbytes
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return value.ccol_indices().nbytes + value.row_indices().nbytes + value.values().nbytes
    if value.layout == torch.jagged:
        return value.values().nbytes
    return value.numel() * value.element_size()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    with unseen():
        raw = [tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return torch.equal(*raw)


@contextmanager
def unseen() -> Iterator[None]:
    """What guard computes itself: no graph, whatever mode the write runs under, and no mode sees it."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        yield


def private_copy(value: torch.Tensor, copied: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    """A copy of `value` in memory of its own. Values that occupy the very same bytes, such as a weight and its transpose,
    share one."""
    with unseen():
        plain = (
            type(value) is torch.Tensor
            and value.layout == torch.strided
            and not (value.is_nested or value.is_conj() or value.is_neg())
        )
        if not (plain and torch.ops.aten.is_non_overlapping_and_dense(value)):
            alone = copied[(id(value),)] = value.clone()
            return alone
        key = (value.data_ptr(), value.numel(), value.dtype)
        flat = copied.get(key)
        if flat is None:
            flat = copied[key] = value.as_strided((value.numel(),), (1,), value.storage_offset()).clone()
        return flat.as_strided(value.size(), value.stride(), 0)

"""Tensors as the programs use them: values, views, and who shares memory with whom."""

from __future__ import annotations

import math

import torch

NUMBERS = [0.5, -1.0, 2, 1.0, 0.0, -0.25]

_pool = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.7


def values(shape, offset, dtype=torch.float64):
    """Rounded to `dtype`."""
    if dtype.is_complex:
        return torch.complex(values(shape, offset), values(shape, offset + 17)).to(dtype)
    return _pool[offset : offset + math.prod(shape)].view(shape).to(dtype, copy=True)


def broadcasts(shape, target):
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))


VIEWS = {
    "alias": lambda t: t[...],
    "select": lambda t, dim, index: t.select(dim, index),
    "unbind": lambda t, dim, index: t.unbind(dim)[index],
    "narrow": lambda t, dim, start, length: t.narrow(dim, start, length),
    "chunk": lambda t, dim: t.chunk(2, dim)[0],
    "transpose": lambda t, a, b: t.transpose(a, b),
    "diagonal": lambda t: t.diagonal(),
    "flatten": lambda t: t.view(-1),
    "reshape": lambda t: t.reshape(-1),
    "unsqueeze": lambda t, dim: t.unsqueeze(dim),
    "expand": lambda t, size: t.expand(size, *t.shape),
}


def take_view(tensor, kind, arguments):
    return VIEWS[kind](tensor, *arguments)


def view_shape(shape, kind, arguments):
    return tuple(take_view(torch.empty(shape, device="meta"), kind, arguments).shape)


def view_arguments(rng, shape, kind, empty):
    """Random ones; `empty`: whether the view may be."""
    if kind in ("select", "unbind"):
        dim = rng.randrange(len(shape))
        return dim, rng.randrange(shape[dim])
    if kind == "narrow":
        dim = rng.randrange(len(shape))
        start = rng.randrange(shape[dim] + empty) if shape[dim] else 0
        return dim, start, rng.randint(min(1, shape[dim] - start), shape[dim] - start)
    if kind == "chunk":
        return (rng.randrange(len(shape)),)
    if kind == "transpose":
        return tuple(rng.sample(range(len(shape)), 2))
    if kind == "unsqueeze":
        return (rng.randint(0, len(shape)),)
    return (2,) if kind == "expand" else ()


def share_storage(a, b):
    """Not their addresses: empty ones have none."""
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def same_elements(a, b):
    """Element by element the same memory: what torch's kernels may read while they write.

    Overlaps that torch finds too hard to detect, as of a matrix and its diagonal, it lets
    through, and reads what it has just written.
    """
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def bytes_of(tensor):
    """Where a small tensor's elements begin; tensors that share a storage have elements of one size here."""
    places = {tensor.storage_offset()}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = {place + i * stride for place in places for i in range(size)}
    return places


def retained_grad(tensor):
    try:
        return tensor.grad if tensor.retains_grad and not tensor.is_leaf else None
    except RuntimeError:
        return None  # torch refuses to say: an output of unbind whose base was written


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def largest(tensor):
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def agree(a, b):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12, equal_nan=True) for x, y in zip(a, b, strict=True))

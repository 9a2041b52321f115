"""Shapes, memory layouts, broadcast patterns and dtypes, stated once.

Tensors are built as slices of larger storages wherever a layout allows it, so that a
kernel that writes one element too many is seen by the storage comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
KERNEL_DTYPES = FLOATING + COMPLEX
INTEGRAL = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
ALL_DTYPES = KERNEL_DTYPES + INTEGRAL + [torch.bool]

OPMATH = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def random_tensor(shape, dtype, device="cpu", generator=None) -> torch.Tensor:
    """Values of modest size; integers small enough that no product overflows int8."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(device=device, dtype=dtype)
    if dtype in INTEGRAL:
        low = 0 if dtype == torch.uint8 else -4
        return torch.randint(low, 5, shape, generator=generator).to(device=device, dtype=dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, dtype=wide, generator=generator).to(device=device, dtype=dtype)


def laid_out(tensor: torch.Tensor, order, around: int = 0) -> torch.Tensor:
    """The same values, the dimensions in memory from the outermost to the innermost as named, and as many sevens around them."""
    dense = tensor.permute(order)
    memory = torch.full((dense.numel() + 2 * around,), 7, dtype=tensor.dtype, device=tensor.device)
    memory[around : around + dense.numel()] = dense.reshape(-1)
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    return memory[around : around + dense.numel()].view(dense.shape).permute(inverse)


def arrange(memory: str, shape, dtype, device="cpu") -> torch.Tensor:
    """A random tensor of this shape in the given kind of memory."""
    shape = tuple(shape)

    def fill(shape):
        return random_tensor(shape, dtype, device)

    if memory == "dense":
        return fill(shape)
    if memory == "transposed":
        return fill(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    if memory == "channels_last":
        return fill(shape).contiguous(memory_format=torch.channels_last)
    if memory == "offset":
        # one element past the allocation's alignment
        numel = math.prod(shape)
        return fill((numel + 2,))[1 : numel + 1].view(shape)
    if memory == "sliced":
        base = fill(tuple(n + 3 for n in shape))
        return base[tuple(slice(1, n + 1) for n in shape)]
    if memory == "stepped":
        base = fill((*shape[:-1], shape[-1] * 2 + 1))
        return base[..., 1::2]
    if memory == "expanded":
        return fill(tuple(1 for _ in shape)).expand(shape)
    if memory == "conjugated":
        return fill(shape).conj()
    if memory == "negated":
        return torch._neg_view(fill(shape))
    raise ValueError(memory)


@dataclass(frozen=True)
class Layout:
    """Input shape and memory, and the shape and memory of each operand."""

    name: str
    shape: tuple[int, ...]
    memory: str
    operands: tuple[tuple[tuple[int, ...], str], ...]

    def input(self, dtype, device="cpu"):
        return arrange(self.memory, self.shape, dtype, device)

    def operand(self, index, dtype, device="cpu"):
        shape, memory = self.operands[index % len(self.operands)]
        return arrange(memory, shape, dtype, device)

    def tensors(self, count, dtype, device="cpu", operand_dtype=None):
        operands = [self.operand(i, operand_dtype or dtype, device) for i in range(count)]
        return self.input(dtype, device), *operands

    def __str__(self):
        return self.name


def _layout(name, shape, memory, *operands):
    operands = tuple(o if o and isinstance(o[0], tuple) else (o, "dense") for o in operands)
    return Layout(name, tuple(shape), memory, operands)


def _build(n, c, h, w):
    """The layouts of real models and the awkward ones, over a base size."""
    full = (n, c, h, w)
    rows = (n * h, c)
    return [
        _layout("same", rows, "dense", rows),
        _layout("last_dim_vector", rows, "dense", (c,)),
        _layout("last_dim_vector_3d", (n, h, c), "dense", (c,)),
        _layout("row_vector", rows, "dense", (n * h, 1)),
        _layout("per_channel_nchw", full, "dense", (c, 1, 1)),
        _layout("per_channel_nhwc", full, "channels_last", (c, 1, 1)),
        _layout("per_sample_tokens", (n, h, c), "dense", (n, 1, c)),
        _layout("per_sample_channels", full, "dense", (n, c, 1, 1)),
        _layout("per_sample_channels_nhwc", full, "channels_last", (n, c, 1, 1)),
        _layout("zero_dim", rows, "dense", ()),
        _layout("one_element", rows, "dense", (1, 1)),
        _layout("vector_and_full", rows, "dense", (c,), rows),
        _layout("full_and_vector", rows, "dense", rows, (c,)),
        _layout("vector_and_row", rows, "dense", (c,), (n * h, 1)),
        _layout("zero_dim_and_vector", rows, "dense", (), (c,)),
        _layout("transposed_input", rows, "transposed", (c,), rows),
        _layout("transposed_operand", rows, "dense", (rows, "transposed")),
        _layout("both_transposed", rows, "transposed", (rows, "transposed")),
        _layout("expanded_operand", rows, "dense", (rows, "expanded"), (c,)),
        _layout("sliced_input", rows, "sliced", (c,), (rows, "sliced")),
        _layout("sliced_4d", full, "sliced", ((c, 1, 1), "sliced")),
        _layout("stepped_input", rows, "stepped", ((c,), "stepped"), rows),
        _layout("offset", rows, "offset", ((c,), "offset"), (rows, "offset")),
        _layout("nhwc_beside_nchw", full, "channels_last", full),
        _layout("nchw_beside_nhwc", full, "dense", (full, "channels_last")),
        _layout("middle_dims", full, "dense", (1, c, 1, w), (n, 1, h, 1)),
        _layout("zero_dim_input", (), "dense", ()),
        _layout("empty", (0, c), "dense", (c,), (0, c)),
        _layout("empty_channels", (n, 0), "dense", (0,), ()),
        _layout("five_dims", (n, 2, c, 1, w), "transposed", (2, 1, 1, w)),
    ]


SMALL = _build(2, 3, 2, 2)
MEDIUM = _build(3, 17, 5, 7)

# Vector tails: every length around the widths of vector registers of every dtype.
TAILS = [
    _layout(f"tail_{size}_{kind}", shape, "dense", *operands)
    for size in (1, 3, 7, 17, 49, 65)
    for kind, shape, operands in (
        ("flat", (size,), ((size,),)),
        ("rows", (3, size), ((size,),)),
        ("columns", (3, size), ((3, 1),)),
    )
]

# Above torch's parallel grain of 32768 elements, with rows that no thread split divides.
LARGE = [
    _layout("large_same", (300, 1111), "dense", (300, 1111)),
    _layout("large_last_dim_vector", (300, 1111), "dense", (1111,)),
    _layout("large_rows", (300, 1111), "dense", (300, 1)),
    _layout("large_transposed", (300, 1111), "transposed", (1111,), (300, 1)),
    _layout("large_per_channel", (3, 37, 29, 31), "dense", (37, 1, 1)),
    _layout("large_nhwc", (3, 37, 29, 31), "channels_last", (37, 1, 1)),
    _layout("large_tokens", (4, 101, 333), "dense", (4, 1, 333)),
    _layout("large_zero_dim", (300, 1111), "dense", ()),
    _layout("large_tall", (70001, 3), "dense", (3,)),
    _layout("large_offset", (300, 1111), "offset", ((1111,), "offset")),
]

# Complex memory that is read through a lazy conjugation or negation.
LAZY = [
    _layout("conjugated_operand", (5, 7), "dense", ((7,), "conjugated")),
    _layout("conjugated_input", (5, 7), "conjugated", (7,)),
    _layout("negated_operand", (5, 7), "dense", ((5, 7), "negated")),
    _layout("negated_input", (5, 7), "negated", ((7,), "negated")),
]


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """The same view of a copy of the whole storage: shape, strides, offset and lazy bits."""
    copied = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    copied.set_(
        tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    if tensor.is_conj():
        copied = copied.conj()
    if tensor.is_neg():
        copied = torch._neg_view(copied)
    return copied


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage behind a tensor as bytes, slack around slices included."""
    data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return data.set_(tensor.untyped_storage()).clone()


def whole_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage behind a tensor, in its dtype."""
    data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return data.set_(tensor.untyped_storage()).clone()

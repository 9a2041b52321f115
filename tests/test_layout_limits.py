"""Layouts at their limits: any number of dimensions or order of memory, inputs that overlap themselves, memory that is gone."""

import itertools
import random

import pytest
import torch

import safe_inplace

from .checks import Untouched, assert_bit_equal
from .layouts import laid_out, random_tensor, short
from .op_table import BY_NAME, OPS, Op

op_ids = {"ids": lambda op: op.name}
OVERLAP = "more than one element of the written-to tensor"
LOST = "has lost its memory"


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


# ---- any number of dimensions


def of_rank(rank, sizes, dtype=torch.float64):
    """Ones, and `sizes` spread over the dimensions from the last to the first."""
    shape = [1] * rank
    for i, size in enumerate(sizes):
        shape[rank - 1 - i * (rank - 1) // max(1, len(sizes) - 1)] = size
    return random_tensor(tuple(shape), dtype)


def squeezed(tensor):
    """The same elements with few dimensions: of more than 64 torch itself cannot take sums, nor compare them."""
    return tensor.detach().squeeze().clone().requires_grad_()


@pytest.mark.parametrize("sizes", [(), (3, 2), (2,) * 12, (2,) * 14], ids=["scalar", "two", "twelve", "fourteen"])
@pytest.mark.parametrize("rank", [63, 64, 65, 100, 600])
def test_any_rank(op, rank, sizes):
    w = of_rank(rank, sizes).requires_grad_()
    for make in (
        lambda: of_rank(rank, sizes),
        lambda: of_rank(rank, ()),
        lambda: random_tensor((w.size(-1),), torch.float64),
    ):
        leaves = [w, *(make().requires_grad_() for _ in op.operands)]
        result = op.function(w * 1, *leaves[1:])
        plain_leaves = [squeezed(leaf) for leaf in leaves]
        plain = op.out_of_place(plain_leaves[0] * 1, *plain_leaves[1:])
        assert result.shape == w.shape
        torch.testing.assert_close(result.squeeze(), plain)
        grad = torch.rand_like(plain)
        grads = torch.autograd.grad(result, leaves, grad.reshape(w.shape))
        for ours, expected in zip(grads, torch.autograd.grad(plain, plain_leaves, grad), strict=True):
            torch.testing.assert_close(ours.squeeze(), expected)


@pytest.mark.parametrize("rank", [65, 200])
def test_any_rank_of_an_input_that_is_not_dense(op, rank):
    """Every other element, dimensions in another order, and more that cannot be merged than a kernel walks."""
    base = random_tensor((4,) + (1,) * (rank - 3) + (4, 4), torch.float64).transpose(0, rank - 1)
    many = random_tensor((1,) * (rank - 14) + (3,) * 10 + (1,) * 4, torch.float64)
    for view in (base[..., ::2], base.transpose(0, rank - 2)[..., 1:], many[(..., *[slice(0, 2)] * 10, *[slice(None)] * 4)]):
        few, operands = squeezed(view).detach(), [torch.rand_like(view) for _ in op.operands]
        op.function(view, *operands)
        torch.testing.assert_close(view.squeeze(), op.out_of_place(few, *(operand.squeeze() for operand in operands)))


# ---- tensors whose elements lie in different orders

ORDERS = {
    "dense": (0, 1, 2, 3),
    "channels_last": (0, 2, 3, 1),
    "transposed": (0, 1, 3, 2),
    "reversed": (3, 2, 1, 0),
    "first in the middle": (1, 0, 2, 3),
}
# Blocks of rows end within each: few and many rows, short and long ones, colours, small images.
SIZES = [(2, 300, 7, 7), (1, 3, 20, 1100), (2, 3, 30, 40), (3, 65, 9, 17), (2, 2, 2, 700)]


def ordered(tensor, order):
    """A part of a larger storage."""
    return laid_out(tensor, order, around=1)


def every_order(shape, dtype, operand_dtype, count):
    """Tensors of the same values in pairs of orders, and expanded and stepped operands."""
    values = [random_tensor(shape, dtype), *(random_tensor(shape, operand_dtype) for _ in range(count))]
    for first, second in itertools.product(ORDERS.values(), repeat=2):
        yield [ordered(values[0], first), *(ordered(value, second) for value in values[1:])]
    for first in ORDERS.values():
        stepped = [torch.stack((value, value), -1)[..., 1] for value in values[1:]]
        yield [ordered(values[0], first), *stepped]
        for dims in ((3,), (1,), (2, 3), (0, 1, 2, 3)):
            sizes = [1 if dim in dims else size for dim, size in enumerate(shape)]
            yield [ordered(values[0], first), *(random_tensor(sizes, operand_dtype).expand(shape) for _ in values[1:])]


# dtypes of the input and of the operands. A product of complex numbers may round another way where it is constant along the row.
MEETING = [
    (op, dtypes)
    for op in OPS
    for dtypes in [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
        (torch.complex128, torch.complex128),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ]
    if op.name == "add_" or not dtypes[0].is_complex
]


@pytest.mark.parametrize("op, dtypes", MEETING, ids=lambda of: of.name if isinstance(of, Op) else "_".join(map(short, of)))
def test_the_order_of_memory_does_not_show_in_the_bits(op, dtypes, two_threads):
    fresh = getattr(safe_inplace, op.name.removesuffix("_"))
    for shape in SIZES:
        for tensors in every_order(shape, *dtypes, len(op.operands)):
            expected = op.function(*(tensor.contiguous().clone() for tensor in tensors))
            assert_bit_equal(fresh(*tensors).to(expected.dtype), expected)
            written = ordered(tensors[0], sorted(range(4), key=lambda dim: -tensors[0].stride(dim)))
            leaf = torch.ones((), dtype=dtypes[0], requires_grad=True)
            recorded = op.function(written * leaf, *tensors[1:])  # where an op keeps the old value, it is written too
            assert_bit_equal(recorded.detach(), expected)
            op.function(written, *tensors[1:])
            assert_bit_equal(written, expected)
            around = written.as_strided((written.numel() + 2,), (1,), 0)
            assert around[0] == around[-1] == 7


# ---- inputs that overlap themselves


def operands_of(op, dtype=torch.float32):
    return [torch.full((), 2, dtype=dtype) if i == 0 else 3 for i in range(len(op.operands))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64], ids=short)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.unfold(0, 3, 1),
        lambda x: x.unfold(0, 3, 2),
        lambda x: x.as_strided((3, 3), (1, 1)),
        lambda x: x.as_strided((2, 4), (3, 1)),
        lambda x: x.as_strided((4, 3), (2, 3)),
        lambda x: x.as_strided((2, 2, 2), (3, 2, 1)),
        lambda x: x.expand(2, 24),
    ],
    ids=["windows", "windows_by_two", "diagonal", "rows_that_meet", "two_and_three", "three_dimensions", "expanded"],
)
def test_an_input_that_overlaps_itself_is_refused(op, view, dtype):
    base = torch.arange(1, 25).to(dtype)
    with Untouched(base), pytest.raises(RuntimeError, match=OVERLAP):
        op.function(view(base), *operands_of(op, dtype))
    with torch.no_grad(), Untouched(base), pytest.raises(RuntimeError, match=OVERLAP):
        op.packet(view(base), *operands_of(op, dtype))


def test_whether_an_input_overlaps_itself_is_told_exactly():
    """By the places of its elements. torch's own test does not say of a slice."""
    draw = random.Random(0)
    add_ = BY_NAME["add_"].function
    overlapping = 0
    for _ in range(1500):
        sizes = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        strides = [draw.choice([1, 1, 2, 3, 4, 5, 6, 7, 10, 12, 15, 20]) for _ in sizes]
        places = [
            sum(i * stride for i, stride in zip(index, strides, strict=True))
            for index in itertools.product(*map(range, sizes))
        ]
        base = torch.zeros(max(places) + 1)
        view = base.as_strided(sizes, strides)
        if len(set(places)) == len(places):
            assert_bit_equal(add_(view, 1.0), torch.ones(sizes))
            assert base.sum() == len(places)
        else:
            overlapping += 1
            with Untouched(base), pytest.raises(RuntimeError, match=OVERLAP):
                add_(view, 1.0)
    assert 300 < overlapping < 1200


# ---- memory that is gone


def take_all(tensor):
    tensor.untyped_storage().resize_(0)


def take_the_end(tensor):
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


VIEWS = {
    "whole": lambda base: base,
    "slice": lambda base: base[1:, ::2],
    "row": lambda base: base[-1],
    "element": lambda base: base[-1, -1],
    "columns": lambda base: base.t(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.complex64, torch.int64], ids=short)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("take", [take_all, take_the_end])
def test_an_argument_whose_memory_is_gone_is_refused(op, take, view, dtype):
    for position in range(1 + len(op.operands)):
        bases = [torch.ones(4, 4, dtype=dtype) for _ in range(1 + len(op.operands))]
        arguments = [view(base) for base in bases]
        take(bases[position])
        name = op.arguments[position]
        with pytest.raises(RuntimeError, match=rf"{op.name}\(\): argument '{name}' {LOST}"):
            op.function(*arguments)
        for i, base in enumerate(bases):
            if i != position:
                assert base.eq(1).all()
                assert base._version == 0


# Not complex: that product is torch's own, node and all.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
@pytest.mark.parametrize("take", [take_all, take_the_end])
def test_a_saved_operand_whose_memory_is_gone_is_refused(op, take, dtype):
    for position, name in enumerate(op.operands):
        if not any(name in saved for saved in op.saves.values()):
            continue
        for shape in ((4, 3), (3,), (1,), ()):
            w = torch.ones(4, 3, dtype=dtype, requires_grad=True)
            operands = [torch.ones(shape, dtype=dtype) for _ in op.operands]
            for other in operands[:position] + operands[position + 1 :]:
                other.requires_grad_()
            result = op.function(w * 1, *operands)
            take(operands[position])
            with pytest.raises(RuntimeError, match=f"the saved '{name}' {LOST}"):
                result.backward(torch.ones_like(result))


def test_empty_memory_is_no_lost_memory(op):
    x = torch.ones(0, 3)
    assert op.function(x, *[torch.ones(0, 3) for _ in op.operands]) is x
    freed = torch.ones(4, 3)[:0]
    freed.untyped_storage().resize_(0)
    assert op.function(freed, *[torch.ones(3) for _ in op.operands]) is freed

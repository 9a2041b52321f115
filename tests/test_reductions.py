"""Gradients of broadcast operands: the same bits every time, on any number of threads, and exact to the last digits."""

from fractions import Fraction

import pytest
import torch

from .checks import assert_bit_equal
from .layouts import LARGE, OPMATH, Layout, short
from .op_table import BY_NAME, OPS

op_ids = {"ids": lambda op: op.name}


def gradients(op, layout, tensors, grad_output):
    result = op.function(tensors[0].clone(), *tensors[1:])
    return torch.autograd.grad(result, tensors, grad_output)


def prepare(op, layout, dtype, device):
    tensors = layout.tensors(len(op.operands), dtype, device)
    grad_output = torch.randn(layout.shape, device=device).to(dtype)
    return [t.detach().requires_grad_() for t in tensors], grad_output


# The gradient is contiguous, the input not.
TRANSPOSED = [
    Layout("positions_nhwc", (16, 37, 29, 31), "channels_last", (((37, 29, 31), "dense"),)),
    Layout("colours_nhwc", (4, 3, 129, 131), "channels_last", (((3, 1, 1), "dense"),)),
    Layout("rows_of_a_transposed", (700, 300), "transposed", (((700, 1), "dense"),)),
]


@pytest.mark.parametrize("layout", LARGE + TRANSPOSED, ids=str)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_the_same_bits_on_one_and_two_threads(op, layout, device):
    tensors, grad_output = prepare(op, layout, torch.float32, device)
    results = []
    for threads in (1, 2, 1, 2):
        torch.set_num_threads(threads)
        results.append(gradients(op, layout, tensors, grad_output))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bit_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_the_same_bits_over_a_hundred_runs(op, dtype, device, two_threads):
    layout = Layout("just above the grain", (130, 517), "dense", (((517,), "dense"),))
    tensors, grad_output = prepare(op, layout, dtype, device)
    first = gradients(op, layout, tensors, grad_output)
    for _ in range(100):
        for a, b in zip(first, gradients(op, layout, tensors, grad_output), strict=True):
            assert_bit_equal(a, b)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_forward_is_the_same_on_one_and_two_threads(op, device):
    for layout in LARGE:
        tensors = layout.tensors(len(op.operands), torch.float32, device)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(op.function(tensors[0].clone(), *tensors[1:]))
        assert_bit_equal(results[0], results[1])


# Terms whose roundings all go one way: a running sum of n of them is off by up to n / 2 units in the last place. Shape, memory
# and the operand's shape; millions of elements, so that every level of the sums is in use.
LONG = {
    "everything": ((3_000_001,), "dense", ()),
    "one column, stepped": ((1_500_000, 1), "stepped", (1,)),
    "two columns": ((1_500_000, 2), "dense", (2,)),
    "three columns": ((1_000_000, 3), "dense", (3,)),
    "columns": ((375_000, 8), "dense", (8,)),
    "columns, stepped": ((375_000, 8), "stepped", (8,)),
    "columns, transposed": ((375_000, 8), "transposed", (8,)),
    "odd columns": ((90_000, 33), "dense", (33,)),
    "more columns than a block": ((1000, 2049), "dense", (2049,)),
    "rows": ((3, 1_000_001), "dense", (3, 1)),
    "rows, transposed": ((3, 1_000_001), "transposed", (3, 1)),
    "rows, stepped, all": ((375_000, 8), "stepped", ()),
    "channels": ((400, 8, 30, 31), "dense", (8, 1, 1)),
    "channels, channels_last": ((400, 8, 30, 31), "channels_last", (8, 1, 1)),
    "channels of small images": ((10_000, 6, 7, 7), "dense", (6, 1, 1)),
    "positions, channels_last": ((6000, 8, 7, 7), "channels_last", (8, 7, 7)),
    "tokens": ((3, 15_000, 64), "dense", (3, 1, 64)),
    "two groups of dimensions": ((600, 5, 1000), "dense", (1, 5, 1)),
}


def constant(shape, memory, value, dtype):
    """A tensor of one value in the given kind of memory."""
    if memory == "stepped":
        return torch.full((*shape[:-1], 2 * shape[-1] + 1), value, dtype=dtype)[..., 1::2]
    if memory == "transposed":
        return torch.full(shape[::-1], value, dtype=dtype).permute(tuple(reversed(range(len(shape)))))
    format = torch.channels_last if memory == "channels_last" else torch.contiguous_format
    return torch.full(shape, value, dtype=dtype).contiguous(memory_format=format)


def units_off(op, shape, memory, operands, dtype, value, summed):
    """How far gradients of operands of ones are from the exact sums of a constant gradient, in units of the accumulator's
    epsilon."""
    accumulator = OPMATH[dtype]
    tensors = [constant(shape, memory, 1, dtype), *(torch.ones(small, dtype=accumulator) for small in operands)]
    tensors = [t.requires_grad_(i in summed) for i, t in enumerate(tensors)]
    grad_output = constant(shape, memory, value, dtype)
    result = op.function(tensors[0].clone(memory_format=torch.preserve_format), *tensors[1:])
    wanted = [tensors[i] for i in summed]
    units = []
    one = [torch.ones(1, dtype=torch.float64).requires_grad_() for _ in tensors]
    of_one = torch.autograd.grad(op.reference(*one), one, torch.ones(1, dtype=torch.float64))
    for i, gradient in zip(summed, torch.autograd.grad(result, wanted, grad_output), strict=True):
        assert gradient.dtype == accumulator
        parts = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        term = grad_output.flatten()[0]
        exact = Fraction(term.real.item()) * int(of_one[i].item()) * (grad_output.numel() // gradient.numel())
        worst = max(abs(Fraction(bound.item()) - exact) / exact for bound in parts.aminmax())
        units.append(float(worst / Fraction(torch.finfo(accumulator).eps)))
    return units


# The input's, the operand's and the factor's shape, and what memory the gradient is in.
COMMON = {
    "columns": ((700, 37), (37,), (37,), "dense"),
    "columns, stepped": ((700, 37), (37,), (37,), "stepped"),
    "columns, transposed": ((700, 37), (37,), (37,), "transposed"),
    "columns, one factor": ((700, 37), (37,), (1, 1), "dense"),
    "rows": ((5, 9001), (5, 1), (5, 1), "dense"),
    "rows, transposed": ((5, 9001), (5, 1), (5, 1), "transposed"),
    "channels": ((9, 17, 7, 7), (17, 1, 1), (17, 1, 1), "dense"),
    "channels, channels_last": ((9, 17, 7, 7), (17, 1, 1), (17, 1, 1), "channels_last"),
    "positions, a factor for each row": ((9, 17, 7, 5), (7, 5), (7, 1), "channels_last"),
    "two groups of dimensions": ((60, 5, 7, 11), (60, 1, 7, 1), (1, 1, 7, 1), "dense"),
    "all": ((700, 37), (), (1,), "dense"),
    "a number": ((700, 37), (37,), None, "dense"),
}


@pytest.mark.parametrize("dtype", OPMATH, ids=short)
@pytest.mark.parametrize("shape, small, of_factor, memory", COMMON.values(), ids=COMMON)
def test_a_factor_common_to_all_terms_multiplies_the_sum(shape, small, of_factor, memory, dtype):
    """Rounded once, where a product for each term would round with each."""
    wide = OPMATH[dtype]
    for factor_dtype in {dtype, wide}:
        # On every second of its elements, so that where it lies counts.
        value = 1 / 3 if of_factor is None else torch.randn((*of_factor, 2)).to(factor_dtype)[..., 0]
        x, ones = constant(shape, memory, 1, dtype), torch.ones(small, dtype=wide)
        terms = x.numel() // ones.numel()
        factor = torch.as_tensor(value, dtype=wide)
        # addcmul_ takes no number.
        for name, position in [("add_mul_", 0), *(("addcmul_", i) for i in range(2) if of_factor is not None)]:
            operands = [value, value]
            operands[position] = ones.clone().requires_grad_()
            result = BY_NAME[name].function(x.clone(memory_format=torch.preserve_format), *operands)
            (actual,) = torch.autograd.grad(result, operands[position], x)
            assert_bit_equal(actual, (terms * ones * factor.conj()).reshape(small))


# Chains of 16 at each of the levels, 32 in a block, 8 and 8 over chunks: half a unit for each addition if every rounding went
# the same way and were the largest possible. Torch's own sums stay within 9, but for those that it takes in one chain.
MOST_UNITS = 9


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_long_sums_keep_their_digits(op, name):
    shape, memory, small = LONG[name]
    operands = [small] * len(op.operands)
    summed = range(1, 1 + len(operands))
    assert max(units_off(op, shape, memory, operands, torch.float32, 0.1, summed)) < MOST_UNITS


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=short)
def test_long_sums_keep_their_digits_in_every_dtype(dtype, name):
    shape, memory, small = LONG[name]
    value = complex(0.1, 0.1) if dtype.is_complex else 0.1
    assert max(units_off(BY_NAME["mul_add_"], shape, memory, [small, small], dtype, value, [1, 2])) < MOST_UNITS


@pytest.mark.parametrize("name", LONG)
def test_long_sums_beside_a_full_operand(name):
    """The factor of the sum is as large as the gradient, contiguous or not."""
    shape, memory, small = LONG[name]
    for op, operands, summed in (("addcmul_", [small, shape], 1), ("add_mul_", [shape, small], 2)):
        assert max(units_off(BY_NAME[op], shape, memory, operands, torch.float32, 0.1, [summed])) < MOST_UNITS


@pytest.mark.parametrize("name", LONG)
def test_long_sums_are_as_exact_as_torchs(name):
    shape, memory, small = LONG[name]
    gradient = constant(shape, memory, 0.1, torch.float32)
    theirs = gradient.sum_to_size(small or (1,) * len(shape)).double()
    exact = gradient.double().flatten()[0] * (gradient.numel() // theirs.numel())
    torch_off = ((theirs - exact).abs().max() / exact / torch.finfo(torch.float32).eps).item()
    ours = max(units_off(BY_NAME["add_"], shape, memory, [small], torch.float32, 0.1, [1]))
    # Either may be lucky: within a few units both are exact.
    assert ours <= max(torch_off, 4)

"""The CUDA kernels through the simulator, which takes the place of the CPU's kernels: whole ops run through it. And, of a build
with CUDA, the machine code.
"""

import importlib.util
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from safe_inplace import _C

from .checks import assert_bit_equal, assert_close, assert_storage_bit_equal, grad_tolerance
from .layouts import KERNEL_DTYPES, LARGE, MEDIUM, SMALL, TAILS, arrange, random_tensor, short, twin
from .op_table import BY_NAME, EXACT, FUSED, OPS
from .simulator import launches, readings, simulated
from .test_reductions import MOST_UNITS, units_off
from .test_values import check

op_ids = {"ids": lambda op: op.name}
INDEX_LIMIT = 2**31
VECTOR = {dtype: 16 // dtype.itemsize for dtype in KERNEL_DTYPES}


@pytest.fixture
def device_code():
    with simulated():
        yield


# Calls as small as those of most tests have kernels of their own: here they take those of large ones.
AS_LARGE = {"small_limit": 0}


@pytest.fixture(params=[{}, AS_LARGE], ids=["small", "as-large"])
def any_size(request):
    with simulated(**request.param):
        yield


def takes_kernel(op, dtype):
    """On the CPU, complex `mul_` is left to torch, whose rounding depends on the position in a row."""
    return op.name != "mul_" or not dtype.is_complex


# Where vectors can start, end and cross rows, around the width of every dtype.
EDGES = [
    (shape, slack, operand)
    for shape in [(8, 16), (5, 24), (7, 49), (6, 15), (3, 9), (40, 3), (4, 7, 7, 5), (1037,), (2, 3, 64)]
    for slack in [(0, 0), (0, 1), (0, 16), (3, 8), (8, 1)]
    for operand in ["full", "last", "outer"]
]


def edge_tensor(shape, slack, dtype):
    """A view `slack[0]` elements into rows that are `slack[1]` elements longer than needed."""
    start, extra = slack
    base = random_tensor((*shape[:-1], shape[-1] + start + extra), dtype)
    return base[..., start : start + shape[-1]]


def operand_shape(shape, kind):
    return {"full": shape, "last": shape[-1:], "outer": (*shape[:-1], 1)}[kind]


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_values_of_every_layout(op, dtype, any_size):
    for layout in SMALL + MEDIUM + TAILS:
        tensors = layout.tensors(len(op.operands), dtype)
        launches()
        check(op, *tensors, **op.parameters(-1))
        if tensors[0].numel() and takes_kernel(op, dtype):
            assert [launch["kernel"] for launch in launches()] in (["small"], ["elementwise"], ["unaligned"]), layout


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_values_at_the_edges_of_vectors(op, dtype, any_size):
    for shape, slack, kind in EDGES:
        operands = [random_tensor(operand_shape(shape, kind), dtype) for _ in op.operands]
        check(op, edge_tensor(shape, slack, dtype), *operands)
        # operands that are misaligned themselves
        operands = [edge_tensor(operand_shape(shape, "last"), (1, 2), dtype) for _ in op.operands]
        check(op, edge_tensor(shape, slack, dtype), *operands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_float_operands_beside_a_16_bit_input(op, dtype, any_size):
    pairs = itertools.product([dtype, torch.float32], repeat=len(op.operands))
    for dtypes, (shape, slack, kind) in itertools.product(pairs, EDGES):
        operands = [random_tensor(operand_shape(shape, kind), d) for d in dtypes]
        launches()
        check(op, edge_tensor(shape, slack, dtype), *operands)
        assert launches()
    for dtypes in itertools.product([dtype, torch.float32, None], repeat=len(op.operands)):
        operands = [1.25 if d is None else random_tensor((24,), d) for d in dtypes]
        check(op, random_tensor((3, 24), dtype), *operands)


# A branch of 16 bits beside float32, as autocast makes it, in every place; and both kinds of 16 bits beside each other.
BESIDE = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.float16),
    (torch.float32, torch.float16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float16),
    (torch.float16, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("dtypes", BESIDE, ids=lambda dtypes: "_".join(map(short, dtypes)))
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_16_bits_beside_float(op, dtypes, any_size):
    """Forward and backward, out of place, and in place where the input is float32."""
    dtypes = dtypes[: 1 + len(op.operands)]
    for shape, slack, kind in EDGES:
        kinds = ["last", kind][: len(op.operands)]
        operands = [random_tensor(operand_shape(shape, k), d) for k, d in zip(kinds, dtypes[1:], strict=True)]
        tensors = [edge_tensor(shape, slack, dtypes[0]), *operands]
        expected = op.exact(*tensors)
        result_dtype = op.reference(*tensors).dtype
        grad_output = edge_tensor(shape, slack, result_dtype)
        exact = [t.double().requires_grad_() for t in tensors]
        expected_grads = torch.autograd.grad(op.reference(*exact), exact, grad_output.double())
        in_place = [dtypes[0] == torch.float32] if len(set(dtypes)) > 1 else []
        for function in [op.functional, *([op.function] if in_place == [True] else [])]:
            leaves = [t.detach().requires_grad_() for t in tensors]
            input = leaves[0] if function is op.functional else leaves[0].clone(memory_format=torch.preserve_format)
            launches()
            result = function(input, *leaves[1:])
            if result_dtype == torch.float32 or len(set(dtypes)) == 1:
                assert launches()
            assert result.dtype == result_dtype
            assert_close(result, expected, 4 * torch.finfo(result_dtype).eps)
            launches()
            grads = torch.autograd.grad(result, leaves, grad_output)
            assert launches() or op.name == "add_"
            for grad, right, leaf in zip(grads, expected_grads, leaves, strict=True):
                assert grad.dtype == leaf.dtype
                terms = max(tensors[0].numel() // grad.numel(), 1)
                coarse = max(dtypes, key=lambda d: torch.finfo(d).eps)
                assert_close(grad, right, grad_tolerance(coarse, terms) * math.sqrt(terms))


@pytest.mark.parametrize("dtype, unpacked", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=short)
@pytest.mark.parametrize("op", [op for op in OPS if op.name not in ("add_", "addcmul_")], **op_ids)
def test_a_kept_value_that_comes_back_in_another_dtype(op, dtype, unpacked, any_size):
    """Hooks may hand back what they like."""
    for shape, operand in [((8, 64), (64,)), ((8, 64), (8, 64)), ((7, 49), (49,)), ((3000, 96), (96,)), ((1037,), (1037,))]:
        tensors = [random_tensor(shape, torch.bfloat16), *(random_tensor(operand, torch.bfloat16) for _ in op.operands)]
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(unpacked), lambda t: t):
            result = op.function(leaves[0].clone(), *leaves[1:])
        grad_output = random_tensor(shape, dtype)
        actual = torch.autograd.grad(result, leaves, grad_output)
        exact = [t.double().requires_grad_() for t in tensors]
        expected = torch.autograd.grad(op.reference(*exact), exact, grad_output.double())
        for a, e in zip(actual, expected, strict=True):
            terms = grad_output.numel() // a.numel()
            assert_close(a, e, grad_tolerance(torch.bfloat16, terms) * math.sqrt(terms))


def compare_backward(op, tensors, grad_output, parameter, wanted, owned, simulation):
    """Gradients against the formula in double precision; `owned` leaves the incoming gradient to the engine alone."""

    def gradients(tensors, function, grad_output):
        inputs = [t for t, w in zip(tensors, wanted, strict=True) if w]
        result = function(tensors[0].clone(memory_format=torch.preserve_format), *tensors[1:], **parameter)
        if not owned:
            return torch.autograd.grad(result, inputs, grad_output)
        # the backward of a sum of products hands over a tensor that nobody else holds
        real = torch.view_as_real(result) if result.is_complex() else result
        weight = torch.view_as_real(grad_output) if grad_output.is_complex() else grad_output
        return torch.autograd.grad((real * weight).sum(), inputs)

    leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    with simulated(**simulation):
        launches()
        actual = gradients(leaves, op.function, grad_output)
        seen = launches()
    widest = torch.complex128 if tensors[0].is_complex() else torch.float64
    exact = [t.detach().to(widest).requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    # What the kernels keep is rounded to the dtype; so is the incoming gradient.
    expected = gradients(exact, op.reference, grad_output.to(widest))
    for a, e, t in zip(actual, expected, (t for t, w in zip(tensors, wanted, strict=True) if w), strict=True):
        assert a.dtype == t.dtype and a.shape == t.shape
        terms = max(tensors[0].numel() // max(a.numel(), 1), 1)
        coarse = max((tensors[0].dtype, t.dtype), key=lambda d: torch.finfo(d).eps)
        assert_close(a, e, grad_tolerance(coarse, terms) * math.sqrt(terms))
    return actual, seen


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradients_of_every_layout(op, dtype):
    for layout in SMALL + MEDIUM + TAILS:
        tensors = layout.tensors(len(op.operands), dtype)
        grad_output = random_tensor(layout.shape, dtype)
        for wanted in itertools.product([True, False], repeat=len(tensors)):
            if any(wanted):
                for owned, simulation in itertools.product((False, True), ({}, AS_LARGE)):
                    compare_backward(op, tensors, grad_output, op.parameters(-0.75), wanted, owned, simulation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex128], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradients_at_the_edges_of_vectors(op, dtype):
    for shape, slack, kind in EDGES:
        kinds = [kind, "last"][: len(op.operands)]
        tensors = [random_tensor(shape, dtype), *(random_tensor(operand_shape(shape, k), dtype) for k in kinds)]
        grad_output = edge_tensor(shape, slack, dtype)
        for owned in (False, True):
            compare_backward(op, tensors, grad_output, {}, [True] * len(tensors), owned, {})
            frozen = [True] + [False] * len(op.operands)
            for simulation in ({}, AS_LARGE):
                compare_backward(op, tensors, grad_output, {}, frozen, owned, simulation)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradients_of_float_operands_beside_a_16_bit_input(op):
    for kind, shape in itertools.product(["full", "last", "outer"], [(8, 64), (9, 49)]):
        operands = [random_tensor(operand_shape(shape, kind), torch.float32) for _ in op.operands]
        tensors = [random_tensor(shape, torch.bfloat16), *operands]
        for owned in (False, True):
            wanted = [True] * len(tensors)
            compare_backward(op, tensors, random_tensor(shape, torch.bfloat16), {}, wanted, owned, {})


def test_an_expanded_gradient(device_code):
    x, scale, shift = (random_tensor(s, torch.float32).requires_grad_() for s in [(24, 16), (16,), (24, 1)])
    BY_NAME["mul_add_"].function(x.clone(), scale, shift).sum().backward()
    assert_close(x.grad, scale.detach().expand(24, 16), 0)
    assert_close(scale.grad, x.detach().sum(0), grad_tolerance(torch.float32, 24))
    assert_close(shift.grad, torch.full((24, 1), 16.0), 0)


def test_gradients_over_nothing_are_zero(device_code):
    x, scale, shift = (torch.ones(s, requires_grad=True) for s in [(0, 5), (5,), (0, 1)])
    result = BY_NAME["mul_add_"].function(x.clone(), scale, shift)
    grads = torch.autograd.grad(result, [x, scale, shift], torch.ones(0, 5))
    assert [tuple(g.shape) for g in grads] == [(0, 5), (5,), (0, 1)]
    assert_bit_equal(grads[1], torch.zeros(5))


# Reductions large enough for several chunks and blocks, so that partial sums go through memory.
REDUCTIONS = {
    "columns": ((3000, 96), (96,)),
    "odd columns": ((3000, 33), (33,)),
    "few columns": ((9000, 8), (8,)),
    "rows": ((700, 200), (700, 1)),
    "long rows": ((3, 70001), (3, 1)),
    "channels": ((70, 6, 28, 28), (6, 1, 1)),
    "channels, odd": ((70, 6, 7, 7), (6, 1, 1)),
    "samples": ((3, 900, 64), (3, 1, 64)),
    "samples and channels": ((20, 6, 28, 28), (20, 6, 1, 1)),
    "positions": ((64, 20, 64), (20, 64)),
    "everything": ((700, 200), ()),
    "everything, odd": ((140001,), (1,)),
    "inner and outer kept": ((30, 40, 64), (30, 1, 64)),
    "middle": ((30, 40, 64), (40, 1)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64], ids=short)
@pytest.mark.parametrize("op", [BY_NAME["mul_add_"], BY_NAME["addcmul_"]], **op_ids)
def test_large_reductions(op, name, dtype):
    shape, small = REDUCTIONS[name]
    tensors = [random_tensor(s, dtype) for s in (shape, small, small)]
    grad_output = random_tensor(shape, dtype)
    wanted = [True] * 3
    plain, seen = compare_backward(op, tensors, grad_output, {}, wanted, False, {})
    assert [launch["kernel"] for launch in seen[1:]] in (["reduce"], ["reduce", "reduce_partials"])
    # Neither the order in which blocks and threads run nor who owns the gradient may change a bit.
    for owned, reversed in itertools.product([False, True], repeat=2):
        again, _ = compare_backward(op, tensors, grad_output, {}, wanted, owned, {"reversed": reversed})
        for a, b in zip(plain, again, strict=True):
            assert_bit_equal(a, b)
    # Alone, a sum has the bits that it has beside one of the same pattern.
    for i in (1, 2):
        (alone,), _ = compare_backward(op, tensors, grad_output, {}, [n == i for n in range(3)], False, {})
        assert_bit_equal(alone, plain[i])
    # 64-bit indices: other launches, the same gradients to rounding.
    _, seen = compare_backward(op, tensors, grad_output, {}, wanted, False, {"index_limit": 1})
    assert {launch["index_bits"] for launch in seen} == {64}


MIXED_REDUCTIONS = {
    "vector, then per sample": ((4, 300, 64), (64,), (4, 1, 64)),
    "vector, then rows": ((900, 64), (64,), (900, 1)),
    "scalar, then vector": ((900, 64), (), (64,)),
    "full, then vector": ((900, 64), (900, 64), (64,)),
    "positions, then vector": ((40, 12, 64), (12, 64), (64,)),
    "channels, then samples": ((6, 8, 14, 14), (8, 1, 1), (6, 8, 1, 1)),
    "two patterns of the middle": ((6, 7, 8, 16), (7, 1, 16), (6, 1, 8, 1)),
    "rows and columns of nothing common": ((50, 60, 16), (50, 1, 16), (60, 16)),
}


@pytest.mark.parametrize("name", MIXED_REDUCTIONS)
@pytest.mark.parametrize("op", FUSED, **op_ids)
def test_operands_of_different_patterns(op, name):
    shape, *small = MIXED_REDUCTIONS[name]
    if len(op.operands) == 1:
        small = small[:1]
    for dtype, (a, b) in itertools.product([torch.bfloat16, torch.float32], [(0, 1), (1, 0)]):
        picked = [small[a], small[b]] if len(small) == 2 else small
        tensors = [random_tensor(s, dtype) for s in (shape, *picked)]
        grad_output = random_tensor(shape, dtype)
        for owned in (False, True):
            _, seen = compare_backward(op, tensors, grad_output, {}, [True] * len(tensors), owned, {})
            reductions = [launch for launch in seen if launch["kernel"] == "reduce"]
            assert len(reductions) == 1, "one reading of the gradient"


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_the_gradient_is_read_once(op, dtype, device_code):
    alike = [(shape, small, small) for shape, small in REDUCTIONS.values()]
    share_a_loop = [row for name, row in MIXED_REDUCTIONS.items() if name != "rows and columns of nothing common"]
    for shape, *small in [*alike, *share_a_loop]:
        leaves = [random_tensor(s, dtype).requires_grad_() for s in (shape, *small[: len(op.operands)])]
        grad_output = random_tensor(shape, dtype)
        result = op.function(leaves[0].clone(), *leaves[1:], **op.parameters(-0.75))
        with readings(grad_output) as count:
            torch.autograd.grad(result, leaves, grad_output)
        assert set(count) == {1} or not takes_kernel(op, dtype), (shape, small)


@pytest.mark.parametrize("name", ["add_mul_", "mul_add_", "addcmul_"])
def test_two_sums_of_many_columns_are_one_reading(name):
    """Each chunk of the loop adds a row of partial sums to both: what they may take is for the two together."""
    shape, small = (20_000, 512), (512,)
    tensors = [random_tensor(s, torch.bfloat16).requires_grad_() for s in (shape, small, small)]
    result = BY_NAME[name].function(tensors[0].clone(), *tensors[1:])
    with simulated():
        torch.autograd.grad(result, tensors, random_tensor(shape, torch.bfloat16))
        reduce, partials = launches()
    assert (reduce["kernel"], partials["kernel"]) == ("reduce", "reduce_partials")
    assert 2**19 < reduce["workspace"] <= 2**20


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
@pytest.mark.parametrize("shape, small", REDUCTIONS.values(), ids=REDUCTIONS)
def test_a_factor_common_to_all_terms_multiplies_the_sum(shape, small, dtype):
    """Rounded once, where a product for each term would round with each; and read once for each sum, not for each term."""
    value = complex(1 / 3, 1 / 7) if dtype.is_complex else 1 / 3
    x, ones = torch.ones(shape, dtype=dtype), torch.ones(small, dtype=dtype)
    factor = torch.full(small, value, dtype=dtype)
    terms = x.numel() // factor.numel()
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(dtype, dtype)
    expected = (terms * factor.to(wide).conj()).to(dtype)
    with simulated(target_blocks=1):
        for name, operands, wanted in [
            ("addcmul_", (ones, factor), 0),
            ("addcmul_", (factor, ones), 1),
            ("add_mul_", (ones, factor), 0),
        ]:
            op = BY_NAME[name]
            leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(operands)]
            result = op.function(x.clone(), *leaves)
            with readings(leaves[1 - wanted].detach()) as count:
                (actual,) = torch.autograd.grad(result, leaves[wanted], x)
            assert_bit_equal(actual, expected)
            assert set(count) == {1} or not small  # on the CPU a 0-dim tensor is a number


def test_a_common_factor_that_is_no_tensor_of_the_sums_dtype(device_code):
    """A number, and float32 beside 16 bits."""
    grad_output = random_tensor((3000, 96), torch.bfloat16)
    exact = grad_output.double().sum(0)
    for factor in (1.0009765625 / 3, random_tensor((96,), torch.float32), random_tensor((), torch.bfloat16)):
        x = torch.zeros(3000, 96, dtype=torch.bfloat16)
        tensor1 = torch.ones(96, requires_grad=True)
        result = BY_NAME["addcmul_"].function(x, tensor1, factor, value=0.75)
        (actual,) = torch.autograd.grad(result, tensor1, grad_output)
        assert_close(actual, exact * factor * 0.75, 4 * torch.finfo(torch.float32).eps * 55)


# Shape, operands, and how many blocks are aimed at: few, so that a thread adds up as much as it would of gigabytes.
LONG_SUMS = {
    "columns": ((100_000, 4), [(4,), (4,)], 1),
    "odd columns": ((60_000, 9), [(9,), (9,)], 1),
    "rows": ((2, 600_000), [(2, 1), (2, 1)], 1),
    "odd rows": ((2, 300_001), [(2, 1), (2, 1)], 1),
    "channels": ((2000, 3, 14, 14), [(3, 1, 1), (3, 1, 1)], 1),
    "small images": ((4000, 3, 7, 7), [(3, 1, 1), (3, 1, 1)], 1),
    "everything": ((1_000_000,), [(), ()], 1),
    "partial sums of columns": ((200_000, 4), [(4,), (4,)], 2048),
    "partial sums of a vector and all": ((1, 900_000), [(), (900_000,)], 1),
}


@pytest.mark.parametrize("name", LONG_SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=short)
def test_long_sums_keep_their_digits(name, dtype):
    shape, operands, blocks = LONG_SUMS[name]
    value = complex(0.1, 0.1) if dtype.is_complex else 0.1
    for limit in (INDEX_LIMIT, 1):
        with simulated(index_limit=limit, target_blocks=blocks):
            launches()
            units = units_off(BY_NAME["mul_add_"], shape, "dense", operands, dtype, value, [1, 2])
            assert {launch["kernel"] for launch in launches()[1:]} <= {"reduce", "reduce_partials"}
        assert max(units) < MOST_UNITS


def test_patterns_with_little_in_common_are_summed_one_after_the_other():
    """Together they would need partial sums of half the gradient's size."""
    op = BY_NAME["mul_add_"]
    shape, scale, shift = (2, 600, 500), (500,), (600, 500)
    tensors = [random_tensor(s, torch.float32) for s in (shape, scale, shift)]
    for owned in (False, True):
        _, seen = compare_backward(op, tensors, random_tensor(shape, torch.float32), {}, [True] * 3, owned, {})
        assert [launch["kernel"] for launch in seen if launch["kernel"] == "reduce"] == ["reduce"] * 2
        assert sum(launch["workspace"] for launch in seen) <= 2**20


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_order_of_threads_and_width_of_indices_change_no_bit(op):
    """Element-wise results do not depend on how they are cut."""
    for layout, dtype in itertools.product(MEDIUM + LARGE[:2], [torch.bfloat16, torch.float32, torch.complex128]):
        tensors = layout.tensors(len(op.operands), dtype)
        results = []
        for simulation in ({}, {"reversed": True}, {"index_limit": 1}, AS_LARGE, AS_LARGE | {"reversed": True}):
            with simulated(**simulation):
                results.append(op.function(twin(tensors[0]), *tensors[1:]))
        for result in results[1:]:
            assert_storage_bit_equal(result, results[0])


@pytest.mark.parametrize("op", EXACT, **op_ids)
def test_the_input_as_its_own_operand(op, device_code):
    for dtype, shape in itertools.product(KERNEL_DTYPES, [(8, 16), (7, 49), (1037,)]):
        x = random_tensor(shape, dtype)
        expected = op.two_step(x.clone(), x.clone())
        assert_bit_equal(op.function(x, x), expected)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_the_kept_value_is_written_by_the_same_launch(op, device_code):
    tensors = [random_tensor(s, torch.float32).requires_grad_() for s in [(9, 49)] * (1 + len(op.operands))]
    x = tensors[0].clone()
    launches()
    op.function(x, *tensors[1:])
    assert len(launches()) == 1


T = torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128

# The layouts of real models: shape, memory, operand, and the path that forward takes. A dtype's full vector width is
# expected wherever it says "elementwise"; "unaligned" is vectors that cross rows.
REAL = {
    "full": ((64, 768), "dense", (64, 768), "elementwise"),
    "last-dim vector": ((8, 197, 768), "dense", (768,), "elementwise"),
    "per channel, NCHW": ((4, 64, 56, 56), "dense", (64, 1, 1), "elementwise"),
    "per channel, NCHW, 7x7": ((4, 64, 7, 7), "dense", (64, 1, 1), "unaligned"),
    "per channel, channels_last": ((4, 64, 7, 7), "channels_last", (64, 1, 1), "elementwise"),
    "per sample, tokens": ((4, 49, 768), "dense", (4, 1, 768), "elementwise"),
    "per sample, NCHW": ((4, 64, 56, 56), "dense", (4, 64, 1, 1), "elementwise"),
    "per sample, channels_last": ((4, 64, 7, 7), "channels_last", (4, 64, 1, 1), "elementwise"),
    "positions": ((4, 196, 768), "dense", (196, 768), "elementwise"),
    "scalar tensor": ((64, 768), "dense", (1,), "elementwise"),
    "odd length": ((1037,), "dense", (1037,), "unaligned"),
    "attention mask": ((2, 3, 197, 197), "dense", (2, 1, 1, 197), "unaligned"),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dtype", T, ids=short)
def test_forward_path_of_real_layouts(name, dtype):
    shape, memory, small, kernel = REAL[name]
    x, operand = arrange(memory, shape, dtype), random_tensor(small, dtype)
    with simulated(**AS_LARGE):
        BY_NAME["addcmul_"].function(x, operand, operand)
        (launch,) = launches()
    assert launch["index_bits"] == 32
    assert launch["vector"] == VECTOR[dtype]
    rows_divide = math.prod(shape) % VECTOR[dtype] == 0 and kernel == "elementwise"
    assert launch["kernel"] == ("elementwise" if rows_divide or VECTOR[dtype] == 1 else kernel)


# At most two dimensions are left of them once they are merged.
SMALL_LAYOUTS = ["full", "last-dim vector", "per channel, channels_last", "positions", "scalar tensor", "per sample, NCHW"]


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("dtype", T, ids=short)
def test_the_short_kernel_takes_small_calls(name, dtype):
    """Same shapes, vectors and numbers; the other takes over where it is no longer small."""
    shape, memory, small, _ = REAL[name]
    x, operand = arrange(memory, shape, dtype), random_tensor(small, dtype)
    expected = x.clone(memory_format=torch.preserve_format)
    with simulated(**AS_LARGE):
        BY_NAME["addcmul_"].function(expected, operand, 0.25, value=-3)
        (large,) = launches()
    vectors = x.numel() // VECTOR[dtype]
    for limit, short_one in ((vectors + 1, name in SMALL_LAYOUTS and VECTOR[dtype] > 1), (vectors, False)):
        actual = x.clone(memory_format=torch.preserve_format)
        with simulated(small_limit=limit):
            BY_NAME["addcmul_"].function(actual, operand, 0.25, value=-3)
            (launch,) = launches()
        assert_bit_equal(actual, expected)
        assert launch["kernel"] == ("small" if short_one else large["kernel"])


@pytest.mark.parametrize("name", [name for name, row in REAL.items() if row[3] == "elementwise" and name != "full"])
@pytest.mark.parametrize("dtype", T, ids=short)
def test_backward_path_of_real_layouts(name, dtype, device_code):
    shape, memory, small, _ = REAL[name]
    x = arrange(memory, shape, dtype).requires_grad_()
    operand = random_tensor(small, dtype).requires_grad_()
    result = BY_NAME["mul_add_"].function(x.clone(memory_format=torch.preserve_format), operand, 0.5)
    launches()
    torch.autograd.grad(result, [x, operand], arrange(memory, shape, dtype))
    reduce, *partials = launches()
    assert (reduce["kernel"], reduce["vector"], reduce["index_bits"]) == ("reduce", VECTOR[dtype], 32)
    assert reduce["workspace"] <= max(2**20, x.numel() * x.element_size() // 32)
    assert bool(partials) == (reduce["workspace"] > 0)


def test_a_large_reduction_fills_the_device(device_code):
    """Blocks for every multiprocessor, and partial sums of a few percent of the gradient at most."""
    x, scale = torch.ones(16384, 256, dtype=torch.bfloat16, requires_grad=True), torch.ones(256, requires_grad=True)
    result = BY_NAME["mul_"].function(x.clone(), scale)
    launches()
    torch.autograd.grad(result, [x, scale], torch.ones_like(x))
    reduce, partials = launches()
    assert reduce["blocks"] >= 256
    assert reduce["workspace"] <= x.numel() * x.element_size() // 8
    assert partials["kernel"] == "reduce_partials"


def test_a_misaligned_base_keeps_vectors(device_code):
    """Contiguous memory from any element: whole vectors but for the first and the last."""
    for dtype in (torch.bfloat16, torch.float32):
        x = arrange("offset", (8, 96), dtype)
        assert x.data_ptr() % 16 != 0
        launches()
        BY_NAME["mul_"].function(x, random_tensor((96,), dtype))
        (launch,) = launches()
        assert (launch["kernel"], launch["vector"]) == ("unaligned", VECTOR[dtype])


def test_an_index_past_32_bits_takes_64(device_code):
    x = random_tensor((40, 64), torch.float32)
    for limit, bits in ((INDEX_LIMIT, 32), (1000, 64)):
        with simulated(index_limit=limit):
            BY_NAME["add_"].function(x, 1.0)
            (launch,) = launches()
            assert launch["index_bits"] == bits


def test_a_sum_over_more_than_32_bits_reach_keeps_its_vectors():
    """Offsets count from a block's chunk: columns, and one row of everything."""
    op = BY_NAME["mul_add_"]
    for shape, small in (((3000, 96), (96,)), ((700 * 200,), (1,))):
        tensors = [random_tensor(s, torch.float32) for s in (shape, small, small)]
        grad_output = random_tensor(shape, torch.float32)
        plain, _ = compare_backward(op, tensors, grad_output, {}, [True] * 3, False, {})
        far = {"index_limit": 40_000}
        assert tensors[0].numel() > 3 * far["index_limit"]
        again, (_, reduce, _) = compare_backward(op, tensors, grad_output, {}, [True] * 3, False, far)
        assert (reduce["kernel"], reduce["vector"], reduce["index_bits"]) == ("reduce", 4, 32)
        for a, b in zip(plain, again, strict=True):
            assert_bit_equal(a, b)


def find_cuobjdump():
    """The toolkit's, or the one that Triton's package carries."""
    triton = importlib.util.find_spec("triton")
    beside = [Path(p) / "backends/nvidia/bin/cuobjdump" for p in triton.submodule_search_locations] if triton else []
    return shutil.which("cuobjdump") or next((str(p) for p in beside if p.is_file()), None)


CUOBJDUMP = find_cuobjdump()
machine_code = pytest.mark.skipif(
    _C.build_info()["cuda"] is None or CUOBJDUMP is None, reason="needs a CUDA build and cuobjdump"
)


def cuobjdump(*arguments):
    return subprocess.run(
        [CUOBJDUMP, *arguments, _C.__file__], check=True, capture_output=True, text=True
    ).stdout


@machine_code
def test_no_kernel_uses_local_memory():
    """No spills and no array that could not be kept in registers; reductions fit twice into a multiprocessor."""
    pattern = r"Function (\S*safe_inplace4cuda\S*):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    usage = re.findall(pattern, cuobjdump("--dump-resource-usage"))
    assert len(usage) > 100
    for name, registers, stack, local in usage:
        assert (stack, local) == ("0", "0"), name
        assert int(registers) <= (48 if "5SmallI" in name else 64 if "8PlainSum" in name else 128), name


@machine_code
def test_the_short_kernels_have_few_parameters():
    """Next to those of the kernel that they stand in for; what every kernel finds beside them depends on the architecture."""
    pattern = r"Function \S*(Small|Elementwise)(I\S*Functor\S*):[^:]*:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+ CONSTANT\[0\]:(\d+)"
    constants = {kernel: {} for kernel in ("Small", "Elementwise")}
    for kernel, arguments, constant in re.findall(pattern, cuobjdump("--dump-resource-usage")):
        constants[kernel].setdefault(re.match(r"I\S*?Lb\d", arguments)[0], set()).add(int(constant))
    assert len(constants["Small"]) > 50
    for arguments, sizes in constants["Small"].items():
        assert max(constants["Elementwise"][arguments]) - max(sizes) >= 512, arguments
        assert min(constants["Elementwise"][arguments]) - min(sizes) >= 512, arguments


@machine_code
def test_vector_kernels_access_16_bytes_at_a_time():
    *_, architecture = re.findall(r"(\d+)\.(\d+)", _C.build_info()["cuda_archs"])
    functions = cuobjdump("-sass", "-arch", "sm_" + "".join(architecture)).split("Function : ")[1:]
    code = {text.split(None, 1)[0]: text for text in functions if "safe_inplace4cuda" in text.split(None, 1)[0]}
    # Those of one op, PlainSum and Unaligned; the others go element by element.
    vectors = [name for name in code if re.search(r"(?:Forward|Backward)FunctorINS_|UnalignedINS0_|PlainSum.*Lb0ELi[248]E", name)]
    assert len(vectors) > 80
    for name in vectors:
        assert "LDG.E.128" in code[name], name
        assert "elementwise_kernel" not in name or "STG.E.128" in code[name], name
    for name, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), name

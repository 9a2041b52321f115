"""Every op writes what its formula says, everywhere in the view and nowhere around it."""

import contextlib
import itertools

import numpy as np
import pytest
import torch

import safe_inplace

from .checks import (
    assert_bit_equal,
    assert_rounded_once,
    assert_storage_bit_equal,
)
from .layouts import (
    ALL_DTYPES,
    COMPLEX,
    FLOATING,
    INTEGRAL,
    KERNEL_DTYPES,
    LARGE,
    LAZY,
    MEDIUM,
    OPMATH,
    TAILS,
    arrange,
    random_tensor,
    short,
    twin,
    whole_storage,
)
from .op_table import EXACT, FUSED, OPS

ids = {"ids": str}
op_ids = {"ids": lambda op: op.name}
dtype_ids = {"ids": short}

PARAMETERS = {
    "add_": [1, 2, -0.3],
    "addcmul_": [1, -2, 0.3],
}


def parameters(op, dtype):
    for value in PARAMETERS.get(op.name, [None]):
        if isinstance(value, float) and not (dtype.is_floating_point or dtype.is_complex):
            continue
        if dtype == torch.bool and value != 1:
            continue
        if dtype == torch.uint8 and value is not None and value < 0:
            continue
        yield op.parameters(value)


def check_against_torch(op, input, *operands, **parameter):
    """Bit for bit torch's own in-place method, the slack around the view included."""
    expected = twin(input)
    getattr(expected, op.torch_method)(*operands, **parameter)
    result = op.function(input, *operands, **parameter)
    assert result is input
    assert_storage_bit_equal(input, expected)


def check_rounded_once(op, input, *operands, **parameter):
    exact = op.exact(input, *operands, **parameter)
    magnitude = op.magnitude(input, *operands, **parameter)
    before = twin(input)
    result = op.function(input, *operands, **parameter)
    assert result is input
    assert_rounded_once(input, exact, magnitude)
    before.zero_()
    around = twin(input).zero_()
    assert_bit_equal(whole_storage(around), whole_storage(before))


@contextlib.contextmanager
def noted(*what):
    """A failure inside a loop says where it is."""
    try:
        yield
    except Exception as error:
        error.add_note(" ".join(map(str, what)))
        raise


def check(op, input, *operands, **parameter):
    if op in EXACT:
        check_against_torch(op, input, *operands, **parameter)
    elif input.dtype in KERNEL_DTYPES:
        check_rounded_once(op, input, *operands, **parameter)
    elif not (op.name == "addcmul_" and input.dtype == torch.bool):  # torch has no such kernel
        expected = op.two_step(twin(input), *operands, **parameter)
        op.function(input, *operands, **parameter)
        assert_storage_bit_equal(input, expected)


@pytest.mark.parametrize("dtype", ALL_DTYPES, **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_layouts(op, dtype, device):
    for layout in MEDIUM + TAILS:
        for parameter in parameters(op, dtype):
            with noted(layout, parameter):
                check(op, *layout.tensors(len(op.operands), dtype, device), **parameter)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_above_the_parallel_grain(op, dtype, device, two_threads):
    for layout in LARGE:
        with noted(layout):
            check(op, *layout.tensors(len(op.operands), dtype, device))


@pytest.mark.parametrize("dtype", [*COMPLEX, torch.float32], **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_lazy_conjugation_and_negation(op, dtype, device):
    for layout in LAZY:
        if dtype.is_complex or "conjugated" not in layout.name:
            check(op, *layout.tensors(len(op.operands), dtype, device))


# What torch refuses for its result dtype is in test_refusals.py.
MIXED = [(a, b) for a in ALL_DTYPES for b in ALL_DTYPES if torch.can_cast(torch.promote_types(a, b), a)]
ZERO_DIM = [
    (a, b)
    for a in ALL_DTYPES
    for b in ALL_DTYPES
    if torch.can_cast(torch.result_type(torch.empty(1, dtype=a), torch.empty((), dtype=b)), a)
]


@pytest.mark.parametrize("dtype, operand_dtype", MIXED, **dtype_ids)
@pytest.mark.parametrize("op", EXACT, **op_ids)
def test_mixed_dtypes_equal_torch(op, dtype, operand_dtype, device):
    for layout in MEDIUM:
        with noted(layout):
            check(op, *layout.tensors(1, dtype, device, operand_dtype))


MIXED_FUSED = pytest.mark.parametrize(
    "dtype, operand_dtypes",
    [
        (torch.bfloat16, (torch.float32,)),
        (torch.bfloat16, (torch.float32, torch.bfloat16)),
        (torch.bfloat16, (torch.bfloat16, torch.float32)),
        (torch.bfloat16, (torch.float16,)),
        (torch.float16, (torch.float32,)),
        (torch.float16, (torch.float64, torch.float32)),
        (torch.float32, (torch.bfloat16, torch.float16)),
        (torch.float32, (torch.float64,)),
        (torch.float64, (torch.float32,)),
        (torch.complex64, (torch.float32,)),
        (torch.complex128, (torch.float64, torch.complex64)),
        (torch.float32, (torch.int64, torch.bool)),
        (torch.bfloat16, (torch.int32, torch.uint8)),
    ],
    ids=lambda v: short(v) if isinstance(v, torch.dtype) else "_".join(map(short, v)),
)


@MIXED_FUSED
@pytest.mark.parametrize("op", FUSED, **op_ids)
def test_mixed_dtypes_of_fused_ops(op, dtype, operand_dtypes, device):
    for layout in MEDIUM:
        operands = [layout.operand(i, operand_dtypes[i % len(operand_dtypes)], device) for i in range(len(op.operands))]
        with noted(layout):
            check(op, layout.input(dtype, device), *operands)


def by_functionalization(op, input, *operands):
    return torch.func.functionalize(lambda *values: op.function(*values))(input, *operands)


def by_forward_mode(op, input, *operands):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.zeros_like(input))
        return torch.autograd.forward_ad.unpack_dual(op.function(dual, *operands)).primal


def by_compiler(op, input, *operands):
    torch._dynamo.reset()
    return torch.compile(lambda *values: op.function(*values), backend="aot_eager")(input, *operands)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("run", [by_functionalization, by_forward_mode, by_compiler], **{"ids": lambda run: run.__name__})
@MIXED_FUSED
@pytest.mark.parametrize("op", FUSED, **op_ids)
def test_mixed_dtypes_by_the_formula(op, dtype, operand_dtypes, run):
    """Where no kernel takes the operands, as with 0-dim ones of another dtype on a GPU, the result is rounded once as well."""
    for shapes in [((), ()), ((17,), ())] if run is by_compiler else itertools.product([(), (17,), (5, 17)], repeat=2):
        operands = [
            random_tensor(shape, operand_dtypes[i % len(operand_dtypes)]) for i, shape in enumerate(shapes[: len(op.operands)])
        ]
        input = random_tensor((5, 17), dtype)
        exact, magnitude = op.exact(input, *operands), op.magnitude(input, *operands)
        with noted(shapes):
            assert_rounded_once(run(op, input, *operands), exact, magnitude)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.bfloat16, torch.float32], **dtype_ids)
def test_two_numbers_on_the_cpu_beside_another_device(dtype):
    """No GPU kernel takes both: their product is made on the CPU."""

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            if any(tensor.is_meta for tensor in tensors):
                most.append(sum(tensor.is_cpu for tensor in tensors))
            return func(*args, **(kwargs or {}))

    most = []
    with Mode():
        input = torch.empty(5, 17, dtype=dtype, device="meta")
        torch.ops.safe_inplace.addcmul_(input, *torch.full((2,), 2, dtype=dtype), value=2)
    assert most and max(most) <= 2


@pytest.mark.parametrize("dtype", ALL_DTYPES, **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_numbers(op, dtype, device):
    numbers = [2, True]
    if dtype.is_floating_point or dtype.is_complex:
        numbers += [0.3, -1.7, 1e-3]
    if dtype.is_complex:
        numbers += [0.5 - 2j]
    if dtype == torch.bool:
        numbers = [True, False]
    for kinds in op.kinds():
        if "Scalar" not in kinds:
            continue
        for number, shape in itertools.product(numbers, [(5, 17), (), (0, 3)]):
            operands = [number if kind == "Scalar" else random_tensor(shape, dtype, device) for kind in kinds]
            with noted(kinds, number, shape):
                check(op, random_tensor(shape, dtype, device), *operands)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_numbers_keep_their_precision(op, dtype):
    """A number is not rounded to a half-precision input's dtype before it is used."""
    for kinds in op.kinds():
        operands = [1.0009765625 / 3 if k == "Scalar" else torch.ones(17, dtype=dtype) for k in kinds]
        check(op, random_tensor((5, 17), dtype), *operands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_numbers_beyond_the_range_of_half(op, dtype):
    small = torch.full((9,), 1e-4, dtype=dtype)
    operands = [7e4] + [torch.full((9,), 1.5, dtype=dtype)] * (len(op.operands) - 1)
    check(op, small, *operands)


@pytest.mark.parametrize("dtype, operand_dtype", ZERO_DIM, **dtype_ids)
@pytest.mark.parametrize("op", EXACT, **op_ids)
def test_zero_dim_operands_do_not_promote(op, dtype, operand_dtype):
    check(op, random_tensor((5, 17), dtype), random_tensor((), operand_dtype))


@pytest.mark.parametrize("dtype", FLOATING, **dtype_ids)
@pytest.mark.parametrize("op", FUSED, **op_ids)
def test_zero_dim_operands_of_fused_ops(op, dtype):
    for kinds in itertools.product([(), (17,), (5, 17)], repeat=2):
        operands = [random_tensor(shape, dtype) for shape in kinds]
        check(op, random_tensor((5, 17), dtype), *operands)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_zero_dim_cpu_operand_beside_input(op, device):
    operands = [random_tensor((), torch.float32) for _ in op.operands]
    check(op, random_tensor((5, 17), torch.float32, device), *operands)


SPECIAL = [0.0, -0.0, 1.0, -1.5, float("inf"), float("-inf"), float("nan")]


def special_values(dtype):
    info = torch.finfo(dtype)
    return [*SPECIAL, info.max, -info.max, info.tiny, info.tiny * info.eps, -info.tiny * 0.5]


def equals_or_near(result, expected, bound):
    same_zero = (result != 0) | (expected != 0) | (result.signbit() == expected.signbit())
    near = (result == expected) & same_zero
    near |= (result.double() - expected.double()).abs() <= bound * ((result != 0) | (expected != 0))
    return near | (result.isnan() & expected.isnan())


def exact_result(op, tensors):
    """The formula with exponents to spare, so that nothing overflows in its middle."""
    dtype = tensors[0].dtype
    if dtype != torch.float64:
        return op.exact(*tensors).to(dtype)
    wide = [t.cpu().numpy().astype(np.longdouble) for t in tensors]
    with np.errstate(all="ignore"):
        result = NUMPY_FORMULAS[op.name](*wide).astype(np.float64)
    return torch.from_numpy(result).to(tensors[0].device)


NUMPY_FORMULAS = {
    "add_mul_": lambda input, other, scale: (input + other) * scale,
    "mul_add_": lambda input, scale, shift: input * scale + shift,
    "addcmul_": lambda input, tensor1, tensor2: input + tensor1 * tensor2,
}


@pytest.mark.parametrize("dtype", FLOATING, **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_special_values(op, dtype, device):
    """Every combination of special values, in vectors long enough for vector registers.

    A fused form gives what its steps give in the opmath type, or what the exact formula
    gives: a fused multiply-add has no overflow in its middle.
    """
    values = torch.tensor(special_values(dtype), dtype=torch.float64).to(dtype)
    grids = torch.meshgrid(*[values] * len(op.arguments), indexing="ij")
    tensors = [g.reshape(-1).to(device) for g in grids]
    if op in EXACT:
        check(op, *tensors)
        return
    result = op.function(tensors[0].clone(), *tensors[1:])
    exact = exact_result(op, tensors)
    steps = op.reference(*[t.to(OPMATH[dtype]) for t in tensors]).to(dtype)
    info = torch.finfo(dtype)
    bound = info.eps * op.magnitude(*tensors) + 2 * info.tiny * info.eps
    good = equals_or_near(result, exact, bound) | equals_or_near(result, steps, bound)
    if not good.all():
        i = (~good).nonzero()[0].item()
        values = [t[i].item() for t in tensors]
        pytest.fail(f"{op.name}{values} gave {result[i].item()}, steps give {steps[i].item()}")


@pytest.mark.parametrize("dtype", COMPLEX, **dtype_ids)
@pytest.mark.parametrize("op", EXACT, **op_ids)
def test_special_values_complex(op, dtype, device):
    real = torch.tensor(SPECIAL, dtype=torch.float64)
    parts = torch.meshgrid(real, real, real, real, indexing="ij")
    first = torch.complex(parts[0], parts[1]).reshape(-1).to(device=device, dtype=dtype)
    second = torch.complex(parts[2], parts[3]).reshape(-1).to(device=device, dtype=dtype)
    check(op, first, second)


@pytest.mark.parametrize("op", FUSED, **op_ids)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], **dtype_ids)
def test_fused_forms_are_at_least_as_accurate_as_two_steps(op, dtype):
    tensors = [random_tensor((300, 65), dtype) for _ in op.arguments]
    exact = op.exact(*tensors)
    fused = op.function(tensors[0].clone(), *tensors[1:])
    steps = op.two_step(tensors[0].clone(), *tensors[1:])

    def error(result):
        return (result.to(exact.dtype) - exact).abs().sum()

    assert error(fused) <= error(steps)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_operands_are_only_read(op, device):
    input = random_tensor((5, 17), torch.float32, device)
    operands = [arrange("sliced", (17,), torch.float32, device) for _ in op.operands]
    before = [whole_storage(o) for o in operands]
    op.function(input, *operands)
    for operand, data in zip(operands, before, strict=True):
        assert_bit_equal(whole_storage(operand), data)
        assert operand._version == 0


@pytest.mark.parametrize("op", OPS, **op_ids)
@pytest.mark.parametrize("dtype", INTEGRAL, **dtype_ids)
def test_integers_wrap_as_torch(op, dtype):
    info = torch.iinfo(dtype)
    values = torch.tensor([info.min, info.min + 1, 0, 1, info.max - 1, info.max], dtype=dtype)
    grids = torch.meshgrid(*[values] * len(op.arguments), indexing="ij")
    check(op, *[g.reshape(-1) for g in grids])


ROWS = [(3, 512), (41, 15), (41, 16), (41, 33), (130, 50), (70, 256), (19, 513), (9, 1025), (9, 2050)]


@pytest.mark.parametrize("dtype", FLOATING, **dtype_ids)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_vectors_over_rows_of_every_length(op, dtype, device):
    """Rows that end inside a vector register, and vectors that the kernel repeats, widens or reads in place."""
    for rows, columns in ROWS:
        for shape, operand in (((rows, columns), (columns,)), ((3, rows, columns), (3, 1, columns))):
            operands = [random_tensor(operand, dtype, device) for _ in op.operands]
            with noted(shape, operand):
                check(op, random_tensor(shape, dtype, device), *operands)
                check(op, random_tensor(shape, dtype, device), *operands[:-1], random_tensor(shape, dtype, device))


@pytest.fixture
def flushed():
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def test_subnormal_halves_are_normal_numbers_where_denormals_are_flushed(flushed):
    """In float32, in which the arithmetic is done."""
    x = torch.full((20, 8), 1024.0, dtype=torch.float16)
    tiny = torch.tensor(1.7881393432617188e-05, dtype=torch.float16)
    for shape in ((), (1,), (8,), (20, 1), (20, 8)):
        operand = tiny.expand(shape).contiguous()
        assert_bit_equal(safe_inplace.mul(x, operand), x * operand)
        assert_bit_equal(safe_inplace.mul_(x.clone(), operand), x * operand)
        assert_bit_equal(safe_inplace.add(operand, operand), operand + operand)
        leaf, grad = x.clone().requires_grad_(), torch.full_like(x, 4.0)
        (gradient,) = torch.autograd.grad(safe_inplace.mul(leaf, operand), leaf, grad)
        assert_bit_equal(gradient, grad * operand)
    assert_bit_equal(safe_inplace.add(x * 0, tiny.item()), x * 0 + tiny.item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], **dtype_ids)
@pytest.mark.parametrize("op", EXACT, **op_ids)
def test_every_bit_pattern_rounds_as_torch(op, dtype, device):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    for seed in range(8):
        order = torch.randperm(patterns.numel(), generator=torch.Generator().manual_seed(seed)).to(device)
        check(op, patterns.clone(), patterns[order])

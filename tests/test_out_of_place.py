"""The ops out of place: torch's values, dtypes, layouts and gradients, in a tensor of its own."""

import itertools

import pytest
import torch
from torch import Tensor

import safe_inplace

from .checks import Memory, Saved, Untouched, assert_bit_equal, assert_close, assert_rounded_once, grad_tolerance
from .layouts import ALL_DTYPES, COMPLEX, FLOATING, KERNEL_DTYPES, LARGE, LAZY, MEDIUM, SMALL, TAILS, random_tensor, short
from .op_table import EXACT, FUSED, OPS

op_ids = {"ids": lambda op: op.name}
dtype_ids = {"ids": short}
rows = pytest.mark.parametrize("op", OPS, **op_ids)


def plain(op, *values, **parameter):
    """The formula as torch's own operators give it, one step after the other."""
    return op.reference(*values, **parameter)


def torchs(op, *values, **parameter):
    return getattr(torch, op.functional_name)(*values, **parameter)


def check(op, *values, **parameter):
    try:
        expected = plain(op, *values, **parameter)
    except NotImplementedError:  # torch 2.14 promotes bfloat16 beside complex numbers to a dtype that has few kernels
        if op in EXACT:
            with pytest.raises(NotImplementedError):
                op.functional(*values, **parameter)
        return
    with Untouched(*values):
        result = op.functional(*values, **parameter)
    assert result.dtype == expected.dtype
    assert result.stride() == expected.stride()
    if op in EXACT:
        assert_bit_equal(result, torchs(op, *values, **parameter))
    elif any(isinstance(v, Tensor) and v.dtype == torch.bool for v in values):
        torch.testing.assert_close(result, expected)  # a sum of booleans is their disjunction
    elif result.dtype in KERNEL_DTYPES:
        exact, magnitude = op.exact(*values, **parameter), op.magnitude(*values, **parameter)
        assert_rounded_once(result, exact, magnitude)
    else:
        assert_bit_equal(result, expected)


def parameters(op, dtype):
    # A number that multiplies takes no part in torch's promotion; the reference's does.
    yield {op.parameter: True} if op.parameter and dtype == torch.bool else {}
    if op.parameter and (dtype.is_floating_point or dtype.is_complex):
        yield {op.parameter: -0.3}
    elif op.parameter and dtype != torch.bool:
        yield {op.parameter: 2}


def rotations(values):
    """Each value in the first place once: the input may be the one that is broadcast."""
    return [values[i:] + values[:i] for i in range(len(values))]


@pytest.mark.parametrize("dtype", ALL_DTYPES, **dtype_ids)
@rows
def test_layouts(op, dtype, device):
    for layout in MEDIUM:
        for values, parameter in itertools.product(
            rotations(layout.tensors(len(op.operands), dtype, device)), parameters(op, dtype)
        ):
            check(op, *values, **parameter)
    for layout in TAILS:
        check(op, *layout.tensors(len(op.operands), dtype, device), **next(parameters(op, dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], **dtype_ids)
@rows
def test_above_the_parallel_grain(op, dtype, device, two_threads):
    for layout in LARGE:
        for values in rotations(layout.tensors(len(op.operands), dtype, device)):
            check(op, *values)


@pytest.mark.parametrize("dtype", [*COMPLEX, torch.float32], **dtype_ids)
@rows
def test_lazy_conjugation_and_negation(op, dtype, device):
    for layout in LAZY:
        if dtype.is_complex or "conjugated" not in layout.name:
            for values in rotations(layout.tensors(len(op.operands), dtype, device)):
                check(op, *values)


@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product([torch.float16, torch.bfloat16, torch.float32], repeat=3)),
    ids=lambda d: "_".join(map(short, d)),
)
@pytest.mark.parametrize("op", FUSED, **op_ids)
def test_mixed_widths(op, dtypes, device):
    """What autocast makes: a branch of one dtype beside vectors and a residual of another."""
    for layout in MEDIUM:
        values = [layout.input(dtypes[0], device), *(layout.operand(i, dtypes[i + 1], device) for i in range(2))]
        for rotated in rotations(values):
            check(op, *rotated)


@pytest.mark.parametrize("a, b", list(itertools.product(ALL_DTYPES, repeat=2)), **dtype_ids)
@pytest.mark.parametrize("op", EXACT, **op_ids)
def test_mixed_dtypes_equal_torch(op, a, b):
    for shapes in [((5, 17), (5, 17)), ((17,), (5, 17)), ((5, 17), ()), ((), (5, 17)), ((), ())]:
        check(op, random_tensor(shapes[0], a), random_tensor(shapes[1], b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64, torch.int64, torch.bool], **dtype_ids)
@rows
def test_numbers(op, dtype, device):
    for kinds in op.kinds():
        for number, shape in itertools.product([2, True, 0.3, 1 - 2j], [(5, 17), (), (0, 3)]):
            if "Scalar" not in kinds or (op.name == "addcmul_" and dtype == torch.bool):
                continue
            input = random_tensor(shape, dtype, device)
            operands = [number if kind == "Scalar" else random_tensor((5, 17), dtype, device) for kind in kinds]
            if shape != (0, 3) or kinds == ("Scalar",) * len(kinds):
                check(op, input, *operands)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float32], **dtype_ids)
@pytest.mark.parametrize("numbers", [(0.5, 300), (3, 5), (True, 7), (2.5, 2**63), (1, 2**63), (1j, 200)], ids=str)
def test_two_numbers_are_multiplied_as_python_does(numbers, dtype):
    x = torch.ones(3, dtype=dtype)
    for a, b in (numbers, numbers[::-1]):
        if dtype == torch.bool and numbers == (1, 2**63):
            with pytest.raises(RuntimeError, match="Promotion for uint16"):  # torch's own sum of the two
                safe_inplace.addcmul(x, a, b)
        else:
            assert_bit_equal(safe_inplace.addcmul(x, a, b), x + a * b)


def test_a_product_of_numbers_that_torch_cannot_hold_is_refused():
    for call in (safe_inplace.addcmul, safe_inplace.addcmul_):
        x = torch.ones(3, dtype=torch.int64)
        with Untouched(x), pytest.raises(ValueError, match="no int64 holds their product; give one of them as a float"):
            call(x, 2**40, 2**40)


MANY_DTYPES = [torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dims", list(itertools.product([(), (1,)], repeat=3)), ids=str)
def test_mixed_dtypes_of_addcmul_are_those_of_the_formula(dims):
    for dtypes in itertools.product(MANY_DTYPES, repeat=3):
        x, a, b = (torch.full(shape, value, dtype=dtype) for shape, value, dtype in zip(dims, (1, 100, 2), dtypes, strict=True))
        torch.testing.assert_close(safe_inplace.addcmul(x, a, b), x + a * b)


def test_unsigned_numbers_beside_complex_ones():
    x, a, b = torch.ones(2, dtype=torch.complex64), torch.tensor([1, 2], dtype=torch.uint16), torch.ones(2)
    assert_bit_equal(safe_inplace.addcmul(x, a, b), x + a * b)


@rows
def test_operands_of_any_form_beside_each_other(op):
    """Two operands that each lack what the other has: nobody has the result's shape."""
    shapes = [(4, 1, 6), (5, 1), (6,), (1, 1, 1), ()]
    for chosen in itertools.product(shapes, repeat=1 + len(op.operands)):
        check(op, *(random_tensor(shape, torch.float32) for shape in chosen))


# Sizes of 1 and 0 leave strides open; torch's choice decides what a later view() accepts.
OPEN = {
    (3, 4, 1, 1): [(4, 1, 4, 4), (4, 1, 1, 1), (1, 3, 12, 12), (4, 1, 7, 2), (0, 1, 4, 4), (8, 2, 1, 1)],
    (1, 3, 2, 2): [(12, 4, 2, 1), (12, 1, 6, 3), (1, 1, 6, 3), (1, 4, 2, 1), (12, 2, 1, 6)],
    (4, 1): [(1, 1), (1, 16), (1, 0), (0, 1)],
    (2, 1, 0, 3): [(3, 3, 3, 1), (1, 1, 1, 1), (3, 7, 1, 3)],
    (1,): [(1,), (5,), (0,)],
}


@pytest.mark.parametrize("sizes", OPEN, ids=str)
@rows
def test_strides_of_sizes_of_1(op, sizes):
    laid_out = [torch.arange(1.0, 100).as_strided(sizes, strides) for strides in OPEN[sizes]]
    beside = [torch.ones(1), torch.ones(sizes[-1:]), torch.tensor(2.0)] + ([2.0] if op.name != "addcmul_" else [])
    formula = {"addcmul_": lambda input, a, b: input + a * b}.get(op.name, op.reference)
    for input, *operands in itertools.product(laid_out, *[laid_out + beside] * len(op.operands)):
        expected = formula(input, *operands)
        assert op.functional(input, *operands).stride() == expected.stride()
        narrow = [operand.bfloat16() if isinstance(operand, Tensor) else operand for operand in operands]
        if len(operands) == 1:
            assert op.functional(input, *narrow).stride() == formula(input, *narrow).stride()


def leaves(values):
    return [v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in values]


@pytest.mark.parametrize("layout", [layout for layout in SMALL if "expanded" not in layout.name], ids=str)
@rows
def test_gradcheck(op, layout):
    for values in rotations(layout.tensors(len(op.operands), torch.float64)):
        function = lambda *v: op.functional(*v, **op.parameters(-0.75))  # noqa: E731
        assert torch.autograd.gradcheck(function, leaves(values), check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, leaves(values))


@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype,) * 3 for dtype in FLOATING),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
    ],
    ids=lambda d: "_".join(map(short, d)),
)
@rows
def test_gradients(op, dtypes, device):
    """Of the caller's gradient and of one that only the engine holds."""
    for layout in MEDIUM:
        values = [layout.input(dtypes[0], device), *(layout.operand(i, dtypes[i + 1], device) for i in range(len(op.operands)))]
        for held, rotated in zip(("caller", "engine", "engine"), rotations(values), strict=False):
            check_gradients(op, rotated, held)


def check_gradients(op, values, held):
    """Against float64, where all need a gradient and where one does; the operands are left as they are."""
    alone = [[i == position for i in range(len(values))] for position in range(len(values))]
    for wanted in [[True] * len(values), *alone]:
        tensors = [v.detach().clone().requires_grad_(n) for v, n in zip(values, wanted, strict=True)]
        exact = [t.detach().double().requires_grad_(n) for t, n in zip(tensors, wanted, strict=True)]
        with Untouched(*tensors):
            result = op.functional(*tensors)
            upstream = torch.randn(result.shape, dtype=torch.float64, device=result.device).to(result.dtype)
            plain(op, *exact).backward(upstream.double())
            (result * 1 if held == "engine" else result).backward(upstream)
        for ours, theirs, n in zip(tensors, exact, wanted, strict=True):
            if n:
                assert ours.grad.dtype == ours.dtype
                terms = max(1, result.numel() // max(1, ours.numel()))
                assert_close(ours.grad, theirs.grad, grad_tolerance(ours.dtype, terms) + grad_tolerance(result.dtype))


@rows
def test_the_node(op):
    values = [torch.randn(3, requires_grad=True) for _ in op.arguments]
    result = op.functional(*values)
    assert result.grad_fn.name() == op.functional_node
    assert result._version == 0 and not result._is_view()
    assert not op.functional(*(v.detach() for v in values)).requires_grad
    with torch.no_grad():
        assert op.functional(*values).grad_fn is None


@rows
def test_saved_are_the_operands_themselves(op):
    for wanted in itertools.product([False, True], repeat=1 + len(op.operands)):
        values = [torch.randn(4, 5).requires_grad_(n) for n in wanted]
        with Saved() as saved:
            op.functional(*values)
        named = dict(zip(op.arguments, values, strict=True))
        needs = {name for name, n in zip(op.arguments, wanted, strict=True) if n}
        allowed = dict.fromkeys(n for name in needs for n in op.saves.get(name, ()))
        own = [t for t in saved.tensors if t.data_ptr() in {v.data_ptr() for v in values}]
        assert {t.data_ptr() for t in own} == {named[n].data_ptr() for n in allowed if n in named}
        assert len(saved.tensors) - len(own) == sum(n not in named for n in allowed)


@rows
def test_a_saved_operand_that_is_written_is_refused_in_backward(op):
    for position, name in enumerate(op.arguments):
        values = [torch.randn(3, requires_grad=True) * 1 for _ in op.arguments]
        result = op.functional(*values)
        with torch.no_grad():
            values[position].add_(1)
        saved = any(name in needed for needed in op.saves.values())
        if saved:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.sum().backward()
        else:
            result.sum().backward()


@rows
def test_opcheck(op):
    for kinds in op.kinds():
        operands = [torch.randn(4, requires_grad=True) if k == "Tensor" else 1.5 for k in kinds]
        overload = getattr(op.functional_packet, op.overload(*operands))
        torch.library.opcheck(overload, (torch.randn(3, 4, requires_grad=True), *operands))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "op, backend", [*((op, "aot_eager") for op in OPS), (OPS[-1], "inductor")], ids=lambda v: getattr(v, "name", v)
)
def test_compile(op, backend):
    def step(*values):
        return op.functional(values[0] * 2, *values[1:]).sin()

    values = [torch.randn(4, 5, requires_grad=True), *(torch.randn(5, requires_grad=True) for _ in op.operands)]
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    expected = torch.autograd.grad(step(*values).sum(), values)
    for ours, theirs in zip(torch.autograd.grad(compiled(*values).sum(), values), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@rows
def test_transforms(op):
    values = [torch.randn(3, 4, dtype=torch.float64) for _ in op.arguments]
    torch.testing.assert_close(torch.vmap(op.functional)(*values), plain(op, *values))
    ours = torch.func.grad(lambda *v: op.functional(*v).sum())(*values)
    torch.testing.assert_close(ours, torch.func.grad(lambda *v: plain(op, *v).sum())(*values))
    torch.testing.assert_close(torch.func.functionalize(op.functional)(*values), plain(op, *values))


@rows
def test_fakes_know_dtype_and_layout(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    values = [
        torch.randn(3, 4).t().to(dtypes[0]),
        *(torch.randn(4, 3).to(d) for d, _ in zip(dtypes[1:], op.operands, strict=False)),
    ]
    real = op.functional(*values)
    with FakeTensorMode() as mode:
        fake = op.functional_packet.default(*(mode.from_tensor(v) for v in values))
    assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())


CALLS = {
    "mul": lambda branch, vector, other: safe_inplace.mul(branch, vector),
    "mul_add": lambda branch, vector, other: safe_inplace.mul_add(branch, vector, other),
    "addcmul": lambda branch, vector, other: safe_inplace.addcmul(other, branch, vector),
    "addcmul turned": lambda branch, vector, other: safe_inplace.addcmul(other, vector, branch),
}


class TestMemory:
    """No full-size tensor besides the result, and in backward none where the saved operand's memory is nobody's any more."""

    SHAPE = (512, 2048)
    SIZE = 4 * 512 * 2048

    def test_forward_makes_the_result_only(self):
        x, v = torch.randn(self.SHAPE), torch.randn(self.SHAPE[1])
        for op in OPS:
            operands = [v for _ in op.operands]
            with Memory() as memory:
                op.functional(x, *operands)
            assert len(memory.allocations(self.SIZE)) == 1

    @pytest.mark.parametrize("view", [False, True], ids=["tensor", "view"])
    @pytest.mark.parametrize("call", CALLS)
    def test_backward_takes_a_temporary_that_it_saved(self, call, view):
        """A branch that only the graph holds, with a trained vector: its gradient is written over it. So F.linear's view."""
        leaf = torch.randn(self.SHAPE, requires_grad=True)
        vector = torch.randn(self.SHAPE[1], requires_grad=True)
        other = torch.randn(self.SHAPE)
        if view:
            result = CALLS[call]((leaf * 1).view(2, -1, self.SHAPE[1]), vector, other.view(2, -1, self.SHAPE[1]))
        else:
            result = CALLS[call](leaf * 1, vector, other)
        upstream = torch.randn(result.shape)
        with Memory() as memory:
            torch.autograd.grad(result, [leaf, vector], upstream)
        assert len(memory.allocations(self.SIZE)) == 1  # (leaf * 1)'s own gradient


class TestRefusals:
    @rows
    def test_shapes(self, op):
        values = [torch.zeros(3)] + [torch.zeros(4)] * len(op.operands)
        with Untouched(*values), pytest.raises(RuntimeError, match="must match the size of tensor"):
            op.functional(*values)

    @rows
    def test_types(self, op):
        rest = [1.0] * (len(op.operands) - 1)
        with pytest.raises(TypeError, match=rf"{op.functional_name}\(\): argument 'input' must be a torch\.Tensor.*wrap it"):
            op.functional(1.0, 2.0, *rest)
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor or a Python number"):
            op.functional(torch.zeros(2), "x", *rest)
        with pytest.raises(TypeError, match="is missing"):
            op.functional(torch.zeros(2))

    @rows
    def test_memory_that_is_gone(self, op):
        for position in range(1 + len(op.operands)):
            values = [torch.zeros(64) for _ in op.arguments]
            values[position].untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="has lost its memory"):
                op.functional(*values)


def test_under_autocast_a_block_keeps_the_stream_in_float32():
    linear, gamma, x = torch.nn.Linear(8, 8), torch.randn(8, requires_grad=True), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        branch = linear(x)
        result = safe_inplace.mul_add(branch, gamma, x)
    assert branch.dtype == torch.bfloat16 and result.dtype == torch.float32
    assert_rounded_once(
        result.detach(),
        (branch.double() * gamma.double() + x.double()).detach(),
        (branch.double() * gamma.double()).abs().detach() + x.abs(),
    )

"""First and second derivatives and forward mode, against finite differences and float64."""

import itertools

import pytest
import torch

from .checks import assert_bit_equal, assert_close, grad_tolerance
from .layouts import COMPLEX, FLOATING, LAZY, MEDIUM, SMALL, laid_out, random_tensor, short
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}

# Finite differences cost the square of the size: the layouts that differ in kind.
KINDS = [
    layout
    for layout in SMALL
    if layout.name
    not in {"last_dim_vector_3d", "one_element", "zero_dim_and_vector", "five_dims", "offset"}
]


def leaves(op, layout, dtype):
    """Leaves in the layout's own memory: gradcheck perturbs them where they are."""
    tensors = layout.tensors(len(op.operands), dtype)
    return [t.detach().requires_grad_() for t in tensors]


def keep_memory(tensor):
    """A non-leaf copy with the strides of a view of a larger base, where it has one."""
    return tensor.clone(memory_format=torch.preserve_format)


def applied(op, **parameter):
    return lambda input, *operands: op.function(keep_memory(input), *operands, **parameter)


@pytest.mark.parametrize("layout", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradcheck(op, dtype, layout):
    inputs = leaves(op, layout, dtype)
    if layout.memory != "expanded" and "expanded_operand" in layout.name:
        # gradcheck cannot perturb memory that several elements share
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
    parameter = op.parameters(-0.75)
    full = dtype == torch.float64
    assert torch.autograd.gradcheck(
        applied(op, **parameter),
        inputs,
        check_forward_ad=True,
        check_batched_grad=full,
        check_batched_forward_grad=full,
        check_undefined_grad=full,
    )


@pytest.mark.parametrize("layout", KINDS, ids=str)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradgradcheck(op, layout):
    inputs = leaves(op, layout, torch.float64)
    if "expanded_operand" in layout.name:
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(
        applied(op, **op.parameters(-0.75)),
        inputs,
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradgradcheck_complex(op):
    layout = next(kind for kind in KINDS if kind.name == "vector_and_row")
    assert torch.autograd.gradgradcheck(applied(op), leaves(op, layout, torch.complex128))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradcheck_of_every_subset(op):
    """What is saved depends on what needs a gradient."""
    for flags in itertools.product([False, True], repeat=len(op.arguments)):
        if not any(flags):
            continue
        tensors = [random_tensor((2, 3), torch.float64)]
        tensors += [random_tensor((3,), torch.float64) for _ in op.operands]
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
        assert torch.autograd.gradcheck(applied(op), tensors, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(applied(op), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradcheck_with_numbers(op, dtype):
    numbers = [0.5, -2, 1.5 - 0.5j] if dtype.is_complex else [0.5, -2]
    for kinds, number in itertools.product(op.kinds(), numbers):
        if "Scalar" not in kinds:
            continue
        inputs = [random_tensor((2, 3), dtype).requires_grad_()]
        inputs += [random_tensor((3,), dtype).requires_grad_() for k in kinds if k == "Tensor"]

        def call(input, *tensors):
            tensors = iter(tensors)
            operands = [number if k == "Scalar" else next(tensors) for k in kinds]
            return op.function(input.clone(), *operands, **op.parameters(-0.75))

        assert torch.autograd.gradcheck(
            call, inputs, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=True
        )
        assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("view", ["slice", "transpose", "select", "diagonal", "reshape", "chain"])
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradcheck_through_a_view(op, view):
    """The write goes through a view of a base that is used afterwards (CopySlices)."""
    pick = {
        "slice": lambda b: b[1:, :2],
        "transpose": lambda b: b.t(),
        "select": lambda b: b[1],
        "diagonal": lambda b: b.diagonal(),
        "reshape": lambda b: b.view(-1)[2:8],
        "chain": lambda b: b[1:].t()[1:],
    }[view]
    size = pick(torch.zeros(3, 3)).shape[-1]

    def call(leaf, *operands):
        base = leaf * 1
        view = pick(base)
        op.function(view, *operands)
        return base.sin(), view

    inputs = [random_tensor((3, 3), torch.float64).requires_grad_()]
    inputs += [random_tensor((size,), torch.float64).requires_grad_() for _ in op.operands]
    assert torch.autograd.gradcheck(
        call, inputs, check_forward_ad=True, check_batched_grad=True, check_undefined_grad=True
    )
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradcheck_of_a_base_under_its_views(op):
    """The base is written; a view taken before it follows."""

    def call(leaf, *operands):
        base = leaf * 1
        view = base[1:]
        op.function(base, *operands)
        return view * 2, base

    inputs = [random_tensor((3, 3), torch.float64).requires_grad_()]
    inputs += [random_tensor((3,), torch.float64).requires_grad_() for _ in op.operands]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def reference_grads(op, tensors, grad_output, parameter):
    """Gradients of the float64 formula, from values as they are in their own dtypes."""
    wide = torch.complex128 if tensors[0].is_complex() else torch.float64
    leaves = [
        t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_()
        for t in tensors
    ]
    result = op.reference(*leaves, **parameter)
    return torch.autograd.grad(result, leaves, grad_output.to(wide))


@pytest.mark.parametrize("dtype", FLOATING + COMPLEX, ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradients_equal_float64(op, dtype, device):
    """Low precision included: only the final rounding, no sum in a narrow dtype."""
    parameter = op.parameters(-0.75)
    for layout in MEDIUM + (LAZY if dtype.is_complex else []):
        tensors = layout.tensors(len(op.operands), dtype, device)
        tensors = [t.detach().requires_grad_() for t in tensors]
        grad_output = random_tensor(layout.shape, dtype, device)
        expected = reference_grads(op, tensors, grad_output, parameter)
        result = op.function(keep_memory(tensors[0]), *tensors[1:], **parameter)
        actual = torch.autograd.grad(result, tensors, grad_output)
        for tensor, a, e in zip(tensors, actual, expected, strict=True):
            assert a.dtype == tensor.dtype and a.shape == tensor.shape
            terms = max(1, grad_output.numel() // max(1, tensor.numel()))
            assert_close(a, e, grad_tolerance(dtype, terms))


# What the operands are broadcast along: everything, channels, positions, samples, nothing.
BROADCAST = [(1, 1, 1), (1, 40, 1, 1), (1, 40, 9, 8), (1, 9, 1), (3, 40, 1, 1), (3, 40, 9, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_gradients_in_another_order_of_memory_than_the_values(op, dtype, device):
    """Of each element the same bits in any order, and of sums the same value."""
    orders = [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (0, 2, 1, 3)]
    for small in BROADCAST:
        values = [random_tensor((3, 40, 9, 8), dtype, device)]
        values += [random_tensor(small, dtype, device) for _ in op.operands]
        grad_output = random_tensor((3, 40, 9, 8), dtype, device)
        exact = reference_grads(op, values, grad_output, {})
        first = None
        for order, of_grad, of_small in itertools.product(orders, orders, orders[::2]):
            tensors = [laid_out(values[0], order), *(laid_out(t, of_small) if t.dim() == 4 else t for t in values[1:])]
            tensors = [t.detach().requires_grad_() for t in tensors]
            result = op.function(keep_memory(tensors[0]), *tensors[1:])
            actual = torch.autograd.grad(result, tensors, laid_out(grad_output, of_grad))
            first = first or actual
            for a, f, e in zip(actual, first, exact, strict=True):
                if a.numel() == grad_output.numel():
                    assert_bit_equal(a, f)
                assert_close(a, e, grad_tolerance(dtype, grad_output.numel() // a.numel()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_reductions_accumulate_in_the_wide_dtype(op, dtype, device):
    """Ten thousand equal terms: a sum kept in half precision would stall far below."""
    rows = 10_000
    grad_output = torch.full((rows, 2), 0.25, dtype=dtype, device=device)
    tensors = [torch.ones(rows, 2, dtype=dtype, device=device)]
    tensors += [torch.ones(2, dtype=dtype, device=device, requires_grad=True) for _ in op.operands]
    expected = reference_grads(op, tensors, grad_output, {})[1:]
    grads = torch.autograd.grad(op.function(*tensors), tensors[1:], grad_output)
    for a, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2 * torch.finfo(dtype).eps, atol=0)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.complex64, torch.float32),
    (torch.complex128, torch.complex64),
    (torch.complex64, torch.float64),
]


@pytest.mark.parametrize(
    "dtype, operand_dtype", MIXED, ids=lambda d: short(d)
)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_mixed_dtypes_give_each_operand_its_own(op, dtype, operand_dtype, device):
    narrow = max(torch.finfo(dtype).eps, torch.finfo(operand_dtype).eps)
    for layout in MEDIUM:
        tensors = layout.tensors(len(op.operands), dtype, device, operand_dtype)
        tensors = [t.detach().requires_grad_() for t in tensors]
        grad_output = random_tensor(layout.shape, dtype, device)
        result = op.function(keep_memory(tensors[0]), *tensors[1:])
        assert result.dtype == dtype
        actual = torch.autograd.grad(result, tensors, grad_output)
        leaves = [
            t.detach().to(torch.complex128 if t.is_complex() else torch.float64).requires_grad_()
            for t in tensors
        ]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        expected = torch.autograd.grad(op.reference(*leaves), leaves, grad_output.to(wide))
        for tensor, a, e in zip(tensors, actual, expected, strict=True):
            assert a.dtype == tensor.dtype and a.shape == tensor.shape
            terms = max(1, grad_output.numel() // max(1, tensor.numel()))
            assert_close(a, e, 4 * narrow + terms * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_integer_operands_of_a_differentiable_input(op):
    """They have no gradient; the input's is right."""
    input = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for dtype in (torch.int64, torch.bool, torch.uint8):
        operands = [torch.tensor([1, 0, 1], dtype=dtype) for _ in op.operands]
        assert torch.autograd.gradcheck(lambda x: op.function(x.clone(), *operands), (input,))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_real_operands_of_a_complex_input(op):
    input = torch.randn(4, 3, dtype=torch.complex128, requires_grad=True)
    operands = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in op.operands]
    assert torch.autograd.gradcheck(applied(op), (input, *operands), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(applied(op), (input, *operands))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_third_derivative(op):
    inputs = [torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in op.arguments]

    def third(formula):
        value = formula(inputs[0].clone(), *inputs[1:]).pow(4).sum()
        for _ in range(3):
            value = sum(
                g.pow(2).sum() for g in torch.autograd.grad(value, inputs, create_graph=True)
            )
        return value

    torch.testing.assert_close(third(op.function), third(op.out_of_place))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_second_derivative_through_an_empty_view_follows_torch(op):
    """A write to nothing leaves some leaves without a gradient, torch's as ours; out of place it would be zero."""

    def grads(function):
        base = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        operands = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in op.operands]
        view = function(base.clone().narrow(0, 2, 0), *operands)
        first = torch.autograd.grad(view.sin().sum(), operands, create_graph=True)
        sum((g.tanh().sum() for g in first), base.sum()).backward()
        return [t.grad for t in (base, *operands)]

    ours, theirs = grads(op.function), grads(op.two_step)
    assert [g is None for g in ours] == [g is None for g in theirs]
    torch.testing.assert_close([g for g in ours if g is not None], [g for g in theirs if g is not None])


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_forward_mode_with_tangents_on_some(op):
    """Primal, tangent and what is absent, for every subset of dual arguments."""
    import torch.autograd.forward_ad as fwAD

    primals = [torch.randn(2, 3, dtype=torch.float64)]
    primals += [torch.randn(3, dtype=torch.float64) for _ in op.operands]
    tangents = [torch.randn_like(p) for p in primals]
    for flags in itertools.product([False, True], repeat=len(primals)):
        with fwAD.dual_level():
            def duals():
                return [
                    fwAD.make_dual(p.clone(), t.clone()) if f else p.clone()
                    for p, t, f in zip(primals, tangents, flags, strict=True)
                ]

            actual = fwAD.unpack_dual(op.function(*duals()))
            expected = fwAD.unpack_dual(op.out_of_place(*duals()))
            torch.testing.assert_close(actual.primal, expected.primal)
            if any(flags):
                torch.testing.assert_close(actual.tangent, expected.tangent)
            else:
                assert actual.tangent is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_sums_that_lie_otherwise_than_the_input(op, dtype, device):
    """The input's rows run along what is an outer dimension of the operands, whose gradients are contiguous."""

    def transposed():
        return random_tensor((40, 50, 6), dtype, device).transpose(1, 2)

    input = transposed().detach().requires_grad_()
    operands = [random_tensor((6, 50), dtype, device).requires_grad_() for _ in op.operands]
    tensors, grad_output = [input, *operands], transposed()
    assert input.stride() == grad_output.stride() == (300, 1, 6)
    found = torch.autograd.grad(op.function(keep_memory(input), *operands), tensors, grad_output)
    beside = [input.detach().contiguous().requires_grad_(), *operands]
    expected = torch.autograd.grad(op.function(beside[0].clone(), *operands), beside, grad_output.contiguous())
    for one, other in zip(found, expected, strict=True):
        # Sums of forty terms in another order, in float32 at least, rounded once.
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=1e-4 if dtype != torch.float64 else 1e-12)

"""Backward takes over memory that nobody else can see, and only such memory."""

import gc
import itertools
from typing import ClassVar

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import safe_inplace

from .checks import Memory, assert_bit_equal
from .layouts import random_tensor, short
from .op_table import OPS
from .programs.backward.runs import Fresh

op_ids = {"ids": lambda op: op.name}
SHAPE = (256, 512)
FULL = 256 * 512 * 4


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


class Sink(torch.autograd.Function):
    """Ends the graph without memory of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def weighted(input, grad):
    """A loss whose backward hands one fresh tensor, the product's gradient, to the engine."""
    return (input * grad).sum()


def make(op, operand_shape=SHAPE[1:], trainable=True, dtype=torch.float32, device="cpu"):
    leaf = random_tensor(SHAPE, dtype, device).requires_grad_()
    operands = [
        random_tensor(operand_shape, dtype, device).requires_grad_(trainable) for _ in op.operands
    ]
    return leaf, operands


def gradients(op, leaf, operands, grad):
    tensors = [t for t in (leaf, *operands) if t.requires_grad]
    result = op.out_of_place(leaf * 1, *operands)
    return dict(zip(map(id, tensors), torch.autograd.grad(result, tensors, grad), strict=True))


def check_grads(op, leaf, operands, grad, names=None):
    expected = gradients(op, leaf, operands, grad)
    for tensor in (leaf, *operands):
        if id(tensor) in expected and tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected[id(tensor)], rtol=1e-4, atol=1e-3)


SHAPES = pytest.mark.parametrize("operand_shape", [(512,), (256, 1), ()], ids=str)
TRAINABLE = pytest.mark.parametrize("trainable", [True, False])


@TRAINABLE
@SHAPES
def test_no_full_size_tensor_for_the_engines_gradient(op, operand_shape, trainable):
    """The incoming gradient becomes the input's; the operands' are reduced on the way."""
    leaf, operands = make(op, operand_shape, trainable)
    input = Sink.apply(leaf)
    op.function(input, *operands)
    grad = torch.randn(SHAPE)
    total = weighted(input, grad)
    with Memory() as memory:
        total.backward()
    assert len(memory.allocations(FULL)) == 1, "more than the product's own gradient"
    assert memory.peak < FULL + FULL // 2
    check_grads(op, leaf, operands, grad)


@TRAINABLE
@SHAPES
def test_one_full_size_tensor_for_a_callers_gradient(op, operand_shape, trainable):
    """`backward(grad)`: the caller may look at `grad` afterwards, so it is not written."""
    leaf, operands = make(op, operand_shape, trainable)
    # Behind a product: a leaf that a Function of somebody else's leads to might keep the gradient, and would get a copy.
    input = Sink.apply(leaf * 1)
    op.function(input, *operands)
    grad = torch.randn(SHAPE)
    before = grad.clone()
    with Memory() as memory:
        input.backward(grad)
    passes_on = op.name in ("add_", "addcmul_")
    assert len(memory.allocations(FULL)) <= (0 if passes_on else 1)
    assert_bit_equal(grad, before)
    check_grads(op, leaf, operands, grad)


@pytest.mark.parametrize("name", ["mul_", "mul_add_", "add_mul_"])
def test_a_saved_copy_becomes_the_gradient_computed_from_it(name):
    """Full-size trainable scale: its gradient is written over the saved old input."""
    op = next(o for o in OPS if o.name == name)
    leaf = random_tensor(SHAPE, torch.float32).requires_grad_()
    scale = random_tensor(SHAPE, torch.float32).requires_grad_()
    fixed = torch.randn(SHAPE[1:])
    operands = {"mul_": [scale], "mul_add_": [scale, fixed], "add_mul_": [fixed, scale]}[name]
    input = Sink.apply(leaf)
    op.function(input, *operands)
    grad = torch.randn(SHAPE)
    total = weighted(input, grad)
    with Memory() as memory:
        total.backward()
    assert len(memory.allocations(FULL)) == 1, "more than the product's own gradient"
    check_grads(op, leaf, operands, grad)


REASONS = [
    "tensor_hook",
    "node_prehook",
    "retain_grad",
    "callers_gradient",
    "two_consumers",
    "leaf_took_a_view",
    "gradient_is_a_view",
    "gradient_has_a_view",
    "expanded_gradient",
    "non_contiguous_gradient",
    "overlapping_storage_in_a_hook",
    "numpy_alias",
]


class Given(torch.autograd.Function):
    """Its backward returns whatever the test prepared."""

    @staticmethod
    def forward(ctx, x, make):
        ctx.make = make
        return x.sum()

    @staticmethod
    def backward(ctx, _):
        return ctx.make(), None


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("reason", REASONS)
def test_memory_that_somebody_else_sees_is_never_written(op, reason, trainable):
    """The held tensor keeps its values, and the gradients are right all the same."""
    leaf, operands = make(op, trainable=trainable)
    input = Fresh.apply(leaf)
    op.function(input, *operands)
    grad = torch.randn(SHAPE)
    held = []

    def keep(value):
        held.append((value, value.detach().clone()))
        return value

    if reason == "tensor_hook":
        input.register_hook(lambda g: held.append((g, g.clone())) and None)
        Given.apply(input, grad.clone).backward()
    elif reason == "node_prehook":
        input.grad_fn.register_prehook(lambda gs: held.append((gs[0], gs[0].clone())) and None)
        Given.apply(input, grad.clone).backward()
    elif reason == "retain_grad":
        input.retain_grad()
        Given.apply(input, grad.clone).backward()
        held.append((input.grad, grad))
    elif reason == "callers_gradient":
        input.backward(keep(grad.clone()))
    elif reason == "two_consumers":
        # one function returns the same tensor to two nodes
        other = torch.zeros(SHAPE, requires_grad=True)
        (Fresh.apply(other) + input).backward(keep(grad.clone()))
        held.append((other.grad, grad))
    elif reason == "leaf_took_a_view":
        # Python has not seen this gradient, and its tensor has one holder: only the storage's count tells
        other = torch.zeros(SHAPE).flatten().requires_grad_()
        weighted(other.view(SHAPE) + input, grad).backward()
        held.append((other.grad.view(SHAPE), grad))
    elif reason == "gradient_is_a_view":
        base = torch.cat([grad, grad])
        keep(base)
        Given.apply(input, lambda: base[: SHAPE[0]]).backward()
    elif reason == "gradient_has_a_view":
        def make_viewed():
            fresh = grad.clone()
            keep(fresh[1:])
            return fresh

        Given.apply(input, make_viewed).backward()
    elif reason == "expanded_gradient":
        grad = torch.full(SHAPE, 0.5)
        Given.apply(input, lambda: keep(torch.tensor(0.5)).expand(SHAPE)).backward()
    elif reason == "non_contiguous_gradient":
        base = torch.randn(SHAPE[1], SHAPE[0])
        grad = base.t().clone()
        keep(base)
        Given.apply(input, base.t).backward()
    elif reason == "overlapping_storage_in_a_hook":
        input.register_hook(lambda g: held.append((g[0], g[0].clone())) and None)
        Given.apply(input, grad.clone).backward()
    elif reason == "numpy_alias":
        array = grad.clone().numpy()
        Given.apply(input, lambda: torch.from_numpy(array)).backward()
        keep(torch.from_numpy(array))
        assert torch.equal(torch.from_numpy(array), grad)

    assert held
    for value, before in held:
        assert_bit_equal(value.detach(), before)
    check_grads(op, leaf, operands, grad)


def test_sum_and_mean_losses(op):
    """`y.sum().backward()`: one element seen at every position."""
    for reduce in (torch.Tensor.sum, torch.Tensor.mean):
        leaf, operands = make(op)
        input = leaf * 1
        reduce(op.function(input, *operands)).backward()
        scale = 1.0 if reduce is torch.Tensor.sum else 1.0 / leaf.numel()
        check_grads(op, leaf, operands, torch.full(SHAPE, scale))


def test_two_consumers_of_the_result(op):
    """The engine sums two gradients; each branch's own gradient stays what it was."""
    leaf, operands = make(op)
    input = leaf * 1
    op.function(input, *operands)
    seen = []
    left, right = input.view_as(input), input.view_as(input)
    for branch in (left, right):
        branch.register_hook(lambda g: seen.append((g, g.clone())) and None)
    weights = torch.randn(SHAPE), torch.randn(SHAPE)
    ((left * weights[0]).sum() + (right * weights[1]).sum()).backward()
    for value, before in seen:
        assert_bit_equal(value, before)
    check_grads(op, leaf, operands, weights[0] + weights[1])


def test_residual_shares_the_gradient(op):
    """y = x + op(f(x)): the same gradient flows into both terms of the sum."""
    leaf, operands = make(op)
    branch = leaf.sin()
    clone = branch.clone()
    op.function(clone, *operands)
    grad = torch.randn(SHAPE)
    (leaf + clone).backward(grad.clone())
    value = leaf.detach().clone().requires_grad_()
    expected = value + op.out_of_place(value.sin(), *operands)
    (reference,) = torch.autograd.grad(expected, value, grad)
    torch.testing.assert_close(leaf.grad, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operand_shape", [(512,), SHAPE], ids=str)
def test_kept_graph_reads_its_saved_values_again(op, operand_shape):
    leaf, operands = make(op, operand_shape)
    tensors = [leaf, *operands]
    grad = torch.randn(SHAPE)
    total = weighted(op.function(leaf * 1, *operands), grad)
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    before = [g.clone() for g in first]
    second = torch.autograd.grad(total, tensors, retain_graph=True)
    third = torch.autograd.grad(total, tensors)
    for values in zip(before, first, second, third, strict=True):
        for value in values[1:]:
            assert_bit_equal(value, values[0])


@pytest.mark.parametrize("operand_shape", [(512,), SHAPE], ids=str)
def test_recorded_backward_takes_no_memory(op, operand_shape):
    """create_graph: every value may be read again by the second backward."""
    leaf, operands = make(op, operand_shape, dtype=torch.float64)
    tensors = [leaf, *operands]
    weight = torch.randn(SHAPE, dtype=torch.float64)

    def second(formula):
        grad = weight.clone().requires_grad_()
        result = formula(leaf.sin(), *operands)
        first = torch.autograd.grad(result, tensors, grad.exp(), create_graph=True)
        before = [g.detach().clone() for g in first]
        total = sum(g.pow(2).sum() for g in first)
        grads = torch.autograd.grad(
            total, [*tensors, grad], allow_unused=True, materialize_grads=True
        )
        for value, kept in zip(first, before, strict=True):
            assert_bit_equal(value.detach(), kept)
        return grads

    for a, e in zip(second(op.function), second(op.out_of_place), strict=True):
        torch.testing.assert_close(a, e)


def test_gradients_of_leaves_are_separate_memory(op):
    """Writing one `.grad` never changes another, nor what the caller passed."""
    for operand_shape in (SHAPE, (512,)):
        leaf, operands = make(op, operand_shape)
        grad = torch.randn(SHAPE)
        passed = grad.clone()
        op.function(leaf * 1, *operands).backward(passed)
        everything = [leaf.grad, *[o.grad for o in operands], passed]
        for written, other in itertools.permutations(everything, 2):
            before = other.clone()
            written.add_(1)
            assert_bit_equal(other, before)
            written.sub_(1)


def test_accumulation_into_existing_grads(op):
    leaf, operands = make(op)
    grad = torch.randn(SHAPE)
    for _ in range(2):
        op.function(leaf * 1, *operands).backward(grad)
    expected = gradients(op, leaf, operands, grad)
    for tensor in (leaf, *operands):
        torch.testing.assert_close(
            tensor.grad, 2 * expected[id(tensor)], rtol=1e-4, atol=1e-3
        )


def test_chain_of_ops_reuses_one_gradient(op):
    """Ten in-place ops in a row need one gradient between them."""
    leaf, operands = make(op, trainable=False)
    input = Sink.apply(leaf)
    for _ in range(10):
        op.function(input, *operands)
    total = weighted(input, torch.randn(SHAPE))
    with Memory() as memory:
        total.backward()
    assert len(memory.allocations(FULL)) == 1


def test_subclass_gradient_is_not_taken(op):
    leaf, operands = make(op, trainable=False)
    input = Fresh.apply(leaf)
    op.function(input, *operands)
    grad = torch.randn(SHAPE)
    first, second = grad.clone(), grad.clone()
    try:
        Given.apply(input, lambda: TwoTensor(first, second)).backward()
    except RuntimeError as error:
        pytest.skip(f"torch itself refuses the gradient: {error}")
    assert_bit_equal(first, grad)
    assert_bit_equal(second, grad)


@pytest.mark.parametrize("form", ["function", "functional"])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.Tensor.clone])
def test_a_gradient_in_the_memory_of_a_saved_value_is_another_tensor(op, form, kind):
    """Its `.grad`, its attributes and its class are the saved value's own."""
    operands = []
    for _ in op.operands:
        operand = kind(torch.full((8,), 3.0)).requires_grad_()
        (7 * operand).sum().backward()
        operand.requires_grad_(False).add_(1)
        operand.mark = "frozen"
        operands.append(operand)
    leaf = torch.randn(8, requires_grad=True)
    expected = gradients(op, leaf, [torch.full((8,), 4.0) for _ in op.operands], torch.ones(8))[id(leaf)]
    got = []
    input = leaf * 1
    input.grad_fn.register_prehook(lambda grads: got.append(grads[0]))
    result = getattr(op, form)(input, *operands)
    del operands, operand, input
    grad = torch.ones(8)
    result.backward(grad)
    (gradient,) = got
    assert_bit_equal(gradient, expected)
    assert type(gradient) is torch.Tensor and gradient.grad is None and not hasattr(gradient, "mark")
    assert gc.is_tracked(gradient)
    if gradient is not grad:
        assert gradient._version == 0
        gradient.resize_(4)


def test_a_hook_that_kept_an_earlier_gradient_is_not_written_by_a_later_backward(op):
    leaf, operands = make(op)
    kept = []
    input = leaf * 1
    op.function(input, *operands)
    input.register_hook(lambda g: kept.append((g, g.clone())) and None)
    total = input.pow(2).sum()
    total.backward(retain_graph=True)
    total.backward()
    for value, before in kept:
        assert_bit_equal(value, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
def test_reuse_in_every_dtype_gives_the_same_bits(op, dtype):
    """Gradients with reuse and without are the same numbers."""

    def run(hold):
        input = Fresh.apply(leaf)
        op.function(input, *operands)
        if hold:
            held = grad.clone()
            return torch.autograd.grad(input, [leaf, *operands], held)
        return torch.autograd.grad(Given.apply(input, grad.clone), [leaf, *operands])

    leaf, operands = make(op, dtype=dtype)
    grad = random_tensor(SHAPE, dtype)
    for reused, allocated in zip(run(False), run(True), strict=True):
        assert_bit_equal(reused, allocated)


def test_views_under_copy_slices(op):
    """The gradient of the written part comes out of CopySlices, the rest stays."""
    leaf, operands = make(op)
    base = leaf * 1
    op.function(base[:100], *operands)
    kept = []
    base.register_hook(lambda g: kept.append((g, g.clone())) and None)
    grad = torch.randn(SHAPE)
    Given.apply(base, grad.clone).backward()
    for value, before in kept:
        assert_bit_equal(value, before)
    value = leaf.detach().clone().requires_grad_()
    plain = torch.cat([op.out_of_place(value[:100], *operands), value[100:]])
    (expected,) = torch.autograd.grad(plain, value, grad)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)


class Viewing(torch.autograd.Function):
    """Hands on a view of its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.view_as(grad)


class Keeping(Viewing):
    """And keeps the gradient."""

    kept: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    @staticmethod
    def backward(ctx, grad):
        Keeping.kept.append((grad, grad.clone()))
        return grad.view_as(grad)


# How a leaf becomes an operand of shape (2, 4): by what hands its gradient on as it came, or a view of it.
ROUTES = {
    "leaf": ((2, 4), lambda leaf: leaf),
    "view": ((8,), lambda leaf: leaf.view(2, 4)),
    "transposed": ((4, 2), lambda leaf: leaf.t()),
    "views": ((8, 1), lambda leaf: leaf.squeeze(1).view(4, 2).t()),
    "clone": ((2, 4), lambda leaf: leaf.clone()),
    "sum": ((2, 4), lambda leaf: leaf + torch.ones(2, 4)),
    "sum_of_views": ((8,), lambda leaf: leaf.view(2, 4) + torch.ones(2, 4)),
    "function": ((8,), lambda leaf: Viewing.apply(leaf).view(2, 4)),
    "cat": ((4,), lambda leaf: torch.cat([leaf, torch.ones(4)]).view(2, 4)),
    "stack": ((4,), lambda leaf: torch.stack([leaf, torch.ones(4)])),
    "addmm": ((2, 4), lambda leaf: torch.addmm(leaf, torch.ones(2, 1), torch.ones(1, 4))),
}

# How a gradient of all threes comes to the op.
GRADIENTS = {
    "callers": lambda result, grad: result.backward(grad),
    "callers_viewed": lambda result, grad: result.view(8).backward(grad.view(8)),
    "callers_transposed": lambda result, grad: result.t().backward(grad.t()),
    "part_of_callers": lambda result, grad: torch.cat([result, result]).backward(torch.cat([grad, grad])),
    "kept": lambda result, grad: (Keeping.apply(result) * grad).sum().backward(),
    "expanded": lambda result, grad: (result.sum() * 3).backward(),
    "engines": lambda result, grad: (result * grad).sum().backward(),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable_input", "frozen_input"])
@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("shape, route", ROUTES.values(), ids=ROUTES)
def test_no_leaf_keeps_memory_that_somebody_else_sees(op, shape, route, gradient, frozen):
    """Over several steps that add to `.grad`: each adds the same, and nothing that others hold changes."""
    grad = torch.full((2, 4), 3.0)
    w = torch.rand(2, 4, requires_grad=not frozen)
    operands = [torch.rand(shape, requires_grad=True) for _ in op.operands]
    shift = torch.rand(shape, requires_grad=True)
    leaves = [operand for operand in (w, *operands, shift) if operand.requires_grad]
    Keeping.kept.clear()

    def step(op_form, add):
        result = add(op_form(w * 1, *map(route, operands)), route(shift))
        gradient(result, grad)

    step(op.out_of_place, lambda a, b: a + b)
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    Keeping.kept.clear()
    grad = torch.full((2, 4), 3.0)
    for count in (1, 2, 3):
        step(op.function, safe_inplace.add_)
        for leaf, once in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, count * once)
        assert_bit_equal(grad, torch.full((2, 4), 3.0))
        for kept, before in Keeping.kept:
            assert_bit_equal(kept, before)
    seen = [grad, *(leaf.grad for leaf in leaves), *(kept for kept, _ in Keeping.kept)]
    for leaf in leaves:
        shared = [t for t in seen if t is not leaf.grad and t.untyped_storage()._cdata == leaf.grad.untyped_storage()._cdata]
        assert not shared


def test_parameters_that_share_a_gradient_have_grads_of_their_own(op):
    """Two ops meet in a sum, one through a view: both get the sum's gradient."""
    w = torch.rand(8, requires_grad=True)
    one = [torch.rand(8, requires_grad=True) for _ in op.operands]
    other = [torch.rand(2, 4, requires_grad=True) for _ in op.operands]

    def total(form):
        return ((form(w * 1, *one).view(2, 4) + form(w.view(2, 4) * 1, *other)) * 3.0).sum()

    leaves = [w, *one, *other]
    expected = torch.autograd.grad(total(op.out_of_place), leaves)
    for count in (1, 2, 3):
        total(op.function).backward()
        for leaf, once in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, count * once)


def test_a_grad_that_a_hook_takes_away_is_given_new_memory(op):
    """An optimizer in backward sets `.grad` to None: what comes next is kept again, not added."""
    grad = torch.full((2, 4), 3.0)
    operands = [torch.rand(2, 4, requires_grad=True) for _ in op.operands]
    taken = []
    for operand in operands:

        def take(leaf):
            taken.append((leaf.grad, leaf.grad.clone()))
            leaf.grad = None

        operand.register_post_accumulate_grad_hook(take)
        operand.grad = torch.zeros(2, 4)
    for _ in range(3):
        op.function(torch.rand(2, 4), *operands).view(8).backward(grad.view(8))
    assert_bit_equal(grad, torch.full((2, 4), 3.0))
    for value, before in taken:
        assert_bit_equal(value, before)


def test_accumulation_copies_nothing(op):
    """Where `.grad` is there already the gradient is added to it, whoever else sees it."""
    operands = [random_tensor(SHAPE, torch.float32).requires_grad_() for _ in op.operands]
    input = op.function(torch.rand(SHAPE), *operands)
    for operand in operands:
        operand.grad = torch.zeros(SHAPE)
    grad = torch.ones(SHAPE)
    with Memory() as memory:
        input.backward(grad)
    computed = sum(1 for position in range(1, 1 + len(op.operands)) if op.saves.get(op.arguments[position]))
    assert len(memory.allocations(FULL)) <= computed


@pytest.mark.parametrize("alpha", [1, -1, 2, 0.5])
def test_the_gradient_of_a_sum_with_a_multiple_is_the_leafs_own(alpha):
    """torch's kernel adds the multiple; torch's node would give the caller's memory to the leaf behind a view."""
    leaf, other, grad = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True), torch.ones(6)
    for step in (1, 2, 3):
        safe_inplace.add_(leaf.clone(), other, alpha=alpha).view(6).backward(grad)
        assert torch.equal(grad, torch.ones(6))
        assert torch.equal(leaf.grad, torch.full((2, 3), float(step)))
        assert torch.equal(other.grad, torch.full((2, 3), float(alpha * step)))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_a_recorded_gradient_is_the_incoming_tensor_where_torchs_is(op, shape):
    """A view of it would be recorded, and its backward hand memory on that somebody else sees."""

    def handed_on(write):
        leaves = [random_tensor(shape, torch.float32).requires_grad_() for _ in op.arguments]
        given = random_tensor(shape, torch.float32).requires_grad_()
        input = leaves[0].clone()
        write(input, *leaves[1:])
        gradients = torch.autograd.grad(input, leaves, given, create_graph=True)
        return [gradient is given for gradient in gradients]

    expected = handed_on(op.two_step)
    assert any(expected) == (op.saves.keys() != set(op.arguments))
    assert handed_on(op.function) == expected

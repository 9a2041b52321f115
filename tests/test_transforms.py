"""torch.func: grad, vjp, jvp, vmap and their nests, against the out-of-place formula."""

import itertools
import re

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from .layouts import random_tensor
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


def arguments(op, shape=(2, 3), operand=(3,)):
    return [random_tensor(shape, torch.float64)] + [
        random_tensor(operand, torch.float64) for _ in op.operands
    ]


def ours(op):
    return lambda input, *operands: op.function(input.clone(), *operands)


def loss(formula):
    return lambda *values: formula(*values).pow(3).sum()


def same(transform, op, *values):
    actual = transform(ours(op))(*values)
    expected = transform(op.out_of_place)(*values)
    torch.testing.assert_close(actual, expected)
    return actual


def test_grad(op):
    everything = tuple(range(len(op.arguments)))
    same(lambda f: grad(loss(f), argnums=everything), op, *arguments(op))


def test_grad_of_grad(op):
    same(lambda f: grad(lambda *v: grad(loss(f))(*v).pow(2).sum()), op, *arguments(op))


def test_vjp(op):
    def transform(f):
        def call(*values):
            output, pull = vjp(f, *values)
            return output, pull(output.sin())

        return call

    same(transform, op, *arguments(op))


def test_jvp(op):
    def transform(f):
        return lambda *values: jvp(f, values, tuple(v.cos() for v in values))

    same(transform, op, *arguments(op))


def test_jvp_of_jvp(op):
    def transform(f):
        def inner(*values):
            return jvp(f, values, tuple(v.cos() for v in values))[1]

        return lambda *values: jvp(inner, values, tuple(v.sin() for v in values))

    same(transform, op, *arguments(op))


def test_jacobians(op):
    everything = tuple(range(len(op.arguments)))
    for jacobian in (jacrev, jacfwd):
        same(lambda f: jacobian(f, argnums=everything), op, *arguments(op))


def test_hessian(op):
    everything = tuple(range(len(op.arguments)))
    same(lambda f: hessian(loss(f), argnums=everything), op, *arguments(op))


def test_grad_of_jvp_and_jvp_of_grad(op):
    def grad_of_jvp(f):
        def directional(*values):
            return jvp(loss(f), values, tuple(torch.ones_like(v) for v in values))[1]

        return grad(directional)

    def jvp_of_grad(f):
        return lambda *values: jvp(
            grad(loss(f)), values, tuple(torch.ones_like(v) for v in values)
        )

    same(grad_of_jvp, op, *arguments(op))
    same(jvp_of_grad, op, *arguments(op))


def test_vmap_over_every_argument_set(op):
    """Batched operands beside an unbatched clone are refused, in torch's words."""
    for batched in itertools.product([True, False], repeat=len(op.arguments)):
        if not any(batched):
            continue
        values = arguments(op)
        values = [
            torch.stack([v, v.sin(), v * 2]) if b else v for v, b in zip(values, batched, strict=True)
        ]
        in_dims = tuple(0 if b else None for b in batched)
        expected = vmap(op.out_of_place, in_dims)(*values)
        if batched[0]:
            torch.testing.assert_close(vmap(ours(op), in_dims)(*values), expected)
            continue
        with pytest.raises(RuntimeError) as theirs:
            vmap(lambda x, *o: op.two_step(x.clone(), *o), in_dims)(*values)
        with pytest.raises(RuntimeError) as refused:
            vmap(ours(op), in_dims)(*values)
        if op.torch_method:
            assert str(refused.value) == str(theirs.value)
        else:
            assert "vmap" in str(refused.value)


def test_vmap_writes_its_input(op):
    """vmap over the tensor itself, no clone: the caller's memory is written."""
    values = arguments(op, shape=(4, 2, 3))
    expected = op.out_of_place(*values)
    pointer, version = values[0].data_ptr(), values[0]._version
    result = vmap(op.function, (0, *[None] * len(op.operands)))(*values)
    torch.testing.assert_close(values[0], expected)
    torch.testing.assert_close(result, expected)
    assert values[0].data_ptr() == pointer
    assert values[0]._version > version


def test_vmap_with_other_dims(op):
    values = arguments(op)
    batch = [torch.stack([values[0], values[0].sin()], dim=1)]
    batch += [torch.stack([v, v.cos()], dim=-1) for v in values[1:]]
    in_dims = (1, *[-1] * len(op.operands))
    actual = vmap(ours(op), in_dims, out_dims=2)(*batch)
    torch.testing.assert_close(actual, vmap(op.out_of_place, in_dims, out_dims=2)(*batch))


def test_nested_vmap(op):
    values = [random_tensor((4, 5, 2, 3), torch.float64)]
    values += [random_tensor((5, 3), torch.float64) for _ in op.operands]
    inner = (0, *[0] * len(op.operands))
    outer = (0, *[None] * len(op.operands))
    actual = vmap(vmap(ours(op), inner), outer)(*values)
    torch.testing.assert_close(actual, vmap(vmap(op.out_of_place, inner), outer)(*values))


def test_vmap_with_numbers(op):
    input = random_tensor((4, 2, 3), torch.float64)
    numbers = [1.5, -0.5][: len(op.operands)]
    actual = vmap(lambda x: op.function(x.clone(), *numbers))(input)
    torch.testing.assert_close(actual, op.out_of_place(input, *numbers))


def test_per_sample_gradients(op):
    """vmap of grad."""
    values = arguments(op, shape=(4, 2, 3))
    in_dims = (0, *[None] * len(op.operands))
    everything = tuple(range(len(op.arguments)))
    same(lambda f: vmap(grad(loss(f), argnums=everything), in_dims), op, *values)


def test_grad_of_vmap(op):
    values = arguments(op, shape=(4, 2, 3))
    in_dims = (0, *[None] * len(op.operands))
    everything = tuple(range(len(op.arguments)))
    same(lambda f: grad(loss(vmap(f, in_dims)), argnums=everything), op, *values)


def test_jvp_of_vmap_and_vmap_of_jvp(op):
    values = arguments(op, shape=(4, 2, 3))
    in_dims = (0, *[None] * len(op.operands))

    def jvp_of_vmap(f):
        return lambda *v: jvp(vmap(f, in_dims), v, tuple(t.cos() for t in v))

    def vmap_of_jvp(f):
        return vmap(lambda *v: jvp(f, v, tuple(t.cos() for t in v)), in_dims)

    same(jvp_of_vmap, op, *values)
    same(vmap_of_jvp, op, *values)


def test_write_into_an_argument_of_grad(op):
    """To `grad` its argument is a leaf that requires grad."""
    values = arguments(op)
    before = values[0].clone()
    with pytest.raises(RuntimeError) as theirs:
        grad(loss(op.two_step))(*values)
    with pytest.raises(RuntimeError) as refused:
        grad(loss(op.function))(*values)
    assert str(refused.value) == str(theirs.value)
    assert torch.equal(values[0], before)


def test_write_to_a_captured_tensor_under_grad_is_refused_as_torch(op):
    captured = random_tensor((2, 3), torch.float64)
    before = captured.clone()

    def mutate(formula):
        def call(value):
            formula(captured, *[value] * len(op.operands))
            return captured.sum()

        return call

    value = random_tensor((3,), torch.float64)
    with pytest.raises(RuntimeError) as theirs:
        grad(mutate(op.two_step))(value)
    with pytest.raises(RuntimeError) as refused:
        grad(mutate(op.function))(value)
    # the words name the aten op that the formula is written with
    assert re.sub(r"\(\w+::.*?\)", "", str(refused.value)) == re.sub(
        r"\(\w+::.*?\)", "", str(theirs.value)
    )
    assert torch.equal(captured, before)


def test_aliased_operands_under_transforms(op):
    value = random_tensor((2, 3), torch.float64)

    def aliased(formula):
        def call(leaf):
            input = leaf * 1
            return formula(input, *[input] * len(op.operands))

        return call

    for transform in (
        lambda f: grad(lambda v: f(v).pow(2).sum()),
        lambda f: vmap(f),
        lambda f: vmap(grad(lambda v: f(v).pow(2).sum())),
        lambda f: lambda v: jvp(f, (v,), (v.cos(),)),
        lambda f: hessian(lambda v: f(v).sum()),
    ):
        actual = transform(aliased(op.function))(value)
        torch.testing.assert_close(actual, transform(aliased(op.out_of_place))(value))


def test_functional_call(op):
    class Block(torch.nn.Module):
        def __init__(self, formula):
            super().__init__()
            self.formula = formula
            self.linear = torch.nn.Linear(3, 3, dtype=torch.float64)
            self.vectors = torch.nn.ParameterList(
                torch.randn(3, dtype=torch.float64) for _ in op.operands
            )

        def forward(self, x):
            return self.formula(self.linear(x), *self.vectors)

    block, plain = Block(op.function), Block(op.out_of_place)
    parameters = {k: v.detach() for k, v in block.named_parameters()}
    x = random_tensor((4, 3), torch.float64)

    def total(module):
        return lambda p, sample: functional_call(module, p, (sample,)).pow(2).sum()

    for transform in (grad, lambda f: vmap(grad(f), (None, 0))):
        actual = transform(total(block))(parameters, x)
        expected = transform(total(plain))(parameters, x)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", [op for op in OPS if op.parameter], ids=lambda op: op.name, indirect=True)
def test_parameter_under_transforms(op):
    """The keyword parameter survives every transform."""
    values = arguments(op, shape=(4, 2, 3))
    in_dims = (0, *[None] * len(op.operands))

    def with_parameter(f):
        return lambda *v: f(*v, **{op.parameter: -0.75})

    def written(*v, **parameter):
        return op.function(v[0].clone(), *v[1:], **parameter)

    for transform in (
        lambda f: vmap(f, in_dims),
        lambda f: grad(loss(f)),
        lambda f: vmap(grad(loss(f)), in_dims),
        lambda f: lambda *v: jvp(f, v, tuple(t.cos() for t in v)),
    ):
        actual = transform(with_parameter(written))(*values)
        torch.testing.assert_close(actual, transform(with_parameter(op.out_of_place))(*values))

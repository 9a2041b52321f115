"""The op tables of the C++ core, of the package and of the tests say the same, and the tests' own follows from its formulas."""

import inspect

import pytest
import torch

import safe_inplace
from safe_inplace import _C

from .checks import Saved
from .op_table import BY_NAME, OPS


def test_cpp_table_equals_test_table():
    cpp = [(row["names"], tuple(row["operands"]), row["parameter"], row["nodes"]) for row in _C.op_table()]
    assert sorted(cpp) == sorted(
        ((op.name, op.functional_name), op.operands, op.parameter, (op.node, op.functional_node)) for op in OPS
    )


def scalars(op, requires_grad):
    """A value of its own for each argument; the input is not a leaf."""
    values = {name: torch.randn((), dtype=torch.float64).requires_grad_(name in requires_grad) for name in op.arguments}
    return values | {"input": values["input"].clone()}


def with_and_without_parameter(op):
    return [{}] if op.parameter is None else [{}, op.parameters(2.5)]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_what_a_gradient_is_computed_from_follows_from_the_formula(op):
    """The values that the derivative by an argument depends on: those by which its own derivative is not zero."""
    for parameters in with_and_without_parameter(op):
        values = scalars(op, op.arguments)
        tensors = list(values.values())
        gradients = torch.autograd.grad(op.reference(*tensors, **parameters), tensors, create_graph=True)
        needed = {}
        for name, gradient in zip(values, gradients, strict=True):
            if gradient.requires_grad:
                second = torch.autograd.grad(gradient, tensors, retain_graph=True, materialize_grads=True)
                needed[name] = {other for other, derivative in zip(values, second, strict=True) if derivative != 0}
        assert needed == {name: {n for factor in factors for n in factor.split(" + ")} for name, factors in op.saves.items()}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_core_saves_what_the_table_says(op):
    """For the gradient of each argument alone, of numbers that differ."""
    for parameters in with_and_without_parameter(op):
        saves = {}
        for name in op.arguments:
            values = scalars(op, {name})
            known = {n: value.item() for n, value in values.items()}
            known |= {f"input + {n}": known["input"] + known[n] for n in op.operands}
            with Saved() as saved:
                result = op.function(*values.values(), **parameters)
            assert result.grad_fn.name() == op.node
            factors = tuple(next(n for n, value in known.items() if value == tensor.item()) for tensor in saved.tensors)
            if factors:
                saves[name] = factors
        assert saves == op.saves


def test_every_public_op_has_a_row():
    public = {name for name in safe_inplace.__all__ if name.endswith("_")}
    assert public == set(BY_NAME)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_python_signature(op):
    signature = inspect.signature(op.function)
    positional = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    keyword = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in positional] == list(op.arguments)
    assert [p.name for p in keyword] == ([op.parameter] if op.parameter else [])
    assert all(p.default == 1 for p in keyword)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_schemas(op):
    overloads = set(op.packet.overloads())
    expected = {
        "default" if set(kinds) == {"Tensor"} else "_".join(kinds) for kinds in op.kinds()
    }
    assert overloads == expected
    for name in overloads:
        schema = getattr(op.packet, name)._schema
        arguments = [a.name for a in schema.arguments if not a.kwarg_only]
        assert arguments == list(op.arguments)
        assert [a.name for a in schema.arguments if a.kwarg_only] == (
            [op.parameter] if op.parameter else []
        )
        assert schema.is_mutable
        assert schema.arguments[0].alias_info.is_write
        assert not any(a.alias_info for a in schema.arguments[1:])
        assert not schema.returns


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_keyword_arguments(op):
    values = {name: torch.randn(3) for name in op.arguments}
    expected = op.out_of_place(**values)
    result = op.function(**values)
    assert result is values["input"]
    torch.testing.assert_close(result, expected)

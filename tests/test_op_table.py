"""The op tables of the C++ core, of the package and of the tests name the same ops."""

import inspect

import pytest
import torch

import safe_inplace
from safe_inplace import _C

from .op_table import BY_NAME, OPS


def test_cpp_table_equals_test_table():
    cpp = [(row["name"], tuple(row["operands"]), row["parameter"]) for row in _C.op_table()]
    assert sorted(cpp) == sorted((op.name, op.operands, op.parameter) for op in OPS)


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

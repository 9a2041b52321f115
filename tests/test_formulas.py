"""The formulas that compilers trace are those of the core's table, in every kind of call."""

import itertools

import pytest
import torch

from safe_inplace.ops import FORMULAS

from .checks import assert_bit_equal, assert_close, assert_rounded_once, grad_tolerance
from .layouts import random_tensor, short
from .op_table import OPS

SHAPE = (3, 8)
OPERANDS = {
    "full": lambda dtype: random_tensor(SHAPE, dtype),
    "vector": lambda dtype: random_tensor(SHAPE[1:], dtype),
    "scalar": lambda dtype: random_tensor((), dtype),
    "number": lambda dtype: 0.375,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
rows = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def calls(op):
    for kinds in itertools.product(OPERANDS, repeat=len(op.operands)):
        for parameter in ({}, {op.parameter: -2.5}) if op.parameter else ({},):
            yield kinds, parameter


def test_there_is_one_for_each_row():
    assert FORMULAS.keys() == {name for op in OPS for name in (op.name, op.functional_name)}


@rows
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_values(op, dtype):
    for kinds, parameter in calls(op):
        input = random_tensor(SHAPE, dtype)
        operands = [OPERANDS[kind](dtype) for kind in kinds]
        results = [f(input.clone(), *operands, **parameter) for f in (op.function, FORMULAS[op.name])]
        if len(op.operands) == 1:  # torch's own, which rounds a number first
            assert_bit_equal(*results)
            continue
        for result in results:
            assert_rounded_once(
                result, op.exact(input, *operands, **parameter), op.magnitude(input, *operands, **parameter)
            )


@rows
def test_input_as_its_own_operand(op):
    for positions in itertools.product([False, True], repeat=len(op.operands)):
        input = random_tensor(SHAPE, torch.float64)
        others = [random_tensor(SHAPE, torch.float64) for _ in op.operands]
        results = []
        for function in (op.function, FORMULAS[op.name]):
            x = input.clone()
            results.append(function(x, *(x if own else other for own, other in zip(positions, others, strict=True))))
        torch.testing.assert_close(*results, rtol=1e-14, atol=1e-14)


@rows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex128], ids=short)
def test_gradients(op, dtype):
    for kinds, parameter in calls(op):
        leaves = [random_tensor(SHAPE, dtype), *(OPERANDS[kind](dtype) for kind in kinds)]
        given = random_tensor(SHAPE, dtype)
        gradients = []
        for function in (op.function, FORMULAS[op.name]):
            tensors = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in leaves]
            result = function(tensors[0].clone(), *tensors[1:], **parameter)
            wanted = [t for t in tensors if isinstance(t, torch.Tensor)]
            gradients.append(torch.autograd.grad(result, wanted, given))
        for ours, traced in zip(*gradients, strict=True):
            assert_close(ours, traced, 4 * grad_tolerance(dtype, terms=given.numel()))


@rows
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool], ids=short)
def test_integers(op, dtype):
    for kinds in itertools.product(["full", "number"], repeat=len(op.operands)):
        input = torch.randint(0, 2, SHAPE).to(dtype)
        operands = [torch.randint(0, 2, SHAPE).to(dtype) if kind == "full" else 1 for kind in kinds]
        outcomes = []
        for function in (op.function, FORMULAS[op.name]):
            try:
                outcomes.append(function(input.clone(), *operands))
            except RuntimeError:
                outcomes.append(None)
        ours, traced = outcomes
        assert (ours is None) == (traced is None)
        assert ours is None or torch.equal(ours, traced)

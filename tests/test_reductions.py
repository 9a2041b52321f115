"""Gradients of broadcast operands: the same bits every time, on any number of threads."""

import pytest
import torch

from .checks import assert_bit_equal
from .layouts import LARGE, Layout, short
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}


def gradients(op, layout, tensors, grad_output):
    result = op.function(tensors[0].clone(), *tensors[1:])
    return torch.autograd.grad(result, tensors, grad_output)


def prepare(op, layout, dtype, device):
    tensors = layout.tensors(len(op.operands), dtype, device)
    grad_output = torch.randn(layout.shape, device=device).to(dtype)
    return [t.detach().requires_grad_() for t in tensors], grad_output


@pytest.mark.parametrize("layout", LARGE, ids=str)
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

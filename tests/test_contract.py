"""Same object, same storage, one version, and exactly the memory that the table names."""

import itertools

import pytest
import torch

from .checks import Saved
from .layouts import SMALL, arrange, short
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}


def subsets(names):
    return itertools.chain.from_iterable(
        itertools.combinations(names, n) for n in range(len(names) + 1)
    )


def make(op, requires_grad, shapes, dtype=torch.float32, device="cpu"):
    """The input as a non-leaf, so that it may require grad; operands as leaves."""
    input = arrange("dense", shapes[0], dtype, device)
    if "input" in requires_grad:
        input = input.requires_grad_().clone()
    operands = [
        arrange("dense", shapes[1 + i % (len(shapes) - 1)], dtype, device).requires_grad_(
            name in requires_grad
        )
        for i, name in enumerate(op.operands)
    ]
    return input, operands


GRAD_CASES = [(op, requires) for op in OPS for requires in subsets(op.arguments)]
grad_case_ids = {"ids": lambda v: "-".join(v) or "none" if isinstance(v, tuple) else v.name}


@pytest.mark.parametrize("op, requires_grad", GRAD_CASES, **grad_case_ids)
def test_returns_the_input_and_bumps_once(op, requires_grad, device):
    for layout in SMALL:
        input, *operands = layout.tensors(len(op.operands), torch.float32, device)
        if "input" in requires_grad:
            input = input.requires_grad_().clone()
        for name, operand in zip(op.operands, operands, strict=True):
            operand.requires_grad_(name in requires_grad)
        pointer, version, stride = input.data_ptr(), input._version, input.stride()
        result = op.function(input, *operands)
        assert result is input
        assert input.data_ptr() == pointer and input.stride() == stride
        assert input._version == version + 1
        assert all(o._version == 0 for o in operands)
        assert input.requires_grad == bool(requires_grad)
        if requires_grad and input._base is None:
            assert input.grad_fn.name() == op.node


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_numbers_bump_once(op):
    for requires_grad in (False, True):
        for kinds in op.kinds():
            input, operands = make(op, {"input"} if requires_grad else (), [(2, 3), (3,)])
            operands = [0.5 if k == "Scalar" else o for k, o in zip(kinds, operands, strict=True)]
            assert op.function(input, *operands) is input
            assert input._version == 1
            if requires_grad:
                assert input.grad_fn.name() == op.node


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_no_grad_bumps_once_and_records_nothing(op):
    input, operands = make(op, op.arguments, [(2, 3), (3,)])
    node = input.grad_fn
    with torch.no_grad():
        assert op.function(input, *operands) is input
    assert input._version == 1
    assert input.grad_fn is node


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_leaf_under_no_grad_stays_a_leaf(op):
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    expected = op.out_of_place(parameter.detach(), *[2.0] * len(op.operands))
    with torch.no_grad():
        assert op.function(parameter, *[2.0] * len(op.operands)) is parameter
    assert parameter.is_leaf and parameter.requires_grad and parameter._version == 1
    torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_data_of_a_parameter(op):
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    expected = op.out_of_place(parameter.detach(), *[2.0] * len(op.operands))
    op.function(parameter.data, *[2.0] * len(op.operands))
    assert parameter._version == 0
    torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_every_view_sees_the_version(op):
    base = torch.randn(4, 3)
    view, detached = base[1:], base.detach()
    op.function(view, *[2.0] * len(op.operands))
    assert base._version == view._version == detached._version == 1


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_integers_bump_once(op):
    for dtype in (torch.int64, torch.uint8):
        for operand in (2, torch.tensor([1, 2, 3], dtype=dtype)):
            input = torch.ones(2, 3, dtype=dtype)
            op.function(input, *[operand] * len(op.operands))
            assert input._version == 1


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_empty_bumps_once(op):
    input = torch.ones(0, 3)
    op.function(input, *[torch.ones(3)] * len(op.operands))
    assert input._version == 1


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_inference_mode(op):
    operands = [torch.randn(3) for _ in op.operands]
    with torch.inference_mode():
        input = torch.randn(2, 3)
        expected = op.out_of_place(input, *operands)
        assert op.function(input, *operands) is input
        torch.testing.assert_close(input, expected)
        assert input.is_inference()


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_normal_tensor_in_inference_mode_bumps_once(op):
    input = torch.randn(2, 3)
    with torch.inference_mode():
        op.function(input, *[torch.randn(3) for _ in op.operands])
    assert input._version == 1 and not input.is_inference()


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_inference_operand_of_a_recorded_op(op):
    """Saving an inference tensor is refused, where the op saves it, as torch does."""
    with torch.inference_mode():
        inference = torch.randn(3)
    for name in op.operands:
        input = torch.randn(2, 3).requires_grad_().clone()
        operands = [inference if n == name else torch.randn(3) for n in op.operands]
        if name in op.saves.get("input", ()):
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
                op.function(input, *operands)
        else:
            op.function(input, *operands).sum().backward()


SAVED_SHAPES = {
    "vectors": [(6, 5), (5,)],
    "full": [(6, 5), (6, 5)],
    "vector_full": [(6, 5), (5,), (6, 5)],
    "full_vector": [(6, 5), (6, 5), (6, 1)],
    "zero_dim": [(6, 5), ()],
    "per_channel": [(2, 3, 4, 5), (3, 1, 1)],
    "empty": [(0, 5), (5,)],
}


@pytest.mark.parametrize("shapes", SAVED_SHAPES.values(), ids=SAVED_SHAPES.keys())
@pytest.mark.parametrize("op, requires_grad", GRAD_CASES, **grad_case_ids)
def test_saves_exactly_the_table(op, requires_grad, shapes, device):
    """Bytes and values, for every choice of what needs a gradient."""
    input, operands = make(op, requires_grad, shapes, device=device)
    expected = op.saved_values(set(requires_grad), input, *operands)
    with Saved() as saved:
        op.function(input, *operands)
    assert saved.bytes == sum(t.numel() * t.element_size() for t in expected)
    for tensor in expected:
        assert any(
            s.shape == tensor.shape and torch.allclose(s, tensor) for s in saved.tensors
        ), "what is saved is not what the table names"
    assert len(saved.tensors) == len(expected)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_saves_nothing_under_no_grad(op):
    input, operands = make(op, op.arguments, [(6, 5), (5,)])
    with Saved() as saved, torch.no_grad():
        op.function(input, *operands)
    assert not saved.tensors


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_numbers_are_never_saved(op):
    for kinds in op.kinds():
        input, operands = make(op, op.arguments, [(6, 5), (5,)])
        operands = [0.5 if k == "Scalar" else o for k, o in zip(kinds, operands, strict=True)]
        requires_grad = {n for n, k in zip(op.operands, kinds, strict=True) if k == "Tensor"} | {"input"}
        expected = op.saved_values(requires_grad, input, *operands)
        with Saved() as saved:
            op.function(input, *operands)
        assert saved.bytes == sum(t.numel() * t.element_size() for t in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=short)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_saves_operands_in_their_own_dtype(op, dtype):
    """Frozen float32 vectors beside a half-precision input: no cast copy is kept."""
    input = torch.randn(6, 5, dtype=dtype).requires_grad_().clone()
    operands = [torch.randn(5) for _ in op.operands]
    expected = op.saved_values({"input"}, input, *operands)
    with Saved() as saved:
        op.function(input, *operands)
    assert saved.bytes == sum(t.numel() * t.element_size() for t in expected)
    for operand in saved.tensors:
        assert any(operand.data_ptr() == o.data_ptr() for o in operands)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_saves_no_copy_of_the_input_in_a_wider_dtype(op):
    input = torch.randn(6, 5, dtype=torch.bfloat16)
    operands = [torch.randn(5, requires_grad=True) for _ in op.operands]
    with Saved() as saved:
        op.function(input, *operands)
    full = [t for t in saved.tensors if t.shape == input.shape]
    assert all(t.dtype == torch.bfloat16 for t in full)
    assert len(full) == len(
        {n for o in op.operands for n in op.saves.get(o, ())} & {"input", "input + other"}
    )


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_a_later_write_to_what_was_saved_is_refused_in_backward(op):
    """Operands are saved as they are, so torch's version check watches them."""
    for name in op.operands:
        input = torch.randn(2, 3).requires_grad_().clone()
        operands = {n: torch.randn(3) for n in op.operands}
        op.function(input, *operands.values())
        operands[name].add_(1)
        if name in op.saves.get("input", ()):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                input.sum().backward()
        else:
            input.sum().backward()


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_a_later_write_to_the_result_is_harmless(op):
    """What was saved of the input is a copy: the result may be written again and again."""
    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True)]
    leaves += [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in op.operands]

    input = leaves[0].clone()
    for _ in range(3):
        op.function(input, *leaves[1:])
    actual = torch.autograd.grad(input.sum(), leaves)

    value = leaves[0]
    for _ in range(3):
        value = op.out_of_place(value, *leaves[1:])
    expected = torch.autograd.grad(value.sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_what_others_saved_of_the_input_is_protected(op):
    """The write is visible to torch's check of everything saved before it."""
    leaf = torch.randn(2, 3, requires_grad=True)
    input = leaf.exp()  # exp saves its result
    op.function(input, *[torch.randn(3) for _ in op.operands])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        input.sum().backward()


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_needs_input_grad_only(op):
    """A gradient that nobody asks for is not computed: frozen operands get None."""
    for requires in subsets(op.arguments):
        if not requires:
            continue
        input, operands = make(op, requires, [(2, 3), (3,)])
        op.function(input, *operands)
        node = input.grad_fn
        grads = node(torch.ones(2, 3))
        grads = grads if isinstance(grads, tuple) else (grads,)
        assert len(grads) == len(op.arguments)
        for name, grad in zip(op.arguments, grads, strict=True):
            assert (grad is not None) == (name in requires)

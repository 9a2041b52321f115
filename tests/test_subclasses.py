"""Subclasses, modes, other devices' tensors: what torch's own in-place methods live with."""

import functools
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from .layouts import random_tensor
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


def tensors(op, shape=(4, 3), operand=(3,), dtype=torch.float64):
    return [random_tensor(shape, dtype)] + [random_tensor(operand, dtype) for _ in op.operands]


class Logged(torch.Tensor):
    """A __torch_function__ subclass that says what it was asked."""

    calls: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class FunctionMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def test_torch_function_subclass_gets_the_public_function(op):
    for position in range(len(op.arguments)):
        values = tensors(op)
        expected = op.out_of_place(*values)
        values[position] = values[position].as_subclass(Logged)
        Logged.calls = []
        result = op.function(*values, **op.parameters(1))
        assert Logged.calls[0] is op.function
        # torch's default turns a plain result into the subclass, over the same memory
        assert result.data_ptr() == values[0].data_ptr()
        torch.testing.assert_close(values[0].as_subclass(torch.Tensor), expected)
        assert values[0]._version == 1


def test_torch_function_subclass_may_answer_itself(op):
    class Answer(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func, len(args), kwargs

    values = tensors(op)
    values[-1] = values[-1].as_subclass(Answer)
    func, _, _ = op.function(*values)
    assert func is op.function


def test_foreign_object_with_torch_function(op):
    """An operand that is no tensor but knows the protocol is asked."""

    class Foreign:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func, args

    foreign = Foreign()
    input, *operands = tensors(op)
    operands[0] = foreign
    func, args = op.function(input, *operands)
    assert func is op.function and foreign in args


def test_torch_function_subclass_gradients(op):
    values = [v.requires_grad_() for v in tensors(op)]
    expected = torch.autograd.grad(op.out_of_place(*values).sum(), values)
    input = (values[0] * 1).as_subclass(Logged)
    actual = torch.autograd.grad(op.function(input, *values[1:]).sum(), values)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), e)


def test_parameter_operands(op):
    """nn.Parameter is a subclass without __torch_function__ of its own."""
    input, *operands = tensors(op)
    expected = op.out_of_place(input, *operands)
    operands = [torch.nn.Parameter(o) for o in operands]
    assert type(op.function(input, *operands)) is torch.Tensor
    torch.testing.assert_close(input, expected)
    input.sum().backward()
    assert all(o.grad is not None for o in operands)


def test_torch_function_mode_gets_the_public_function(op):
    values = tensors(op)
    expected = op.out_of_place(*values)
    with FunctionMode() as mode:
        result = op.function(*values, **op.parameters(1))
    assert [c[0] for c in mode.calls if c[0] is op.function] == [op.function]
    assert result is values[0]
    torch.testing.assert_close(result, expected)


def test_torch_function_mode_with_keywords(op):
    values = dict(zip(op.arguments, tensors(op), strict=True))
    expected = op.out_of_place(**values)
    with FunctionMode():
        result = op.function(**values)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dispatch_mode_sees_one_op(op, requires_grad):
    values = [v.requires_grad_(requires_grad) for v in tensors(op)]
    input = values[0].clone()
    expected = op.out_of_place(*values)
    with DispatchMode() as mode:
        op.function(input, *values[1:])
    ours = [f for f in mode.calls if f.namespace == "safe_inplace"]
    assert ours == [op.packet.default]
    assert input._version == 1
    torch.testing.assert_close(input, expected)
    if requires_grad:
        assert input.grad_fn.name() == op.node
        actual = torch.autograd.grad(input.sum(), values)
        for a, e in zip(actual, torch.autograd.grad(expected.sum(), values), strict=True):
            torch.testing.assert_close(a, e)


def test_dispatch_mode_sees_the_number_overloads(op):
    for kinds in op.kinds():
        values = tensors(op)
        operands = [0.5 if k == "Scalar" else v for k, v in zip(kinds, values[1:], strict=True)]
        with DispatchMode() as mode:
            op.function(values[0], *operands)
        assert getattr(op.packet, op.overload(*operands)) in mode.calls


def test_dispatch_mode_sees_the_backward(op):
    """Every read and write of backward goes through ops that a mode can see."""
    values = [v.requires_grad_() for v in tensors(op)]
    total = op.function(values[0] * 1, *values[1:]).sin().sum()
    expected = torch.autograd.grad(total, values, retain_graph=True)
    with DispatchMode() as mode:
        actual = torch.autograd.grad(total, values)
    assert mode.calls
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_modes_nest(op):
    values = tensors(op)
    expected = op.out_of_place(*values)
    with DispatchMode() as outer, FunctionMode() as functions, DispatchMode() as inner:
        op.function(*values)
    assert op.packet.default in inner.calls and op.packet.default in outer.calls
    assert functions.calls
    torch.testing.assert_close(values[0], expected)


@pytest.mark.parametrize("wrapped", ["input", "both"])
def test_wrapper_subclass(op, wrapped):
    """Both inner tensors are written."""
    values = tensors(op)

    def wrap(tensor, wanted):
        return TwoTensor(tensor.clone(), tensor * 2) if wanted else tensor.clone()

    input, theirs = wrap(values[0], True), wrap(values[0], True)
    operands = [wrap(v, wrapped == "both") for v in values[1:]]
    if wrapped == "input":
        operands = [0.5] * len(operands)
    op.two_step(theirs, *operands)
    assert op.function(input, *operands) is input
    torch.testing.assert_close(input.a, theirs.a)
    torch.testing.assert_close(input.b, theirs.b)


def test_wrapper_subclass_gradients(op):
    leaves = [TwoTensor(v, v * 2).requires_grad_() for v in tensors(op)]
    total = op.function(leaves[0] * 1, *leaves[1:]).sum()
    total.backward()
    plain = [TwoTensor(v.a.detach(), v.b.detach()).requires_grad_() for v in leaves]
    op.out_of_place(plain[0] * 1, *plain[1:]).sum().backward()
    for ours, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad.a, theirs.grad.a)
        torch.testing.assert_close(ours.grad.b, theirs.grad.b)


def test_meta(op):
    input = torch.empty(4, 3, device="meta", requires_grad=True) * 1
    operands = [torch.empty(3, device="meta", requires_grad=True) for _ in op.operands]
    assert op.function(input, *operands) is input
    assert input.device.type == "meta" and input.shape == (4, 3)
    assert input._version == 1
    input.sum().backward()
    assert all(o.grad.shape == (3,) and o.grad.device.type == "meta" for o in operands)


def test_meta_refusals(op):
    input = torch.empty(4, 3, device="meta")
    for bad in (torch.empty(5, device="meta"), torch.empty(2, 4, 3, device="meta")):
        with pytest.raises(RuntimeError):
            op.function(input, *[bad] * len(op.operands))
    integers = torch.empty(3, dtype=torch.int64, device="meta")
    floats = [torch.empty(3, device="meta")] * len(op.operands)
    try:
        op.two_step(integers, *floats)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            op.function(integers, *floats)


def test_fake_tensors(op):
    with FakeTensorMode() as mode:
        input = torch.empty(4, 3, requires_grad=True) * 1
        operands = [torch.empty(3, requires_grad=True) for _ in op.operands]
        assert op.function(input, *operands) is input
        assert input.shape == (4, 3)
        input.sum().backward()
        assert all(o.grad.shape == (3,) for o in operands)
        with pytest.raises(RuntimeError):
            op.function(torch.empty(3), *[torch.empty(2, 3)] * len(op.operands))
    real = mode.from_tensor(torch.randn(4, 3))
    with mode:
        op.function(real, *[2.0] * len(op.operands))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("sharded", [True, False])
def test_dtensor(op, mesh, sharded):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    values = tensors(op)
    placement = [Shard(0)] if sharded else [Replicate()]
    leaves = [distribute_tensor(values[0], mesh, placement).requires_grad_()]
    leaves += [distribute_tensor(v, mesh, [Replicate()]).requires_grad_() for v in values[1:]]
    input = leaves[0] * 1
    result = op.function(input, *leaves[1:])
    assert result is input and isinstance(result, DTensor)
    plain = [v.clone().requires_grad_() for v in values]
    expected = op.out_of_place(*plain)
    torch.testing.assert_close(result.full_tensor(), expected)
    result.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def test_numpy_numbers_and_tensor_like_numbers(op):
    """What torch's own methods take as a number is a number here too."""
    import numpy as np

    for number in (np.float64(0.5), np.float32(0.5), np.int64(2), np.bool_(True)):
        input, _ = tensors(op)[:2]
        expected = op.two_step(input.clone(), *[number] * len(op.operands))
        op.function(input, *[number] * len(op.operands))
        torch.testing.assert_close(input, expected)
        assert input._version == 1


def test_numpy_memory(op):
    """A tensor over a NumPy array writes the array."""
    import numpy as np

    array = np.ones((4, 3))
    input = torch.from_numpy(array)
    expected = op.out_of_place(input.clone(), *[2.0] * len(op.operands))
    op.function(input, *[2.0] * len(op.operands))
    np.testing.assert_array_equal(array, expected.numpy())


def test_partial_and_bound_forms(op):
    values = tensors(op)
    expected = op.out_of_place(*values)
    bound = functools.partial(op.function, **dict(zip(op.operands, values[1:], strict=True)))
    assert bound(values[0]) is values[0]
    torch.testing.assert_close(values[0], expected)

"""What saved-tensor hooks, and assignments to `.data`, do to an op and to its backward: right, or refused."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from .checks import Untouched, assert_bit_equal
from .layouts import random_tensor
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


def arguments(op, shape=(4, 4), requires_grad=()):
    """A value for each argument, by name; the input is not a leaf."""
    values = {name: random_tensor(shape, torch.float32).requires_grad_(name in requires_grad) for name in op.arguments}
    return values, values["input"] * 1


# (argument whose gradient is asked for, operand that is saved for it)
SAVED = [(op, name, saved) for op in OPS for name, factors in op.saves.items() for saved in factors if saved in op.operands]
FITTING = [(1,), (4,), (4, 1), (1, 4), ()]
OTHERS = [(2,), (0,), (8,), (3, 4), (4, 2), (2, 2, 2), (1, 1, 4, 4), (2, 4, 4)]


@pytest.mark.parametrize("how", ["data", "hook"])
@pytest.mark.parametrize("shape", FITTING + OTHERS, ids=str)
@pytest.mark.parametrize("op, name, saved", SAVED, ids=lambda v: getattr(v, "name", v))
def test_a_saved_operand_of_another_shape(op, name, saved, shape, how):
    """Taken as forward takes an operand of that shape, or refused in the same words; never read past its end."""
    values, input = arguments(op, requires_grad=[name])
    replacement = random_tensor(shape, torch.float32)
    packed = saved_tensors_hooks(lambda t: t.data_ptr() == values[saved].data_ptr(), lambda _: replacement)
    if how == "data":
        result = op.function(input, *list(values.values())[1:])
        values[saved].data = replacement
    else:
        with packed:
            result = op.function(input, *list(values.values())[1:])
    if shape in FITTING:
        result.sum().backward()
        torch.testing.assert_close(values[name].grad, torch.ones(4, 4) * replacement)
    else:
        with pytest.raises(RuntimeError, match=r"must match the size of tensor|doesn't match the broadcast shape"):
            result.sum().backward()
        assert values[name].grad is None


KEPT = [(op, name) for op in OPS for name, factors in op.saves.items() if any(f not in op.operands for f in factors)]


@pytest.mark.parametrize("shape", FITTING + OTHERS, ids=str)
@pytest.mark.parametrize("op, name", KEPT, ids=lambda v: getattr(v, "name", v))
def test_a_kept_value_of_another_shape(op, name, shape):
    values, input = arguments(op, requires_grad=[name])
    replacement = random_tensor(shape, torch.float32)
    with saved_tensors_hooks(lambda t: t, lambda _: replacement):
        result = op.function(input, *list(values.values())[1:])
    if shape in FITTING:
        before = replacement.clone()
        result.sum().backward()
        torch.testing.assert_close(values[name].grad, torch.ones(4, 4) * replacement)
        assert_bit_equal(replacement, before)
    else:
        with pytest.raises(RuntimeError, match=r"must match the size of tensor|doesn't match the broadcast shape"):
            result.sum().backward()


@pytest.mark.parametrize("shape", [(1, 4), (2, 4, 4), (4,), (3, 3)], ids=str)
def test_a_hook_that_hands_the_node_a_gradient_of_another_shape(op, shape):
    """As torch's own nodes: what does not fit is refused by them or by the engine, and nothing is read or left unwritten."""
    def backward(form):
        values, input = arguments(op, requires_grad=op.arguments)
        result = form(input, *list(values.values())[1:])
        result.grad_fn.register_prehook(lambda grads: (torch.ones(shape),))
        result.sum().backward()
        return [value.grad for value in values.values()]

    try:
        grads = backward(op.function)
    except RuntimeError:
        return
    for grad in grads:
        assert grad.isfinite().all()
        assert grad.shape == (4, 4)


# ---- while the op is saving


class Refused(Exception):
    pass


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_pack_hook_that_raises_changes_nothing(op, count):
    """Whichever of the saved values it is: the input has its old bytes, version and history, and the op can be called again."""
    values, input = arguments(op, requires_grad=op.arguments)
    operands = list(values.values())[1:]
    calls = 0

    def pack(tensor):
        nonlocal calls
        calls += 1
        if calls == count:
            raise Refused
        return tensor

    history = input.grad_fn
    try:
        with saved_tensors_hooks(pack, lambda t: t), Untouched(input, *operands):
            op.function(input, *operands)
    except Refused:
        assert input.grad_fn is history
        result = op.function(input, *operands)
        grads = torch.autograd.grad(result.sum(), list(values.values()))
        plain = op.out_of_place(values["input"] * 1, *operands)
        for ours, expected in zip(grads, torch.autograd.grad(plain.sum(), list(values.values())), strict=True):
            torch.testing.assert_close(ours, expected)
    except AssertionError:
        assert calls < count  # nothing was refused, so the input was written


DISTURBANCES = {
    "writes": lambda t: t.detach().mul_(2),
    "writes_no_grad": lambda t: t.mul_(2),
    "other_data": lambda t: setattr(t, "data", torch.zeros_like(t)),
    "other_shape": lambda t: setattr(t, "data", torch.zeros(2)),
    "other_dtype": lambda t: setattr(t, "data", t.detach().half()),
    "resizes": lambda t: t.untyped_storage().resize_(10**6),
    "requires_grad": lambda t: t.requires_grad_(not t.requires_grad),
}


@pytest.mark.parametrize("disturb", DISTURBANCES.values(), ids=DISTURBANCES)
def test_a_pack_hook_that_changes_an_argument_is_refused(op, disturb):
    for name in op.arguments:
        values, input = arguments(op)
        trained = torch.ones(4, 4, requires_grad=True)
        operands = [trained if i == 0 else value for i, value in enumerate(list(values.values())[1:])]
        calls = dict(zip(op.arguments, [input, *operands], strict=True))
        disturbed = []

        def pack(tensor, victim=calls[name], disturbed=disturbed):
            if not disturbed:
                disturbed.append(True)
                with torch.no_grad():
                    disturb(victim)
            return tensor

        before = input.detach().clone()
        try:
            with saved_tensors_hooks(pack, lambda t: t):
                op.function(input, *operands)
        except RuntimeError as error:
            assert disturbed, error
            ours = f"{op.name}(): a saved-tensor hook changed the argument '{name}'"
            assert ours in str(error) or "A saved tensor pack hook is modifying its input in place" in str(error)
            if name != "input":
                assert_bit_equal(input.detach(), before)
                assert input._version == 0
        else:
            assert not disturbed


def test_hooks_that_copy_give_the_same_gradients(op):
    values, input = arguments(op, requires_grad=op.arguments)
    operands = list(values.values())[1:]
    plain = torch.autograd.grad(op.function(values["input"] * 1, *operands).sum(), list(values.values()))
    with saved_tensors_hooks(lambda t: t.double().clone(), lambda t: t.float()):
        hooked = op.function(input, *operands)
    for ours, expected in zip(torch.autograd.grad(hooked.sum(), list(values.values())), plain, strict=True):
        assert_bit_equal(ours, expected)

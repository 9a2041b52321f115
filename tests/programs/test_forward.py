"""The differential test in slices, and the proof that it sees what it is there to see."""

import os
import subprocess
import sys

import pytest
import torch

import safe_inplace

from ..op_table import OPS
from .engine import Disagreement, Var
from .forward.check import FUZZ, Ours, Torch, check
from .forward.passes import Backward, Grad, Watch
from .forward.steps import Binary, Leaf, PrivateView, Unary, Write
from .machines import TensorProgram
from .slices import SEED, slices
from .tensors import values


@slices(FUZZ, 12_000, 24)
def test_programs(indices):
    assert FUZZ.search(SEED, indices).total() == len(indices)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="needs a CPU with vectors")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_programs_with_the_vectors_of_an_older_cpu(capability):
    """Each has loops of its own, and on this CPU only the newest are run."""
    program = f"""
import sys
import torch
from tests.programs.__main__ import main

assert torch.backends.cpu.get_cpu_capability() == "{capability.upper()}"
sys.exit(main(["forward", "--programs", "300", "--seed", "{capability}"]))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_programs_end_in_every_way():
    """Most agree, some are refused by both, some have an answer that only ours finds."""
    ends = FUZZ.search("ends", range(600))
    assert ends["agree"] > 300
    assert ends["both refuse"] > 10
    assert ends["only torch refuses"] > 0


def test_programs_write_private_views():
    safe_inplace.reset_counts()
    FUZZ.search("ends", range(300))
    assert safe_inplace.counts()["view.own"] > 30


def test_the_reference_is_judged_as_well(monkeypatch):
    """Where torch does not refuse, it says what the reference must find."""
    monkeypatch.setattr(Binary, "reference", lambda step, run: run[step.a] + run[step.b])
    with pytest.raises(Disagreement, match="torch against reference"):
        FUZZ.search("broken", range(200))


def sabotaged(name, function):
    return {op.name: op.function for op in OPS} | {name: function}


def wrong_formula(input, scale, shift):
    return OPS_BY_NAME["mul_add_"](input, shift, scale)


def forgotten_version(input, scale, shift):
    with torch.no_grad():
        OPS_BY_NAME["mul_add_"](input.data, scale, shift)
    return input


def forgotten_gradient(input, scale, shift):
    scale = scale.detach() if isinstance(scale, torch.Tensor) else scale
    return OPS_BY_NAME["mul_add_"](input, scale, shift)


def saved_after_the_write(input, scale, shift):
    """The gradient of `scale` from the new input in place of the old one."""
    return Late.apply(input, scale, shift)


def refuses_too_much(input, scale, shift):
    if isinstance(scale, torch.Tensor) and scale.dim() == 0:
        raise RuntimeError("no scalars")
    return OPS_BY_NAME["mul_add_"](input, scale, shift)


def writes_then_refuses(input, scale, shift):
    if isinstance(scale, torch.Tensor) and input.requires_grad and input.is_leaf:
        input.data.zero_()
    return OPS_BY_NAME["mul_add_"](input, scale, shift)


def writes_the_callers_gradient(input, scale, shift):
    OPS_BY_NAME["mul_add_"](input, scale, shift)
    if input.requires_grad and input.grad_fn is not None:
        input.register_hook(lambda grad: grad.mul_(1.5))
    return input


class Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, scale, shift):
        OPS_BY_NAME["mul_add_"](input, scale, shift)
        ctx.mark_dirty(input)
        ctx.saved = input.detach().clone(), scale, shift
        return input

    @staticmethod
    def backward(ctx, grad):
        input, scale, shift = ctx.saved
        number = not isinstance(scale, torch.Tensor)
        of_scale = None if number else (grad * input).sum_to_size(scale.shape)
        of_shift = grad.sum_to_size(shift.shape) if isinstance(shift, torch.Tensor) else None
        return grad * scale, of_scale, of_shift


OPS_BY_NAME = {op.name: op.function for op in OPS}


@pytest.mark.parametrize(
    "broken",
    [
        wrong_formula,
        forgotten_version,
        forgotten_gradient,
        saved_after_the_write,
        refuses_too_much,
        writes_then_refuses,
        writes_the_callers_gradient,
    ],
    ids=lambda f: f.__name__,
)
def test_the_fuzz_finds(broken):
    with pytest.raises(Disagreement, match=r"reproduce: python -m tests\.programs forward"):
        FUZZ.search("broken", range(2000), sabotaged("mul_add_", broken))


def test_a_history_that_torch_loses_of_nothing():
    """CopySlices gives the gradient of a view without elements no history, the formula and ours do."""
    steps = [
        Leaf((0, 3), 244, True),
        Unary(Var(0), "clone"),
        PrivateView(Var(1), "clone", "narrow", (1, 0, 1)),
        Write(Var(2), "add_", (Var(2),), 0.0, False),
        Grad(Var(2), Var(0), "sin", 278, True, True),
    ]
    program = TensorProgram("lost", steps, torch.float64)
    ours, theirs = Ours(program).run(), Torch(program).run()
    assert ours.variables[-1].requires_grad and not theirs.variables[-1].requires_grad
    assert check(program) == "agree"


def test_a_hook_of_a_private_view_sees_all_of_its_gradient():
    """Between two writes: torch's view sends a part of it by its base."""
    steps = [
        Leaf((3,), 3610, True),
        PrivateView(Var(0), "clone", "alias", ()),
        Write(Var(1), "add_", (1.0,), None, False),
        Watch(Var(1), "hook"),
        Binary(Var(1), Var(1), "+"),
        Write(Var(1), "mul_", (Var(2),), None, False),
        Backward(Var(1), "sum", 0, True),
    ]
    program = TensorProgram("watched", steps, torch.float64)
    ours, theirs = Ours(program).run(), Torch(program).run()
    whole = 4 * (values((3,), 3610, torch.float64) + 1)  # of (x + 1) * 2 (x + 1)
    for run, seen in ((ours, whole), (theirs, whole / 2)):
        assert torch.equal(run.seen[0][1], seen)
    assert check(program) == "agree"

"""The differential test of backward in slices, and the proof that it sees what it is there to see."""

import pytest
import torch

import safe_inplace

from ..op_table import BY_NAME, OPS
from .backward.check import FUZZ
from .backward.passes import Backward
from .backward.runs import Ideal, Ours, write_ideally
from .backward.steps import Given, Leaf, Op, Passing, Unary
from .engine import Disagreement, Var
from .machines import TensorProgram
from .slices import SEED, slices


@slices(FUZZ, 600, 6)
def test_programs(indices):
    assert FUZZ.search(SEED, indices).total() == len(indices)


def test_programs_write_private_views():
    safe_inplace.reset_counts()
    FUZZ.search("views", range(100))
    assert safe_inplace.counts()["view.own"] > 20


def refusing_first(write):
    """torch asks a Function's written input whether it may be written when it has been."""

    def function(input, *operands, **parameters):
        before, version = input.detach().clone(), input._version
        try:
            write(input, *operands, **parameters)
        except RuntimeError:
            input.data.copy_(before)
            torch._C._autograd._unsafe_set_version_counter((input,), (version,))
            raise
        return input

    return function


def ideal(name):
    @refusing_first
    def write(input, *operands, **parameters):
        write_ideally(BY_NAME[name], input, operands, parameters)

    return write


IDEAL = {op.name: ideal(op.name) for op in OPS}


@pytest.mark.parametrize("kind", ["own", "transposed"])
def test_a_leaf_keeps_a_gradient_of_the_reference_where_it_keeps_ours(kind):
    """It takes what somebody else keeps, or copies it, by its layout."""
    v = [Var(i) for i in range(5)]
    steps = [Leaf((2, 1, 2), 0, True), Leaf((2, 1, 2), 4, True), Passing(v[1], "stash_detached", True), Unary(v[2], "viewed")]
    steps += [Op(v[3], "addcmul_", (v[0], v[3]), -0.25, "keep"), Given((2, 1, 2), kind, 8)]
    program = TensorProgram("", [*steps, Backward(v[3], "given", v[4], True, False, None)], dtype=torch.float32)
    assert Ours(program).run().shared() == Ideal(program).run().shared() != set()
    assert FUZZ.check(program) == "agree"


def test_most_programs_agree():
    """Few are refused, or wrong by torch's own doing; with ideal ops none is found."""
    ends = FUZZ.search("ends", range(300), IDEAL)
    assert ends["agree"] > 225
    assert ends["refused"] > 2
    assert ends["wrong by torch's own nodes"] > 2


class Faulty(torch.autograd.Function):
    """add_ or mul_, with a fault in its backward."""

    @staticmethod
    def forward(ctx, input, other, name, fault):
        ctx.old, ctx.other, ctx.name, ctx.fault = input.clone(), other.clone(), name, fault
        ctx.mark_dirty(input)  # counts the version
        getattr(input.data, name)(other)
        return input

    @staticmethod
    def backward(ctx, grad):
        # vmap's tensors have no memory of their own to be at fault with
        fault = right if torch._C._functorch.is_legacy_batchedtensor(grad) else ctx.fault
        return *fault(ctx, grad), None, None


def right(ctx, grad):
    shape = ctx.other.shape
    if ctx.name == "add_":
        return grad.clone(), grad.sum_to_size(shape).clone()
    return grad * ctx.other.conj(), (grad * ctx.old.conj()).sum_to_size(shape)


def one_memory_for_two(ctx, grad):
    of_input, of_other = right(ctx, grad)
    if of_input.shape == of_other.shape and not torch.is_grad_enabled():
        of_other = of_input.data
    return of_input, of_other


def overwrites_what_it_gets(ctx, grad):
    of_input, of_other = right(ctx, grad)
    with torch.no_grad():
        return (grad.copy_(of_input) if grad.is_contiguous() else of_input), of_other


def overwrites_what_it_kept(ctx, grad):
    of_input, of_other = right(ctx, grad)
    with torch.no_grad():
        ctx.old.mul_(2)
    return of_input, of_other


def one_buffer_for_every_pass(ctx, grad):
    of_input, of_other = right(ctx, grad)
    with torch.no_grad():
        ctx.buffer = ctx.buffer.copy_(of_input) if hasattr(ctx, "buffer") else of_input
    return ctx.buffer, of_other


def forgets_the_graph(ctx, grad):
    with torch.no_grad():
        return right(ctx, grad)


def forgets_the_second_pass(ctx, grad):
    of_input, of_other = right(ctx, grad)
    again, ctx.again = getattr(ctx, "again", False), True
    return of_input, None if again else of_other


def refuses_the_second_pass(ctx, grad):
    if getattr(ctx, "again", False):
        raise RuntimeError("once is enough")
    ctx.again = True
    return right(ctx, grad)


FAULTS = [
    ("add_", one_memory_for_two),
    ("mul_", overwrites_what_it_gets),
    ("mul_", overwrites_what_it_kept),
    ("mul_", one_buffer_for_every_pass),
    ("mul_", forgets_the_graph),
    ("mul_", forgets_the_second_pass),
    ("mul_", refuses_the_second_pass),
]


def planted(name, fault):
    """Ideal ops, but for one that is faulty where its operand is a tensor and it has no parameter."""

    @refusing_first
    def faulty(input, other, **parameters):
        if isinstance(other, torch.Tensor) and not parameters:
            Faulty.apply(input, other, name, fault)
        else:
            IDEAL[name](input, other, **parameters)

    return IDEAL | {name: faulty}


@pytest.mark.parametrize("name, fault", FAULTS, ids=lambda f: getattr(f, "__name__", f))
def test_the_fuzz_finds(name, fault):
    with pytest.raises(Disagreement, match=r"reproduce: python -m tests\.programs backward"):
        FUZZ.search("broken", range(1000), planted(name, fault))


def test_the_fuzz_finds_that_torch_hands_on_what_others_see():
    ops = {name: refusing_first(BY_NAME[name].two_step) for name in ("add_", "addcmul_")}
    with pytest.raises(Disagreement, match=r"share memory|was written|instead of"):
        FUZZ.search("broken", range(1000), IDEAL | ops)


def test_what_it_finds_is_shrunk():
    with pytest.raises(Disagreement) as found:
        FUZZ.search("broken", range(1000), planted("mul_", overwrites_what_it_gets))
    assert str(found.value).split("shrunk:")[1].count("Op(") == 1

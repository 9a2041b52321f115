"""Selective checkpointing, and whatever else replays or skips operators by their schemas: right or refused, never wrong."""

import functools
import itertools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .layouts import random_tensor
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}

# What the ops and their gradients are made of where a mode looks on.
PARTS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.sigmoid.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.add.Tensor,
    torch.ops.aten.add.out,
    torch.ops.aten.add_.Tensor,
]


def kinds(op):
    """Each choice of tensors and numbers, and of what needs a gradient."""
    for choice in op.kinds():
        tensors = choice.count("Tensor")
        yield from ((choice, needed) for needed in itertools.product((True, False), repeat=tensors + 1))


def gradients(call, choice, needed, context=None, **options):
    input, weight = random_tensor((4, 8), torch.float64), random_tensor((8, 8), torch.float64)
    vectors = [random_tensor((8,), torch.float64) for kind in choice if kind == "Tensor"]
    leaves = [t.requires_grad_(n) for t, n in zip([input, *vectors], needed, strict=True)]

    def block(input, weight, *vectors):
        rest = iter(vectors)
        hidden = input @ weight
        call(hidden, *[next(rest) if kind == "Tensor" else 0.75 for kind in choice])
        return torch.sigmoid(hidden)

    arguments = (input, weight.requires_grad_(), *vectors)
    if context is None:
        out = block(*arguments)
    else:
        out = checkpoint(block, *arguments, use_reentrant=False, context_fn=context, **options)
    return torch.autograd.grad(out.square().sum(), [weight, *(t for t in leaves if t.requires_grad)])


def saves(*ops, **options):
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy, **options)


def seeded(call, *args, **options):
    torch.manual_seed(0)
    return call(*args, **options)


def right_or_refused(call, choice, needed, context, expected):
    """True if right; refused in the words in which a policy that saves what torch's own methods write is refused."""
    try:
        actual = seeded(gradients, call, choice, needed, context)
    except RuntimeError as error:
        assert "has been mutated" in str(error)
        return False
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    return True


def overloads(op):
    return [getattr(op.packet, name) for name in op.packet.overloads()]


@pytest.mark.parametrize("form", ["public", "dispatcher"])
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_policy_that_saves_the_op(op, form):
    def by_dispatcher(input, *operands):
        getattr(op.packet, op.overload(*operands))(input, *operands)

    call = op.function if form == "public" else by_dispatcher
    for choice, needed in kinds(op):
        expected = seeded(gradients, op.two_step, choice, needed)
        assert right_or_refused(call, choice, needed, saves(*overloads(op)), expected)
        ops_to_save = functools.partial(create_selective_checkpoint_contexts, overloads(op))
        assert right_or_refused(call, choice, needed, ops_to_save, expected)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_policy_that_saves_the_parts(op):
    """Some of the operators that ran are answered from the cache, some run again: the kept value is whole all the same."""
    sets = [set(), set(PARTS), *({part} for part in PARTS), *(set(PARTS) - {part} for part in PARTS)]
    for choice, needed in kinds(op):
        expected = seeded(gradients, op.two_step, choice, needed)
        rights = [right_or_refused(op.function, choice, needed, saves(*parts, *overloads(op)), expected) for parts in sets]
        assert rights[0]
        # The product that the op overwrites: refused wherever it is saved.
        assert not any(right for right, parts in zip(rights, sets, strict=True) if PARTS[0] in parts)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_compiled_selective_checkpoint(op):
    choice, needed = ("Tensor",) * len(op.operands), (True,) * (len(op.operands) + 1)
    expected = seeded(gradients, op.two_step, choice, needed)
    context = saves(*overloads(op), torch.ops.aten.sigmoid.default)

    def block(input, weight, *vectors):
        return torch.sigmoid(op.function(input @ weight, *vectors))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(*leaves):
        return checkpoint(block, *leaves, use_reentrant=False, context_fn=context)

    torch.manual_seed(0)
    input, weight = random_tensor((4, 8), torch.float64), random_tensor((8, 8), torch.float64)
    leaves = [t.requires_grad_() for t in (input, weight, *(random_tensor((8,), torch.float64) for _ in op.operands))]
    actual = torch.autograd.grad(step(*leaves).square().sum(), [leaves[1], leaves[0], *leaves[2:]])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_graph_passes_keep_each_write(op):
    """No operator of a traced graph uses what the op returns: it is neither dead code nor a common subexpression."""
    from torch._functorch.compile_utils import fx_graph_cse
    from torch.fx.experimental.proxy_tensor import make_fx

    values = [random_tensor((4, 3), torch.float64), *(random_tensor((3,), torch.float64) for _ in op.operands)]

    def twice(input, *operands):
        written = input.clone()
        for _ in range(2):
            op.function(written, *operands)
        return written

    graph = make_fx(twice)(*values)
    assert sum(node.target is op.packet.default for node in graph.graph.nodes) == 2
    graph.graph.eliminate_dead_code()
    graph.graph = fx_graph_cse(graph.graph)
    graph.recompile()
    torch.testing.assert_close(graph(*values), twice(*values))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_observers_that_read_schemas(op):
    """A profiler that boxes the arguments and a counter of operations change nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    for choice in op.kinds():
        values = [random_tensor((3,), torch.float64) if kind == "Tensor" else 2**63 for kind in choice]
        expected = random_tensor((4, 3), torch.float64)
        profiled, counted = expected.clone(), expected.clone()
        op.function(expected, *values)
        with torch.profiler.profile(record_shapes=True, with_stack=True):
            op.function(profiled, *values)
        with FlopCounterMode(display=False):
            op.function(counted, *values)
        assert torch.equal(profiled, expected) and torch.equal(counted, expected)

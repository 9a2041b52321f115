"""Operands that share memory with the input: right, or refused as torch refuses."""

import itertools

import pytest
import torch

from .checks import Untouched, assert_bit_equal
from .op_table import OPS

op_ids = {"ids": lambda op: op.name}


def fill(op, chosen, make):
    """The operands, with `make()` in every position that `chosen` does not give."""
    return [chosen.get(i) if i in chosen else make() for i in range(len(op.operands))]


def placements(op):
    """Every non-empty set of operand positions."""
    positions = range(len(op.operands))
    return [
        set(some) for n in positions for some in itertools.combinations(positions, n + 1)
    ]


PLACEMENTS = [(op, p) for op in OPS for p in placements(op)]
placement_ids = {"ids": lambda v: v.name if hasattr(v, "name") else v if isinstance(v, str) else "".join(map(str, v))}


@pytest.mark.parametrize("shape", [(5, 7), (300, 257), (), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.parametrize("op, where", PLACEMENTS, **placement_ids)
def test_input_as_operand_values(op, where, dtype, shape, device):
    input = torch.randn(shape).mul(3).to(device=device, dtype=dtype)
    operands = fill(op, {i: None for i in where}, lambda: torch.full(shape, 2).to(input))
    copies = [input.clone() if o is None else o for o in operands]
    expected = op.function(input.clone(), *copies)
    result = op.function(input, *[input if o is None else o for o in operands])
    assert result is input
    assert_bit_equal(input, expected)
    assert input._version == 1


@pytest.mark.parametrize(
    "op, where, requires_grad",
    [
        (op, where, requires_grad)
        for op, where in PLACEMENTS
        for requires_grad in ("input", "operands", "both")
        if requires_grad != "operands" or len(where) < len(op.operands)
    ],
    **placement_ids,
)
def test_input_as_operand_gradients(op, where, requires_grad):
    leaf = torch.randn(4, 3, dtype=torch.float64)
    others = [torch.randn(3, dtype=torch.float64) for _ in op.operands]
    leaf.requires_grad_(requires_grad != "operands")
    for other in others:
        other.requires_grad_(requires_grad != "input")
    wanted = [t for t in (leaf, *(o for i, o in enumerate(others) if i not in where))]
    wanted = [t for t in wanted if t.requires_grad]
    weight = torch.randn(4, 3, dtype=torch.float64)

    value = leaf * 1
    expected = op.out_of_place(value, *[value if i in where else o for i, o in enumerate(others)])
    expected_grads = torch.autograd.grad((expected * weight).sum(), wanted)

    input = leaf * 1
    op.function(input, *[input if i in where else o for i, o in enumerate(others)])
    grads = torch.autograd.grad((input * weight).sum(), wanted)
    torch.testing.assert_close(input, expected)
    for actual, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("op, where", PLACEMENTS, **placement_ids)
def test_input_as_operand_second_derivatives(op, where):
    def run(formula, leaf, *others):
        input = leaf * 1
        return formula(input, *[input if i in where else o for i, o in enumerate(others)])

    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in op.arguments]
    torch.autograd.gradcheck(lambda *a: run(op.function, *a), leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda *a: run(op.function, *a), leaves)


def views(base):
    """Pairs of an input and an operand that share the base's memory."""
    return {
        "same_region_other_object": (base, base[:]),
        "same_view_twice": (base[1:3], base[1:3]),
        "view_of_input": (base, base[0]),
        "transposed_self": (base[:, :4], base[:, :4].t()),
        "shifted": (base[:-1], base[1:]),
        "shifted_by_one_element": (base.view(-1)[:-1], base.view(-1)[1:]),
        "disjoint_halves": (base[:2], base[2:]),
        "interleaved_columns": (base[:, 0::2], base[:, 1::2]),
        "column_of_itself": (base, base[:, :1]),
        "row_of_itself": (base, base[2:3]),
        "column_as_a_row": (base, base[:, 1]),
        "element_of_itself": (base, base[1, 1]),
        "detached_self": (base, base.detach()),
        "data_of_self": (base, base.data),
        "expanded_row_of_itself": (base, base[0].expand_as(base)),
        "base_as_operand": (base[:, :], base),
        "row_beside_its_matrix": (base[0], base[1]),
    }


def run_pair(call, name, prepare):
    """What a call on a pair of views does: where it ends, and with what."""
    leaf, base = prepare()
    input, operand = views(base)[name]
    try:
        call(input, operand)
    except RuntimeError as error:
        return "call", str(error), base.detach()
    weight = torch.arange(base.numel(), dtype=base.dtype).view_as(base)
    if not leaf.requires_grad:
        return "end", (base.detach().clone(),), base
    try:
        (grad,) = torch.autograd.grad((base * weight).sum(), leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return "backward", str(error), base
    return "end", (base.detach().clone(), grad), base


# With a parameter, add_ is torch's kernel; integers have no kernel of ours at all.
KINDS = {
    "kernel": (torch.float64, False, None),
    "recorded": (torch.float64, True, None),
    "parameter": (torch.float64, False, 2),
    "recorded parameter": (torch.float64, True, 2),
    "integers": (torch.int64, False, None),
}


@pytest.mark.parametrize("dtype, requires_grad, parameter", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("name", views(torch.zeros(4, 4)).keys())
@pytest.mark.parametrize("op, where", PLACEMENTS, **placement_ids)
def test_views_of_the_same_base(op, where, name, dtype, requires_grad, parameter):
    """The out-of-place result, or a refusal where torch's own ops refuse the overlap."""
    values = torch.randn(4, 4, dtype=torch.float64).mul(8).to(dtype)
    other = torch.tensor(3, dtype=dtype)
    parameters = op.parameters(parameter)

    def prepare():
        leaf = values.clone().requires_grad_(requires_grad)
        return leaf, leaf * 1

    def operands(operand):
        return [operand if i in where else other for i in range(len(op.operands))]

    ours, result, base = run_pair(lambda x, o: op.function(x, *operands(o), **parameters), name, prepare)
    if ours == "call":
        overlap, words, _ = run_pair(lambda x, o: x.add_(o), name, prepare)
        assert overlap == "call", f"refused what torch accepts: {result}"
        assert result == words
        assert_bit_equal(base, values * 1)
        return
    if ours == "backward":
        steps, _, _ = run_pair(lambda x, o: op.two_step(x, *operands(o), **parameters), name, prepare)
        assert steps != "end", f"torch's own steps are not refused: {result}"
        return
    _, expected, _ = run_pair(
        lambda x, o: x.copy_(op.out_of_place(x.clone(), *[v.clone() for v in operands(o)], **parameters)),
        name,
        prepare,
    )
    for actual, right in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_partial_overlap_is_refused_in_torchs_words(op):
    for position in range(len(op.operands)):
        base = torch.randn(9)
        input, operand = base[:-1], base[1:]
        operands = fill(op, {position: operand}, lambda: torch.ones(8))
        with pytest.raises(RuntimeError) as theirs:
            input.add_(operand)
        with Untouched(base), pytest.raises(RuntimeError) as ours:
            op.function(input, *operands)
        assert str(ours.value) == str(theirs.value)
        op.function(input, *fill(op, {position: operand.clone()}, lambda: torch.ones(8)))


@pytest.mark.parametrize("op", [op for op in OPS if len(op.operands) == 2], **op_ids)
def test_one_tensor_in_both_operands(op):
    leaf = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    operand = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, o: op.function(x.clone(), o, o), (leaf, operand))
    torch.autograd.gradgradcheck(lambda x, o: op.function(x.clone(), o, o), (leaf, operand))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_result_used_as_operand_of_the_next_call(op):
    first = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def chain(formula, a, b):
        x, y = a * 1, b * 1
        x = formula(x, *[y] * len(op.operands))
        y = formula(y.clone(), *[x] * len(op.operands))
        return formula(y, *[x] * len(op.operands))

    actual = torch.autograd.grad(chain(op.function, first, second).sum(), (first, second))
    expected = torch.autograd.grad(chain(op.out_of_place, first, second).sum(), (first, second))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)

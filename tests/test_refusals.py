"""Bad input: one clear error, before any byte or version changes."""

import pytest
import torch

import safe_inplace

from .checks import Untouched
from .layouts import short
from .op_table import BY_NAME, OPS

op_ids = {"ids": lambda op: op.name}
POSITIONS = [(op, i) for op in OPS for i in range(len(op.operands))]
position_ids = {"ids": lambda v: v.name if hasattr(v, "name") else str(v)}


def place(op, position, bad, good=1.5):
    return [bad if i == position else good for i in range(len(op.operands))]


def refused(op, input, *operands, watch=(), **parameter):
    """The exception of our op, after which nothing has changed."""
    with Untouched(input, *operands, *watch), pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as caught:
        op.function(input, *operands, **parameter)
    assert not isinstance(caught.value, NotImplementedError), caught.value
    return caught.value


def same_refusal(ours, theirs):
    assert type(ours) is type(theirs)
    assert str(ours) == str(theirs)


def torch_refusal(call):
    with pytest.raises((RuntimeError, TypeError)) as caught:
        call()
    return caught.value


def operands_that_fit(op, input):
    return [torch.ones((), dtype=input.dtype) for _ in op.operands]



@pytest.mark.parametrize("op", OPS, **op_ids)
def test_leaf_that_requires_grad(op):
    leaf = torch.randn(2, 3, requires_grad=True)
    theirs = torch_refusal(lambda: leaf.mul_(2))
    for operands in ([2.0] * len(op.operands), [torch.ones(3)] * len(op.operands)):
        same_refusal(refused(op, leaf, *operands), theirs)
    with torch.no_grad():
        op.function(leaf, *[2.0] * len(op.operands))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_view_of_a_leaf_that_requires_grad(op):
    leaf = torch.randn(2, 3, requires_grad=True)
    theirs = torch_refusal(lambda: leaf[0].mul_(2))
    same_refusal(refused(op, leaf[0], *[torch.ones(3)] * len(op.operands), watch=[leaf]), theirs)
    op.function(leaf.clone()[0], *[torch.ones(3)] * len(op.operands))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_view_of_a_plain_leaf_becomes_differentiable(op):
    """The write makes the base require grad, as with torch's own methods."""
    base = torch.randn(2, 3)
    op.function(base[0], *[torch.ones(3, requires_grad=True)] * len(op.operands))
    assert base.requires_grad


@pytest.mark.parametrize("split", ["unbind", "split", "chunk"])
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_multi_output_views(op, split):
    base = torch.randn(2, 3).requires_grad_().clone()
    view = {
        "unbind": lambda: base.unbind()[0],
        "split": lambda: base.split(1)[0],
        "chunk": lambda: base.chunk(2)[0],
    }[split]()
    theirs = torch_refusal(lambda: view.mul_(2))
    same_refusal(refused(op, view, *operands_that_fit(op, view), watch=[base]), theirs)
    op.function(base[0], *operands_that_fit(op, base)).sum().backward()


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_multi_output_view_becoming_differentiable(op):
    """The view requires no grad yet; the operand's gradient would have to pass it."""
    base = torch.randn(2, 3)
    view = base.unbind()[0]
    vector = torch.ones(3, requires_grad=True)
    other = torch.randn(2, 3).unbind()[0]
    theirs = torch_refusal(lambda: other.mul_(vector))
    operands = [vector] * len(op.operands)
    same_refusal(refused(op, view, *operands, watch=[base]), theirs)
    op.function(view, *[vector.detach()] * len(op.operands))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_view_made_under_no_grad(op):
    base = torch.randn(2, 3).requires_grad_().clone()
    with torch.no_grad():
        view = base[0]
    vector = torch.ones(3, requires_grad=True)
    theirs = torch_refusal(lambda: view.mul_(vector))
    same_refusal(refused(op, view, *[vector] * len(op.operands), watch=[base]), theirs)
    op.function(base[0], *[vector] * len(op.operands))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_view_made_in_a_custom_function(op):
    class View(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x[0]

        @staticmethod
        def backward(ctx, grad):
            return torch.stack([grad, torch.zeros_like(grad)])

    base = torch.randn(2, 3).requires_grad_().clone()
    view = View.apply(base)
    theirs = torch_refusal(lambda: View.apply(base).mul_(2))
    same_refusal(refused(op, view, *operands_that_fit(op, view), watch=[base]), theirs)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_inference_tensor_outside_inference_mode(op):
    """In torch's words, though torch's own methods write before they refuse."""
    with torch.inference_mode():
        input, base = torch.randn(2, 3), torch.randn(2, 3)
    vector = torch.ones(3, requires_grad=True)
    for operand in (2.0, vector):
        theirs = torch_refusal(lambda: base.mul_(operand))
        data = input.clone()
        with pytest.raises(RuntimeError) as ours:
            op.function(input, *[operand] * len(op.operands))
        same_refusal(ours.value, theirs)
        assert torch.equal(input, data)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_expanded_input(op):
    base = torch.randn(3, 1)
    input = base.expand(3, 4)
    theirs = torch_refusal(lambda: input.mul_(torch.ones(4)))
    for operands in ([torch.ones(4)] * len(op.operands), [torch.ones(())] * len(op.operands)):
        same_refusal(refused(op, input, *operands, watch=[base]), theirs)
    same_refusal(refused(op, input, *[2.0] * len(op.operands), watch=[base]), theirs)
    op.function(input.clone(), *[2.0] * len(op.operands))


@pytest.mark.parametrize("op, position", POSITIONS, **position_ids)
def test_growth(op, position):
    for shape, operand in [((3,), (2, 3)), ((), (1,)), ((1, 3), (2, 3)), ((3,), (1, 3)), ((2, 1), (2, 3)), ((1,), (0,))]:
        input = torch.randn(shape)
        theirs = torch_refusal(lambda: input.clone().add_(torch.ones(operand)))
        same_refusal(refused(op, input, *place(op, position, torch.ones(operand))), theirs)
        op.function(torch.randn(operand), *place(op, position, torch.ones(shape)))


def test_growth_from_two_operands_together():
    """Each fits the other's missing dimension; the input has neither."""
    for op in OPS:
        if len(op.operands) == 2:
            error = refused(op, torch.randn(1, 1), torch.ones(2, 1), torch.ones(1, 3))
            assert isinstance(error, RuntimeError)
            assert "broadcast shape [2, 3]" in str(error) or "broadcast shape [2, 1]" in str(error)


@pytest.mark.parametrize("op, position", POSITIONS, **position_ids)
def test_shapes_that_do_not_broadcast(op, position):
    for shape, operand in [((2, 3), (4,)), ((2, 3), (3, 3)), ((0, 3), (2, 3)), ((5,), (3,))]:
        input = torch.randn(shape)
        theirs = torch_refusal(lambda: input.clone().add_(torch.ones(operand)))
        same_refusal(refused(op, input, *place(op, position, torch.ones(operand))), theirs)


@pytest.mark.parametrize("bad", [torch.ones(4), torch.ones(2, 2, 3)], ids=["shape", "growth"])
@pytest.mark.parametrize("op", [op for op in OPS if len(op.operands) == 2], **op_ids)
def test_a_bad_second_operand_stops_the_first(op, bad):
    """No half-done op: the first step is not taken when the second cannot be."""
    for dtype in (torch.float32, torch.int64):
        input = torch.ones(2, 3, dtype=dtype)
        refused(op, input, torch.ones(3, dtype=dtype), bad.to(dtype))


NARROWING = [
    (torch.int64, torch.float32),
    (torch.uint8, torch.float64),
    (torch.bool, torch.int32),
    (torch.bool, torch.float16),
    (torch.float32, torch.complex64),
    (torch.bfloat16, torch.complex64),
    (torch.int32, torch.complex128),
    (torch.float64, torch.complex64),
]


@pytest.mark.parametrize("op, position", POSITIONS, **position_ids)
@pytest.mark.parametrize("dtype, operand_dtype", NARROWING, ids=short)
def test_result_dtype_that_cannot_be_cast(op, position, dtype, operand_dtype):
    input = torch.ones(2, 3, dtype=dtype)
    operand = torch.ones(3, dtype=operand_dtype)
    theirs = torch_refusal(lambda: input.clone().mul_(operand))
    error = refused(op, input, *place(op, position, operand, torch.ones(3, dtype=dtype)))
    same_refusal(error, theirs)


@pytest.mark.parametrize("op, position", POSITIONS, **position_ids)
@pytest.mark.parametrize(
    "dtype, number", [(torch.int64, 1.5), (torch.float32, 1j), (torch.bool, 2), (torch.uint8, 0.5)]
)
def test_number_that_cannot_be_cast(op, position, dtype, number):
    input = torch.ones(2, 3, dtype=dtype)
    theirs = torch_refusal(lambda: input.clone().mul_(number))
    error = refused(op, input, *place(op, position, number, torch.ones(3, dtype=dtype)))
    same_refusal(error, theirs)


@pytest.mark.parametrize("op, position", POSITIONS, **position_ids)
def test_other_device(op, position):
    input = torch.randn(2, 3)
    error = refused(op, input, *place(op, position, torch.ones(3, device="meta")))
    assert "cpu" in str(error) and "meta" in str(error)
    if torch.cuda.is_available():
        theirs = torch_refusal(lambda: input.clone().mul_(torch.ones(3, device="cuda")))
        error = refused(op, input, *place(op, position, torch.ones(3, device="cuda")))
        assert type(error) is type(theirs)
        assert "cpu" in str(error) and "cuda" in str(error)


NOT_TENSORS = {
    "None": None,
    "str": "1",
    "list": [1.0, 2.0, 3.0],
    "tuple": (1.0,),
    "dict": {},
    "object": object(),
    "type": torch.Tensor,
    "function": len,
    "dtype": torch.float32,
    "bytes": b"1",
}


@pytest.mark.parametrize("bad", NOT_TENSORS.values(), ids=NOT_TENSORS.keys())
@pytest.mark.parametrize("op, position", POSITIONS, **position_ids)
def test_operand_that_is_no_tensor(op, position, bad):
    """The op, the argument, what it was, what it may be."""
    for good in (1.5, torch.ones(3)):
        error = refused(op, torch.randn(2, 3), *place(op, position, bad, good))
        assert type(error) is TypeError
        message = str(error)
        assert op.name in message
        assert op.operands[position] in message
        assert type(bad).__name__ in message
        assert "ensor" in message and "number" in message


@pytest.mark.parametrize(
    "bad", [*NOT_TENSORS.values(), 1.5, True], ids=[*NOT_TENSORS.keys(), "number", "bool"]
)
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_input_that_is_no_tensor(op, bad):
    error = refused(op, bad, *[torch.ones(3)] * len(op.operands))
    assert type(error) is TypeError
    message = str(error)
    assert op.name in message and "input" in message and type(bad).__name__ in message
    assert "ensor" in message


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_wrong_number_of_arguments(op):
    input = torch.randn(2, 3)
    count = len(op.operands)
    for operands in ([1.0] * (count - 1), [1.0] * (count + 1), [1.0] * (count + 2)):
        error = refused(op, input, *operands)
        assert type(error) is TypeError and op.name in str(error)
    with pytest.raises(TypeError, match=op.name):
        op.function()


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_unknown_and_repeated_keywords(op):
    input = torch.randn(2, 3)
    for keyword in ({"beta": 1}, {"out": input}, {"alpha_": 2}, {"self": input}, {"": 1}):
        error = refused(op, input, *[1.0] * len(op.operands), **keyword)
        assert type(error) is TypeError and op.name in str(error)
        assert next(iter(keyword)) in str(error)
    repeated = {op.operands[0]: 1.0}
    error = refused(op, input, *[1.0] * len(op.operands), **repeated)
    assert type(error) is TypeError and op.operands[0] in str(error)


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_missing_keyword_names_the_argument(op):
    with pytest.raises(TypeError, match=op.operands[-1]):
        op.function(torch.randn(2, 3), **{n: 1.0 for n in op.operands[:-1]})


@pytest.mark.parametrize("op", [op for op in OPS if op.parameter], **op_ids)
def test_parameter_is_keyword_only(op):
    error = refused(op, torch.randn(2, 3), *[torch.ones(3)] * len(op.operands), 2.0)
    assert type(error) is TypeError


@pytest.mark.parametrize("bad", ["1", None, [1], torch.ones(3), object()], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("op", [op for op in OPS if op.parameter], **op_ids)
def test_parameter_that_is_no_number(op, bad):
    for good in (torch.ones(3), 1.5):
        operands = [good] * len(op.operands)
        error = refused(op, torch.randn(2, 3), *operands, **{op.parameter: bad})
        assert type(error) in (TypeError, RuntimeError, ValueError)
        assert op.parameter in str(error)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=short)
def test_float_alpha_for_integers(dtype):
    for operand in (torch.ones(3, dtype=dtype), 2):
        input = torch.ones(2, 3, dtype=dtype)
        theirs = torch_refusal(lambda: input.clone().add_(operand, alpha=1.5))
        same_refusal(refused(BY_NAME["add_"], input, operand, alpha=1.5), theirs)


def test_complex_alpha_for_real_input():
    input = torch.ones(2, 3)
    theirs = torch_refusal(lambda: input.clone().add_(torch.ones(3), alpha=1j))
    same_refusal(refused(BY_NAME["add_"], input, torch.ones(3), alpha=1j), theirs)


def test_bool_alpha_for_numbers():
    input = torch.ones(2, 3)
    theirs = torch_refusal(lambda: input.clone().add_(torch.ones(3), alpha=True))
    same_refusal(refused(BY_NAME["add_"], input, torch.ones(3), alpha=True), theirs)


def test_complex_value_of_addcmul_without_an_imaginary_part():
    """As torch's: also where one operand is a number and torch's own functions compute."""
    x = torch.randn(4, 3)
    for operands in ((3, x), (x, 3), (x, x)):
        expected = safe_inplace.addcmul(x, *operands, value=2)
        torch.testing.assert_close(safe_inplace.addcmul(x, *operands, value=2 + 0j), expected)
        rows = tuple(0 if isinstance(one, torch.Tensor) else None for one in (x, *operands))
        mapped = torch.func.vmap(lambda row, a, b: safe_inplace.addcmul(row, a, b, value=2 + 0j), rows)(x, *operands)
        torch.testing.assert_close(mapped, expected)


def test_complex_value_of_addcmul_for_real_input():
    input, ones = torch.ones(2, 3), torch.ones(3)
    theirs = torch_refusal(lambda: input.clone().addcmul_(ones, ones, value=1j))
    same_refusal(refused(BY_NAME["addcmul_"], input, ones, ones, value=1j), theirs)


def dense(tensor):
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.is_nested:
        return torch.stack(tensor.unbind())
    return tensor.to_dense()


UNUSUAL = {
    "sparse_coo": lambda: torch.ones(2, 3).to_sparse(),
    "sparse_csr": lambda: torch.ones(2, 3).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(2, 3).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(3)]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
@pytest.mark.parametrize("op, position", POSITIONS, **position_ids)
def test_unusual_operand_works_where_torch_works(op, position, make):
    """Right where torch's own method takes it; else one error, and nothing has changed."""
    operand = make()
    input = torch.full((2, 3), 3.0)
    expected = input.clone()
    try:
        op.two_step(expected, *place(op, position, operand))
    except (RuntimeError, NotImplementedError):
        expected = None
    actual = input.clone()
    if expected is not None:
        assert op.function(actual, *place(op, position, operand)) is actual
        torch.testing.assert_close(actual, expected)
        return
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        op.function(actual, *place(op, position, operand))
    assert str(caught.value)
    assert torch.equal(actual, input)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL.keys())
@pytest.mark.parametrize("op", OPS, **op_ids)
def test_unusual_input_works_where_torch_works(op, make):
    for operand in (2.0, torch.ones(2, 3), make()):
        operands = [operand] * len(op.operands)
        expected = make()
        try:
            op.two_step(expected, *operands)
        except (RuntimeError, NotImplementedError):
            expected = None
        actual = make()
        if expected is None:
            with pytest.raises((RuntimeError, NotImplementedError)):
                op.function(actual, *operands)
            assert torch.equal(dense(actual), dense(make()))
        else:
            assert op.function(actual, *operands) is actual
            torch.testing.assert_close(dense(actual), dense(expected))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sparse_coo", "sparse_csr", "mkldnn", "nested"])
def test_unusual_input_that_is_its_own_operand(name):
    """The second of two steps reads the old input."""
    input = UNUSUAL[name]()
    added = input.clone().add_(input)
    op = BY_NAME["add_mul_"]
    try:
        expected = added.clone().mul_(input)
    except (RuntimeError, NotImplementedError):
        with pytest.raises((RuntimeError, NotImplementedError)):
            op.function(input, input, input)
        expected = UNUSUAL[name]()
    else:
        op.function(input, input, input)
    assert torch.equal(dense(input), dense(expected))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_refused_calls_leave_no_node_behind(op):
    """After a refusal the input has the graph it had, and backward works."""
    leaf = torch.randn(2, 3, requires_grad=True)
    input = leaf * 2
    node = input.grad_fn
    for bad in (torch.ones(4), torch.ones(3, dtype=torch.complex64), "x"):
        refused(op, input, *[bad] * len(op.operands))
        assert input.grad_fn is node and input._version == 0
    input.sum().backward()
    assert torch.equal(leaf.grad, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("op", OPS, **op_ids)
def test_refusals_of_the_dispatcher_op_are_the_same(op):
    """`torch.ops` is a way in too."""
    packet = op.packet
    leaf = torch.randn(2, 3, requires_grad=True)
    cases = [
        (leaf, torch.ones(3)),
        (torch.randn(3, 1).expand(3, 4), torch.ones(4)),
        (torch.randn(3), torch.ones(2, 3)),
        (torch.ones(3, dtype=torch.int64), torch.ones(3)),
    ]
    for input, operand in cases:
        theirs = torch_refusal(lambda: input.mul_(operand))
        with Untouched(input):
            ours = torch_refusal(lambda: packet.default(input, *[operand] * len(op.operands)))
        same_refusal(ours, theirs)

"""What only a CUDA device shows: streams, graphs, devices. Collected where there is one."""

import pytest
import torch

import safe_inplace
from safe_inplace import _C

from .checks import assert_bit_equal, assert_close
from .layouts import KERNEL_DTYPES, random_tensor, short
from .op_table import OPS
from .test_values import check

op_ids = {"ids": lambda op: op.name}

pytestmark = pytest.mark.cuda

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


def tensors(op, shape=(1024, 513), operand=(513,), dtype=torch.float32):
    values = [random_tensor(shape, dtype, "cuda")]
    values += [random_tensor(operand, dtype, "cuda") for _ in op.operands]
    return values


def expected_grads(op, values, grad):
    leaves = [v.detach().clone().requires_grad_() for v in values]
    return torch.autograd.grad(op.out_of_place(leaves[0] * 1, *leaves[1:]), leaves, grad)


def test_runs_on_the_current_stream(op):
    """Work queued before the op on a side stream is waited for; what follows waits for it."""
    stream = torch.cuda.Stream()
    values = tensors(op)
    expected = op.out_of_place(values[0] * 2, *values[1:]) + 1
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        input = values[0] * 2
        op.function(input, *values[1:])
        result = input + 1
    stream.synchronize()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_backward_on_several_streams(op):
    """Forward on two streams, backward on the engine's threads; delays in every gap."""
    leaves = [v.requires_grad_() for v in tensors(op)]
    grad = torch.randn(1024, 513, device="cuda")
    expected = expected_grads(op, leaves, grad)
    for _ in range(5):
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        current = torch.cuda.current_stream()
        first.wait_stream(current)
        with torch.cuda.stream(first):
            torch.cuda._sleep(5_000_000)
            input = leaves[0] * 1
            op.function(input, *leaves[1:])
        second.wait_stream(first)
        with torch.cuda.stream(second):
            torch.cuda._sleep(5_000_000)
            output = input * 1
            held = output.sin()
        current.wait_stream(second)
        torch.cuda._sleep(5_000_000)
        grads = torch.autograd.grad(output, leaves, grad.clone())
        for actual, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-2)
        del held


def test_pinned_memory_is_not_taken_over():
    """A copy to the device may still be reading it."""
    pinned = torch.ones(1024, pin_memory=True)
    assert not _C.may_take_over(pinned) and _C.may_take_over(torch.ones(1024))


def test_a_gradient_read_on_another_stream_is_not_overwritten(op):
    """A consumer on a side stream still reads the gradient while backward goes on."""
    leaves = [v.requires_grad_() for v in tensors(op)]
    side = torch.cuda.Stream()
    copies = []
    input = leaves[0] * 1
    op.function(input, *leaves[1:])

    def copy_later(grad):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            copies.append(grad.clone())
        grad.record_stream(side)

    input.register_hook(copy_later)
    grad = torch.randn(1024, 513, device="cuda")
    (input * grad).sum().backward()
    torch.cuda.synchronize()
    assert_bit_equal(copies[0], grad)


def test_graph_capture_of_forward(op):
    values = tensors(op)
    start = values[0].clone()
    expected = op.function(start.clone(), *values[1:])
    op.function(values[0].clone(), *values[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.function(values[0], *values[1:])
    for _ in range(3):
        values[0].copy_(start)
        graph.replay()
        assert_bit_equal(values[0], expected)


def test_graph_capture_of_forward_and_backward(op):
    """A whole step is captured; replays see new inputs and give their gradients."""
    leaves = [v.requires_grad_() for v in tensors(op)]
    grad = torch.randn(1024, 513, device="cuda")

    def step():
        return torch.autograd.grad(op.function(leaves[0] * 1, *leaves[1:]), leaves, grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        expected = step()
        graph.replay()
        for actual, right in zip(captured, expected, strict=True):
            assert_bit_equal(actual, right)


def test_graph_trees(op):
    """`mode="reduce-overhead"`: outputs live in a pool that the next run overwrites."""
    leaves = [v.requires_grad_() for v in tensors(op)]
    compiled = torch.compile(lambda x: x.sin() * 2, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        result = op.function(compiled(leaves[0]).clone(), *leaves[1:])
        grads = torch.autograd.grad(result.pow(2).sum(), leaves)
        plain = op.out_of_place(leaves[0].sin() * 2, *leaves[1:])
        expected = torch.autograd.grad(plain.pow(2).sum(), leaves)
        for actual, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=short)
def test_numbers_and_cpu_scalars_beside_cuda_input(op, dtype):
    """Used in the precision of the arithmetic, not rounded to the input's: to the bit for what torch has a method of."""
    numbers = [1.0009765625 / 3, 7e4, torch.tensor(0.3), torch.tensor(1 / 3, dtype=torch.float64)]
    if dtype.is_complex:
        numbers += [0.3 - 1.7j, torch.tensor(0.3 - 1.7j)]
    for number in numbers:
        for parameter in ({}, op.parameters(-0.3)):
            check(op, random_tensor((5, 17), dtype, "cuda"), *[number] * len(op.operands), **parameter)


def test_no_synchronization(op):
    leaves = [v.requires_grad_() for v in tensors(op)]
    grad = torch.ones(1024, 513, device="cuda")
    torch.autograd.grad(op.function(leaves[0] * 1, *leaves[1:]), leaves, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(op.function(leaves[0] * 1, *leaves[1:]), leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("holder", ["engine", "caller"])
def test_peak_memory_of_backward(op, holder):
    """No full-size tensor but the gradient that the graph itself makes."""
    leaf, *operands = tensors(op, shape=(4096, 1024), operand=(1024,))
    full = leaf.numel() * leaf.element_size()
    leaf.requires_grad_()
    for operand in operands:
        operand.requires_grad_()
    # an addition hands its gradient on
    input = leaf + 0
    op.function(input, *operands)
    grad = torch.randn_like(leaf)
    weighted = (input * grad).sum() if holder == "engine" else None
    expected = expected_grads(op, [leaf, *operands], grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if holder == "engine":
        del input
        weighted.backward()
        grads = [t.grad for t in (leaf, *operands)]
    else:
        grads = torch.autograd.grad(input, [leaf, *operands], grad)
    extra = torch.cuda.max_memory_allocated() - before
    # The engine's: made by the product's backward. The caller's: handed on, or its result is written over the kept input.
    assert extra < (9 / 8 if holder == "engine" else 1 / 8) * full
    for actual, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-2)


def test_the_benchmarks_see_what_backward_allocates_on_the_device():
    """The engine runs it on a thread of its own."""
    measure = pytest.importorskip("benchmarks.measure")
    leaf = torch.ones(1 << 20, device="cuda", requires_grad=True)
    full = leaf.numel() * leaf.element_size()
    result = leaf * 2
    peak = measure.peak_memory(leaf.device, lambda: torch.autograd.grad(result, leaf, torch.ones_like(leaf)))
    assert 2 * full <= peak < 3 * full


def test_same_bits_as_the_cpu(op):
    """One formula for both devices: element-wise results agree to the last bit or ulp."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        values = tensors(op, dtype=dtype)
        cpu = op.function(values[0].cpu(), *[v.cpu() for v in values[1:]])
        cuda = op.function(values[0], *values[1:])
        torch.testing.assert_close(
            cuda.cpu(), cpu, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
        )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_not_the_current_device(op):
    values = [v.to("cuda:1").requires_grad_() for v in tensors(op)]
    grad = torch.ones(1024, 513, device="cuda:1")
    grads = torch.autograd.grad(op.function(values[0] * 1, *values[1:]), values, grad)
    for actual, right in zip(grads, expected_grads(op, values, grad), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-2)


def test_other_cuda_device_is_refused(op):
    input = torch.randn(2, 3, device="cuda")
    before = input.clone()
    with pytest.raises(RuntimeError, match="same device"):
        op.function(input, *[torch.ones(3)] * len(op.operands))
    assert torch.equal(input, before) and input._version == 0


@pytest.mark.parametrize("offset", [0, 1, 2, 4], ids=lambda n: f"offset{n}")
@pytest.mark.parametrize("numel", [0, 1, 3, 4099, 3_000_017])
def test_digest_is_that_of_the_cpu(numel, offset):
    base = torch.randn(numel + offset)
    value = base[offset:].cuda() if offset == 0 else base.cuda()[offset:]
    assert safe_inplace._C.digest(value) == safe_inplace._C.digest(base[offset:])


@pytest.mark.skipif(torch.cuda.get_device_properties(0).total_memory < 40 << 30, reason="needs 40 GiB")
@pytest.mark.parametrize("columns", [1032, 1031], ids=["vectors", "elements"])
def test_more_elements_than_32_bits_count(columns):
    """Forward and backward on 2**31 elements and more, against torch piece by piece. The sums are of small integers: exact."""
    rows = 1 << 21
    x = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[1::2] = -1
    x[:, 5::7] = 0
    x[-1] = 2
    assert x.numel() > 2**31
    scale, shift = (random_tensor((columns,), torch.float32, "cuda").requires_grad_() for _ in range(2))
    result = safe_inplace.mul_add_(x.requires_grad_() + 0, scale, shift)
    grad = x.detach().roll(1, 0)
    grads = torch.autograd.grad(result, [x, scale, shift], grad)
    sums = torch.zeros(2, columns, device="cuda")
    pieces = (t.detach().split(1 << 17) for t in (x, grad, result, grads[0]))
    for some_x, some_grad, some_result, some_of_grad in zip(*pieces, strict=True):
        exact = torch.addcmul(shift.detach().double(), some_x.double(), scale.detach().double())
        assert_close(some_result, exact, torch.finfo(torch.bfloat16).eps)
        assert_bit_equal(some_of_grad, (some_grad * scale.detach()).bfloat16())
        sums += torch.stack([(some_grad.float() * some_x.float()).sum(0), some_grad.float().sum(0)])
    assert torch.equal(torch.stack(grads[1:]), sums)

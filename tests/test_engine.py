"""Hooks, kept graphs, anomaly mode, checkpoint, autocast, threads, lifetime: as torch's own."""

import contextlib
import copy
import gc
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from .layouts import random_tensor
from .op_table import BY_NAME, OPS

op_ids = {"ids": lambda op: op.name}


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


def leaves(op, shape=(4, 3), operand=(3,), dtype=torch.float64):
    tensors = [random_tensor(shape, dtype)] + [random_tensor(operand, dtype) for _ in op.operands]
    return [t.requires_grad_() for t in tensors]


def expected_grads(op, tensors, weight=None):
    result = op.out_of_place(tensors[0] * 1, *tensors[1:])
    total = (result * (1 if weight is None else weight)).sum()
    return torch.autograd.grad(total, tensors)


def close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_tensor_hook_after_the_write_sees_the_new_gradient(op):
    tensors = leaves(op)
    input = tensors[0] * 1
    op.function(input, *tensors[1:])
    seen = []
    input.register_hook(lambda g: seen.append(g) or g * 2)
    (input * 3).sum().backward()
    assert torch.equal(seen[0], torch.full((4, 3), 3.0, dtype=torch.float64))
    close([t.grad for t in tensors], [g * 6 for g in expected_grads(op, tensors)])


def test_tensor_hook_before_the_write_follows_torch(op):
    """A hook belongs to the node of its time: it sees the gradient of the old value."""

    def run(formula):
        input = tensors[0] * 1
        seen = []
        input.register_hook(seen.append)
        formula(input, *tensors[1:])
        return seen, torch.autograd.grad(input.sum(), tensors)

    tensors = leaves(op)
    ours, grads = run(op.function)
    theirs, expected = run(op.two_step)
    close(ours, theirs)
    close(grads, expected)


def test_retain_grad_before_the_write_follows_torch(op):
    def run(formula):
        input = tensors[0] * 1
        input.retain_grad()
        formula(input, *tensors[1:])
        grads = torch.autograd.grad(input.pow(2).sum(), tensors, retain_graph=True)
        input.pow(2).sum().backward(inputs=[tensors[0], input])
        return input.grad, grads

    tensors = leaves(op)
    ours, grads = run(op.function)
    tensors[0].grad = None
    theirs, expected = run(op.two_step)
    close(grads, expected)
    torch.testing.assert_close(ours, theirs)


def test_retain_grad_after_the_write(op):
    tensors = leaves(op)
    input = tensors[0] * 1
    op.function(input, *tensors[1:])
    input.retain_grad()
    weight = random_tensor((4, 3), torch.float64)
    (input * weight).sum().backward()
    torch.testing.assert_close(input.grad, weight)
    close([t.grad for t in tensors], expected_grads(op, tensors, weight))


def test_node_hooks(op):
    tensors = leaves(op)
    input = tensors[0] * 1
    op.function(input, *tensors[1:])
    node = input.grad_fn
    assert node.name() == op.node
    before, after = [], []
    node.register_prehook(lambda grads: before.append(grads))
    node.register_hook(lambda grad_inputs, grad_outputs: after.append((grad_inputs, grad_outputs)))
    weight = random_tensor((4, 3), torch.float64)
    (input * weight).sum().backward()
    torch.testing.assert_close(before[0][0], weight)
    grad_inputs, grad_outputs = after[0]
    torch.testing.assert_close(grad_outputs[0], weight)
    expected = expected_grads(op, tensors, weight)
    close([t.grad for t in tensors], expected)
    close(grad_inputs, expected)


def test_node_prehook_replaces_the_gradient(op):
    tensors = leaves(op)
    input = tensors[0] * 1
    op.function(input, *tensors[1:])
    input.grad_fn.register_prehook(lambda grads: (grads[0] * 3,))
    input.sum().backward()
    close([t.grad for t in tensors], [g * 3 for g in expected_grads(op, tensors)])


def test_post_accumulate_grad_hook(op):
    tensors = leaves(op)
    seen = []
    for tensor in tensors:
        tensor.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad.clone()))
    input = tensors[0] * 1
    op.function(input, *tensors[1:]).sum().backward()
    assert len(seen) == len(tensors)
    close([t.grad for t in tensors], expected_grads(op, tensors))


def test_multi_grad_hook(op):
    tensors = leaves(op)
    expected = expected_grads(op, tensors)
    seen = []
    torch.autograd.graph.register_multi_grad_hook(tensors, seen.append)
    input = tensors[0] * 1
    op.function(input, *tensors[1:]).sum().backward()
    close(seen[0], expected)


def test_retain_graph_gives_the_same_twice(op):
    tensors = leaves(op)
    weight = random_tensor((4, 3), torch.float64)
    input = tensors[0] * 1
    total = (op.function(input, *tensors[1:]) * weight).sum()
    expected = expected_grads(op, tensors, weight)
    for _ in range(3):
        close(torch.autograd.grad(total, tensors, retain_graph=True), expected)
    close(torch.autograd.grad(total, tensors), expected)


def test_backward_twice_is_refused_as_torch(op):
    """Where something was saved; where nothing was, a second backward is harmless."""
    tensors = leaves(op)
    input = tensors[0].sin()
    total = op.function(input, *tensors[1:]).sum()
    total.backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        total.backward()

    result = op.function(torch.zeros(4, 3, dtype=torch.float64), *tensors[1:])
    total = result.sum()
    torch.autograd.grad(total, tensors[1:])
    if op.saves:
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second"):
            torch.autograd.grad(total, tensors[1:])
    else:
        torch.autograd.grad(total, tensors[1:])


def test_partial_backward_then_the_rest(op):
    """Only the asked-for gradients are computed, and the graph serves another question."""
    tensors = leaves(op)
    total = op.function(tensors[0] * 1, *tensors[1:]).sum()
    expected = expected_grads(op, tensors)
    for tensor, grad in zip(tensors, expected, strict=True):
        close(torch.autograd.grad(total, tensor, retain_graph=True), [grad])


@pytest.mark.parametrize("form", ["function", "functional"])
@pytest.mark.parametrize("name", ["addcmul_", "mul_add_"])
def test_a_pass_that_reads_nothing_leaves_what_an_earlier_one_has_read(name, form):
    op = BY_NAME[name]
    tensors = leaves(op)
    total = getattr(op, form)(tensors[0] * 1, *tensors[1:]).sum()
    expected = expected_grads(op, tensors)
    named = dict(zip(op.arguments, zip(tensors, expected, strict=True), strict=True))
    (reads_nothing,) = set(named) - set(op.saves)
    first, last = op.saves
    for asked, kept in ((first, True), (reads_nothing, False), (last, False)):
        tensor, grad = named[asked]
        close(torch.autograd.grad(total, tensor, retain_graph=kept), [grad])


def test_materialized_and_unused_gradients(op):
    tensors = leaves(op)
    unused = torch.randn(3, requires_grad=True)
    total = op.function(tensors[0] * 1, *tensors[1:]).sum()
    grads = torch.autograd.grad(total, [*tensors, unused], allow_unused=True)
    assert grads[-1] is None
    close(grads[:-1], expected_grads(op, tensors))


def test_undefined_gradient(op):
    """A consumer that returns None: ours returns None on."""

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    tensors = leaves(op)
    result = op.function(tensors[0] * 1, *tensors[1:])
    Silent.apply(result).sum().backward()
    assert all(t.grad is None for t in tensors)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_names_the_node(op):
    tensors = leaves(op)
    with torch.autograd.set_detect_anomaly(True):
        op.function(tensors[0] * 1, *tensors[1:]).sum().backward()
        close([t.grad for t in tensors], expected_grads(op, tensors))
        input = tensors[0] * 1
        op.function(input, *tensors[1:])
        with pytest.raises(RuntimeError, match=f"{op.node}.*returned nan"):
            input.backward(torch.full_like(input, float("nan")))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(op, use_reentrant):
    def block(x, *operands):
        return op.function((x * 1.5).sin(), *operands).cos()

    tensors = leaves(op)
    plain = op.out_of_place((tensors[0] * 1.5).sin(), *tensors[1:]).cos()
    expected = torch.autograd.grad(plain.sum(), tensors)
    checkpoint(block, *tensors, use_reentrant=use_reentrant).sum().backward()
    close([t.grad for t in tensors], expected)


def test_checkpoint_over_a_written_input_follows_torch(op):
    """The block writes its own argument: recomputation would start from the new value."""
    tensors = leaves(op)

    def run(formula):
        input = tensors[0] * 1

        def block(x, *operands):
            return formula(x, *operands).cos()

        return torch.autograd.grad(
            checkpoint(block, input, *tensors[1:], use_reentrant=False).sum(), tensors
        )

    try:
        theirs = run(op.two_step)
    except RuntimeError as error:
        with pytest.raises(type(error)):
            run(op.function)
    else:
        close(run(op.function), theirs)


def test_autocast(op):
    """As torch's own in-place methods: the input's dtype decides, nothing is cast."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = leaves(op, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            input = tensors[0] * 1
            result = op.function(input, *tensors[1:])
            assert result.dtype == dtype and result is input
            linear = torch.nn.functional.linear(torch.randn(4, 5), torch.randn(3, 5))
            assert linear.dtype == torch.bfloat16
            op.function(linear, *[t.float() for t in tensors[1:]])
            assert linear.dtype == torch.bfloat16
        result.sum().backward()
        assert all(t.grad.dtype == dtype for t in tensors)


def test_save_on_cpu(op):
    tensors = leaves(op)
    with torch.autograd.graph.save_on_cpu():
        total = op.function(tensors[0] * 1, *tensors[1:]).sum()
    close(torch.autograd.grad(total, tensors), expected_grads(op, tensors))


def test_saved_tensors_hooks_are_asked_for_every_saved_tensor(op):
    """What the hooks return is what backward uses."""
    tensors = leaves(op)
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1

    def unpack(index):
        unpacked.append(index)
        return packed[index].clone()

    input = tensors[0] * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        op.function(input, *tensors[1:])
    weight = random_tensor((4, 3), torch.float64)
    total = (input * weight).sum()
    close(torch.autograd.grad(total, tensors), expected_grads(op, tensors, weight))
    assert sorted(unpacked) == list(range(len(packed)))


def test_disabled_saved_tensors_hooks(op):
    tensors = leaves(op)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        total = op.function(tensors[0] * 1, *tensors[1:]).sum()
    close(torch.autograd.grad(total, tensors), expected_grads(op, tensors))


def test_allow_mutation_on_saved_tensors(op):
    tensors = leaves(op)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        input = tensors[0] * 1
        total = (input * input).sum()
        op.function(input, *tensors[1:])
        total = total + input.sum()
        actual = torch.autograd.grad(total, tensors)
    plain = tensors[0] * 1
    total = (plain * plain).sum() + op.out_of_place(plain, *tensors[1:]).sum()
    close(actual, torch.autograd.grad(total, tensors))


def test_detach_in_place(op):
    tensors = leaves(op)
    input = tensors[0] * 1
    op.function(input, *tensors[1:])
    input.detach_()
    assert not input.requires_grad and input.grad_fn is None
    op.function(input, *[t.detach() for t in tensors[1:]])
    assert not input.requires_grad


def test_set_grad_enabled_and_enable_grad_inside_no_grad(op):
    tensors = leaves(op)
    with torch.no_grad(), torch.enable_grad():
        total = op.function(tensors[0] * 1, *tensors[1:]).sum()
    close(torch.autograd.grad(total, tensors), expected_grads(op, tensors))


def test_copy_slices_hooks_and_nested_views(op):
    tensors = leaves(op, shape=(4, 3))
    base = tensors[0] * 1
    op.function(base[1:][:2].t()[:, 0], *tensors[1:])
    op.function(base[0], *tensors[1:])
    value = tensors[0] * 1
    rows = [op.out_of_place(value[0], *tensors[1:]), op.out_of_place(value[1], *tensors[1:])]
    plain = torch.stack([*rows, value[2], value[3]])
    torch.testing.assert_close(base, plain)
    close(
        torch.autograd.grad(base.sin().sum(), tensors),
        torch.autograd.grad(plain.sin().sum(), tensors),
    )


def test_view_whose_base_only_now_requires_grad(op):
    """To torch's methods such a view is a leaf until somebody asks for its grad_fn: they refuse it."""
    leaf = torch.randn(3, dtype=torch.float64, requires_grad=True)
    operands = [torch.randn(2, 3, dtype=torch.float64) for _ in op.operands]

    def run(write):
        base = torch.ones(2, 3, dtype=torch.float64)
        view = base[:]
        base[0] = leaf
        write(view, *operands)
        return torch.autograd.grad((base * base).sum(), leaf)[0]

    with pytest.raises(RuntimeError, match="a leaf Variable"):
        run(lambda view, *o: op.two_step(view, *o))
    expected = run(lambda view, *o: view.copy_(op.out_of_place(view, *o)))
    torch.testing.assert_close(run(op.function), expected)


def test_deepcopy_and_pickle(op):
    leaf = random_tensor((4, 3), torch.float64)
    result = op.function(leaf.clone(), *[2.0] * len(op.operands))
    assert torch.equal(copy.deepcopy(result), result)
    assert torch.equal(pickle.loads(pickle.dumps(result)), result)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.equal(torch.load(file), result)
    parameter = torch.nn.Parameter(leaf.clone())
    with torch.no_grad():
        op.function(parameter, *[2.0] * len(op.operands))
    assert torch.equal(copy.deepcopy(parameter), result)
    assert pickle.loads(pickle.dumps(op.function)) is op.function


def test_python_object_survives(op):
    """Attributes and identity stay, while only C++ holds the tensor too."""
    input = torch.randn(4, 3, requires_grad=True).clone()
    input.mark = "kept"
    assert op.function(input, *[2.0] * len(op.operands)).mark == "kept"


def test_module_inside_an_optimizer_step():
    """Two training steps in place and out of place walk the same way."""

    class Net(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            torch.manual_seed(0)
            self.first = torch.nn.Linear(5, 5, dtype=torch.float64)
            self.second = torch.nn.Linear(5, 5, dtype=torch.float64)
            self.scale = torch.nn.Parameter(torch.full((5,), 0.9, dtype=torch.float64))
            self.shift = torch.nn.Parameter(torch.full((5,), 0.1, dtype=torch.float64))
            self.table = table

        def forward(self, x):
            call = self.table
            h = call("mul_add_")(self.first(x), self.scale, self.shift).tanh()
            y = call("addcmul_")(self.second(h), h, self.scale, value=0.5)
            y = call("add_mul_")(y, x, self.scale)
            return call("mul_")(call("add_")(y, self.shift, alpha=2), 0.7)

    def train(table):
        net = Net(table)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        torch.manual_seed(1)
        for _ in range(5):
            loss = net(torch.randn(7, 5, dtype=torch.float64)).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    close(
        train(lambda name: BY_NAME[name].function), train(lambda name: BY_NAME[name].out_of_place)
    )


def test_many_threads(op):
    """Forward and backward in many Python threads at once, on shared parameters."""
    shared = [random_tensor((3,), torch.float64).requires_grad_() for _ in op.operands]
    inputs = [random_tensor((50, 3), torch.float64) for _ in range(8)]

    def step(input):
        leaf = input.clone().requires_grad_()
        grads = []
        for _ in range(20):
            total = op.function(leaf * 1, *shared).pow(2).sum()
            grads.append(torch.autograd.grad(total, [leaf, *shared]))
        return grads

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(step, inputs))
    for input, grads in zip(inputs, results, strict=True):
        leaf = input.clone().requires_grad_()
        total = op.out_of_place(leaf * 1, *shared).pow(2).sum()
        expected = torch.autograd.grad(total, [leaf, *shared])
        for actual in grads:
            close(actual, expected)


def test_threads_share_one_graph(op):
    """Concurrent backward calls through one kept graph: no thread takes another's memory."""
    tensors = leaves(op, shape=(50, 3))
    total = op.function(tensors[0] * 1, *tensors[1:]).pow(2).sum()
    expected = torch.autograd.grad(total, tensors, retain_graph=True)

    def step(_):
        return torch.autograd.grad(total, tensors, retain_graph=True)

    with ThreadPoolExecutor(4) as pool:
        for actual in pool.map(step, range(40)):
            close(actual, expected)


def test_the_gil_is_released_or_at_least_safe():
    """A Python thread keeps running while another is inside a large op."""
    large = torch.randn(2000, 2000)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    for _ in range(5):
        BY_NAME["mul_add_"].function(large, 1.0, 0.0)
    stop.set()
    thread.join()
    assert ticks


def step(op, tensors):
    input = tensors[0] * 1
    view = input[1:]
    op.function(view, *tensors[1:])
    op.function(input, *tensors[1:])
    torch.autograd.grad(input.sum(), tensors)


def live_tensors():
    # By its type: isinstance asks lazy modules and deprecated names, among all that there is, for their __class__.
    return sum(1 for o in gc.get_objects() if issubclass(type(o), torch.Tensor))


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_no_leak_over_ten_thousand_steps(op):
    """No reference cycle (the collector stays off), no object and no page left over."""
    tensors = leaves(op, shape=(40, 64), operand=(64,), dtype=torch.float32)
    gc.collect()
    gc.freeze()  # a collection may set more of what other tests left free to be collected: not counted here
    gc.disable()
    try:
        for _ in range(500):
            step(op, tensors)
        objects, pages = live_tensors(), resident_bytes()
        for _ in range(2000 if op.name != "mul_add_" else 10_000):
            step(op, tensors)
        grown = resident_bytes() - pages  # before live_tensors makes its list
        assert live_tensors() == objects
        # one leaked input per step would be 20 MB at 2,000 steps; a leaked node about 1 MB
        assert grown < 500_000
        assert gc.collect() == 0
    finally:
        gc.enable()
        gc.unfreeze()


def test_no_leak_without_backward_and_after_refusals(op):
    tensors = leaves(op, shape=(40, 64), operand=(64,), dtype=torch.float32)

    def forget():
        input = tensors[0] * 1
        op.function(input, *tensors[1:])
        for bad in ([torch.ones(3)], [None], ["x"]):
            with contextlib.suppress(RuntimeError, TypeError):
                op.function(input, *bad * len(op.operands))

    for _ in range(200):
        forget()
    gc.collect()
    pages = resident_bytes()
    for _ in range(1000):
        forget()
    assert resident_bytes() - pages < 500_000


def test_everything_dies_with_the_result(op):
    tensors = leaves(op)
    input = tensors[0] * 1
    operands = [t * 1 for t in tensors[1:]]
    watch = [weakref.ref(t) for t in (input, *operands)]
    op.function(input, *operands)
    del operands, input
    assert all(w() is None for w in watch)


def test_saved_memory_is_freed_by_backward(op):
    """After backward the node holds nothing, even while the result lives."""
    tensors = leaves(op)
    freed = []

    class Held:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        held = Held(tensor.detach())
        freed.append(weakref.ref(held))
        return held

    input = tensors[0] * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        op.function(input, *tensors[1:])
    input.sum().backward()
    gc.collect()
    assert all(w() is None for w in freed)

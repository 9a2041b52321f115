"""guard beside the parts of torch that save, write or keep tensors in ways of their own."""

import contextlib
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as distributed
from torch import nn
from torch.utils.checkpoint import checkpoint

import safe_inplace
from safe_inplace import HazardError, HazardWarning, guard

from ..checks import assert_bit_equal

ROOT = Path(__file__).resolve().parents[2]
ON = pytest.mark.parametrize("verify", [False, True], ids=["", "verify"])


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def silent(run, steps=3, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", HazardWarning)
        with guard("raise", **options) as watched:
            for _ in range(steps):
                run()
    assert watched.hazards == []


def training(model, *inputs, optimizer=torch.optim.AdamW, **options):
    stepper = optimizer(model.parameters(), lr=1e-3, **options)

    def step():
        output = model(*inputs)
        loss = output[0] if isinstance(output, tuple) else output
        loss.square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()

    return step


# ---- silence


@ON
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_networks(kind, verify):
    silent(training(kind(3, 4, num_layers=2), torch.randn(5, 2, 3)), verify=verify)


@ON
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm(norm, verify):
    silent(training(norm(nn.Linear(3, 3)), torch.randn(2, 3)), verify=verify)


@ON
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
        (torch.optim.Adagrad, {"fused": True}),
        (torch.optim.RMSprop, {"foreach": True, "centered": True}),
        (torch.optim.Adadelta, {}),
    ],
)
def test_optimizers(optimizer, options, verify):
    silent(training(nn.Linear(3, 3), torch.randn(2, 3), optimizer=optimizer, **options), verify=verify)


@ON
def test_averaged_models(verify):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    step = training(model, torch.randn(4, 3))

    def run():
        step()
        average.update_parameters(model)
        average(torch.randn(4, 3)).sum().backward()

    silent(run, verify=verify)


@ON
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_gradients_that_overflow(dtype, verify):
    model = nn.Linear(3, 3)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**60)

    def run():
        with torch.autocast("cpu", dtype=dtype):
            loss = model(torch.randn(2, 3)).square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    silent(run, steps=6, verify=verify)


@pytest.fixture(scope="module")
def process_group():
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "gloo", store=distributed.FileStore(os.path.join(folder, "store"), 1), rank=0, world_size=1
        )
        yield distributed
        distributed.destroy_process_group()


def network():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Linear(3, 2))


@ON
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_distributed_data_parallel(process_group, options, verify):
    parallel = nn.parallel.DistributedDataParallel(network(), **options)
    silent(training(parallel, torch.randn(4, 3)), verify=verify)


def test_running_statistics_that_ddp_broadcasts_between_two_forwards(process_group):
    """Train-mode batch norm reads them no more, and DDP raises no version: right, and silent. On torch 2.11 it raises one."""

    def run():
        parallel = nn.parallel.DistributedDataParallel(network())
        (parallel(torch.randn(4, 3)) + parallel(torch.randn(4, 3))).sum().backward()

    try:
        run()
    except RuntimeError as refused:
        assert "modified by an inplace operation" in str(refused)
        with guard(), pytest.raises(HazardError):
            run()
    else:
        silent(run, verify=True)


def test_a_buffer_that_ddp_broadcasts_between_two_forwards(process_group):
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x):
            return super().forward(x) * self.scale

    parallel = nn.parallel.DistributedDataParallel(Scaled())
    with guard(), pytest.raises(HazardError) as caught:
        first = parallel(torch.randn(4, 3))
        second = parallel(torch.randn(4, 3))
        (first + second).sum().backward()
    assert caught.value.mutation.source.startswith("second =")
    assert caught.value.save.source == "return super().forward(x) * self.scale"
    assert "broadcast_buffers=False" in caught.value.remedies[0]
    with guard("copy"):
        (parallel(torch.randn(4, 3)) + parallel(torch.randn(4, 3))).sum().backward()


def test_collectives_that_write_what_was_saved(process_group):
    collectives = {
        "all_reduce": lambda t: process_group.all_reduce(t),
        "all_gather": lambda t: process_group.all_gather([t], torch.ones(3)),
        "all_to_all_single": lambda t: process_group.all_to_all_single(t, torch.ones(3)),
        "scatter": lambda t: process_group.scatter(t, [torch.ones(3)]),
        "coalesced": lambda t: process_group.all_reduce_coalesced([torch.ones(3), t]),
    }
    for collective in collectives.values():
        with guard():
            y = leaf(3).exp()
            with pytest.raises(HazardError) as caught:
                collective(y.detach())
            assert caught.value.op.startswith("c10d.") and caught.value.save.source == "y = leaf(3).exp()"
            y.sum().backward()
    with guard(verify=True) as watched:  # these write on some ranks, or bring a parameter's own bytes back
        y = leaf(3).exp()
        process_group.broadcast(y.detach(), src=0)
        y.sum().backward()
    assert watched.hazards == []


# ---- checkpoint


@ON
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_that_are_right(reentrant, verify):
    checkpointed = _Checkpointed(network(), reentrant)
    silent(training(checkpointed, leaf(4, 3)), verify=verify)
    assert checkpointed.calls == 6


class _Checkpointed(nn.Module):
    def __init__(self, inside, reentrant):
        super().__init__()
        self.inside, self.reentrant, self.calls = inside, reentrant, 0

    def run(self, x):
        self.calls += 1
        return self.inside(x)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=self.reentrant)


def careless(v):
    y = v.exp()
    y.mul_(10)
    return y.sin() * 1.5


def test_a_write_inside_a_checkpoint_which_torch_overlooks():
    x = leaf(3)
    right = torch.autograd.grad(((x.exp() * 10).sin() * 1.5).sum(), x)[0]
    plain = torch.autograd.grad(checkpoint(careless, x, use_reentrant=False).sum(), x)[0]
    assert not torch.allclose(plain, right)
    with guard() as watched:
        y = checkpoint(careless, x, use_reentrant=False)
        assert watched.hazards == []  # the first pass saves nothing
        with pytest.raises(HazardError) as caught:
            y.sum().backward()
    assert caught.value.mutation.source == "y.mul_(10)" and caught.value.save.source == "y = v.exp()"
    with guard("copy") as watched:
        got = torch.autograd.grad(checkpoint(careless, x, use_reentrant=False).sum(), x)[0]
    torch.testing.assert_close(got, right)
    assert watched.hazards_seen == 1 and watched.bytes_copied == 12
    # As torch refuses it outside of a checkpoint.
    with pytest.warns(HazardWarning), guard("warn"), pytest.raises(HazardError):
        torch.autograd.grad(checkpoint(careless, x, use_reentrant=False).sum(), x)


def test_a_checkpoint_inside_a_checkpoint():
    x = leaf(3)
    right = torch.autograd.grad(((x.exp() * 10).sin() * 1.5).tanh().sum(), x)[0]

    def outer(v):
        return checkpoint(careless, v, use_reentrant=False).tanh()

    with guard("copy") as watched:
        got = torch.autograd.grad(checkpoint(outer, x, use_reentrant=False).sum(), x)[0]
    torch.testing.assert_close(got, right)
    assert watched.hazards_seen >= 1


def test_what_a_recomputation_saves_goes_with_it():
    x, storages = leaf(3), []

    def inside(v):
        y = v.exp()
        storages.append(weakref.ref(y.untyped_storage()))
        return y.sin()

    with guard(verify=True):
        checkpoint(inside, x, use_reentrant=False).sum().backward()
    assert len(storages) == 2 and [ref() for ref in storages] == [None, None]


class Saved(torch.autograd.Function):
    """Its gradient is what it has saved: of (x * s).sum() it is s, and of half the sum of squares of x it is x."""

    @staticmethod
    def forward(ctx, x, s, change):
        ctx.save_for_backward(x if s is None else s)
        ctx.change = change
        return (x * (x / 2 if s is None else change(s))).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(*ctx.saved_tensors), None, None


@pytest.mark.parametrize("mode", ["raise", "defer", "warn", "copy"])
@pytest.mark.parametrize("change", [lambda s: s, torch.t, lambda s: s[:, :]], ids=["itself", "transposed", "a view"])
@pytest.mark.parametrize("way", [lambda x: x, lambda x: x + 0, lambda x: x.view(4, 4)], ids=["leaf", "sum", "view"])
@pytest.mark.parametrize("own", [False, True])
def test_no_leaf_takes_a_saved_value_for_its_gradient(own, way, change, mode):
    """Backward gets it as a tensor of its own, of which nobody but torch has a handle. A view torch alone gets wrong, too."""

    def run(change):
        x = torch.full((4, 4), 2.0, requires_grad=True)
        s = torch.arange(16.0).reshape(4, 4)
        for _ in range(3):
            Saved.apply(way(x), None if own else s, change).backward()
        with torch.no_grad():
            x.grad.mul_(2)
        return x.detach(), s, x.grad

    expected = run(lambda s: change(s).clone())
    with guard(mode) as watched:
        got = run(change)
    assert watched.hazards == []
    for a, b in zip(got, expected, strict=True):
        assert_bit_equal(a, b)


class Keeps(torch.autograd.Function):
    """Its sum, of which backward shows what it finds saved."""

    @staticmethod
    def forward(ctx, look, result, *tensors):
        ctx.look = look
        total = sum(tensor.sum() for tensor in tensors if tensor is not None)
        ctx.save_for_backward(*tensors, *([total] if result else []))
        return total

    @staticmethod
    def backward(ctx, grad):
        ctx.look(*ctx.saved_tensors)
        given = ctx.saved_tensors[: len(ctx.needs_input_grad) - 2]
        return None, None, *(None if tensor is None else grad.expand(tensor.shape) for tensor in given)


def no_guard():
    return contextlib.nullcontext(SimpleNamespace(hazards=[]))


@pytest.mark.parametrize("watch", [no_guard, *(functools.partial(guard, mode) for mode in ("raise", "defer", "warn", "copy"))])
@pytest.mark.parametrize("after", [False, True], ids=["inside", "after"])
def test_a_functions_backward_finds_what_its_forward_saved(after, watch):
    """Weights whose gradient a Function adds up itself, in an attribute of theirs, are trained that way."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.main_grad = torch.zeros(2)
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    inner = weight * 1
    kept = (weight, frozen, inner, inner[:1], None, torch.ones(3))

    def look(*found):
        assert all(a is b for a, b in zip(found, kept, strict=True))
        found[0].main_grad.add_(1)
        found[1].grad = torch.ones(2)

    with watch() as watched:
        total = Keeps.apply(look, False, *kept)
        if not after:
            total.backward()
    if after:
        total.backward()
    assert watched.hazards == []
    assert weight.main_grad.tolist() == [1, 1] and frozen.grad.tolist() == [1, 1]


def test_a_functions_backward_finds_no_other_value_than_was_saved():
    """A result is another object without guard as well; what was written or exchanged since is a copy or an error."""
    for watch in (no_guard, guard):
        seen = []
        with watch():
            total = Keeps.apply(lambda x, result: seen.append(result), True, torch.ones(2, requires_grad=True))
            total.backward()
        assert seen[0] is not total and seen[0].grad_fn is total.grad_fn

    def changes(change):
        y, seen = torch.ones(2, requires_grad=True) * 1, []
        with guard("copy") as watched:
            total = Keeps.apply(lambda y: seen.append(y), False, y)
            change(y)
            total.backward()
        assert len(watched.hazards) == 1 and seen[0] is not y and seen[0].tolist() == [1, 1]

    changes(lambda y: y.mul_(2))
    changes(lambda y: setattr(y, "data", torch.zeros(2)))


@pytest.mark.parametrize("once", [False, True])
def test_what_a_function_saved_is_refused_in_torchs_words(once):
    """When it is gone, or not there yet."""

    class Twice(torch.autograd.Function):
        clear_saved_tensors_on_access = once

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            said.append(() if once else ctx.saved_tensors)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            assert len(ctx.saved_tensors) == 1
            try:
                assert len(ctx.saved_tensors) == 1
            except RuntimeError as error:
                said.append(str(error))
            return grad

    for watch in (no_guard, guard):
        said = []
        with watch():
            total = Twice.apply(torch.ones(2, requires_grad=True)).sum()
            total.backward()
            with pytest.raises(RuntimeError) as refused:
                total.backward()
        said.append(str(refused.value))
        if watch is no_guard:
            plain = said
    assert said == plain and len(said) == 2 + once


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def test_a_functions_backward_may_be_differentiated():
    x = torch.full((2,), 3.0, requires_grad=True)
    with guard():
        (first,) = torch.autograd.grad(Square.apply(x * 1).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert first.tolist() == [6, 6] and second.tolist() == [2, 2]


@pytest.mark.filterwarnings("error:Dynamo does not know how to trace")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd(backend, fresh_dynamo):
    def step(change):
        w = leaf(3)
        h = w * 1
        total = (h * h + Square.apply(h)).sum()
        change(h.data)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend)):
            total.backward()
        return w

    with guard("defer") as watched:
        w = step(lambda h: None)
    assert_bit_equal(w.grad, 4 * w.detach())
    assert watched.hazards == []
    with guard("defer") as watched, pytest.raises(HazardError, match=r"change\(h.data\)|h.mul_\(2\)"):
        step(lambda h: h.mul_(2))
    assert len(watched.hazards) == 1


def test_other_hooks_are_said_once():
    with pytest.warns(UserWarning, match="other saved-tensor hooks") as caught, guard():
        for _ in range(3):
            with torch.autograd.graph.save_on_cpu():
                leaf(3).exp()
    assert len(caught) == 1
    enter = torch.autograd.graph.saved_tensors_hooks.__enter__
    assert enter.__module__ == "torch.autograd.graph"


def test_hooks_around_a_guard_are_said_once():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        for times in (1, 0):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with guard(), guard():
                    leaf(3).exp().sum().backward()
            assert ["hooks around the guard" in str(one.message) for one in caught] == [True] * times


# ---- layouts


def layouts():
    nested = [torch.randn(2, 3), torch.randn(4, 3)]
    return {
        "nested": torch.nested.nested_tensor(nested, requires_grad=True),
        "jagged": torch.nested.nested_tensor(nested, layout=torch.jagged, requires_grad=True),
    }


@pytest.mark.parametrize("layout", ["nested", "jagged"])
def test_nested_tensors(layout, tmp_path):
    def run(watched):
        x = layouts()[layout]
        with watched:
            h = x * 2
            y = torch.relu(h)
            y.detach().mul_(0.0)
            loss = y.to_padded_tensor(0.0).sum() if layout == "nested" else y.values().sum()
            loss.backward()
        return x, watched

    with pytest.raises(HazardError) as caught:
        run(guard())
    assert caught.value.save.source == "y = torch.relu(h)" and caught.value.mutation.source == "y.detach().mul_(0.0)"
    assert caught.value.shape[0] == 2 and caught.value.shape[2] == 3 and not isinstance(caught.value.shape[1], int)
    assert json.loads(json.dumps(caught.value.hazard.as_dict()))["shape"] == list(caught.value.shape)
    x, watched = run(guard("copy"))
    grad = x.grad.to_padded_tensor(0.0) if layout == "nested" else x.grad.values()
    values = x.detach().to_padded_tensor(0.0) if layout == "nested" else x.detach().values()
    assert torch.equal(grad, 2.0 * (values > 0))
    assert watched.bytes_copied == 72


def test_nested_tensors_of_one_structure_share_no_values():
    x = layouts()["jagged"]
    with guard() as watched:
        h, other = x * 2, x * 3
        y = h.sin()
        other.detach().mul_(2)
        torch.zeros_like(h.detach()).add_(1)
        y.values().sum().backward()
    assert watched.hazards == []


def sparse(layout):
    dense = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 3.0]])
    if layout == torch.sparse_coo:
        return dense.to_sparse()
    return dense.to_sparse(layout=layout)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors(layout):
    def run(watched, write):
        matrix, x = sparse(layout), leaf(3, 2)
        values = matrix._values() if layout == torch.sparse_coo else matrix.values()
        with watched:
            y = matrix @ x
            write(values)
            y.sum().backward()
        return x, watched

    right = run(contextlib.nullcontext(), lambda values: None)[0].grad
    with pytest.raises(HazardError) as caught:
        run(guard(), lambda values: values.mul_(2))
    assert caught.value.save.source == "y = matrix @ x"
    x, watched = run(guard("copy"), lambda values: values.mul_(2))
    assert torch.equal(x.grad, right) and watched.bytes_copied > 0
    with pytest.raises(HazardError) as caught:
        run(guard(verify=True), lambda values: values.numpy().fill(7))
    assert caught.value.hazard.kind == "corrupted"
    run(guard(verify=True), lambda values: None)


def test_verify_looks_inside_subclasses():
    x = layouts()["jagged"]
    with guard(verify=True):
        h = x * 1
        y = h.sin()
        h.detach().values().numpy()[0] = 7
        with pytest.raises(HazardError) as caught:
            y.values().sum().backward()
    assert caught.value.hazard.kind == "corrupted" and caught.value.save.source == "y = h.sin()"


def test_values_without_elements_and_writes_beside_what_the_same_op_saves():
    for make in (lambda: leaf(0, 3) * 1, lambda: torch.randn(2, 3) * leaf(3)):
        for mode, refused in (("raise", True), ("copy", False)):
            m = make()
            with guard(mode) as watched, pytest.raises(HazardError) if refused else contextlib.nullcontext() as caught:
                if m.numel():
                    m[0].mul_(m[1])
                else:
                    m.mul_(m)
                m.sum().backward()
            assert not refused or caught.value.hazard.kind == "version"
            assert watched.hazards_seen == 1


# ---- operators


def test_a_composite_op_of_another_library_is_taken_at_its_word():
    with torch.library._scoped_library("guard_composite", "FRAGMENT") as library:
        library.define("fill(Tensor(a!) x) -> ()")
        library.impl("fill", lambda x: x.numpy().fill(7) and None, "CompositeImplicitAutograd")
        with guard():
            y = leaf(3).exp()
            with pytest.raises(HazardError) as caught:
                torch.ops.guard_composite.fill(y.detach())
    assert caught.value.op == "guard_composite.fill"


def test_an_operator_that_is_gone_is_forgotten():
    """Whatever comes to lie at its address is judged by its own schema."""
    for i in range(20):
        writes = i % 2
        with torch.library._scoped_library("guard_passing", "DEF") as library:
            library.define(f"op(Tensor{'(a!)' if writes else ''} x) -> ()")
            library.impl("op", lambda x: None, "CPU")
            torch.ops.guard_passing.__dict__.pop("op", None)
            with guard() as watched:
                y = leaf(3).exp()
                with pytest.raises(HazardError) if writes else contextlib.nullcontext():
                    torch.ops.guard_passing.op(y.detach())
            assert watched.hazards_seen == writes


def test_memory_that_was_given_back_is_no_more_the_saved_value():
    weight, x = leaf(1000), torch.randn(1000)
    with guard() as watched:
        h = weight * 1
        y = h * x.requires_grad_()
        size = h.untyped_storage().nbytes()
        kept = h.detach().clone()
        h.untyped_storage().resize_(0)
        others = [torch.empty(1000) for _ in range(8)]
        for other in others:
            other.zero_()
        with torch.autograd._unsafe_preserve_version_counter(h):
            h.untyped_storage().resize_(size)
            h.detach().numpy()[:] = kept.numpy()
        y.sum().backward()
    assert watched.hazards == [] and torch.equal(x.grad, kept)


# ---- the thread's state, memory, the end of the process


def state():
    return (
        safe_inplace._C.guard_current(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.autograd.graph.saved_tensors_hooks.__enter__.__module__,
        torch.autograd.graph.disable_saved_tensors_hooks.__module__,
    )


CLEAN = (None, None, "torch.autograd.graph", "torch.autograd.graph")


def test_an_exception_leaves_the_thread_as_it_was():
    class Boom(Exception):
        pass

    watched = guard()
    with pytest.raises(Boom), watched, guard("copy"), watched:
        y = leaf(3).exp()
        with pytest.raises(HazardError):
            y.data.zero_()
        raise Boom
    assert state() == CLEAN
    with pytest.raises(Boom), watched:
        leaf(3).register_hook(lambda grad: None)
        x = leaf(3)
        x.register_hook(lambda grad: (_ for _ in ()).throw(Boom()))
        x.exp().sum().backward()
    assert state() == CLEAN


def test_guards_left_in_another_order():
    first, second = guard("copy"), guard()
    first.__enter__()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    with pytest.warns(UserWarning, match="other saved-tensor hooks"):
        hooks.__enter__()
    with pytest.warns(UserWarning, match="hooks around the guard"):
        second.__enter__()
    first.__exit__(None, None, None)
    assert safe_inplace._C.guard_current() is second
    y = leaf(3).exp()
    with pytest.raises(HazardError):
        y.data.zero_()
    second.__exit__(None, None, None)
    assert safe_inplace._C.guard_current() is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(True)[0] is hooks.pack_hook
    hooks.__exit__(None, None, None)
    assert state() == CLEAN


def test_a_generator_that_holds_a_guard():
    def numbers():
        with guard():
            yield 1
            yield 2

    suspended = numbers()
    assert next(suspended) == 1
    failed = []

    def close():
        try:
            suspended.close()
        except RuntimeError as error:
            failed.append(str(error))

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert "another thread" in failed[0]
    # This thread's guard is open still; it is closed as any other.
    safe_inplace._C.guard_current().__exit__(None, None, None)
    assert state() == CLEAN
    for _ in numbers():
        pass
    assert state() == CLEAN


def test_code_objects_are_not_kept():
    names = {"torch": torch}
    exec("def write(x):\n    h = x * 1\n    y = h.exp()\n    return y\n", names)
    code = weakref.ref(names["write"].__code__)
    with guard():
        names["write"](leaf(3)).sum().backward()
    names.clear()
    gc.collect()
    assert code() is None


def test_no_more_memory_at_any_time():
    """Bytes that torch has allocated, at their highest during a step."""

    def peak(watched):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(8)))
        x = torch.randn(512, 256)
        model(x).sum().backward()
        with torch.profiler.profile(profile_memory=True) as profile, watched:
            model(x).sum().backward()
        held, most = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most, held

    plain, watched = peak(contextlib.nullcontext()), peak(guard())
    assert plain[0] > 8 * 512 * 256 * 4
    assert watched == plain
    fingerprints = 8 * 4 * 64
    assert peak(guard(verify=True))[0] <= plain[0] + fingerprints


def run_script(body):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_graph_and_a_guard_that_outlive_the_interpreter():
    done = run_script(
        """
        import torch, safe_inplace
        watched = safe_inplace.guard(verify=True)
        watched.__enter__()
        x = torch.ones(3, requires_grad=True)
        y = x.exp()
        kept = [y]
        kept.append(kept)
        """
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_forked_child_is_guarded_too():
    done = run_script(
        """
        import os, threading, torch, safe_inplace
        stop = threading.Event()
        def busy():
            with safe_inplace.guard():
                while not stop.is_set():
                    torch.ones(3, requires_grad=True).exp().sum().backward()
        thread = threading.Thread(target=busy)
        thread.start()
        with safe_inplace.guard():
            y = torch.ones(3, requires_grad=True).exp()
            for _ in range(20):
                pid = os.fork()
                if pid == 0:
                    try:
                        y.data.zero_()
                    except safe_inplace.HazardError:
                        os._exit(0)
                    os._exit(1)
                assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        thread.join()
        """
    )
    assert done.returncode == 0, done.stderr


# -- decorated functions that are compiled


def product(x, w):
    return (x * w).sum()


class Writer(nn.Module):
    @staticmethod
    def written(x, w):
        w.mul_(2)
        return x * 2

    @guard
    def forward(self, x, w):
        return Writer.written(x, w)

    @guard(
        "raise",
    )
    def broken(self, x, w):
        y = x * 2
        torch._dynamo.graph_break()
        return Writer.written(y, w)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("method", "line"), [("forward", "def forward(self, x, w):"), ("broken", "torch._dynamo.graph_break()")]
)
def test_a_decorated_function_that_is_compiled_is_named_by_its_own_line(fresh_dynamo, backend, method, line):
    compiled = torch.compile(getattr(Writer(), method), backend=backend)
    x, w = leaf(3), torch.ones(3)
    with guard(), pytest.raises(HazardError) as caught:
        loss = product(x, w)
        compiled(x, w)
    del loss
    site = caught.value.mutation
    assert (site.filename, site.source, site.function) == (__file__, line, f"Writer.{method}")


def test_what_a_compiled_function_saved_is_named_by_the_function(fresh_dynamo):
    @torch.compile(backend="aot_eager")
    @guard
    def saves(x):
        return x.exp()

    y = saves(leaf(3))
    with guard(), pytest.raises(HazardError) as caught:
        y.mul_(2)
    assert caught.value.save.source == "def saves(x):" and caught.value.saved_by == "torch.compile"


def test_decorated_functions_compute_the_same_compiled_and_nothing_is_said_of_how_they_are_traced(fresh_dynamo):
    def step(x):
        h = x.sin()
        return (h * h).relu_().sum()

    x = leaf(5)
    step(x).backward()
    expected, x.grad = x.grad, None
    guarded = guard(step)
    for function in (torch.compile(guarded, backend="aot_eager"), torch.compile(lambda x: guarded(x) * 1, backend="aot_eager")):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            function(x).backward()
        assert torch.equal(x.grad, expected)
        words = [str(warning.message) for warning in said]
        assert [text for text in words if "Dynamo" in text or ("safe_inplace" in text and "compiled region" not in text)] == []
        x.grad = None


def test_nothing_is_said_of_the_tensors_that_a_tracer_traces_with(fresh_dynamo):
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    def written(x):
        return (x.sin() * 2).mul_(3)

    with warnings.catch_warnings(record=True) as said, guard():
        warnings.simplefilter("always")
        torch.compile(written, backend="aot_eager")(leaf(3)).sum().backward()
        make_fx(functionalize(written))(torch.ones(3))
        make_fx(written, tracing_mode="symbolic")(torch.ones(3))
        torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), (torch.ones(2, 3),))
    assert [str(words.message) for words in said if "where its memory is" in str(words.message)] == []


def test_one_graph_with_a_guard_in_it_says_in_a_sentence_what_to_do():
    # In a process of its own: torch's evaluator of frames stays where it has refused one, and holds every argument once more.
    done = run_script(
        """
        import torch
        from safe_inplace import guard

        def opened(x):
            with guard():
                return x * 2

        @guard
        def decorated(x):
            return x * 2

        words = "a safe_inplace.guard cannot be opened inside of a compiled region; open it around the call of the compiled "
        words += "function"
        for function in (opened, decorated, lambda x: decorated(x) + 1):
            try:
                torch.compile(function, backend="eager", fullgraph=True)(torch.ones(3))
            except torch._dynamo.exc.Unsupported as error:
                assert words in str(error), error
            else:
                raise AssertionError("it was compiled")
        """
    )
    assert done.returncode == 0, done.stderr

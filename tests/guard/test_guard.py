"""What guard promises besides naming the lines: it is never less safe than torch, keeps nothing, and stays out of the way."""

import asyncio
import contextlib
import copy
import gc
import multiprocessing
import pickle
import subprocess
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import safe_inplace
from safe_inplace import HazardError, HazardWarning, guard
from safe_inplace._C import guard_current

HOOKED = "modified by an inplace operation"


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


# ---- never less safe than plain torch


def test_a_write_outside_the_guard_is_refused_in_backward():
    x = leaf(3)
    with guard():
        h = x * 1
        y = h * h
    h.mul_(10)
    with pytest.raises(HazardError, match=HOOKED) as caught:
        y.sum().backward()
    assert caught.value.mutation is None and caught.value.save.source == "y = h * h"


def test_backward_outside_the_guard_is_still_checked():
    x = leaf(3)
    with guard("warn"), pytest.warns(HazardWarning):
        h = x * 1
        y = h * h
        h.mul_(10)
    with pytest.raises(RuntimeError, match=HOOKED):
        y.sum().backward()


def test_a_write_in_another_thread_is_refused_in_backward():
    x = leaf(3)
    with guard():
        h = x * 1
        y = h.exp()
        thread = threading.Thread(target=lambda: y.detach().zero_())
        thread.start()
        thread.join()
        with pytest.raises(HazardError, match=HOOKED) as caught:
            y.sum().backward()
    # Where it ran is not known: it may have been inside, too.
    assert "that guard did not see" in str(caught.value)


@pytest.mark.parametrize("change", ["t_", "squeeze_", "resize_"])
def test_a_change_of_layout_is_refused_as_by_torch_and_named(change):
    def program():
        y = leaf(1, 3).exp()
        z = y * 1
        if change == "resize_":
            y.detach().resize_(3)
        else:
            getattr(y.detach(), change)()
        z.sum().backward()

    def outcome(context):
        with context:
            try:
                program()
            except RuntimeError as error:
                return error
        return None

    plain, guarded = outcome(contextlib.nullcontext()), outcome(guard())
    assert (plain is None) == (guarded is None)


def test_a_refused_write_has_changed_nothing():
    x = leaf(3)
    with guard():
        h = x * 1
        y = h * h
        before, version = h.detach().clone(), h._version
        with pytest.raises(HazardError):
            h.mul_(10)
        assert torch.equal(h, before) and h._version == version
        y.sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_an_op_that_overwrites_what_it_saves_itself():
    with guard():
        h = leaf(3) * 1
        with pytest.raises(HazardError) as caught:
            h.mul_(h)
    assert caught.value.mutation == caught.value.save
    x = leaf(3)
    with guard("copy"):
        h = x * 1
        h.mul_(h)
        h.sum().backward()
    assert torch.equal(x.grad, 2 * x)


# ---- what is a hazard


@pytest.mark.parametrize(
    ("saved", "written", "hit"),
    [
        (lambda m: m[0], lambda m: m[1], False),
        (lambda m: m[:, 0], lambda m: m[:, 1], False),
        (lambda m: m[:, :4], lambda m: m[:, 4:], False),
        (lambda m: m[::2], lambda m: m[1::2], False),
        (lambda m: m[1:5, 1:5], lambda m: m[5:, 5:], False),
        (lambda m: m[2:4, 2:4], lambda m: m[3, :3], True),
        (lambda m: m[:, 2], lambda m: m[4], True),
        (lambda m: m.t(), lambda m: m[7, 7:], True),
        (lambda m: m[1::2, ::3], lambda m: m.view(-1)[8:9], True),
        (lambda m: m.view(2, 4, 8)[:, 1], lambda m: m.view(2, 4, 8)[:, 2, 3:5], False),
        (lambda m: m[:0], lambda m: m, False),
        (lambda m: m[0].expand(3, 8), lambda m: m[0, 3:4], True),
    ],
)
def test_a_write_hits_where_bytes_really_overlap(saved, written, hit):
    m = torch.randn(8, 8)
    x = leaf(1)
    with guard() as watched:
        y = x * saved(m)
        if hit:
            with pytest.raises(HazardError):
                written(m).data.zero_()
        else:
            written(m).data.zero_()
            y.sum().backward()
    assert (watched.hazards_seen > 0) == hit


def test_overlap_against_brute_force():
    generator = torch.Generator().manual_seed(0)

    def draw():
        base = torch.arange(96)
        sizes = [int(torch.randint(1, 4, (), generator=generator)) for _ in range(3)]
        strides = [int(torch.randint(0, 13, (), generator=generator)) for _ in range(3)]
        offset = int(torch.randint(0, 20, (), generator=generator))
        return base, sizes, strides, offset

    for _ in range(4000):
        base, sizes, strides, offset = draw()
        a = base.as_strided(sizes, strides, offset)
        _, sizes, strides, offset = draw()
        b = base.as_strided(sizes, strides, offset)
        expected = bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
        assert safe_inplace._C.guard_overlap(a, b) == expected, (a.stride(), a.size(), b.stride(), b.size())


def test_a_row_of_one_base_is_no_hazard_but_named_when_torch_refuses():
    w = leaf(3)
    base = torch.ones(4, 3)
    with guard():
        y = base[0] * w
        base[1] = 2
        with pytest.raises(HazardError, match=HOOKED) as caught:
            y.sum().backward()
    assert caught.value.mutation.source == "base[1] = 2"
    assert caught.value.save.source == "y = base[0] * w"


WAYS = {
    "method": lambda h: h.mul_(2),
    "operator": lambda h: h.__imul__(2),
    "slice": lambda h: h.__setitem__(slice(0, 1), 0),
    "mask": lambda h: h.__setitem__(h > 0, 0),
    "out": lambda h: torch.add(torch.ones(4, 3), 1, out=h),
    "two outs": lambda h: torch.max(torch.ones(4, 3, 2), -1, out=(h, torch.empty(4, 3, dtype=torch.long))),
    "foreach": lambda h: torch._foreach_mul_([torch.ones(2), h], 2),
    "foreach copy": lambda h: torch._foreach_copy_([h], [torch.ones(4, 3)]),
    "index_add_": lambda h: h.index_add_(0, torch.tensor([1]), torch.ones(1, 3)),
    "index_copy_": lambda h: h.index_copy_(0, torch.tensor([1]), torch.ones(1, 3)),
    "index_fill_": lambda h: h.index_fill_(0, torch.tensor([1]), 0),
    "scatter_": lambda h: h.scatter_(0, torch.zeros(1, 3, dtype=torch.long), 1.0),
    "masked_fill_": lambda h: h.masked_fill_(h > 0, 0),
    "masked_scatter_": lambda h: h.masked_scatter_(h > 0, torch.zeros(12)),
    "copy_": lambda h: h.copy_(torch.ones(4, 3)),
    "fill_diagonal_": lambda h: h.fill_diagonal_(0),
    "random": lambda h: h.normal_(),
    "relu_": lambda h: F.relu_(h),
    "view of view": lambda h: h.view(-1)[2:].view(2, 5)[1, ::2].zero_(),
    "transposed": lambda h: h.t()[0].zero_(),
    "detach": lambda h: h.detach().zero_(),
    "addmm_": lambda h: h.addmm_(torch.ones(4, 2), torch.ones(2, 3)),
    "our own": lambda h: safe_inplace.add_(h, 1.0),
}


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("write", WAYS.values(), ids=list(WAYS))
def test_every_way_to_write(write, through_data):
    x = leaf(4, 3)
    with guard():
        h = x * 2
        y = h * h
        with pytest.raises(HazardError) as caught, torch.no_grad():
            write(h.data if through_data else h)
        assert caught.value.save.source == "y = h * h"
        y.sum().backward()
    assert torch.allclose(x.grad, 8 * x)
    with guard("copy"):
        h = x * 2
        y = h * h
        with torch.no_grad():
            write(h.data if through_data else h)
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], 8 * x)


def test_a_custom_op_with_an_honest_schema():
    @torch.library.custom_op("guard_tests::double", mutates_args={"x"})
    def double(x: torch.Tensor) -> None:
        x.numpy()[:] *= 2

    with guard():
        h = leaf(3) * 1
        y = h.exp()
        with pytest.raises(HazardError) as caught:
            double(y.detach())
    assert caught.value.op == "guard_tests.double"


def test_batch_norm_that_trains_twice_before_backward_is_silent():
    norm, x = nn.BatchNorm1d(3), leaf(4, 3)
    with guard(verify=True) as watched:
        (norm(x) + norm(x * 2)).sum().backward()
    assert watched.hazards == []


def test_a_checkpoint_whose_input_is_overwritten():
    linear, x = nn.Linear(3, 3), leaf(2, 3)
    with guard():
        h = x * 1
        y = torch.utils.checkpoint.checkpoint(linear, h, use_reentrant=False)
        with pytest.raises(HazardError):
            h.data.zero_()
        y.sum().backward()


def test_parts_of_sparse_tensors():
    indices, values = torch.tensor([[0, 1], [1, 2]]), leaf(2)
    dense = leaf(3, 4)
    with guard():
        sparse = torch.sparse_coo_tensor(indices, values * 2, (2, 3))
        y = torch.sparse.mm(sparse, dense)
        with pytest.raises(HazardError):
            sparse.detach()._values().zero_()
        y.sum().backward()


def test_parts_of_wrapper_subclasses():
    nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged, requires_grad=True)
    with guard():
        h = nested * 2
        y = h.sin()
        with pytest.raises(HazardError):
            h.detach().values().zero_()
        y.values().sum().backward()


def test_memory_of_numpy_and_dlpack_is_the_same_memory():
    m = torch.randn(3)
    with guard():
        y = leaf(3) * m
        with pytest.raises(HazardError):
            torch.from_numpy(m.numpy()).zero_()
        with pytest.raises(HazardError):
            torch.from_dlpack(m).zero_()
        y.sum().backward()


# ---- silence


def test_a_graph_that_is_gone_saves_nothing():
    with guard():
        h = leaf(3) * 1
        y = h * h
        del y
        h.mul_(2)


def test_writes_after_backward():
    linear = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(linear.parameters())
    with guard(verify=True) as watched:
        for _ in range(3):
            loss = linear(torch.randn(2, 3)).square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert watched.hazards == []


def test_what_saved_nothing():
    with guard():
        x = leaf(3)
        h = x * 2
        y = h + 1
        h.add_(1)
        h.mul_(3)
        y.sum().backward()


def test_a_backward_may_use_the_memory_it_alone_saved():
    class Reuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x * 2)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0].mul_(grad)

    x = leaf(3)
    with guard() as watched:
        Reuse.apply(x).sum().backward()
        assert torch.equal(x.grad, 2 * x)
        y = Reuse.apply(x).sum()
        y.backward(retain_graph=True)
        assert watched.hazards_seen == 0
        with pytest.raises(HazardError) as caught:
            y.backward()
    assert watched.hazards_seen == 1 and "mul_(grad)" in caught.value.mutation.source


def test_gradient_accumulation_and_double_backward():
    x = leaf(3)
    with guard(verify=True) as watched:
        for _ in range(3):
            (x.exp() * x).sum().backward()
        (first,) = torch.autograd.grad((x.exp() * x).sum(), x, create_graph=True)
        first.square().sum().backward()
    assert watched.hazards == []


def test_dropout_in_eval_mode_writes_nothing():
    with guard():
        h = leaf(3).exp()
        F.dropout(h, 0.5, training=False, inplace=True)
        h.sum().backward()


def test_transforms_of_torch_func_run():
    x = torch.randn(3)
    with guard(), pytest.warns(UserWarning, match="torch.func transforms allow no saved-tensor hooks"):
        assert torch.equal(torch.func.grad(lambda v: (v * v).sum())(x), 2 * x)
        torch.func.vmap(torch.sin)(x)
        torch.func.jacrev(torch.sin)(x)
        y = leaf(3).exp()
        with pytest.raises(HazardError):
            y.data.zero_()
    assert torch.autograd.graph.disable_saved_tensors_hooks.__module__ == "torch.autograd.graph"


def test_compiled_regions_run_and_what_they_save_is_checked():
    x = leaf(3)

    @torch.compile(backend="aot_eager")
    def f(v):
        return (v * 2).sin() * v

    with guard():
        f(x).sum().backward()
        h = x * 1
        y = f(h)
        with pytest.raises(HazardError):
            h.data.zero_()
        y.sum().backward()


def test_what_is_known_of_compiled_regions_is_said_once():
    """In a process of its own: it is said where the first region of a process runs."""
    program = """
import torch
import safe_inplace

f = torch.compile(lambda v: (v * 2).sin() * v, backend="aot_eager")
with safe_inplace.guard():
    for _ in range(2):
        f(torch.ones(3, requires_grad=True)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: safe_inplace.guard: of a compiled region only what it saves") == 1


# ---- copy


def test_double_backward_through_a_copy():
    x = leaf(3)
    with guard("copy") as watched:
        h = x * 1
        y = (h**3).sum()
        h.zero_()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 3 * x**2)
    torch.testing.assert_close(second, 6 * x)
    assert watched.hazards_seen == 1 and watched.bytes_copied == 12


def test_one_copy_for_all_who_saved_the_same_bytes():
    weight, x = leaf(8, 8), torch.randn(2, 8, requires_grad=True)
    with guard("copy") as watched:
        y = F.linear(x, weight) + x @ weight + F.linear(F.linear(x, weight), weight)
        with torch.no_grad():
            weight.mul_(2)
        assert watched.bytes_copied == weight.nbytes
        y.sum().backward()


def test_only_the_value_about_to_be_lost_is_copied():
    x = torch.randn(100, 8)
    w = leaf(8)
    with guard("copy") as watched:
        y = x[3] * w + (x[5:7] * w).sum()
        x[3].data.zero_()
        y.sum().backward()
    assert watched.bytes_copied == 32


def test_copies_go_with_the_graph():
    with guard("copy"):
        h = leaf(3) * 1
        y = h.exp()
        y.data.zero_()
        saved = y.grad_fn._raw_saved_result
        kept = weakref.ref(saved.data.value.untyped_storage())
        del saved
        y.sum().backward()
        gc.collect()
        assert kept() is None


# ---- verify


def test_numpy_and_raw_pointers():
    import ctypes

    def numpy(t):
        t.detach().numpy()[0] = 7

    def pointer(t):
        ctypes.memset(t.data_ptr(), 0, 1)

    for write in (numpy, pointer):
        x = leaf(300)
        with guard(verify=True):
            y = torch.exp(x)
            write(y)
            with pytest.raises(HazardError) as caught:
                y.sum().backward()
        assert caught.value.mutation is None
        assert caught.value.save.source == "y = torch.exp(x)"
        with guard("warn", verify=True), pytest.warns(HazardWarning):
            y = torch.exp(x)
            write(y)
            y.sum().backward()


def test_a_kernel_that_writes_over_its_input():
    """The stores of Liger-Kernel's cross entropy (issues 272 and 343), by a kernel that tells nobody."""

    class Lies(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            values = logits.detach().numpy()
            loss = float(values.sum())
            values[...] = 1.0
            ctx.save_for_backward(logits)
            return logits.new_tensor(loss)

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0] * grad

    x = leaf(4)
    plain = torch.autograd.grad(Lies.apply(torch.softmax(x, 0)), x)[0]
    p = torch.softmax(x, 0)
    assert not torch.allclose(plain, torch.autograd.grad(p, x, torch.ones(4))[0], atol=1e-3)
    with guard(verify=True):
        p = torch.softmax(x, 0)
        loss = Lies.apply(p)
        with pytest.raises(HazardError) as caught:
            loss.backward()
    assert caught.value.save.source == "p = torch.softmax(x, 0)"


def test_digests_of_a_device_are_compared_once_when_backward_is_through(monkeypatch):
    watched = guard(verify=True)
    settled = []
    monkeypatch.setattr(watched, "_on_mismatch", None)
    x = leaf(3)
    with watched:
        y = x.exp()
        saved = y.grad_fn._raw_saved_result.data
        hook = y.register_hook(
            lambda grad: [watched._compare(saved, torch.tensor(1), torch.tensor(1)) for _ in range(3)] and None
        )
        settle = watched._settle
        monkeypatch.setattr(watched, "_settle", lambda through: (settled.append(len(through.results)), settle(through)))
        y.sum().backward()
        hook.remove()
        assert settled == [3]
        y = x.exp()
        saved = y.grad_fn._raw_saved_result.data
        y.register_hook(lambda grad: watched._compare(saved, torch.tensor(1), torch.tensor(2)))
        with pytest.raises(HazardError):
            y.sum().backward()


def test_a_backward_that_fails_leaves_nothing_for_the_next():
    one, two = torch.tensor(1), torch.tensor(2)

    def fail(grad):
        raise ValueError

    x = leaf(3)
    with guard(verify=True) as watched:
        for _ in range(2):
            h = x * 1
            y = h.exp()
            y.register_hook(lambda grad, saved=y.grad_fn._raw_saved_result.data: watched._compare(saved, one, two))
            h.register_hook(fail)
            with pytest.raises(ValueError):
                y.sum().backward()
        assert watched.hazards == [] and not watched._passes
        for differs in (one, two):
            y = x.exp()
            y.register_hook(lambda grad, saved=y.grad_fn._raw_saved_result.data: watched._compare(saved, one, differs))
            with contextlib.nullcontext() if differs is one else pytest.raises(HazardError):
                y.sum().backward()
        assert watched.hazards_seen == 1


def test_passes_inside_of_passes_are_settled_each_by_itself():
    one, two = torch.tensor(1), torch.tensor(2)
    x = leaf(3)
    with guard("warn", verify=True) as watched:
        inner = x.exp()
        within = inner.grad_fn._raw_saved_result.data
        inner.register_hook(lambda grad: watched._compare(within, one, one))
        y = x.sin()
        saved = y.grad_fn._raw_saved_self.data

        def inside(grad):
            watched._compare(saved, one, two)
            inner.backward(torch.ones(3))
            assert watched.hazards == []

        y.register_hook(inside)
        with pytest.warns(HazardWarning):
            y.sum().backward()
        assert watched.hazards_seen == 1


# ---- digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (1025,), (3, 5, 7), (65536 * 3 + 1,)])
def test_digest_sees_any_changed_element(dtype, shape):
    t = torch.randint(0, 2, shape).to(dtype)
    digest = safe_inplace._C.digest
    before = digest(t)
    assert digest(t.clone()) == before
    if t.numel():
        flat = t.view(-1)
        for i in (0, t.numel() // 2, t.numel() - 1):
            old = flat[i].clone()
            flat[i] = ~old if dtype == torch.bool else old + 1
            assert digest(t) != before
            flat[i] = old
    assert digest(t) == before


def test_digest_does_not_depend_on_threads_or_place():
    t = torch.randn(1 << 20)
    threads = torch.get_num_threads()
    try:
        found = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found |= {safe_inplace._C.digest(t), safe_inplace._C.digest(torch.cat([t[:1], t])[1:])}
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_digest_sees_words_that_change_places():
    t = torch.randn(1000)
    swapped = t.clone()
    swapped[:2], swapped[2:4] = t[2:4], t[:2]
    assert safe_inplace._C.digest(t) != safe_inplace._C.digest(swapped)


@pytest.mark.parametrize("view", [lambda m: m.t(), lambda m: m[:, ::2], lambda m: m[0].expand(9, 8), lambda m: m[1:, 3]])
def test_digest_of_views(view):
    m = torch.randn(8, 8)
    before = safe_inplace._C.digest(view(m))
    assert safe_inplace._C.digest(view(m.clone())) == before
    view(m).select(0, -1).select(-1, 0).fill_(99) if view(m).dim() > 1 else view(m)[-1].fill_(99)
    assert safe_inplace._C.digest(view(m)) != before


# ---- nesting, threads, decorator


def test_the_innermost_decides_and_the_outer_one_returns():
    with guard() as outer:
        h = leaf(3).exp()
        with guard("copy") as inner:
            h.data.zero_()
        g = leaf(3).exp()
        with pytest.raises(HazardError):
            g.data.zero_()
    assert inner.hazards_seen == 1 and outer.hazards_seen == 1
    assert safe_inplace._C.guard_current() is None


def test_one_guard_entered_twice():
    watched = guard()
    with watched, watched:
        pass
    assert safe_inplace._C.guard_current() is None


def test_after_the_guard_nothing_is_watched():
    with guard():
        pass
    h = leaf(3) * 1
    y = h * h
    h.mul_(2)
    with pytest.raises(RuntimeError, match=HOOKED) as caught:
        y.sum().backward()
    assert not isinstance(caught.value, HazardError)


def test_decorator():
    @guard("copy")
    def step(x):
        """Doc."""
        h = x * 1
        y = h.exp()
        y.data.zero_()
        return torch.autograd.grad(y.sum(), x)[0]

    x = leaf(3)
    assert torch.allclose(step(x), x.exp()) and step.__doc__ == "Doc."
    with pytest.raises(TypeError, match="suspends"):

        @guard()
        def generator():
            yield


def drive(coroutine):
    """Runs it without an event loop; what it awaits is told, and answered with None."""
    waited = []
    while True:
        try:
            waited.append(coroutine.send(None))
        except StopIteration:
            return waited


def test_an_async_generator_is_watched_where_its_own_code_runs():
    @types.coroutine
    def wait():
        yield "waiting"

    closed = []

    @guard()
    async def steps():
        try:
            for factor in (1.0, 2.0):
                x = leaf(3)
                h = x * factor
                await wait()
                got = yield h * h
                assert got == "sent"
                try:
                    h.mul_(3)
                except HazardError:
                    closed.append("refused")
        finally:
            closed.append("closed")

    async def run():
        running = steps()
        y = await running.asend(None)
        assert guard_current() is None
        y.sum().backward()
        y = await running.asend("sent")  # its graph is gone, h may be written
        await running.asend("sent")

    with pytest.raises(StopAsyncIteration):
        coroutine = run()
        while coroutine.send(None) == "waiting":
            assert guard_current() is None
    assert closed == ["refused", "closed"]


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError])
def test_an_async_generator_passes_on_what_is_thrown_and_is_closed(kind):
    seen = []

    @guard()
    async def steps():
        try:
            while True:
                try:
                    yield guard_current() is not None
                except kind as error:
                    seen.append(error)
        finally:
            seen.append(guard_current() is not None)

    async def run():
        running = steps()
        assert await running.asend(None)
        error = kind()
        assert await running.athrow(error)
        await running.aclose()
        assert seen == [error, True]

    assert drive(run()) == []


def test_guards_of_two_threads_do_not_mix():
    found = {}

    def work(mode):
        with guard(mode) as watched:
            for _ in range(200):
                h = leaf(16) * 1
                y = h.exp()
                if mode == "copy":
                    y.data.zero_()
                y.sum().backward()
            found[mode] = watched.hazards_seen

    threads = [threading.Thread(target=work, args=(mode,)) for mode in ("copy", "raise")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"copy": 200, "raise": 0}


def test_wrong_argument():
    with pytest.raises(ValueError, match="on_hazard"):
        guard("ignore")


# ---- memory


def test_nothing_is_kept_longer_than_without_guard():
    def program():
        x = leaf(1000)
        h = x * 1
        storages = [weakref.ref(h.untyped_storage())]
        y = h.exp()
        storages.append(weakref.ref(y.untyped_storage()))
        loss = (y * h).sum()
        del h, y
        alive_before = [ref() is not None for ref in storages]
        loss.backward()
        return alive_before, [ref() is not None for ref in storages]

    plain = program()
    with guard(verify=True):
        guarded = program()
    assert guarded == plain
    assert plain[1] == [False, False]


def test_no_cycle_keeps_a_graph():
    gc.collect()
    before = safe_inplace._C.guard_live()
    gc.disable()
    try:
        with guard():
            y = leaf(3).sigmoid().exp().tanh()
            assert safe_inplace._C.guard_live() == before + 3
            del y
            assert safe_inplace._C.guard_live() == before
    finally:
        gc.enable()


# ---- the report


def test_the_report():
    x = leaf(64, 128)
    with guard() as watched:
        h = x * 2
        y = h * h  # noqa: F841
        with pytest.raises(HazardError) as caught:
            h.mul_(10)
    text = caught.value.hazard.text()
    error = caught.value
    assert "\x1b" not in text and "\x1b[" in error.hazard.text(color=True)
    assert f"{error.mutation.lineno} | h.mul_(10)" in text and f"{error.save.lineno} | y = h * h" in text
    assert "^^^^^" in text and "float32[64, 128], 32.0 KiB" in text and "h = h.mul(10)" in text
    assert error.op == "aten.mul_.Tensor" and error.saved_by == "aten.mul.Tensor"
    assert error.shape == (64, 128) and error.dtype == torch.float32 and error.device.type == "cpu"
    assert watched.as_dict()["hazards"][0]["mutation"]["source"] == "h.mul_(10)"
    assert watched.summary().startswith("safe_inplace guard: 1 hazard between 1 pair of lines")


def test_warnings_come_once_per_pair_of_lines():
    with pytest.warns(HazardWarning) as caught, guard("warn") as watched:
        for _ in range(5):
            y = leaf(3).exp()
            y.data.zero_()
    assert len(caught) == 1 and watched.hazards_seen == 5


def test_optimizer_writes_are_named_at_the_users_step():
    linear = nn.Linear(3, 3)
    for optimizer in (
        torch.optim.SGD(linear.parameters(), lr=0.1, foreach=True),
        torch.optim.AdamW(linear.parameters(), fused=True),
        torch.optim.RMSprop(linear.parameters()),
    ):
        with guard():
            linear(leaf(2, 3)).sum().backward()
            kept = linear(leaf(2, 3))
            optimizer.step()
            with pytest.raises(HazardError) as caught:
                kept.sum().backward()
        assert caught.value.mutation.source == "optimizer.step()"
        assert "Run backward() before this step" in caught.value.remedies[0]


# -- errors that travel, and guards that an exception leaves open


def an_error(kind=HazardError):
    x = torch.ones(3, requires_grad=True)
    with guard("raise" if kind is HazardError else "warn"), warnings.catch_warnings():
        warnings.simplefilter("error")
        h = x * 1
        y = h * h
        with pytest.raises(kind) as caught:
            h.mul_(2)
        del y
    return caught.value


@pytest.mark.parametrize("kind", [HazardError, HazardWarning])
def test_an_error_survives_pickling_and_copies(kind):
    error = an_error(kind)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind and str(twin) == str(error) and "h.mul_(2)" in str(twin)
        assert twin.mutation == error.mutation and twin.hazard == error.hazard and twin.remedies == error.remedies != []


@pytest.mark.parametrize("kind", [HazardError, HazardWarning])
def test_an_error_is_made_anew_as_others_are(kind):
    error = an_error(kind)
    assert error.args == (str(error),)
    for arguments in ((), ("text",), ("text", 2), error.args):
        twin = kind(*arguments)
        plain = RuntimeError(*arguments)
        assert str(twin) == str(plain) and twin.args == plain.args and pickle.loads(pickle.dumps(twin)).args == plain.args
        assert twin.mutation is twin.save is twin.hazard is twin.op is None and twin.remedies == []
    error.args = (error.args[0] + " in step 3",)
    assert str(error).endswith("each time. in step 3")


class Hazardous(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise an_error()


def test_a_worker_of_a_data_loader():
    with pytest.raises(HazardError, match=r"Caught HazardError in DataLoader worker process 0[\s\S]*h.mul_\(2\)"):
        list(torch.utils.data.DataLoader(Hazardous(), num_workers=1))


def fail(index):
    raise an_error()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_errors_of_worker_processes(method):
    with multiprocessing.get_context(method).Pool(1) as pool, pytest.raises(HazardError) as caught:
        pool.map(fail, [0])
    assert caught.value.mutation.source == "h.mul_(2)"
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=r"h.mul_\(2\)"):
        torch.multiprocessing.start_processes(fail, nprocs=1, start_method=method)


def is_open():
    return safe_inplace._C.guard_current() is not None


def test_a_guard_that_an_exception_leaves_open_is_closed_with_the_one_around_it():
    inner = guard("copy")

    def begins():
        inner.__enter__()
        raise KeyError

    with pytest.raises(KeyError), guard():
        begins()
    assert not is_open()
    with pytest.raises(KeyError), guard("defer") as outer:
        try:
            with guard():
                begins()
        finally:
            assert safe_inplace._C.guard_current() is outer
    assert not is_open()
    # Somebody may still leave it.
    inner.__exit__(None, None, None)
    with inner:
        assert is_open()
    assert not is_open()


def test_a_guard_that_others_hold_stays_open_when_an_exception_passes():
    inner = guard("copy")

    @contextlib.contextmanager
    def generator():
        with inner:
            yield

    for opened in (lambda stack: stack.enter_context(inner), lambda stack: stack.enter_context(generator())):
        with contextlib.ExitStack() as stack:
            with pytest.raises(KeyError), guard():
                opened(stack)
                raise KeyError
            assert safe_inplace._C.guard_current() is inner
        assert not is_open()


def test_a_guard_that_cannot_be_entered_is_not_left_open(monkeypatch):
    monkeypatch.setattr(safe_inplace._guard.api.torch_patches, "enter", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), guard():
        raise AssertionError("entered")
    assert not is_open()


def test_a_thread_that_ends_with_an_open_guard_leaves_torch_as_it_was():
    before = torch.autograd.graph.disable_saved_tensors_hooks
    thread = threading.Thread(target=lambda: guard().__enter__())
    thread.start()
    thread.join()
    gc.collect()
    assert torch.autograd.graph.disable_saved_tensors_hooks == before


def test_a_decorator_without_parentheses():
    @guard
    def function(a, *, b=2):
        "words"
        assert guard_current() is not None and guard_current().on_hazard == "raise"
        return a + b

    class Own:
        @guard
        def method(self, a):
            return self, a, is_open()

    assert function(1, b=3) == 4 and function.__doc__ == "words" and function.__name__ == "function"
    own = Own()
    assert own.method(1) == (own, 1, True) and not is_open()
    with pytest.raises(TypeError, match="suspends"):

        @guard
        def generator():
            yield

    with pytest.raises(ValueError, match="on_hazard must be"):
        guard("loud")


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, pickle.dumps, lambda watch: copy.deepcopy({"held": [watch]})])
def test_a_guard_that_is_copied_or_pickled_says_why_not(twin):
    with pytest.raises(TypeError, match=r"neither copied nor pickled, since .* make another: guard\('copy', verify=True\)"):
        twin(guard("copy", verify=True))

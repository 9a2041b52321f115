"""A view whose base nobody else can reach becomes a tensor of its own when it is written; every other view stays one."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge
from torch.testing._internal.two_tensor import TwoTensor

import safe_inplace

from .checks import Untouched, assert_bit_equal
from .op_table import BY_NAME, OPS

op_ids = {"ids": lambda op: op.name}


@pytest.fixture(params=OPS, **op_ids)
def op(request):
    return request.param


@pytest.fixture(autouse=True)
def from_zero():
    safe_inplace.reset_counts()


def counted():
    return {name: times for name, times in safe_inplace.counts().items() if times}


def nodes(tensor):
    """The names of all nodes behind a tensor."""
    names, todo, seen = [], [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name().split("::")[-1])
            todo += [following for following, _ in node.next_functions]
    return names


def trainable(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, **options).requires_grad_()


def asked(view):
    assert view._base is not None
    return view


def written(base, write):
    """A view of a base that is written after the view was taken."""
    view = base.view(12)
    write(base)
    return view


def double(base):
    base.mul_(2)


def double_silently(base):
    with torch.no_grad():
        base.mul_(2)


def triple_a_part(base):
    base[1:].view(-1)[:2].mul_(3)


# From a leaf of shape (3, 4) to a view of a base that nobody else can reach, with the same elements.
PRIVATE = {
    "viewed": lambda leaf: (leaf * 1).view(12),
    "transposed": lambda leaf: (leaf * 1).t(),
    "view of a view": lambda leaf: (leaf * 1).view(2, 6).t().unsqueeze(0),
    "made in C++": lambda leaf: torch.tensordot(leaf, torch.eye(4, dtype=leaf.dtype, device=leaf.device).view(4, 2, 2), 1),
    "asked for its base": lambda leaf: asked((leaf * 1).view(12)),
    "alias": lambda leaf: (leaf * 1).view_as(leaf),
    "subclass": lambda leaf: (leaf * 1).as_subclass(Named),
    "base doubled": lambda leaf: written(leaf * 1, double),
    "base doubled under no_grad": lambda leaf: written(leaf * 1, double_silently),
    "part of the base tripled": lambda leaf: written(leaf * 1, triple_a_part),
    "doubled by torch": lambda leaf: (leaf * 1).view(12).mul_(2),
    "doubled by torch under another view": lambda leaf: (leaf * 1).view(12).mul_(2).view(4, 3),
    "of one element": lambda leaf: (leaf.sum() * 1).view(1, 1),
    "empty": lambda leaf: (leaf[:0] * 1).view(4, 0),
}


class Named(torch.Tensor):
    pass


def operands_of(op, device="cpu"):
    return [trainable(device=device) for _ in op.operands]


def result_and_gradients(formula, make, leaf, operands):
    result = formula(make(leaf), *operands)
    weight = torch.linspace(1, 2, result.numel(), dtype=result.dtype, device=result.device).view(result.shape)
    return [result.detach(), *torch.autograd.grad((result * weight).sum(), [leaf, *operands])]


def check_against_torch(op, make, leaf, operands):
    actual = result_and_gradients(op.function, make, leaf, operands)
    expected = result_and_gradients(op.out_of_place, make, leaf, operands)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("make", PRIVATE.values(), ids=PRIVATE)
def test_a_private_view_becomes_a_tensor_of_its_own(op, make, device):
    leaf, operands = trainable(3, 4, device=device), operands_of(op, device)
    view = make(leaf)
    assert view._is_view()
    pointer, layout, version = view.data_ptr(), (view.shape, view.stride()), view._version
    before = view.grad_fn
    assert op.function(view, *operands) is view
    assert not view._is_view() and view._base is None
    assert view.grad_fn.name() == op.node and view.grad_fn.next_functions[0] == (before, 0)
    assert view.requires_grad and not view.is_leaf and not view.retains_grad
    assert view.data_ptr() == pointer and (view.shape, view.stride()) == layout
    assert view._version == version + 1
    assert nodes(view).count("CopySlices") == nodes(make(leaf)).count("CopySlices"), "more than torch's own writes made"
    assert counted() == {"view.own": 1}
    check_against_torch(op, make, leaf, operands)


def test_a_private_view_of_what_needs_no_gradient(op):
    operands = operands_of(op)
    view = torch.randn(3, 4, dtype=torch.float64).view(12)
    value = view.clone()
    op.function(view, *operands)
    assert not view._is_view() and counted() == {"view.own": 1}
    assert view.grad_fn.next_functions[0] == (None, 0) and not view.is_leaf
    gradients = torch.autograd.grad(view.exp().sum(), operands)
    for a, e in zip(gradients, torch.autograd.grad(op.out_of_place(value, *operands).exp().sum(), operands), strict=True):
        torch.testing.assert_close(a, e)


def test_a_private_view_that_is_not_recorded_stays_a_view(op):
    leaf = trainable(3, 4)
    view = (leaf * 1).view(12)
    with torch.no_grad():
        op.function(view, *[t.detach() for t in operands_of(op)])
    untrained = torch.randn(3, 4).view(12)
    op.function(untrained, *[2.0] * len(op.operands))
    assert view._is_view() and untrained._is_view() and counted() == {}


def test_derivatives_of_first_and_second_order_through_a_private_view(op):
    def call(leaf, *operands):
        view = (leaf * 1).view(2, 3).t()
        return op.function(view, *operands)

    leaves = [trainable(6), *[trainable(2) for _ in op.operands]]
    assert torch.autograd.gradcheck(call, leaves, check_batched_grad=True, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert counted().keys() == {"view.own"}


def test_what_is_registered_afterwards_belongs_to_the_new_value(op):
    leaf, operands = trainable(3, 4), operands_of(op)
    view = op.function((leaf * 1).view(12), *operands)
    seen = []
    view.register_hook(lambda grad: seen.append(grad.clone()))
    view.retain_grad()
    later = view.view(3, 4)
    assert later._base is view
    later.mul_(3)  # torch's own: a view of what is now the base
    weight = torch.randn(3, 4, dtype=torch.float64)
    (later * weight).sum().backward()
    value = leaf.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((op.out_of_place(value * 1, *operands) * 3 * weight).sum(), value)
    torch.testing.assert_close(leaf.grad, expected)
    assert_bit_equal(seen[0], (3 * weight).view(12))
    assert view._version == 2


def test_the_gradient_edge_that_was_handed_out_stays_that_of_the_old_value(op):
    leaf, operands = trainable(3, 4), operands_of(op)
    view = (leaf * 1).view(12)
    edge, old = get_gradient_edge(view), view.detach().clone().requires_grad_()
    op.function(view, *operands)
    (gradient,) = torch.autograd.grad(view.exp().sum(), [edge])
    (expected,) = torch.autograd.grad(op.out_of_place(old, *operands).exp().sum(), old)
    torch.testing.assert_close(gradient, expected)


def test_what_saved_the_view_still_notices_the_write(op):
    leaf, operands = trainable(3, 4), operands_of(op)
    view = (leaf * 1).view(12)
    earlier = view.sin()
    op.function(view, *operands)
    assert counted() == {"view.own": 1}
    later = view.sin()
    op.function(view, *operands)
    for saver in (earlier, later):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saver.sum().backward()


def test_it_can_be_detached_in_place_as_a_tensor_can(op):
    view = op.function((trainable(3, 4) * 1).view(12), *operands_of(op))
    assert not view.detach_().requires_grad and view.grad_fn is None


def test_the_memory_is_the_tensors_alone_afterwards(op):
    view = (trainable(3, 4) * 1).view(12)
    assert safe_inplace._C.guard_holders(view) == 2
    assert safe_inplace._C.guard_holders(op.function(view, *operands_of(op))) == 1


class Held:
    """A view that stays one, and all that its reason to be one needs to live."""

    def __init__(self, view, *others):
        self.view, self.others = view, others


def hooked(view, register):
    return Held(view, register(view))


def base_hooked(leaf, register):
    base = leaf * 1
    register(base)
    return Held(base.view(12))


def formerly_a_leaf(register):
    view = torch.ones(3, 4, dtype=torch.float64).view(12).requires_grad_()
    register(view)
    return Held(view.requires_grad_(False))


def exchanged(view, other):
    view.data = other
    return Held(view, other)


def with_grad(view, **attributes):
    for name, value in attributes.items():
        setattr(view, name, value)
    return Held(view)


def replayed(leaf):
    with torch.autograd._force_original_view_tracking(True):
        return Held((leaf * 1).view(12))


def both(base, view, other):
    return Held(view(base), other(base))


def subclass_of(leaf):
    base = torch.Tensor._make_subclass(Named, leaf.detach().clone())
    with torch._C.DisableTorchFunctionSubclass():
        return Held(base.view(12))


def former_dual(base):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.make_dual(base, torch.ones_like(base))


def spread_zeros():
    return torch.zeros(24).as_strided_((12,), (2,))


def viewed(base):
    return base.view(12)


# What stands against a view's becoming a tensor of its own: how it is counted, and such a view of a leaf.
REASONS = {
    "base in Python": ("base held", lambda leaf: both(leaf * 1, viewed, lambda base: base)),
    "base in a closure": ("base held", lambda leaf: both(leaf * 1, viewed, lambda base: lambda: base)),
    "base in its own cycle": ("base held", lambda leaf: both(leaf * 1, viewed, lambda base: setattr(base, "me", base))),
    "weak reference to the base": ("base held", lambda leaf: both(leaf * 1, viewed, weakref.ref)),
    "weak handle on the base": ("base held", lambda leaf: both(leaf * 1, viewed, lambda base: torch._C._WeakTensorRef(base))),
    "another view": ("base held", lambda leaf: both(leaf * 1, viewed, lambda base: base[1:])),
    "view of the view": ("base held", lambda leaf: both(leaf * 1, viewed, lambda base: base.view(12)[1:])),
    "detached base": ("memory held", lambda leaf: both(leaf * 1, viewed, lambda base: base.detach())),
    "NumPy": ("memory held", lambda leaf: both(leaf * 1, viewed, lambda base: base.detach().numpy())),
    "DLPack": ("memory held", lambda leaf: both(leaf * 1, viewed, lambda base: base.detach().__dlpack__())),
    "base saved by a node": ("base held", lambda leaf: both(leaf * 1, viewed, lambda base: base.sin())),
    "base of a subclass": ("base held", subclass_of),
    "retain_grad on the base": ("base held", lambda leaf: base_hooked(leaf, lambda base: base.retain_grad())),
    "data of the view": ("memory held", lambda leaf: hooked((leaf * 1).view(12), lambda view: view.data)),
    "data of the base": ("memory held", lambda leaf: both(leaf * 1, viewed, lambda base: base.data)),
    "storage object": ("memory held", lambda leaf: hooked((leaf * 1).view(12), lambda view: view.untyped_storage())),
    "base saved as a result": ("memory held", lambda leaf: Held(leaf.exp().view(12))),
    "view saved as a result": ("memory held", lambda leaf: Held((leaf * 1).view(12).exp_())),
    "other memory": ("memory held", lambda leaf: exchanged((leaf * 1).view(12), torch.ones(12, dtype=leaf.dtype))),
    "first rows": ("part of base", lambda leaf: Held((leaf * 1)[:2])),
    "rows": ("part of base", lambda leaf: Held((leaf * 1)[1:])),
    "columns": ("part of base", lambda leaf: Held((leaf * 1)[:, :2])),
    "every other": ("part of base", lambda leaf: Held((leaf * 1).view(-1)[::2])),
    "element": ("part of base", lambda leaf: Held((leaf * 1)[1, 2])),
    "spread beyond the base": ("part of base", lambda leaf: Held(torch.zeros(24).resize_(12).as_strided((12,), (2,), 0))),
    "closer than the base": ("part of base", lambda leaf: Held(spread_zeros().as_strided((12,), (1,), 0))),
    "beside the base": ("part of base", lambda leaf: Held(torch.zeros(24).resize_(12).as_strided((12,), (1,), 12))),
    "real view": ("another kind", lambda leaf: Held(torch.view_as_real(torch.complex(leaf * 1, leaf * 2)))),
    "complex view": ("another kind", lambda leaf: Held(torch.view_as_complex((leaf * 1).view(6, 2)))),
    "view with its function": ("another kind", replayed),
    "former dual": ("another kind", lambda leaf: Held(former_dual(leaf * 1))),
    "hook": ("hooks", lambda leaf: hooked((leaf * 1).view(12), lambda view: view.register_hook(lambda g: None))),
    "hook, removed": ("hooks", lambda leaf: hooked((leaf * 1).view(12), lambda view: view.register_hook(print).remove())),
    "hook on the node": ("hooks", lambda leaf: hooked((leaf * 1).view(12), lambda v: v.grad_fn.register_hook(print))),
    "hook before the node": ("hooks", lambda leaf: hooked((leaf * 1).view(12), lambda v: v.grad_fn.register_prehook(print))),
    "hook on the base": ("hooks", lambda leaf: base_hooked(leaf, lambda base: base.register_hook(lambda g: None))),
    "hook of a former leaf": ("hooks", lambda leaf: formerly_a_leaf(lambda view: view.register_hook(print))),
    "hook behind a former leaf": ("hooks", lambda leaf: formerly_a_leaf(lambda v: v.register_post_accumulate_grad_hook(print))),
    "retain_grad": ("gradient", lambda leaf: hooked((leaf * 1).view(12), lambda view: view.retain_grad())),
    "grad": ("gradient", lambda leaf: with_grad((leaf * 1).view(12), grad=torch.ones(12, dtype=torch.float64))),
    "grad_dtype": ("gradient", lambda leaf: with_grad(torch.zeros(3, 4).view(12), grad_dtype=torch.float64)),
    "any grad_dtype": ("gradient", lambda leaf: with_grad(torch.zeros(3, 4).view(12), grad_dtype=None)),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("event, make", REASONS.values(), ids=REASONS)
def test_a_view_stays_one_where_somebody_might_see_it(event, make):
    leaf, operands = trainable(3, 4), [trainable(), trainable()]
    held = make(leaf)
    view, version, base = held.view, held.view._version, held.view._base
    del base
    safe_inplace.mul_add_(view, *operands)
    assert counted() == {f"view.{event}": 1}
    assert view._is_view() and "CopySlices" in nodes(view._base)
    assert view._version == version + 1
    assert view.requires_grad and not view.is_leaf


# In this one torch's CopySlices reads what lies between the elements of the base's gradient, which nobody has set.
WITH_GRADIENTS = {name: make for name, (_, make) in REASONS.items() if name != "closer than the base"}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("make", WITH_GRADIENTS.values(), ids=WITH_GRADIENTS)
def test_gradients_where_a_view_stays_one(make):
    leaf, operands = trainable(3, 4), [trainable(), trainable()]

    def run(formula):
        result = formula(make(leaf).view, *operands)
        weight = torch.linspace(1, 2, result.numel()).to(result.dtype).view(result.shape)
        total = (result * weight).sum().abs()
        try:
            return torch.autograd.grad(total, [leaf, *operands], allow_unused=True)
        except RuntimeError as error:
            return str(error).split(":")[0]

    actual, expected = run(safe_inplace.mul_add_), run(lambda input, scale, shift: input.mul_(scale).add_(shift))
    if isinstance(expected, str):
        assert actual == expected
        return
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(a, e)


def test_the_rest_of_a_base_can_be_reached_from_a_part():
    """Why a view of a part stays one: as_strided leads from it to the whole, whose gradient needs the base's size."""

    def run(write):
        part = (leaf * 1)[1:3]
        write(part, factor)
        whole = part.as_strided((12,), (1,), 0)
        whole.mul_(3)
        return torch.autograd.grad(part.sum(), [leaf, factor])

    leaf, factor = trainable(3, 4), trainable()
    for a, e in zip(run(safe_inplace.mul_), run(torch.Tensor.mul_), strict=True):
        torch.testing.assert_close(a, e)


LEFT_TO_TORCH = {
    "complex product": ("mul_", lambda: (trainable(3, 4) * 1j).view(12), lambda: [trainable()]),
    "integer operand": ("mul_add_", lambda: (trainable(3, 4) * 1).view(12), lambda: [torch.arange(12), trainable()]),
}


@pytest.mark.parametrize("name, make, operands", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_torchs_own_writes_make_its_copies(name, make, operands):
    view = BY_NAME[name].function(make(), *operands())
    assert counted() == {"view.left to torch": 1}
    assert view._is_view() and "CopySlices" in nodes(view)
    with torch.no_grad():
        BY_NAME[name].function(view, *operands())
    plain = BY_NAME[name].function(make().clone(), *operands())
    assert counted() == {"view.left to torch": 1} and not plain._is_view()


class Viewing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view(12)

    @staticmethod
    def backward(ctx, grad):
        return grad.view(3, 4)


def under(context, base):
    with context:
        return base.view(12)


def raise_error(_):
    raise RuntimeError("the hook's own")


REFUSED = {
    "view of a leaf": lambda leaf: leaf.view(12),
    "made under no_grad": lambda leaf: under(torch.no_grad(), leaf * 1),
    "made in inference mode": lambda leaf: under(torch.inference_mode(), leaf * 1),
    "chunk": lambda leaf: (leaf * 1).view(12).chunk(1)[0],
    "split": lambda leaf: (leaf * 1).view(24 // 2).split(12)[0],
    "unbind": lambda leaf: (leaf * 1).view(1, 12).unbind()[0],
    "custom Function": lambda leaf: Viewing.apply(leaf * 1),
    "expanded": lambda leaf: (leaf.sum() * 1).expand(12),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_a_refused_view_is_left_as_it_was(op, make):
    view, operands = make(trainable(3, 4)), operands_of(op)
    with Untouched(view.detach()), pytest.raises(RuntimeError):
        op.function(view, *operands)
    assert view._is_view() and counted() == {}


def test_a_view_is_left_as_it_was_where_an_operand_or_a_hook_is_refused(op):
    view = (trainable(3, 4) * 1).view(12)
    node = view.grad_fn
    with Untouched(view.detach()):
        with pytest.raises(RuntimeError, match="shape"):
            op.function(view, *[trainable(2, 12) for _ in op.operands])
        if op.saves:
            with (
                torch.autograd.graph.saved_tensors_hooks(raise_error, raise_error),
                pytest.raises(RuntimeError, match="the hook's own"),
            ):
                op.function(view, *[trainable(12) for _ in op.operands])
    assert view._is_view() and view.grad_fn is node and counted() == {}


def dual(base):
    return torch.autograd.forward_ad.make_dual(base, torch.ones_like(base)).view(12)


def fake(base):
    mode = torch._subclasses.FakeTensorMode()
    return mode.from_tensor(base.detach()).view(12)


# What the kernels never see, torch's methods write: these stay as torch leaves them.
LEFT_FROM_THE_START = {
    "forward gradient": dual,
    "wrapper subclass": lambda base: TwoTensor(base.detach(), base.detach().clone()).view(12),
    "fake": fake,
    "conjugate": lambda base: (base * 1j).conj(),
}


@pytest.mark.parametrize("make", LEFT_FROM_THE_START.values(), ids=LEFT_FROM_THE_START)
def test_a_view_that_no_kernel_sees_stays_one(make):
    with torch.autograd.forward_ad.dual_level():
        view = make(trainable(3, 4) * 1)
        assert view._is_view()
        safe_inplace.mul_(view, trainable() if "Fake" not in type(view).__name__ else 2.0)
        assert view._is_view() and counted() == {}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_views_as_it_did(op, backend, fresh_dynamo):
    def step(leaf, *operands):
        return op.function((leaf * 1).view(12), *operands).sin()

    leaf, operands = trainable(3, 4), operands_of(op)
    expected = step(leaf, *operands)
    safe_inplace.reset_counts()
    actual = torch.compile(step, backend=backend, fullgraph=True)(leaf, *operands)
    assert "view.own" not in counted()
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(result.sum(), [leaf, *operands]) for result in (actual, expected)]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)


def test_transforms_view_as_they_did(op):
    def call(formula):
        return lambda leaf, *operands: formula((leaf * 1).view(12), *operands).sin().sum()

    leaf, operands = torch.randn(3, 4, dtype=torch.float64), [torch.randn((), dtype=torch.float64) for _ in op.operands]
    positions = tuple(range(len(op.arguments)))
    actual = torch.func.grad(call(op.function), positions)(leaf, *operands)
    expected = torch.func.grad(call(op.out_of_place), positions)(leaf, *operands)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert counted() == {}


def test_guard_finds_no_hazard_and_every_hazard():
    with safe_inplace.guard(verify=True):
        leaf, scale, shift = trainable(3, 4), trainable(), trainable()
        view = safe_inplace.mul_add_((leaf * 1).view(12), scale, shift)
        view.sum().backward()
        view = (leaf * 1).view(12)
        saver = view.sin()
        with pytest.raises(safe_inplace.HazardError):
            safe_inplace.mul_add_(view, scale, shift)
        saver.sum().backward()
        # What was a view is followed by its memory afterwards as before.
        view = safe_inplace.mul_add_((leaf * 1).view(12), scale, shift)
        saver = view.sin()
        with pytest.raises(safe_inplace.HazardError):
            view.data.mul_(2)
        saver.sum().backward()


def test_layer_scale_of_a_linear_layer_makes_no_copy():
    """`mul_add_` into what `F.linear` returns for three dimensions, all of it trained."""
    x, residual = torch.randn(8, 512, 768, requires_grad=True), torch.randn(8, 512, 768, requires_grad=True)
    weight, bias, gamma = (torch.randn(shape, requires_grad=True) for shape in ((768, 768), (768,), (768,)))
    leaves = [x, weight, bias, gamma, residual]

    def run(formula):
        result = formula(F.linear(x, weight, bias), gamma, residual)
        total = (result * result.detach()).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            gradients = torch.autograd.grad(total, leaves)
        copies = [
            event.name
            for event in profile.events()
            if event.name in ("aten::clone", "aten::copy_", "aten::empty_strided", "aten::new_empty_strided")
            and any(len(shape) and torch.Size(shape).numel() >= x.numel() for shape in event.input_shapes)
        ]
        return nodes(result), copies, gradients

    names, copies, gradients = run(safe_inplace.mul_add_)
    assert "CopySlices" not in names
    assert copies == []
    _, _, expected = run(lambda input, scale, shift: input * scale + shift)
    for a, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-2)


def test_the_count_of_copies_sees_those_of_a_view_that_stays_one():
    """The twin of the test above."""
    gamma = torch.randn(768, requires_grad=True)
    base = torch.randn(4096, 768, requires_grad=True) * 1
    result = safe_inplace.mul_(base.view(8, 512, 768), gamma)
    assert "CopySlices" in nodes(result)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        result.sum().backward()
    assert any(event.name == "aten::copy_" for event in profile.events())


def test_counts_by_name():
    names = list(safe_inplace.counts())
    assert all(isinstance(times, int) and times == 0 for times in safe_inplace.counts().values())
    documented = [name for name in names if f'``"{name}"``' in safe_inplace.counts.__doc__]
    assert documented == names
    assert {f"view.{event}" for event, _ in REASONS.values()} | {"view.own", "view.left to torch"} == {
        name for name in names if name.startswith("view.")
    }
    safe_inplace.mul_((trainable(3, 4) * 1).view(12), 2.0)
    assert safe_inplace.counts()["view.own"] == 1
    safe_inplace.reset_counts()
    assert counted() == {} and list(safe_inplace.counts()) == names

"""An op out of place takes over the memory of a temporary that nobody sees any more, and no other; its result is the same.

A case makes a tensor, lets somebody hold it or its memory, and hands it to a call that would take over a plain one. What the
holder sees afterwards must be what it saw before.
"""

import asyncio
import concurrent.futures
import functools
import gc
import itertools
import operator
import sys
import threading
import types
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.utils.dlpack
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from safe_inplace import _C, add, add_mul, addcmul, guard, mul, mul_add

from .checks import assert_bit_equal
from .layouts import random_tensor
from .op_table import OPS

SHAPE = (4, 6)
PLACES = [(op, place) for op in OPS for place in range(1 + len(op.operands))]
places = pytest.mark.parametrize("op, place", PLACES, ids=lambda v: getattr(v, "functional_name", v))


@contextmanager
def always_fresh():
    before = _C.look_for_temporaries(False)
    try:
        yield
    finally:
        _C.look_for_temporaries(before)


def values(op, dtype=torch.float32, shape=SHAPE):
    return [random_tensor(shape, dtype) for _ in op.arguments]


def plain_call(op, place, *, by_name=False, before="", after=""):
    """A function of (f, make, values) that calls f with what make() returns at that place: nobody but the call has it."""
    operands = [f"{before}make(){after}" if i == place else f"values[{i}]" for i in range(1 + len(op.operands))]
    if by_name:
        operands = [f"{name}={operand}" for name, operand in zip(op.arguments, operands, strict=True)]
    return eval(f"lambda f, make, values: f({', '.join(operands)})")


class Made:
    """Makes the temporary, and notes where its memory is and what is in it."""

    def __init__(self, make, hold=lambda tensor: None):
        self.make, self.hold = make, hold

    def __call__(self):
        tensor = self.make()
        self.address, self.value = tensor.data_ptr(), tensor.detach().clone()
        self.seen = self.hold(tensor)
        return tensor


def call_twice(op, place, make, given, call=None):
    """The result of the call, and what is the same but fresh."""
    call = call or plain_call(op, place)
    with always_fresh():
        expected = call(op.functional, make, given)
    return call(op.functional, make, given), expected


# ---- taken over


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@places
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_temporary_is_taken_over(op, place, dtype):
    given = values(op, dtype)
    made = Made(lambda: given[place] * 2)
    result, expected = call_twice(op, place, made, given)
    assert result.data_ptr() == made.address
    assert_bit_equal(result, expected)
    assert (result.stride(), result._version, result._base) == (expected.stride(), expected._version, None)
    assert result.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert sys.getrefcount(result) == sys.getrefcount(expected)
    assert gc.is_tracked(result)


FORMS = {
    "by_name": {"by_name": True},
    "conditional": {"before": "(", "after": " if values else None)"},
    "popped": {"before": "[", "after": "].pop()"},
    "returned": {"before": "(lambda: ", "after": ")()"},
}


@places
@pytest.mark.parametrize("form", FORMS)
def test_however_it_came_on_the_stack(op, place, form):
    given = values(op)
    made = Made(lambda: given[place] * 2)
    result, expected = call_twice(op, place, made, given, plain_call(op, place, **FORMS[form]))
    assert result.data_ptr() == made.address
    assert_bit_equal(result, expected)


LAYOUTS = {
    "transposed": lambda t: (t.t() * 2),
    "channels_last": lambda t: t.reshape(2, 2, 2, 3).to(memory_format=torch.channels_last) * 2,
    "size_one": lambda t: t.reshape(4, 1, 6) * 2,
    "size_one_of_any_stride": lambda t: (t * 2).resize_(4, 6, 1).as_strided_((4, 6, 1), (6, 1, 17)),
    "one_element": lambda t: t.flatten()[:1] * 2,
    "no_dims": lambda t: t[0, 0] * 2,
}


@places
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_layouts_are_taken_over(op, place, layout):
    value = random_tensor(SHAPE, torch.float32)
    given = [LAYOUTS[layout](random_tensor(SHAPE, torch.float32)) for _ in op.arguments]
    made = Made(lambda: LAYOUTS[layout](value))
    result, expected = call_twice(op, place, made, given)
    assert result.data_ptr() == made.address
    assert_bit_equal(result, expected)
    assert result.stride() == expected.stride()


ONLY_VIEWS = {
    "flat": lambda t: (t * 2).view(-1).view(SHAPE),
    "all": lambda t: (t * 2)[:],
    "transposed": lambda t: (t.t() * 2).t(),
    "squeezed": lambda t: (t[None] * 2)[0],
}


@places
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "has_history"])
@pytest.mark.parametrize("view", ONLY_VIEWS)
def test_a_view_whose_base_nobody_holds_is_taken_over(op, place, view, requires_grad):
    given = values(op)
    value = random_tensor(SHAPE, torch.float32).requires_grad_(requires_grad)
    made = Made(lambda: ONLY_VIEWS[view](value))
    result, expected = call_twice(op, place, made, given)
    assert result.data_ptr() == made.address
    assert result._base is None
    assert_bit_equal(result.detach(), expected.detach())
    if requires_grad:
        gradients = [torch.autograd.grad(r.sin().sum(), value)[0] for r in (result, expected)]
        assert_bit_equal(*gradients)


@places
@pytest.mark.parametrize("shape", [(6,), (4, 1), (1, 1), ()], ids=str)
def test_beside_operands_that_are_broadcast(op, place, shape):
    given = [random_tensor(shape, torch.float32) for _ in op.arguments]
    value = random_tensor(SHAPE, torch.float32)
    made = Made(lambda: value * 2)
    result, expected = call_twice(op, place, made, given)
    assert result.data_ptr() == made.address
    assert_bit_equal(result, expected)


@places
@pytest.mark.parametrize("shape", [(300, 1031), (1031,), (300, 1), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_ones(op, place, shape, dtype):
    """Of many blocks, on the way that writes fresh memory past the caches, and without the interpreter's lock."""
    given = [random_tensor(shape, dtype) for _ in op.arguments]
    value = random_tensor((300, 1031), dtype)
    made = Made(lambda: value * 2)
    result, expected = call_twice(op, place, made, given)
    assert result.data_ptr() == made.address
    assert_bit_equal(result, expected)


@places
def test_beside_numbers(op, place):
    given = [random_tensor(SHAPE, torch.float32)] + [1.5] * len(op.operands)
    value = random_tensor(SHAPE, torch.float32)
    made = Made(lambda: value * 2)
    result, expected = call_twice(op, place, made, given)
    assert result.data_ptr() == made.address
    assert_bit_equal(result, expected)


def test_of_several_temporaries_one():
    for op in OPS:
        mades = [Made(lambda value=value: value * 2) for value in values(op)]
        call = eval(f"lambda f, {', '.join(op.arguments)}: f({', '.join(name + '()' for name in op.arguments)})")
        with always_fresh():
            expected = call(op.functional, *mades)
        result = call(op.functional, *mades)
        assert result.data_ptr() in [made.address for made in mades]
        assert_bit_equal(result, expected)


def test_nested_calls_hand_one_memory_on():
    x, y, z = (random_tensor(SHAPE, torch.float32) for _ in range(3))
    first = Made(lambda: mul(x, y))
    result = addcmul(mul_add(add_mul(add(first(), z), y, z), x, y), x, z)
    assert result.data_ptr() == first.address
    with always_fresh():
        assert_bit_equal(result, addcmul(mul_add(add_mul(add(mul(x, y), z), y, z), x, y), x, z))


@places
@pytest.mark.parametrize("trained", [False, True])
def test_with_gradients_as_without(op, place, trained):
    """The result, its node, every gradient and the gradients of the gradients, bit for bit."""

    def derivatives():
        given = [value.detach().requires_grad_(trained or i == place) for i, value in enumerate(original)]
        made.make = lambda: given[place].clone()
        leaves = [value for value in given if value.requires_grad]
        result = plain_call(op, place)(op.functional, made, given)
        first = torch.autograd.grad(result, leaves, weight, create_graph=True, allow_unused=True)
        first = [g for g in first if g is not None and g.requires_grad]
        second = torch.autograd.grad(sum(g.sum() for g in first), leaves, allow_unused=True) if first else ()
        return result, [g for g in (*first, *second) if g is not None]

    original, weight = values(op), torch.randn(SHAPE)
    made = Made(None)
    with always_fresh():
        expected, gradients = derivatives()
    result, taken = derivatives()
    name = op.arguments[place]
    saved = trained and any(name in factors for factors in op.saves.values())
    assert (result.data_ptr() == made.address) is (not saved)
    assert (result.is_leaf, result.grad_fn.name()) == (False, expected.grad_fn.name())
    for a, b in zip([result, *taken], [expected, *gradients], strict=True):
        assert_bit_equal(a.detach(), b.detach())


# Whether memory is taken over there.
MODES = {
    "no_grad": (torch.no_grad, True),
    "anomaly": (torch.autograd.detect_anomaly, True),
    "inference": (torch.inference_mode, None),
    "guard": (lambda: guard("raise", verify=True), None),
}


@places
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_in_other_modes(op, place, mode):
    given = values(op)
    made = Made(lambda: given[place] * 2)
    context, taken = MODES[mode]
    with context():
        result, expected = call_twice(op, place, made, given)
    assert taken is None or result.data_ptr() == made.address
    assert result.is_inference() == expected.is_inference()
    assert_bit_equal(result, expected)


# ---- while the op saves


SAVING = [(op, place) for op, place in PLACES if any(op.arguments[place] in factors for factors in op.saves.values())]
saving = pytest.mark.parametrize("op, place", SAVING, ids=lambda v: getattr(v, "functional_name", v))


def trained(op, place):
    return [value.requires_grad_(i != place) for i, value in enumerate(values(op))]


KEEPS = {
    "itself": lambda tensor: tensor,
    "an_alias": lambda tensor: tensor.detach(),
    "numpy": lambda tensor: tensor.numpy(),
    "its_storage": lambda tensor: tensor.untyped_storage(),
    "a_weak_reference": weakref.ref,
    "nothing": lambda tensor: None,
}


@saving
@pytest.mark.parametrize("keeps", KEEPS)
def test_what_a_pack_hook_keeps_stays(op, place, keeps):
    given, kept = trained(op, place), []
    value = random_tensor(SHAPE, torch.float32)
    made = Made(lambda: value * 2)

    def pack(tensor):
        if tensor.data_ptr() == made.address:
            kept.append(KEEPS[keeps](tensor))
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result, expected = call_twice(op, place, made, given)
    assert len(kept) == 2
    assert_bit_equal(result.detach(), expected.detach())
    if keeps == "itself":
        assert_bit_equal(kept[1], made.value)
    elif keeps in ("an_alias", "numpy"):
        assert_bit_equal(torch.as_tensor(kept[1]), made.value)
    elif keeps == "its_storage":
        assert_bit_equal(torch.empty(0).set_(kept[1], 0, SHAPE), made.value)
    if keeps != "nothing":
        assert result.data_ptr() != made.address or keeps == "a_weak_reference"
    gradients = [torch.autograd.grad(r.sum(), [v for v in given if v.requires_grad]) for r in (result, expected)]
    for a, b in zip(*gradients, strict=True):
        assert_bit_equal(a, b)


class Refused(Exception):
    pass


@saving
@pytest.mark.parametrize("raises", [False, True])
def test_a_temporary_that_lives_on_is_known_to_the_garbage_collector(op, place, raises):
    """Also after a call that raised: only what goes with the call may stay hidden."""
    given, kept = trained(op, place), []
    value = random_tensor(SHAPE, torch.float32)
    made = Made(lambda: value * 2)

    def pack(tensor):
        if tensor.data_ptr() == made.address:
            kept.append(tensor)
            if raises:
                raise Refused
        return tensor.clone()

    with pytest.raises(Refused) if raises else nullcontext(), saved_tensors_hooks(pack, lambda tensor: tensor):
        plain_call(op, place)(op.functional, made, given)
    (tensor,) = kept
    kept.clear()
    assert_bit_equal(tensor, made.value)
    alone = torch.zeros(())
    assert sys.getrefcount(tensor) == sys.getrefcount(alone)
    assert gc.is_tracked(tensor)
    gone = weakref.ref(tensor)
    tensor.itself = tensor
    del tensor
    gc.collect()
    assert gone() is None


class Attribute:
    """Of a tensor: notes when that goes."""

    def __init__(self, gone):
        self.gone = gone

    def __del__(self):
        self.gone.append(True)


@places
@pytest.mark.parametrize("refused", [False, True])
def test_the_temporary_goes_with_the_call(op, place, refused):
    given = [torch.zeros(3, 3) if refused else value for value in values(op)]
    value, gone = random_tensor(SHAPE, torch.float32), []
    made = Made(lambda: value * 2, lambda tensor: setattr(tensor, "attribute", Attribute(gone)))
    with pytest.raises(RuntimeError, match="must match the size") if refused else nullcontext():
        result = plain_call(op, place)(op.functional, made, given)
    assert gone == [True]
    if not refused:
        assert result.data_ptr() == made.address
        assert not hasattr(result, "attribute")


# ---- held by somebody


HOLDERS = {}


def holder(function):
    """Takes the tensor; returns a function that says what the holder sees, None where it is gone."""
    HOLDERS[function.__name__] = function
    return function


@holder
def a_name(tensor):
    globals()["held_by_a_name"] = tensor
    return lambda: globals().pop("held_by_a_name")


@holder
def a_list(tensor):
    held = [tensor]
    return held.pop


@holder
def a_dict(tensor):
    held = {"tensor": tensor}
    return lambda: held["tensor"]


@holder
def a_key(tensor):
    held = {tensor}
    return lambda: next(iter(held))


@holder
def a_deep_container(tensor):
    held = ({"list": [(tensor,)]},)
    return lambda: held[0]["list"][0][0]


@holder
def a_closure(tensor):
    return lambda: tensor


@holder
def a_default_argument(tensor):
    def function(tensor=tensor):
        return tensor

    del tensor
    return function


@holder
def a_generators_frame(tensor):
    def generate(tensor):
        yield
        yield tensor

    running = generate(tensor)
    next(running)
    return lambda: next(running)


@holder
def a_generators_stack(tensor):
    def generate(tensors):
        yield [tensors.pop(), (yield)]

    running = generate([tensor])
    next(running)
    return lambda: running.send(None)[0]


@holder
def a_coroutine(tensor):
    async def wait(tensor):
        await asyncio.sleep(0)
        return tensor

    waiting = wait(tensor)
    waiting.send(None)

    def seen():
        with pytest.raises(StopIteration) as stop:
            waiting.send(None)
        return stop.value.value

    return seen


@holder
def an_iterator(tensor):
    held = itertools.repeat(tensor)
    return lambda: next(held)


@holder
def a_cycle(tensor):
    tensor.itself = tensor
    mark = tensor.mark = object()
    return lambda: next(t for t in gc.get_objects() if type(t) is torch.Tensor and getattr(t, "mark", None) is mark)


@holder
def a_bound_method(tensor):
    return types.MethodType(lambda tensor: tensor, tensor)


@holder
def a_method_of_the_tensor(tensor):
    return tensor.detach


@holder
def a_partial(tensor):
    return functools.partial(lambda tensor: tensor, tensor)


@holder
def a_cached_function(tensor):
    @functools.cache
    def function(key):
        return held.pop()

    held = [tensor]
    function(0)
    return lambda: function(0)


@holder
def an_exceptions_traceback(tensor):
    def fail(tensor):
        raise KeyError

    try:
        fail(tensor)
    except KeyError as error:
        held = error.__traceback__
    return lambda: held.tb_next.tb_frame.f_locals["tensor"]


@holder
def an_exceptions_argument(tensor):
    held = ValueError(tensor)
    return lambda: held.args[0]


@holder
def a_weak_reference(tensor):
    return weakref.ref(tensor)


@holder
def a_weak_proxy(tensor):
    held = weakref.WeakValueDictionary(tensor=tensor)
    return lambda: held.get("tensor")


@holder
def a_weak_reference_with_a_callback(tensor):
    called = []
    held = weakref.ref(tensor, called.append)

    def seen():
        assert called == [held]

    return seen


@holder
def a_finalizer(tensor):
    held = weakref.finalize(tensor, int)

    def seen():
        assert not held.alive

    return seen


@holder
def a_weak_reference_of_torch(tensor):
    held = torch._C._WeakTensorRef(tensor)

    def seen():
        assert held.expired()

    return seen


@holder
def another_thread(tensor):
    given, waits = threading.Event(), threading.Thread(target=lambda tensor: (given.wait(), seen.append(tensor)), args=(tensor,))
    seen = []
    waits.start()

    def look():
        given.set()
        waits.join()
        return seen.pop()

    return look


@holder
def a_modules_buffer(tensor):
    module = torch.nn.Module()
    module.register_buffer("held", tensor.detach())
    return lambda: module.held


@holder
def a_scripted_modules_attribute(tensor):
    class Holds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.held = tensor.detach()

        def forward(self):
            return self.held

    scripted = torch.jit.script(Holds())
    return scripted


def as_the_tensor(tensor, storage):
    """A function that gives the storage the form of the tensor."""
    dtype, size, stride, offset = tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
    return lambda: torch.empty(0, dtype=dtype).set_(storage(), offset, size, stride)


@holder
def a_storage(tensor):
    storage = tensor.untyped_storage()
    return as_the_tensor(tensor, lambda: storage)


@holder
@pytest.mark.filterwarnings("ignore:TypedStorage")
def a_typed_storage(tensor):
    storage = tensor.storage()
    return as_the_tensor(tensor, storage.untyped)


@holder
def a_weak_reference_to_the_storage(tensor):
    held = StorageWeakRef(tensor.untyped_storage())

    def seen():
        if held.expired():
            return None
        return revive()

    revive = as_the_tensor(tensor, lambda: torch.UntypedStorage._new_with_weak_ptr(held.cdata))
    return seen


@holder
def a_weak_reference_to_the_storages_object(tensor):
    held = weakref.ref(tensor.untyped_storage())
    revive = as_the_tensor(tensor, held)
    return lambda: None if held() is None else revive()


@holder
def a_detached_alias(tensor):
    held = tensor.detach()
    return lambda: held


@holder
def its_data(tensor):
    held = tensor.data
    return lambda: held


@holder
def a_tensor_set_to_its_memory(tensor):
    held = torch.empty(0).set_(tensor.detach())
    return lambda: held


@holder
def a_view_of_all(tensor):
    held = tensor.view(-1)
    return lambda: held.view(SHAPE)


@holder
def a_view_of_a_part(tensor):
    held, whole = tensor.detach()[1:3], tensor.detach().clone()

    def seen():
        whole[1:3] = held
        return whole

    return seen


@holder
def an_untracked_view(tensor):
    with torch.no_grad():
        held = tensor.t()
    return held.t


@holder
def a_lazy_copy(tensor):
    held = torch._lazy_clone(tensor.detach())
    return lambda: held


@holder
def numpy(tensor):
    held = tensor.detach().numpy()
    return lambda: torch.from_numpy(held)


@holder
def the_buffer_protocol(tensor):
    held = memoryview(tensor.detach().numpy())
    return lambda: torch.frombuffer(held, dtype=torch.float32).view(SHAPE)


@holder
def the_array_interface(tensor):
    import numpy

    held = numpy.asarray(tensor.detach())
    return lambda: torch.from_numpy(held)


@holder
def a_dlpack_capsule(tensor):
    held = torch.utils.dlpack.to_dlpack(tensor.detach())
    return lambda: torch.utils.dlpack.from_dlpack(held)


@holder
def a_dlpack_consumer(tensor):
    import numpy

    held = numpy.from_dlpack(tensor.detach())
    return lambda: torch.from_numpy(held)


VIEWS = {
    "itself": lambda tensor: tensor,
    "a_view_of_it": lambda tensor: tensor.view(-1).view(SHAPE),
    "an_alias_of_it": lambda tensor: tensor[:],
}


@places
@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "has_history"])
@pytest.mark.parametrize("given_on", VIEWS)
@pytest.mark.parametrize("name", HOLDERS)
def test_what_somebody_holds_stays(op, place, name, given_on, requires_grad):
    given = values(op)
    value = random_tensor(SHAPE, torch.float32).requires_grad_(requires_grad)
    made = Made(lambda: value * 2, HOLDERS[name])
    call = plain_call(op, place)
    with always_fresh():
        expected = call(op.functional, lambda: VIEWS[given_on](made()), given)
        assert_sees(made)
    result = call(op.functional, lambda: VIEWS[given_on](made()), given)
    assert_sees(made)
    assert result.data_ptr() != made.address or made.gone
    assert_bit_equal(result.detach(), expected.detach())


def assert_sees(made):
    seen = made.seen()
    made.gone = seen is None
    if seen is not None:
        assert_bit_equal(seen.detach(), made.value)


@places
@pytest.mark.parametrize("module", [torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Sigmoid(), torch.nn.LayerNorm(6)], ids=str)
def test_a_modules_hook_keeps_its_output(op, place, module):
    given, kept = values(op), []
    value = random_tensor(SHAPE, torch.float32)
    handle = module.register_forward_hook(lambda module, args, output: kept.append((output, output.detach().clone())))
    made = Made(lambda: module(value))
    result, expected = call_twice(op, place, made, given)
    handle.remove()
    for output, before in kept:
        assert_bit_equal(output.detach(), before)
    assert_bit_equal(result.detach(), expected.detach())
    assert result.data_ptr() != made.address


NODES = {
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "softmax": lambda t: t.softmax(-1),
    "rsqrt": lambda t: t.abs().rsqrt(),
    "norm": lambda t: t / t.norm(dim=-1, keepdim=True),
    "cummax": lambda t: t.cummax(0)[0],
}


@places
@pytest.mark.parametrize("name", NODES)
def test_what_a_node_saved_as_its_output_stays(op, place, name):
    """The gradients are those of plain torch."""
    given = [value.requires_grad_() for value in values(op)]
    made = Made(lambda: NODES[name](given[place]))
    results = call_twice(op, place, made, given)
    gradients = [torch.autograd.grad(result.sin().sum(), given) for result in results]
    for a, b in zip(*gradients, strict=True):
        assert_bit_equal(a, b)


@places
def test_what_a_node_saved_as_its_input_stays(op, place):
    given = [value.requires_grad_() for value in values(op)]
    made = Made(lambda: given[place] * 2, lambda tensor: kept.append(tensor.sin()))
    gradients = []
    for context in (always_fresh(), nullcontext()):
        kept = []
        with context:
            result = plain_call(op, place)(op.functional, made, given)
        assert result.data_ptr() != made.address
        gradients.append(torch.autograd.grad((result + kept.pop()).sum(), given))
    for a, b in zip(*gradients, strict=True):
        assert_bit_equal(a, b)


# What its memory, its history or its form forbids. Some of it nobody could see, but a rule that knew would be longer.
UNFIT = {
    "a_leaf": lambda t: t.clone().requires_grad_(),
    "a_parameter": lambda t: torch.nn.Parameter(t.clone()),
    "has_a_hook": lambda t: hooked(t.clone().requires_grad_() * 1),
    "retains_its_gradient": lambda t: retaining(t.clone().requires_grad_() * 1),
    "a_part_of_its_base": lambda t: torch.cat([t, t]).view(2, *SHAPE)[0],
    "sliced": lambda t: torch.cat([t, t])[: SHAPE[0]],
    "beyond_the_start": lambda t: torch.cat([t, t])[SHAPE[0] :],
    "beyond_the_start_detached": lambda t: torch.cat([t, t]).detach()[SHAPE[0] :].detach(),
    "expanded": lambda t: t[0].clone().expand(SHAPE),
    "with_gaps": lambda t: torch.empty_strided(SHAPE, (12, 2)).copy_(t),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int64),
    "smaller": lambda t: t[:1] * 2,
    "from_numpy": lambda t: torch.from_numpy(t.numpy().copy()),
    "from_dlpack": lambda t: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t.clone())),
    "from_a_buffer": lambda t: torch.frombuffer(bytearray(t.numpy().tobytes()), dtype=t.dtype).view(SHAPE),
    "shared": lambda t: t.clone().share_memory_(),
    "was_in_numpy": lambda t: in_numpy(t.clone()),
}


def hooked(tensor):
    tensor.register_hook(lambda grad: grad)
    return tensor


def retaining(tensor):
    tensor.retain_grad()
    return tensor


def in_numpy(tensor):
    tensor.numpy()
    return tensor


@places
@pytest.mark.parametrize("name", UNFIT)
def test_what_is_not_fit_stays(op, place, name):
    given = values(op)
    made = Made(lambda: UNFIT[name](given[place]))
    result, expected = call_twice(op, place, made, given)
    assert result.data_ptr() != made.address
    assert_bit_equal(result.detach(), expected.detach())
    assert result.stride() == expected.stride()


@places
def test_of_other_strides_than_the_results(op, place):
    """The first full operand decides how the result is laid out."""
    given = values(op)
    made = Made(lambda: given[place].t().contiguous().t() * 2)
    result, expected = call_twice(op, place, made, given)
    assert (result.data_ptr() == made.address) is (place == 0)
    assert_bit_equal(result, expected)
    assert result.stride() == expected.stride()


@places
def test_memory_that_is_larger_than_its_tensor(op, place):
    """Else a small result would keep a large memory alive."""
    given = values(op)
    made = Made(lambda: torch.ones(1000).resize_(SHAPE))
    result, expected = call_twice(op, place, made, given)
    assert_bit_equal(result, expected)
    assert result.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_memory_of_a_file(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(96))
    for make in (
        lambda: torch.from_file(str(path), True, 24).view(SHAPE),
        lambda: torch.empty(0).set_(torch.UntypedStorage.from_file(str(path), True, 96)),
    ):
        assert add(make(), 1).eq(1).all()
        assert path.read_bytes() == bytes(96)


def test_a_lazy_copy_does_not_write_its_source():
    source = random_tensor(SHAPE, torch.float32)
    before = source.clone()
    result = add(torch._lazy_clone(source), 1)
    assert_bit_equal(source, before)
    assert_bit_equal(result, before + 1)


def test_a_finalizer_of_the_class_sees_what_was_there(monkeypatch):
    x, seen = random_tensor(SHAPE, torch.float32), []

    def finalize(tensor):
        if hasattr(tensor, "mark"):
            seen.append(tensor.numpy().tobytes())

    def marked():
        tensor = x * 2
        tensor.mark = True
        return tensor

    expected = (x * 2).numpy().tobytes()
    monkeypatch.setattr(torch.Tensor, "__del__", finalize, raising=False)
    result = add(marked(), 1)
    assert seen == [expected]
    del result


# ---- not a plain call


CALLS = {}


def call(function):
    """Calls add with a tensor of make() and one; what keeps that tensor is what it returns besides the result."""
    CALLS[function.__name__] = function
    return function


@call
def a_name_of_the_callers_that_a_callee_has(make):
    """From Python 3.14 on none of these places but the caller's counts."""

    def callee(given):
        own = given
        del given
        return add(own, 1)

    held = make()
    return callee(held), held


@call
def a_name_bound_in_the_call(make):
    return add(held := make(), 1), held


@call
def a_name_that_waits_in_an_outer_call(make):
    held = make()
    return tuple(reversed((held, add(held, 1))))


@call
def star(make):
    args = (make(), 1)
    return add(*args), args[0]


@call
def star_of_a_list(make):
    args = [make(), 1]
    return add(*args), args[0]


@call
def star_after_a_temporary(make):
    args = (1,)
    held = [make()]
    return add(held[0], *args), held[0]


@call
def double_star(make):
    named = {"input": make(), "other": 1}
    return add(**named), named["input"]


@call
def star_and_double_star(make):
    args, named = (make(),), {"other": 1}
    return add(*args, **named), args[0]


@call
def partial(make):
    held = functools.partial(add, make())
    return held(1), held.args[0]


@call
def partial_with_keywords(make):
    held = functools.partial(add, other=1, input=make())
    return held(), held.keywords["input"]


@call
def mapped(make):
    held = [make()]
    return next(map(add, held, [1])), held[0]


@call
def starmapped(make):
    held = [(make(), 1)]
    return next(itertools.starmap(add, held)), held[0][0]


@call
def reduced(make):
    held = [make(), 1]
    return functools.reduce(add, held), held[0]


@call
def accumulated(make):
    held = [make(), 1]
    return list(itertools.accumulate(held, add))[1], held[0]


@call
def method_type(make):
    held = types.MethodType(add, make())
    return held(1), held.__self__


@call
def a_partial_on_the_stack_of_an_outer_call(make):
    """A partial puts its own argument on the caller's stack, just above what the outer call has pushed there."""
    partial = functools.partial(add, make())
    method = types.MethodType(partial, 1)
    return add(method(), 0), partial.args[0]


@call
def a_method_on_the_stack_of_an_outer_call(make):
    held = types.MethodType(add, make())
    method = types.MethodType(held, 1)
    return add(method(), 0), held.__self__


@call
def a_partial_between_outer_calls(make):
    partial = functools.partial(add, make())
    method = types.MethodType(partial, 1)
    return add(add(0.5 * torch.ones(SHAPE), 0) * 0, method()), partial.args[0]


@call
def a_partial_of_keywords_on_the_stack(make):
    partial = functools.partial(add, make())
    method = types.MethodType(functools.partial(partial), 1)
    return add(method(alpha=1), other=0), partial.args[0]


@call
def method_caller(make):
    class Holds:
        op = staticmethod(add)

    args = (make(), 1)
    return operator.methodcaller("op", *args)(Holds()), args[0]


@call
def called_by_operator(make):
    args = (make(), 1)
    return operator.call(add, *args), args[0]


@call
def a_special_method(make):
    class Holds:
        __call__ = add

    args = (make(), 1)
    return Holds()(*args), args[0]


@call
def an_index(make):
    class Holds(list):
        __getitem__ = staticmethod(functools.partial(add, 1.0 * torch.ones(())))

    held = [make()]
    return Holds()[held[0]], held[0]


@call
def a_property(make):
    class Adds:
        increased = property(functools.partial(lambda tensor, self: add(tensor, 1), tensor := make()))

    return Adds().increased, Adds.tensor


@call
def a_cached_op(make):
    held = make()
    return functools.lru_cache(add)(held, 1), held


@call
def a_key_function(make):
    held = [make()]
    results = []

    def key(tensor):
        results.append(add(tensor, 1))
        return 0

    return sorted(held, key=key) and results[0], held[0]


@call
def the_key_function(make):
    held, results = [make()], []
    max(held, key=functools.partial(lambda tensor, *, to: to.append(add(tensor, 1)) or 0, to=results))
    return results[0], held[0]


@call
def a_threads_target(make):
    results = []
    args = (make(), 1)
    thread = threading.Thread(target=lambda *args: results.append(add(*args)), args=args)
    thread.start()
    thread.join()
    return results[0], args[0]


@call
def an_executor(make):
    held = make()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(add, held, 1).result(), held


@call
def a_context_variable(make):
    import contextvars

    args = (make(), 1)
    return contextvars.copy_context().run(add, *args), args[0]


@call
def a_walrus(make):
    return add(held := make(), 1), held


@call
def an_argument_twice(make):
    held = []
    return (lambda tensor: held.append(tensor) or add(tensor, 1))(make()), held[0]


@call
def a_starred_name(make):
    first, *held = 1, make()
    return add(held[0], first), held[0]


@call
def a_comprehension(make):
    held = [make()]
    return [add(tensor, 1) for tensor in held].pop(), held[0]


@call
def a_generator_expression(make):
    held = [make()]
    return next(add(tensor, 1) for tensor in held), held[0]


@call
def a_loop(make):
    for held in (make(),):
        result = add(held, 1)
    return result, held


@call
def a_match(make):
    match [make()]:
        case [held]:
            return add(held, 1), held


@call
def a_with_statement(make):
    with nullcontext(make()) as held:
        return add(held, 1), held


@call
def a_finally(make):
    held = make()
    try:
        return add(held, 1), held
    finally:
        held.sum()


@call
def sent_to_a_generator(make):
    def generate():
        yield add((yield), 1)

    running, held = generate(), make()
    next(running)
    return running.send(held), held


@call
def a_coroutines_argument(make):
    async def later(tensor):
        await asyncio.sleep(0)
        return add(tensor, 1)

    held = make()
    return asyncio.run(later(held)), held


@call
def kept_by_another_argument(make):
    held = []

    def keep():
        held.extend(t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == SHAPE and hasattr(t, "marked"))
        return 1

    def marked():
        tensor = make()
        tensor.marked = True
        return tensor

    return add(marked(), keep()), held[0]


@call
def kept_out_of_a_running_generator(make):
    held = []

    def keep():
        held.extend(t for t in gc.get_referents(running) if type(t) is torch.Tensor)
        return 1

    def generate():
        yield add(make(), keep())

    running = generate()
    result = next(running)
    return result, held[0]


@call
def kept_out_of_a_suspended_generator(make):
    def generate():
        yield add(make(), (yield))

    running = generate()
    next(running)
    held = [t for t in gc.get_referents(running) if type(t) is torch.Tensor]
    return running.send(1), held[0]


@call
def an_autograd_function(make):
    class Adds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return add(tensor, 1)

        @staticmethod
        def backward(ctx, grad):
            return grad

    held = make()
    return Adds.apply(held), held


@call
def recomputed(make):
    held = make()
    return checkpoint(lambda tensor: add(tensor, 1), held, use_reentrant=False), held


@call
def an_operator_of_torch(make):
    args = (make(), 1)
    return torch.ops.safe_inplace.add(*args), args[0]


@call
def a_function_mode(make):
    held = []

    class Keeps(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            held.extend(args[:1] if function is add else ())
            return function(*args, **(kwargs or {}))

    with Keeps():
        return add(make(), 1), held[0]


@call
def a_dispatch_mode(make):
    held = []

    class Keeps(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "safe_inplace" in str(function):
                held.append(args[0])
            return function(*args, **(kwargs or {}))

    with Keeps():
        return add(make(), 1), held[0]


@call
def a_tracer(make):
    held = []
    traced = torch.jit.trace(lambda tensor: add(keep(held, tensor * 1), 1), make())
    held.clear()
    tensor = make()
    return traced(tensor), tensor


@call
def settrace(make):
    held = []

    def trace(frame, event, arg):
        if event == "return" and frame.f_code is make.__code__:
            held.append(arg)
        frame.f_trace_opcodes = True
        return trace

    def function():
        return add(make(), 1)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = function()
    finally:
        sys.settrace(before)
    return result, held[0]


@call
def setprofile(make):
    held = []

    def profile(frame, event, arg):
        if event == "return" and frame.f_code is make.__code__:
            held.append(arg)

    def function():
        return add(make(), 1)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(before)
    return result, held[0]


if hasattr(sys, "monitoring"):

    def monitored(function, answer=None):
        """The interpreter shows a call's first argument before the call and after it."""
        held, events = [], sys.monitoring.events

        def look(code, offset, function, argument):
            if function is add:
                held.append(argument.clone())

        def look_before(*call):
            look(*call)
            return answer

        tool = next(i for i in range(6) if sys.monitoring.get_tool(i) is None)
        sys.monitoring.use_tool_id(tool, "test")
        sys.monitoring.register_callback(tool, events.CALL, look_before)
        sys.monitoring.register_callback(tool, events.C_RETURN, look)
        sys.monitoring.set_local_events(tool, function.__code__, events.CALL)
        sys.monitoring.restart_events()
        try:
            result = function()
        finally:
            sys.monitoring.set_local_events(tool, function.__code__, 0)
            sys.monitoring.free_tool_id(tool)
        assert len(held) == 2
        return result, held[-1]

    @call
    def monitoring(make):
        return monitored(lambda: add(make(), 1))

    @call
    def monitoring_that_is_switched_off_before_the_call(make):
        return monitored(lambda: add(make(), 1), sys.monitoring.DISABLE)

    @call
    def monitoring_of_names_that_is_switched_off_before_the_call(make):
        return monitored(lambda: add(input=make(), other=1), sys.monitoring.DISABLE)


def keep(held, tensor):
    held.append(tensor)
    return tensor


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_what_a_caller_keeps_stays(name):
    value = random_tensor(SHAPE, torch.float32)
    for _ in range(20):  # also when the interpreter has specialized the calls
        result, held = CALLS[name](lambda: value * 2)
        assert gc.is_tracked(held)
        assert_bit_equal(held, value * 2)
        assert_bit_equal(result, value * 2 + 1)


@pytest.mark.parametrize("function", [add, mul])
def test_the_same_temporary_twice(function):
    x = random_tensor(SHAPE, torch.float32)
    with always_fresh():
        expected = function(x * 2, x * 2)
    assert_bit_equal((lambda t: function(t, t))(x * 2), expected)
    assert_bit_equal((lambda t: function(input=t, other=t))(x * 2), expected)
    assert_bit_equal(function(t := x * 2, t), expected)


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.vmap,
        torch.func.functionalize,
        lambda f: torch.func.vmap(torch.func.grad(lambda t: f(t).sum())),
        lambda f: lambda t: torch.func.jvp(f, (t,), (t,))[1],
        lambda f: lambda t: torch.func.jacrev(f)(t),
        lambda f: torch.compile(f, backend="eager"),
    ],
    ids=["vmap", "functionalize", "vmap_grad", "jvp", "jacrev", "compile"],
)
def test_under_transforms(transform, fresh_dynamo):
    x = random_tensor(SHAPE, torch.float64)

    def function(t):
        return mul(add(t * 2, 1), addcmul(t.sin(), t * 3, t.exp()))

    with always_fresh():
        expected = transform(function)(x)
    assert_bit_equal(transform(function)(x), expected)


def test_after_a_graph_break(fresh_dynamo):
    x = random_tensor(SHAPE, torch.float32)

    def broken():
        torch._dynamo.graph_break()
        return 2.0

    def function(x):
        held = x * 2
        return mul(add(held, broken()), add(x * 3, broken())), held

    result, held = torch.compile(function, backend="eager")(x)
    assert_bit_equal(held, x * 2)
    assert_bit_equal(result, (x * 2 + 2) * (x * 3 + 2))


def test_in_forward_mode():
    x, tangent = random_tensor(SHAPE, torch.float64), random_tensor(SHAPE, torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        made = Made(lambda: dual * 2)
        primal, derivative = torch.autograd.forward_ad.unpack_dual(mul(made(), dual))
    assert_bit_equal(primal, x * 2 * x)
    torch.testing.assert_close(derivative, 4 * x * tangent)


# ---- what C or C++ hands to a function that lets go of it


def adds(*arguments):
    """The function has no reference of its own to its first argument when it calls the op: whoever called it still has."""
    held = list(arguments)
    del arguments
    return add(held.pop(0), 1)


HANDED = {
    "map": lambda value: next(map(adds, [value])),
    "reduce": lambda value: functools.reduce(adds, [value, 1]),
    "partial": lambda value: functools.partial(adds, value)(),
    "star": lambda value: adds(*[value]),
    "method": lambda value: types.MethodType(adds, value)(),
    "call": lambda value: operator.call(adds, value),
    "special": lambda value: type("Adds", (), {"__call__": staticmethod(adds)})()(value),
    "send": lambda value: sent(value),
    "thread": lambda value: concurrent.futures.ThreadPoolExecutor(1).submit(adds, value).result(),
    "vmap": lambda value: torch.vmap(adds)(value),
    "checkpoint": lambda value: checkpoint(adds, value, use_reentrant=False),
    "reentrant": lambda value: checkpoint(adds, value, use_reentrant=True),
    "compiled": lambda value: torch.compile(adds, backend="eager")(value),
}


def sent(value):
    def generate():
        yield adds((yield))

    running = generate()
    next(running)
    return running.send(value)


@pytest.mark.parametrize("how", HANDED)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_a_function_was_handed(how, fresh_dynamo):
    value = random_tensor(SHAPE, torch.float32)
    before = value.clone()
    for _ in range(3):
        assert_bit_equal(HANDED[how](value), before + 1)
        assert_bit_equal(value, before)


@pytest.mark.parametrize("where", ["tensor", "prehook", "posthook", "capture", "function"])
def test_what_a_hook_of_a_gradient_was_handed(where):
    """One gradient comes to two operands of a sum, or is the caller's."""

    class Adds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, *gradients):
            held = list(gradients)
            del gradients
            return adds(held.pop())

    a, b = (torch.zeros(SHAPE, requires_grad=True) for _ in range(2))
    hooked = Adds.apply(a) if where == "function" else a * 1
    if where == "tensor":
        hooked.register_hook(adds)
    elif where == "prehook":
        hooked.grad_fn.register_prehook(lambda gradients: (adds(*gradients),))
    elif where == "posthook":
        hooked.grad_fn.register_hook(lambda inputs, outputs: (adds(*inputs), *inputs[1:]))
    elif where == "capture":
        a.register_hook(adds)
    gradient = random_tensor(SHAPE, torch.float32)
    before = gradient.clone()
    (hooked + b).backward(gradient)
    assert_bit_equal(gradient, before)
    assert_bit_equal(b.grad, before)
    assert_bit_equal(a.grad, before + 1)


def test_what_a_hook_of_accumulation_was_handed():
    leaf, results = torch.zeros(SHAPE, requires_grad=True), []
    leaf.register_post_accumulate_grad_hook(lambda leaf: results.append(adds(leaf.grad)))
    leaf.backward(torch.ones(SHAPE))
    assert leaf.grad.eq(1).all()
    assert results[0].eq(2).all()


@pytest.mark.parametrize("trained", ["input", "other"])
def test_what_saved_tensor_hooks_were_handed(trained):
    tensors = {name: random_tensor(SHAPE, torch.float32) for name in ("input", "other")}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors[trained].requires_grad_()
    (saved,) = tensors.keys() - {trained}
    with saved_tensors_hooks(adds, adds):
        result = mul(**tensors)
    result.sum().backward(retain_graph=True)
    first = tensors[trained].grad.clone()
    assert_bit_equal(first, before[saved] + 1 + 1)
    result.sum().backward()
    assert_bit_equal(tensors[trained].grad, first + first)
    for name, tensor in tensors.items():
        assert_bit_equal(tensor.detach(), before[name])


def test_what_a_modules_hook_was_handed():
    module, kept = torch.nn.Linear(6, 6), []
    module.register_forward_hook(lambda module, arguments, output: kept.append(output.detach().clone()))
    module.register_forward_hook(lambda module, arguments, output: adds(output))
    module.register_forward_pre_hook(lambda module, arguments: (adds(*arguments),))
    value = random_tensor(SHAPE, torch.float32)
    before = value.clone()
    result = module(value)
    assert_bit_equal(value, before)
    assert_bit_equal(result.detach(), kept[0] + 1)


# ---- the garbage collector's lists


LARGE = (256, 256)  # the call runs without the interpreter's lock


def marked(tensor):
    tensor.mark = True
    return tensor


def found():
    return [t for t in gc.get_objects(0) if type(t) is torch.Tensor and hasattr(t, "mark")]


def test_no_other_thread_finds_it_in_the_collectors_lists():
    """Whatever a thread finds while calls run has, and keeps, the value that it had."""
    x, stop, times, wrong = torch.ones(LARGE), threading.Event(), 0, []

    def scan():
        nonlocal times
        while not stop.is_set():
            for tensor in found():
                times += 1
                wrong.extend(value for value in tensor.unique().tolist() if value != 2)

    scanner = threading.Thread(target=scan)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    scanner.start()
    taken = 0
    try:
        for _ in range(3000):
            made = Made(lambda: marked(x * 2))
            result = add(made(), 1)
            taken += result.data_ptr() == made.address
            del result
    finally:
        stop.set()
        scanner.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    assert times > 10
    assert taken > 10


@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.view(-1).view(SHAPE)], ids=["itself", "view"])
@pytest.mark.parametrize("first", [False, True])
def test_nobody_finds_it_while_the_arguments_are_dropped(first, view):
    """The last reference to the other argument goes with the call, and runs code when the memory is the result's already."""
    x, seen = random_tensor(SHAPE, torch.float32), []

    class Looks:
        def __del__(self):
            seen.append(found())

    def looking(tensor):
        tensor.looks = Looks()
        return tensor

    made = Made(lambda: view(marked(x * 2)))
    result = add(looking(x[:1] * 3), made()) if first else add(made(), looking(x[:1] * 3))
    assert result.data_ptr() == made.address
    assert seen == [[]]


@pytest.mark.parametrize("first", [False, True])
def test_no_weak_reference_leads_to_it_while_the_arguments_are_dropped(first):
    x, reference, seen = random_tensor(SHAPE, torch.float32), [], []

    class Looks:
        def __del__(self):
            seen.append(reference[0]())

    def looking(tensor):
        tensor.looks = Looks()
        return tensor

    def held(tensor):
        reference.append(weakref.ref(tensor))
        return tensor

    result = add(looking(x[:1] * 3), held(x * 2)) if first else add(held(x * 2), looking(x[:1] * 3))
    (tensor,) = seen
    # From Python 3.14 on the last argument is dropped first.
    still_held = first != (sys.version_info >= (3, 14))
    assert (tensor is not None) is still_held
    if still_held:
        assert_bit_equal(tensor, x * 2)
    assert_bit_equal(result, x[:1] * 3 + x * 2)


class Looks(float):
    """A number that looks around when it goes."""

    def __new__(cls, look):
        number = super().__new__(cls, 1)
        number.look = look
        return number

    def __del__(self):
        self.look()


def first_of_a_generator(make, look):
    def generate():
        yield add(make(), Looks(lambda: look(running)))

    running = generate()
    return next(running)


def first_of_a_generator_expression(make, look):
    running = (add(make(), Looks(lambda: look(running))) for _ in range(1))
    return next(running)


def first_of_an_asynchronous_generator(make, look):
    async def generate():
        yield add(make(), Looks(lambda: look(running)))

    running = generate()
    return asyncio.run(anext(running))


def of_a_coroutine(make, look):
    async def compute():
        return add(make(), Looks(lambda: look(running)))

    running = compute()

    async def wait():
        return await running

    return asyncio.run(wait())


def by_name_in_a_generator(make, look):
    def generate():
        yield add(input=make(), other=Looks(lambda: look(running)))

    running = generate()
    return next(running)


def the_other_way_round_in_a_generator(make, look):
    def looking():
        tensor = torch.ones(())
        tensor.looks = Looks(lambda: look(running))
        return tensor

    def generate():
        yield add(looking(), make())

    running = generate()
    return next(running)


@pytest.mark.parametrize(
    "run",
    [
        first_of_a_generator,
        first_of_a_generator_expression,
        first_of_an_asynchronous_generator,
        of_a_coroutine,
        by_name_in_a_generator,
        the_other_way_round_in_a_generator,
    ],
)
def test_what_a_running_generator_shows_while_arguments_are_dropped_stays(run):
    """Python 3.14 shows its stack during a call, as others do before it."""
    value, looked = random_tensor(SHAPE, torch.float32), []
    for _ in range(20):
        seen = []

        def look(running):
            looked.append(running)
            seen.extend(t for t in gc.get_referents(running) if type(t) is torch.Tensor and t.shape == SHAPE)

        result = run(lambda: value * 2, look)
        for tensor in seen:
            assert_bit_equal(tensor, value * 2)
        assert_bit_equal(result, value * 2 + 1)
    assert len(looked) == 20


def test_no_other_thread_finds_it_on_the_stack_of_a_generator():
    x, stop, times, wrong = torch.ones(LARGE), threading.Event(), 0, []

    def calculate():
        while True:
            yield add(marked(x * 2), 1)

    running = calculate()

    def scan():
        nonlocal times
        while not stop.is_set():
            times += 1
            for tensor in gc.get_referents(running):
                if hasattr(tensor, "mark"):
                    wrong.extend(value for value in tensor.unique().tolist() if value != 2)

    scanner = threading.Thread(target=scan)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    scanner.start()
    try:
        for _ in range(3000):
            next(running)
    finally:
        stop.set()
        scanner.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    assert times > 10


def test_many_threads():
    """Each has its own frames and its own memory."""
    x = random_tensor(LARGE, torch.float32)
    expected = addcmul(mul(x, 3), x, x)

    def work():
        return all(torch.equal(addcmul(mul(x * 1.5, 2), mul(x, 1), x), expected) for _ in range(100))

    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        assert all([task.result() for task in [executor.submit(work) for _ in range(4)]])

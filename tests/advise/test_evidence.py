"""What is seen of a program that runs: who holds an operand, and what an option would have made."""

import ast
import functools
import itertools
import multiprocessing
import os
import re
import sys
import textwrap
import weakref

import numpy
import pytest
import torch
from torch.overrides import TorchFunctionMode

import safe_inplace
from safe_inplace._advise import evidence, forms, steps, watch
from safe_inplace._advise.evidence import SMALLEST, is_plain
from safe_inplace._advise.fresh import is_fresh
from safe_inplace._advise.instrument import CALLEE, OPERAND, PROBE
from safe_inplace._advise.source import Source

from ..checks import Memory
from ..programs.advised import advice_of

SHAPE = (128, 128)
assert torch.empty(SHAPE).nbytes == SMALLEST


def advised(body, *, calls=2, arguments=None, **names):
    """The code that is advised for the function of that body, after some calls."""
    text = f"import torch\ndef function(a, w, kept):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
    given = {"torch": torch, "weakref": weakref, "functools": functools, "turn": itertools.cycle([0, 1]), **names}

    def call(function):
        for _ in range(calls):
            function(*(arguments or (torch.rand(SHAPE, requires_grad=True), torch.rand(128, requires_grad=True), [])))

    advice = advice_of(text, call, given)
    return [
        file.source.code(change.site, {change.site.index: change.option}).replace("safe_inplace.", "")
        for file in advice.files
        for change in sorted(file.changes, key=lambda change: change.site.position)
    ]


WRITTEN = {
    "a variable": "h = a - w\nreturn h + 1",
    "a variable that is bound anew": "h = a - w\nh = h + 1\nreturn h",
    "after a write": "h = a - w\nh += 1\nreturn h + 1",
    "made by a function": "h = torch.nn.functional.gelu(a)\nreturn h + 1",
    "made by a method": "h = a.sin()\nreturn h + 1",
    "made by a module": "h = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(128, 128))(a)\nreturn h + 1",
    "made by one of two": "h = a.sin() if next(turn) else -a\nreturn h + 1",
    "in a loop": "h = a - w\nfor _ in range(3):\n    h = h + 1\nreturn h",
    "without a record": "with torch.no_grad():\n    h = a - w\n    return h + 1",
    "of inference": "with torch.inference_mode():\n    h = a - w\n    return h + 1",
    "what backward has no use for": "h = a - w\ng = h.sin().detach() - w\nreturn g + 1",
}


@pytest.mark.parametrize("body", WRITTEN.values(), ids=WRITTEN)
def test_a_variable_is_written(body):
    assert any(re.fullmatch(r"add_\([hg], 1\)", code) for code in advised(body))


HELD = {
    "by a list": "h = a - w\nkept.append(h)\nreturn h + 1",
    "by another name": "h = a - w\ng = h\nr = h + 1\nreturn r, g",
    "by a view": "h = a - w\ng = h.view(-1)\nr = h + 1\nreturn r, g",
    "by a part": "h = a - w\nkept.append(h[0])\nreturn h + 1",
    "by its base": "g = a - w\nh = g.view(128, 128)\nr = h + 1\nreturn r, g",
    "by an alias": "h = a - w\nkept.append(h.detach())\nreturn h + 1",
    "by .data": "h = a - w\nkept.append(h.data)\nreturn h + 1",
    "by NumPy": "h = a.detach() - w.detach()\nkept.append(h.numpy())\nreturn h + 1",
    "by its memory": "h = a - w\nkept.append(h.untyped_storage())\nreturn h + 1",
    "weakly": "h = a - w\nkept.append(weakref.ref(h))\nreturn h + 1",
    "by a closure": "h = a - w\nkept.append(lambda: h)\nreturn h + 1",
    "by a default": "h = a - w\nkept.append(lambda h=h: h)\nreturn h + 1",
    "by a partial": "h = a - w\nkept.append(functools.partial(print, h))\nreturn h + 1",
    "by an attribute": "h = a - w\nfunction.held = h\nreturn h + 1",
    "by a mark": "h = a - w\nh.mark = 1\nreturn h + 1",
    "by a hook": "h = a - w\nh.register_hook(print)\nreturn h + 1",
    "by its gradient": "h = a - w\nh.retain_grad()\nreturn h + 1",
    "by backward, as a result": "h = (a - w).exp()\nreturn h + 1",
    "by backward, as an operand": "h = a - w\nkept.append(h.sin())\nreturn h + 1",
    "by the same sum": "h = a - w\nreturn h * w",
    "by the caller": "return a + 1",
    "by what is read later": "h = a - w\nr = h + 1\nreturn r * h.mean()",
    "a leaf": "h = torch.rand(128, 128, requires_grad=True)\nreturn h + 1",
    "from NumPy": "h = torch.from_numpy(a.detach().numpy())\nreturn h + 1",
    "expanded": "h = a.detach()[0].clone().expand(128, 128)\nreturn h + 1",
    "a part of its memory": "h = (a - w)[:64]\nh = torch.cat([h, h])[:64]\nreturn h + 1",
    "of another shape": "h = w - 1\nreturn h + a",
    "of another layout": "h = (a - w).t()\nreturn a + h",
    "of another dtype": "h = (a - w).to(torch.bfloat16)\nreturn h + a",
}


@pytest.mark.parametrize("body", HELD.values(), ids=HELD)
def test_what_is_held_is_not_written(body):
    assert [code for code in advised(body) if code.startswith(("add_(h", "mul_(h"))] == []


class Own(torch.Tensor):
    pass


UNSURE = {
    "an argument": "return a + 1",
    "an argument in another call": "if next(turn):\n    a = a - w\nreturn a + 1",
    "an item": "h = [a - w][0]\nreturn h + 1",
    "unpacked": "h, g = a - w, a * w\nreturn h + g.mean()",
    "of a loop": "for h in (a * t for t in [1, 2]):\n    g = h + 1",
    "of two names": "h = g = a - w\ndel g\nreturn h + 1",
    "bound in an expression": "if (h := a - w) is not None:\n    return h + 1",
    "from a module that may return its argument": "h = torch.nn.Dropout()(a)\nreturn h + 1",
    "from one that writes in place": "h = torch.nn.ReLU(inplace=True)(a - w)\nreturn h + 1",
    "from one with a hook": "m = torch.nn.Linear(128, 128)\nm.register_forward_hook(lambda *a: None)\nh = m(a)\nreturn h + 1",
    "from one with another forward": "m = torch.nn.Linear(128, 128)\nm.forward = torch.sin\nh = m(a)\nreturn h + 1",
    "from a sequence that may": "h = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Dropout())(a)\nreturn h + 1",
    "from a method that may": "h = (a - w).contiguous()\nreturn h + 1",
    "from a function that may": "h = torch.nn.functional.dropout(a, 0.5)\nreturn h + 1",
    "from a function with out=": "h = torch.sin(a.detach(), out=torch.empty(128, 128))\nreturn h + 1",
    "from somebody's function": "h = (lambda t: t - w)(a)\nreturn h + 1",
    "from one of two": "h = a.sin() if next(turn) else (a - w).contiguous()\nreturn h + 1",
    "from a call that was not seen": "h = a.sin()\nif len(kept) > 5:\n    h = a.cos()\nreturn h + 1",
    "from an operator of the program's own": "h = a @ own\nreturn h + 1",
    "from a sign of the program's own": "h = -own\nreturn h + 1",
    "from another operator": "h = a.bool() | a.bool()\nreturn h + 1",
    "after an assignment of the program's own": "h = a - w\nh += own\nreturn h + 1",
    "after another assignment": "h = a - w\nh @= own\nreturn h + 1",
    "from a module that is another with other arguments": "h = given(a)\nreturn h + 1",
    "from a function that is another with other arguments": "sin = torch.sin\nh = sin(a)\nreturn h + 1",
    "read by another name": "h = a - w\ng = h\ndel g\nreturn h + 1",
    "read by somebody's function": "h = a - w\nstr(h)\nreturn h + 1",
    "read by a module that may keep it": "h = a - w\ng = torch.nn.Dropout()(h).sum()\nreturn h + 1",
    "read by an operator of the program's own": "h = a - w\ng = h * own\nreturn h + 1",
    "of another dtype, maybe": "h = a - w\ng = h.double()\nr = h + 1\nreturn r, g",
    "read on one way": "h = a - w\nif len(kept) > 5:\n    kept.append(h)\nreturn h + 1",
    "read in a loop": "h = a - w\nfor _ in range(len(kept)):\n    kept.append(h)\nreturn h + 1",
    "from a forward that somebody changed": "h = changed(a)\nreturn h + 1",
    "from a method of a subclass": "h = a.detach().as_subclass(Own).sin().as_subclass(torch.Tensor)\nreturn h + 1",
}


@pytest.mark.parametrize("body", UNSURE.values(), ids=UNSURE)
def test_what_may_have_been_there_before_is_not_written(body, monkeypatch):
    """Though nobody else had it in the calls that were seen."""

    class Operator:
        def __rmatmul__(self, other):
            return other * 1

        def __neg__(self):
            return torch.rand(SHAPE)

        __radd__ = __rmul__ = __rmatmul__

    changed = torch.nn.Linear(128, 128)
    monkeypatch.setattr(torch.nn.Linear, "forward", torch.nn.Linear.forward if "changed" not in body else lambda m, x: x * 1)
    codes = advised(body, Own=Own, own=Operator(), changed=changed, given=torch.nn.Linear(128, 128))
    assert [code for code in codes if code.startswith(("add_(h", "add_(a"))] == []


def test_who_is_not_trusted_any_more(monkeypatch):
    """Functions of torch that somebody has put others in the place of, hooks on all modules, and modes."""
    linear, norm = torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)
    assert all(map(is_fresh, (torch.sin, torch.rand(2).sin, linear, norm, torch.nn.functional.softmax)))
    with monkeypatch.context() as patched:
        softmax = torch.nn.functional.softmax
        patched.setattr(torch.nn.functional, "softmax", lambda *args: args[0])
        assert not is_fresh(torch.nn.functional.softmax) and is_fresh(softmax) and not is_fresh(norm)
    with TorchFunctionMode():
        assert not is_fresh(torch.sin)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_fresh(linear)
    hook.remove()
    with steps.counted():
        assert is_fresh(linear)


def test_what_the_program_calls_is_not_asked():
    """Objects that answer anything, or raise."""

    class Proxy:
        __class__ = property(lambda self: 1 / 0)
        __hash__ = None

        def __eq__(self, other):
            raise KeyError

    class Unfinished(torch.nn.Module):
        def __init__(self):
            pass

        def __getattr__(self, name):
            raise KeyError(name)

    class Kind(type):
        def __eq__(self, other):
            raise KeyError

    class OfThatKind(metaclass=Kind):
        pass

    assert not any(map(is_fresh, (Proxy(), Unfinished(), OfThatKind(), functools.partial(torch.sin), torch.Tensor.sin, len)))
    assert not is_plain(OfThatKind())


class Weight(torch.nn.Parameter):
    pass


def changed_module(change):
    module = torch.nn.Conv1d(2, 2, 1)
    change(module)
    return module


MODULES = {
    "a weight of its own kind": lambda: changed_module(lambda m: setattr(m, "weight", Weight(m.weight.detach()))),
    "a method of the instance": lambda: changed_module(lambda m: setattr(m, "_conv_forward", lambda x, *_: x)),
    "a hook before": lambda: changed_module(lambda m: m.register_forward_pre_hook(lambda *_: None)),
    "compiled": lambda: changed_module(lambda m: m.compile(backend="eager")),
    "an empty sequence": torch.nn.Sequential,
    "a sequence that begins with another": lambda: torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2)),
    "a sequence that ends with another": lambda: torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout()),
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_modules_that_are_not_trusted(module):
    assert not is_fresh(module()) and is_fresh(torch.nn.Conv1d(2, 2, 1))


@pytest.mark.parametrize("name", ["_call_impl", "__call__"])
def test_a_call_that_somebody_changed(name, monkeypatch):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert is_fresh(module)
    monkeypatch.setattr(torch.nn.Module, name, lambda module, x: x)
    assert not is_fresh(module)


def test_a_sequence_with_another_forward(monkeypatch):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    monkeypatch.setattr(torch.nn.Sequential, "forward", lambda module, x: x)
    assert not is_fresh(module)


FORBIDDEN = {
    "a result without a history": "h = a - w\nwith torch.no_grad():\n    return h + 1",
    "of inference, outside": "with torch.inference_mode():\n    h = a - w\nreturn h + 1",
    "inference of what is recorded": "h = a - w\nwith torch.inference_mode():\n    return h + 1",
}


@pytest.mark.parametrize("body", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_would_be_another_kind_of_tensor(body):
    assert [code for code in advised(body) if code.startswith("add_(h")] == []


def test_the_layout_of_the_result():
    """Where the two operators lay it out otherwise than the op would."""
    body = "return kept[0] * (a + w)"
    transposed, column, row = torch.rand(128, 128).t(), torch.rand(128, 1), torch.rand(1, 128)
    assert (transposed * (column + row)).stride() != safe_inplace.add_mul(column, row, transposed).stride()
    assert advised(body, arguments=(column, row, [transposed])) == []
    assert advised("return kept[0] * a + w", arguments=(transposed, row, [transposed])) == ["mul_add(kept[0], a, w)"]


def test_a_file_that_is_loaded_twice():
    """What one of them forbids is forbidden."""
    text = "def function(x):\n    h = x * 1\n    keep(h)\n    return h + 1\n"
    watch.forget()
    for keep in ([].append, str):
        names = {"keep": keep, PROBE: watch.probe, CALLEE: watch.callee, OPERAND: watch.operand}
        exec(compile(watch.watch(Source(text.encode(), "program.py")), "program.py", "exec"), names)
        for _ in range(2):
            names["function"](torch.rand(SHAPE))
    _, total = watch.found()["seen"]
    assert total["calls"] == 4 and [option.op for option in Source(text.encode(), "").sites[1].options] == ["add", "add_", "add"]
    assert total["gained"] == {}


def test_a_file_that_changes_is_left_alone():
    watch.forget()
    for text in (b"r = x + y\n", b"r = y + x\n"):
        tree = watch.watch(Source(text, "program.py"))
    assert "probe" not in ast.unparse(tree)
    found = watch.found()
    assert found["seen"] == [] and found["left alone"] == [os.path.realpath("program.py")]


def test_a_site_within_its_own_judgement(monkeypatch):
    """A handler of a signal, or a finalizer, may run the program's code where the lock is held."""

    def interrupted(*arguments):
        if next(running, False):
            function(torch.rand(SHAPE), torch.rand(128), [])
        return judged(*arguments)

    judged, running = evidence._is_possible, iter([True])
    monkeypatch.setattr(evidence, "_is_possible", interrupted)
    text = "import torch\ndef function(a, w, kept):\n    h = a.sin()\n    return h + 1\n"

    def call(watched):
        nonlocal function
        function = watched
        for _ in range(4):
            function(torch.rand(SHAPE), torch.rand(128), [])

    function = None
    advice = advice_of(text, call, {"torch": torch})
    assert advice.changes == [] and advice.against == {"it also ran within itself": 1}


def test_once_held_is_held():
    def keep():
        return kept.append(sys._getframe(1).f_locals["h"]) if next(turns) else None

    kept = []
    for held in (False, True):
        turns = iter([False, False, held, False, False])
        assert advised("h = a - w\nkeep()\nreturn h + 1", calls=5, keep=keep) == ([] if held else ["add_(h, 1)"])


def test_seen_once_is_no_evidence():
    assert advised("h = a - w\nreturn h + 1", calls=1) == []


def test_small_results():
    assert advised("h = a[:127] - w\nreturn h + 1") == []


@pytest.mark.parametrize(
    "body, expected",
    [
        ("return torch.relu(a) + w", []),  # backward has the result of relu
        ("return torch.sin(a) + w", ["add(torch.sin(a), w)"]),
        ("return w + torch.sin(a)", ["add(w, torch.sin(a))"]),
        ("return 1 + torch.sin(a)", ["add(torch.sin(a), 1)"]),
        ("return torch.sin(a) * w", []),  # it is what the gradient of w needs
        ("return torch.sin(a) * w.detach()", ["mul(torch.sin(a), w.detach())"]),
        ("return a * w + 1", ["mul_add(a, w, 1)"]),
        ("return w * 2 + a", []),  # the product is of one row
        ("h = a - w\nreturn h * w + 1", ["mul_add(h, w, 1)"]),
        ("h = a - w\nreturn h * 2 + 1", ["mul_add_(h, 2, 1)"]),
        ("h = a - w\nreturn a + h * 2", ["mul_add_(h, 2, a)"]),
        ("h = a - w\nreturn h - a * w", ["addcmul_(h, a, w, value=-1)"]),
        ("h = a - w\nreturn (h + a) * 0.5", ["add_mul_(h, a, 0.5)"]),
    ],
)
def test_what_is_advised(body, expected):
    assert [code for code in advised(body) if not code.startswith("add(a")] == expected


def transformed(transform):
    def run(function):
        for _ in range(2):
            transform(lambda a: function(a, a.mean(0), []))(torch.rand(2, *SHAPE))

    return run


def test_modes_see_what_the_program_does():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    def call(function):
        with Mode():
            function(torch.rand(SHAPE), torch.rand(128), [])

    seen = []
    advice_of("def function(a, w, kept):\n    return a * w + 1\n", call)
    assert seen[-2:] == ["mul", "add"] and len([name for name in seen if name in ("mul", "add", "__get__", "stride")]) == 2
    del seen[:]
    advice_of("def function(a, w, kept):\n    h = a * w\n    h += w\n    return h + 1\n", call)  # and what is shown
    assert seen[-3:] == ["mul", "add_", "add"] and "__get__" not in seen


@pytest.mark.parametrize(
    "transform",
    [torch.vmap, lambda f: torch.func.grad(lambda a: f(a[0]).sum()), lambda f: lambda a: torch.func.jvp(f, (a[0],), (a[1],))],
    ids=["vmap", "grad", "jvp"],
)
def test_under_transforms_nothing_is_advised(transform):
    advice = advice_of("def function(a, w, kept):\n    h = a - w\n    return h * 2 + 1\n", transformed(transform))
    assert advice.changes == []


def test_what_is_compiled_is_not_looked_into(fresh_dynamo):
    def call(function):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(torch.ones(SHAPE), torch.ones(128), []), torch.ones(SHAPE))

    assert advice_of("def function(a, w, kept):\n    h = a - w\n    return h * 2 + 1\n", call).sites == 0


def test_what_also_runs_where_it_is_not_watched(fresh_dynamo):
    """Compiled, traced, or in a forked process."""

    def compiled(function):
        torch.compile(lambda a: function(a, 1, []), backend="eager")(torch.ones(SHAPE))

    def traced(function):
        torch.jit.trace(lambda a: function(a, 1, []), torch.ones(SHAPE), check_trace=False)

    def forked(function):
        process = multiprocessing.get_context("fork").Process(target=function, args=(torch.ones(SHAPE), 1, []))
        process.start()
        process.join()

    for elsewhere in (None, compiled, traced, forked):

        def call(function, elsewhere=elsewhere):
            for _ in range(2):
                function(torch.ones(SHAPE), 1, [])
            if elsewhere is not None:
                elsewhere(function)

        advice = advice_of("def function(a, w, kept):\n    h = a - w\n    return h * 2 + 1\n", call)
        assert bool(advice.changes) is (elsewhere is None), elsewhere


OTHERS = {
    "whole numbers": lambda: (torch.ones(SHAPE, dtype=torch.int64), 1),
    "truth values": lambda: (torch.ones(SHAPE, dtype=torch.bool),) * 2,
    "two dtypes": lambda: (torch.ones(SHAPE), torch.ones(128, dtype=torch.float64)),
    "a number of NumPy's": lambda: (torch.ones(SHAPE), numpy.float32(2)),
    "sparse": lambda: (torch.ones(SHAPE).to_sparse(),) * 2,
    "of MKLDNN": lambda: (torch.ones(SHAPE).to_mkldnn(),) * 2,
    "nested": lambda: (torch.nested.nested_tensor([torch.ones(SHAPE)]),) * 2,
    "a subclass": lambda: (torch.ones(SHAPE).as_subclass(Own), 1),
    "numbers": lambda: (3, 4),
    "text": lambda: ("a", "b"),
}


@pytest.mark.parametrize("made", OTHERS.values(), ids=OTHERS)
def test_of_others_nothing_is_advised(made):
    arguments = made()
    body = "h = a + w\nreturn (h + w) + h" if isinstance(arguments[0], str) else "return a * w + a"
    assert advised(body, arguments=(*arguments, [])) == []


def test_a_line_of_tensors_and_numbers():
    calls = iter([torch.rand(SHAPE), torch.rand(SHAPE), 3])
    assert advised("t = next(kept)\nreturn t * 2 + 1", calls=3, arguments=(None, None, calls)) == []


FORMS = [each for each in vars(forms).values() if isinstance(each, forms.Form)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_an_option_makes(form):
    """As many values of the size of the result as is said, whoever needs a gradient, and whichever operand is a temporary."""
    places = range(len((form.options + form.moved)[0].order))
    for option, trained in itertools.product(form.options + form.moved, itertools.product([False, True], repeat=len(places))):
        tensors = [i for i in places if i != option.negated]
        for temporary in tensors if option.writes is None else [None]:
            values = [torch.rand(SHAPE, requires_grad=needs) * 1 if i in tensors else 1.5 for i, needs in enumerate(trained)]
            expected = option.keeps(values) + (option.writes is None and option.needs(temporary, values))
            codes = ["temporary.pop()" if i == temporary else f"values[{i}]" if i in tensors else "1.5" for i in places]
            names = {"safe_inplace": safe_inplace, "values": values, "temporary": []}
            if temporary is not None:
                names["temporary"].append(values[temporary])
                values[temporary] = None
            with Memory() as memory:
                eval(option.code(codes), names)
            assert len(memory.allocations(at_least=SMALLEST)) == expected, (option, trained, temporary)

"""The sums and products of a source file, and the file with our ops in their place."""

import ast
import textwrap

import pytest

from safe_inplace._advise.flow import Flow, codes_in
from safe_inplace._advise.source import Source

# An expression, and the code of all that may stand for it. Each name is read again, but for `x`.
FOUND = {
    "x + y": ["add(x, y)", "add_(x, y)", "add(y, x)"],
    "y + x": ["add(y, x)", "add(x, y)", "add_(x, y)"],
    "x - y": ["add(x, y, alpha=-1)", "add_(x, y, alpha=-1)"],
    "x - 2": ["add(x, -2)", "add_(x, -2)"],
    "x - -2": ["add(x, 2)", "add_(x, 2)"],
    "y - x": ["add(y, x, alpha=-1)"],
    "x * y": ["mul(x, y)", "mul_(x, y)", "mul(y, x)"],
    "2 * x": ["mul(2, x)", "mul(x, 2)", "mul_(x, 2)"],
    "-2.5 * f(x)": ["mul(-2.5, f(x))", "mul(f(x), -2.5)"],
    "f(x) * y": ["mul(f(x), y)"],
    "x * y + z": ["mul_add(x, y, z)", "mul_add_(x, y, z)", "mul_add(y, x, z)"],
    "y * z + x": ["mul_add(y, z, x)", "mul_add(z, y, x)", "addcmul_(x, y, z)"],
    "x * f(y) + z": ["mul_add(x, f(y), z)", "mul_add_(x, f(y), z)"],
    # f would run before the product, and may write to what that reads.
    "x * y + f(z)": ["add(mul(x, y), f(z))", "mul_(x, y)", "mul(y, x)"],
    "z + x * y": ["addcmul(z, x, y)", "mul_add(x, y, z)", "mul_add_(x, y, z)"],
    "f(z) + g(x) * h(y)": ["addcmul(f(z), g(x), h(y))"],
    "x - y * z": ["addcmul(x, y, z, value=-1)", "addcmul_(x, y, z, value=-1)"],
    "x * y - 2": ["mul_add(x, y, -2)", "mul_add_(x, y, -2)", "mul_add(y, x, -2)"],
    "x * y - 0.0": ["mul(x, y)", "mul_(x, y)", "mul(y, x)"],
    "2 * x - -1.5": ["mul_add(2, x, 1.5)", "mul_add(x, 2, 1.5)", "mul_add_(x, 2, 1.5)"],
    "x * y - z": ["add(mul(x, y), z, alpha=-1)", "mul_(x, y)", "mul(y, x)"],
    "(x + y) * z": ["add_mul(x, y, z)", "add_mul_(x, y, z)", "add_mul(y, x, z)"],
    "(x + y) * f(z)": ["mul(add(x, y), f(z))", "add_(x, y)", "add(y, x)"],
    "z * (x + y)": ["add_mul(x, y, z)", "add_mul_(x, y, z)", "add_mul(y, x, z)"],
    "f(z) * (x + y)": ["mul(f(z), add(x, y))", "add_(x, y)", "add(y, x)"],
    "self.g * (x + 1)": ["add_mul(x, 1, self.g)", "add_mul_(x, 1, self.g)", "add_mul(1, x, self.g)"],
    "x * x": ["mul(x, x)"],
    "y[0] * x": ["mul(y[0], x)"],
    "x / y + z": ["add(x / y, z)"],
    "(x * y + z) * f(y)": ["mul(mul_add(x, y, z), f(y))", "mul_add_(x, y, z)", "mul_add(y, x, z)"],
}


def options_of(expression):
    text = f"def function(self, y, z):\n    x = f()\n    r = {expression}\n    return r, y, z\n"
    source = Source(text.encode(), "program.py")
    codes = []
    for number, site in enumerate(source.sites):
        rest = {other.index: other.options[0] for other in source.sites if other is not site}
        codes += [source.code(site, {site.index: option, **rest}) for option in site.options[number > 0 :]]
    return [code.replace("safe_inplace.", "") for code in codes]


@pytest.mark.parametrize("expression", FOUND)
def test_options(expression):
    assert list(dict.fromkeys(options_of(expression))) == FOUND[expression]


NOT_FOUND = [
    "1 + 2 * 3",
    "'a' + x",
    "'%s' * x",
    "f'{x + y}'",
    "x @ y",
    "x / y",
    "x - 0",
    "(x := y) + z",
    "(yield x) + y",
    "[*x] and (x if y else z)",
    "(x  # kept\n    + y)",
    "x \\\n    + y",
]


@pytest.mark.parametrize("expression", NOT_FOUND)
def test_left_alone(expression):
    assert options_of(expression) == []


@pytest.mark.parametrize(
    "text",
    [
        b"# coding: latin-1\nr = x + y  # \xe9\n",
        b"\xef\xbb\xbfr = x + y\n",
        b"r = x + y\r\n",
        b"\fr = x + y\n",
        b"import numpy as safe_inplace\nr = x + y\n",
        b"safe_inplace = x + y\n",
        b"def f(x, safe_inplace): return x + safe_inplace\n",
        b"def safe_inplace(): return x + y\n",
        b"from safe_inplace import add as safe_inplace\nr = x + y\n",
        b"def f():\n    import safe_inplace\n    return x + y\n",
        b"import safe_inplace\nr = x + y\ndel safe_inplace\n",
        b"try:\n    r = x + y\nexcept KeyError as safe_inplace:\n    pass\n",
    ],
)
def test_files_left_alone(text):
    source = Source(text, "program.py")
    assert source.sites == [] and source.left_alone


@pytest.mark.parametrize("text", [b"", b"# no\n", b"'doc'\n", b"safe_inplace = 1 + 2\n", b"from __future__ import division\n"])
def test_where_nothing_is_found_nothing_is_left_alone(text):
    source = Source(text, "program.py")
    assert source.sites == [] and not source.left_alone


def test_patterns_are_no_expressions():
    text = b"match x:\n    case 1 + 2j:\n        r = x + y\n"
    assert [site.position[0] for site in Source(text, "program.py").sites] == [3]


def test_the_rest_of_the_text_stays():
    text = textwrap.dedent(
        '''
        """Of é."""
        from __future__ import annotations
        # before the imports

        import math

        def function(ü: "a + b", y):
        \tz = {"é": (ü * 2
        \t\t+ y)}  # é
        \treturn z["é"] + (ü
        \t\t* y), "ü + y"
        '''
    ).encode()
    source = Source(text, "program.py")
    changed = source.final({site.index: site.options[0] for site in source.sites})
    expected = (
        text.replace("(ü * 2\n\t\t+ y)}".encode(), "(safe_inplace.mul_add(ü, 2, y))}".encode())
        .replace('z["é"] + (ü\n\t\t* y)'.encode(), 'safe_inplace.addcmul(z["é"], ü, y)'.encode())
        .replace(b"import math", b"import safe_inplace\nimport math")
    )
    assert changed == expected
    ast.parse(changed)


def final(text):
    source = Source(text.encode(), "program.py")
    return source.final({site.index: site.options[0] for site in source.sites}).decode()


@pytest.mark.parametrize(
    "before, after",
    [
        ("r = x + y", "import safe_inplace\nr = safe_inplace.add(x, y)"),
        ("import safe_inplace\nr = x + y\n", "import safe_inplace\nr = safe_inplace.add(x, y)\n"),
        ("import os, safe_inplace.nn\nr = x + y\n", "import os, safe_inplace.nn\nr = x + y\n"),
        ("import safe_inplace as si\nr = x + y", "import safe_inplace\nimport safe_inplace as si\nr = safe_inplace.add(x, y)"),
        ("r = x + y\nimport safe_inplace", "import safe_inplace\nr = safe_inplace.add(x, y)\nimport safe_inplace"),
        ("if 1: import safe_inplace\nr = x + y", "import safe_inplace\nif 1: import safe_inplace\nr = safe_inplace.add(x, y)"),
        ("'doc'\n@f\ndef g(): return x + y", "'doc'\nimport safe_inplace\n@f\ndef g(): return safe_inplace.add(x, y)"),
        ("a.b = 1\nimport torch\nr = x + y", "a.b = 1\nimport safe_inplace\nimport torch\nr = safe_inplace.add(x, y)"),
        ("a = 1\nfrom torch.nn import f\nx + y", "a = 1\nimport safe_inplace\nfrom torch.nn import f\nsafe_inplace.add(x, y)"),
        ("r = x + y\nimport torch", "import safe_inplace\nr = safe_inplace.add(x, y)\nimport torch"),
        ("import os; import torch\nr = x + y", "import safe_inplace\nimport os; import torch\nr = safe_inplace.add(x, y)"),
        ("from .torch import f\nr = x + y", "import safe_inplace\nfrom .torch import f\nr = safe_inplace.add(x, y)"),
        # No line of its own is free for it.
        ("from __future__ import annotations; r = x + y", None),
        ("'''doc\nument'''; r = x + y", None),
        # Tokens that only a parenthesis or a sign tells apart.
        ("def f(): return(x) * y", "import safe_inplace\ndef f(): return safe_inplace.mul(x, y)"),
        ("r = 0 if z else-x + y", "import safe_inplace\nr = 0 if z else safe_inplace.add(-x, y)"),
        ("r = z and(x + y).sum()", "import safe_inplace\nr = z and safe_inplace.add(x, y).sum()"),
        ("r = (x + y)[0] / (x * y)", "import safe_inplace\nr = safe_inplace.add(x, y)[0] / (safe_inplace.mul(x, y))"),
        ("r = f(x + y)", "import safe_inplace\nr = f(safe_inplace.add(x, y))"),
    ],
)
def test_the_new_file(before, after):
    if after is None:
        assert Source(before.encode(), "program.py").left_alone
    else:
        if "nn" in before:
            after = after.replace("x + y", "safe_inplace.add(x, y)").replace("import os", "import safe_inplace\nimport os")
        assert final(before) == after
        ast.parse(after)


def test_of_a_class_only_its_functions():
    text = """
    @f(x + 1)
    class C(x + 2):
        a = x + 3
        if a:
            @f(x + 4)
            def g(self, y=x + 5):
                return x + 10
        b = [x + 6 for x in a], lambda y=x + 7: x + 11
        class D:
            a = x + 8
            async def h(self):
                class E:
                    a = x + 9
                    g = lambda self: x + 12
    """
    source = Source(textwrap.dedent(text).encode(), "program.py")
    assert sorted(source.text_of(site.operands[1]) for site in source.sites) == ["10", "11", "12"]


def test_annotations_stay():
    text = b"def f(a: x + 1, *b: x + 1, c: x + 1 = x * 2) -> x + 1:\n    d: x + 1\n    e: x + 1 = x * 2\n"
    assert [site.form.name for site in Source(text, "program.py").sites] == ["a * b", "a * b"]


# Functions in which x is read by `x + 1` alone, and those in which more comes.
DEAD = [
    "return x + 1",
    "x = x + 1\nreturn x",
    "y = x + 1\nx = 2\nreturn x, y",
    "y = x + 1\ndel x\nreturn y",
    "for i in range(3):\n    x = x + 1\nreturn x",
    "while y:\n    x = f()\n    y = x + 1\nreturn y",
    "if y:\n    z = x + 1\nelse:\n    z = x\nreturn z",
    "try:\n    y = x + 1\nexcept ValueError:\n    y = 2\nreturn y",
    "try:\n    return x + 1\nfinally:\n    f()",
    "try:\n    f()\nfinally:\n    y = x + 1\nreturn y",
    "with f():\n    y = x + 1\nreturn y",
    "match y:\n    case 1:\n        return x + 1\n    case _:\n        return x",
    "yield x + 1\nyield 2",
    "return [t for t in [x + 1]]",
    "return x + 1 if y else x",
    "y, x = x + 1, f()\nreturn x, y",
    "y = f(z=x + 1)\nreturn y",
]
READ = [
    "y = x + 1\nreturn x, y",
    "y = x + 1\nreturn f(lambda: x)",
    "y = x + 1\nx += 1\nreturn x",
    "y = (x + 1) * x\nreturn y",
    "for i in range(3):\n    y = x + 1\nreturn y",
    "while f():\n    if y:\n        x = f()\n    y = x + 1\nreturn y",
    "y = x + 1\nif y:\n    x = 3\nreturn x",
    "try:\n    y = x + 1\n    f()\nexcept ValueError:\n    return x\nreturn y",
    "try:\n    y = x + 1\n    x = f()\nfinally:\n    g(x)\nreturn y",
    "try:\n    return x + 1\nfinally:\n    f(x)",
    "try:\n    f()\nfinally:\n    y = x + 1\n    g(x)\nreturn y",
    "with f():\n    y = x + 1\nreturn x",
    "y = x + 1\nreturn locals()",
    "y = x + 1\nreturn eval('x')",
    "y = x + 1\nimport sys\nreturn sys._getframe().f_locals",
    "y = x + 1\nreturn [x for _ in y]",
    "y = x + 1\nreturn [x for x in y], x",
    "y = x + 1\ndef g():\n    nonlocal x\n    x = 2\nreturn g, y",
    "y = x + 1\nclass C:\n    z = x\nreturn C",
    "y = x + 1\nmatch y:\n    case 1 if x:\n        return 2",
    "y = x + 1\nyield y\nyield x",
    "try:\n    y = x + 1\n    raise f()\nexcept* ValueError:\n    g(x)\nreturn y",
    "y = x + 1\nz = y\nwhile z:\n    z = x\nreturn y",
    "async for t in f():\n    y = x + 1\nreturn y",
]


def is_dead(body):
    text = f"async def function(x, y=None):\n{textwrap.indent(body, '    ')}\n" if "async" in body else None
    text = text or f"def function(x, y=None):\n{textwrap.indent(body, '    ')}\n"
    found = []
    for code in codes_in(compile(text, "program.py", "exec")):
        flow = Flow(code)
        for (line, _, column, end), index in flow.operators():
            if text.splitlines()[line - 1][column:end] == "x + 1":
                found.append(flow.is_dead("x", index))
    return found


@pytest.mark.parametrize("body", DEAD)
def test_dead(body):
    assert set(is_dead(body)) == {True}


@pytest.mark.parametrize("body", READ)
def test_read_again(body):
    assert False in is_dead(body)


# What is done with x before `x + 1`, by who keeps nothing of it whatever way the program takes, and by who may.
NOT_KEPT = [
    "y = x.shape",
    "y = x.T.sum()",
    "y = x.sin()",
    "y = x.view(-1).sum(dim=0)",
    "y = x[0, :2].float().mean()",
    "x.relu_()",
    "x.detach().mul_(y)",
    "y = x * y",
    "y = -x",
    "y = -(x + y) / 2",
    "y = x.reshape(-1) @ y",
    "x += y",
    "y = x is None or not x",
    "y = x < 0",
    "y = torch.sin(x)",
    "y = torch.clamp(input=x, min=0)",
    "y = self.norm(x)",
    "if x.isnan().any():\n    raise ValueError(x.shape)",
    "while x is None:\n    y = 3",
    "assert x.ndim == 2, f'{x.ndim}'",
    "y = f(x.mean())",
    "y = (x if y else y).exp()",
    "x = torch.sin(f(x))",
    "g(x)\nx = y * z",
    "if y:\n    y = x.sum()",
    "y = x.shape; z = y",
    "y = [t.size(0) for t in y]",
]
KEPT = [
    "g(x)",
    "y = x",
    "y = x.float()",
    "y = x[0]",
    "y = x.T",
    "y = [x]",
    "y = self.norm(x.contiguous, x)",
    "y = x.long()",
    "y = x.chunk(2) * 2",
    "y = self.drop(x).sum()",
    "y = max(x, y)",
    "y = super().forward(x)",
    "y = torch.sin(y, out=x)",
    "y = torch.sin(**{'input': x})",
    "y = x.sin(out=z)",
    "y = x.numpy()",
    "y = x.grad_fn",
    "y = x @ y if z else x",
    "y = x in z",
    "y[0] = x",
    "y += x",
    "y = z[x]",
    "y = (x, 1)[0].sum()",
    "y = +x",
    "yield x",
    "for t in x: y = t",
    "with x: y = 1",
    "y = f'{x}'",
    "y = [x for t in y]",
    "y = lambda: x",
    "match x:\n    case [1]: y = 2",
    "(y := x).sum()",
    "raise_(*x)",
    "y = x, x",
    "y = 1; z = x; g = z",
    "x = torch.cos(z); x.numpy()",
]


def is_writable(body, line=None):
    text = "import torch\nclass M:\n    def __init__(self):\n        self.norm = torch.nn.LayerNorm(3)\n"
    lines = ["    def function(self, f, g, y, z):", "x = torch.cos(z)", *body.split("\n"), line or "r = x + 1", "return r, y, z"]
    source = Source("\n        ".join([text + lines[0], *lines[1:], ""]).encode(), "program.py")
    (found,) = [site for site in source.sites if source.text_of(site.node) == "x + 1"]
    return any(all(source.settled[each] for each in shown) for shown in found.writable.values())


@pytest.mark.parametrize("body", NOT_KEPT)
def test_who_keeps_nothing(body):
    assert is_writable(body)


@pytest.mark.parametrize("body", KEPT)
def test_who_may_keep_it(body):
    assert not is_writable(body)


@pytest.mark.parametrize(
    "line, may",
    [
        ("r = x.float() * (x + 1)", False),  # it waits for the sum
        ("r = y * f(x.T, z=x + 1)", False),
        ("r = [x.data, x + 1]", False),
        ("r = torch.sub(input=x if y else z, other=x + 1)", False),
        ("r = torch.sub(x if y else z, [t for t in [x + 1]][0])", False),
        ("r = x.mean() * (x + 1)", True),
        ("r = f(x.T.sum(), x + 1)", True),
        ("r = (x + 1 if x.ndim else x)", True),
    ],
)
def test_who_waits_for_the_sum(line, may):
    assert is_writable("pass", line) is may


SETTLED = {
    "torch.sin(x)": True,
    "F.gelu(x)": True,
    "sin(x)": True,
    "self.norm(x)": True,
    "self.either(x)": True,
    "self.mlp(x)": True,
    "nn.Linear(2, 2)(x)": True,
    "f(x)": False,  # an argument
    "made(x)": False,  # of this file
    "twice(x)": False,  # bound by two
    "x.sin(x)": False,  # a method tells itself what it is
    "self.other.norm(x)": False,
    "self.given(x)": False,
    "self.maybe(x)": False,
    "self.rebound(x)": False,
    "self.relu(x)": False,
    "self.gelu(x)": True,
    "other.norm(x)": False,
    "nn.ReLU(flag)(x)": False,
    "self.unknown(x)": False,
    "self.dropped(x)": False,
    "nn.Identity()(x)": False,
}


@pytest.mark.parametrize("call", SETTLED)
def test_who_is_always_called(call):
    text = f"""
        import torch, torch.nn.functional as F
        from torch import nn, sin
        from math import twice
        def twice(x): ...
        def made(x): ...
        class Other(nn.Module):
            def __init__(self):
                self.unknown = nn.Linear(2, 2)
        class Block(nn.Module):
            def __init__(self, given, flag):
                self.norm = nn.LayerNorm(2)
                self.either: nn.Module = nn.Linear(2, 2) if flag else nn.Linear(2, 2, bias=False)
                self.mlp = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
                self.dropped = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
                self.given = given
                self.maybe = nn.LayerNorm(2) if flag else nn.Identity()
                self.rebound, self.more = nn.Linear(2, 2), nn.Linear(2, 2)
                self.relu = nn.ReLU(inplace=flag)
                self.gelu = nn.GELU("tanh")
            def forward(self, x, f, other):
                h = {call}
                return h + 1
    """
    source = Source(textwrap.dedent(text).encode(), "program.py")
    assert source.settled == [SETTLED[call]]


# Of a module whose class is this, whether `self.norm` is always what it is.
SETTLED_MODULES = {
    "": True,
    "model = Block()\nmodel.norm = nn.Identity()": False,
    "class More(Block):\n    def more(self):\n        self.norm = given": False,
    "def change(model): setattr(model, 'norm', None)": False,
    "def change(model): model.add_module('norm', None)": False,
    "from mine import *": False,
    "from mine import nn": False,
    "if flag:\n    from mine import nn": False,
    "nn.LayerNorm = given": False,
    "nn = given": False,
    "class Other(nn.Module):\n    def __init__(self):\n        self.norm = nn.Linear(2, 2)": True,
}


@pytest.mark.parametrize("more", SETTLED_MODULES)
def test_a_module_of_one_kind(more):
    text = """
        import torch
        from torch import nn
        class Block(nn.Module):
            def __init__(self):
                self.norm = nn.LayerNorm(2)
            def forward(self, x):
                h = self.norm(x)
                return h + 1
    """
    assert Source(f"{textwrap.dedent(text)}{more}\n".encode(), "program.py").settled == [SETTLED_MODULES[more]]
    based = textwrap.dedent(text).replace("nn.Module", "Base")
    assert Source(f"{based}{more}\n".encode(), "program.py").settled == [False]


FROM_ELSEWHERE = [
    "def f():\n    kept.append(x)\nx = y @ y\nx = x + 1",
    "import shared\ndef f():\n    kept.append(shared.x)\nx = y @ y\nx = x + 1",
    "x = y @ y\nfrom shared import *\nx = x + 1",
    "if y:\n    x = y @ y\nx = x + 1",
    "x = y @ y\nglobals()['x'] = z\nx = x + 1",
    "def f():\n    global x\n    x = z\nx = y @ y\nx = x + 1",
    "def f():\n    globals()['x'] = z\nx = y @ y\nx = x + 1",
]


@pytest.mark.parametrize("text", FROM_ELSEWHERE)
def test_a_modules_variable_may_come_from_elsewhere(text):
    assert not any(site.writable for site in Source(text.encode(), "program.py").sites)
    assert any(site.writable for site in Source(b"x = y @ y\nx = x + 1", "program.py").sites)


@pytest.mark.parametrize(
    "text, dead",
    [
        ("x = x + 1", True),
        ("class C:\n    x = x + 1", False),  # it reads the module's x
        ("y = x + 1", False),
        ("x = f(x + 1)", False),
        ("x = y = x + 1", False),
    ],
)
def test_dead_in_a_module(text, dead):
    flows = map(Flow, codes_in(compile(text, "program.py", "exec")))
    (found,) = [flow.is_dead("x", at) for flow in flows for _, at in flow.operators()]
    assert found is dead

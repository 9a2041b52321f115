"""python -m safe_inplace advise: whole programs, as they are and changed."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest

from safe_inplace.__main__ import main
from safe_inplace._advise import evidence, watch
from safe_inplace._advise.command import REFUTED
from safe_inplace._advise.loading import Finder
from safe_inplace._advise.source import Source

from ..guard.test_run import ROOT, run

PROGRAM = {
    "train.py": """
        import sys
        import torch
        from parts.block import Block

        torch.manual_seed(0)
        model = torch.nn.Sequential(*[Block(128) for _ in range(2)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = torch.randn(512, 128)
        for step in range(4):
            loss = (model(data) * 2 - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(__name__, sys.argv[1:], f"{loss.item():.4f}")
        """,
    "parts/__init__.py": "",
    "parts/block.py": '''
        """A block."""

        import torch
        from torch import nn
        from . import numbers


        class Block(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.linear = nn.Linear(width, width)
                self.gamma = nn.Parameter(torch.full((width,), 0.1))

            def forward(self, x):
                h = self.linear(x)
                h = h + self.gamma  # in place
                h = torch.sigmoid(h)
                return x + h * self.gamma
        ''',
    "parts/numbers.py": "total = 0\nfor i in range(10):\n    total = total + i * 2\n",
}


@pytest.fixture
def program(tmp_path):
    for name, text in PROGRAM.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
    return tmp_path


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def advise(monkeypatch, capfd):
    """The command in this process, which has torch already; the program's own processes are others."""

    def advise(folder, *arguments):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        status = main(["advise", *arguments])
        return Done(status, *capfd.readouterr())

    return advise


def test_a_program_and_what_is_advised(program, advise):
    plain = run(program, "train.py", "--fast", python=())
    done = advise(program, "--check", "--diff", "found.diff", "--json", "found.json", "train.py", "--fast")
    assert done.returncode == 0, done.stderr
    told = done.stdout
    assert told.startswith(plain.stdout)
    assert "3 changes found, among 3 sums and products" in told
    at = told.index("parts/block.py:16 in Block.forward")
    assert told.index("- h = h + self.gamma  # in place\n    + h = safe_inplace.add_(h, self.gamma)  # in place", at)
    assert "8 calls in 4 steps, 256.0 KiB less allocated in each: nobody else had the memory of `h`, and it is not read" in told
    assert "+ return safe_inplace.addcmul(x, h, self.gamma)" in told
    assert "+ loss = safe_inplace.mul_add(model(data), 2, -1).square().mean()" in told
    assert "under guard: no hazard" in told
    assert re.search(r"values: rounding; in the first 2 steps .+ of step \d differs most, by \d\.\de-0[678] of its norm", told)
    assert re.search(r"time of a step: \d+\.\d\d of the plain one \(by pairs of runs: \d+\.\d\d, \d+\.\d\d\)", told)
    assert re.search(r"memory at the most: \d+\.\d MiB, plain \d+\.\d MiB", told)
    found = json.loads((program / "found.json").read_text())
    assert found["program"] == ["train.py", "--fast"] and len(found["changes"]) == 3
    check, documented = found["check"], documented_file()["check"]
    assert {name: type(value) for name, value in check.items()} == {name: type(value) for name, value in documented.items()}
    assert all(check[name].keys() == documented[name].keys() for name in ("apart", "plain_apart", "peak_bytes"))
    assert check["right"] and check["values"] == "rounding" and check["apart"]["of_norm"] < 1e-5

    # The changes as a patch.
    subprocess.run(["git", "apply", "found.diff"], cwd=program, check=True)
    block = (program / "parts/block.py").read_text()
    assert block.startswith('"""A block."""\n\nimport safe_inplace\nimport torch\n')
    changed = run(program, "train.py", "--fast", python=())
    assert changed.stdout == plain.stdout, changed.stderr


def test_the_page(tmp_path, advise):
    page = (ROOT / "docs" / "advise.md").read_text()
    text, said = re.search(r"```python\n(.*?)```\n\nit says\n\n```text\n(.*?)```", page, re.DOTALL).groups()
    write(tmp_path, text)
    (tmp_path / "program.py").rename(tmp_path / "train.py")
    assert advise(tmp_path, "--json", "found.json", "train.py").stdout.strip() == said.strip()
    found, documented = json.loads((tmp_path / "found.json").read_text()), documented_file()
    for change in found["changes"]:
        lines = text.splitlines()[change["lineno"] - 1 : change["end_lineno"]]
        begin, end = change["columns"]
        assert "\n".join([*lines[:-1], lines[-1][:end]])[begin:] == change["source"]
        change["filename"] = change["filename"].replace(str(tmp_path.resolve()), "/home/me")
    assert found["changes"][0] == documented["changes"][0] and found["check"] is None
    for name in ("changes", "check", "torch", "safe_inplace"):
        assert found.keys() == documented.keys() or name not in found
        del found[name], documented[name]
    assert found == documented


def documented_file():
    page = (ROOT / "docs" / "advise.md").read_text()
    (example,) = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return json.loads(example)


@pytest.mark.parametrize("option", ["--json", "--diff"])
def test_a_file_that_cannot_be_written_is_said_before_anything_runs(option, tmp_path, advise, capfd):
    write(tmp_path, "print('it runs')")
    with pytest.raises(SystemExit, match="2"):
        advise(tmp_path, option, "no/such/folder.txt", "program.py")
    printed = capfd.readouterr()
    assert printed.out == "" and f"{option} no/such/folder.txt: No such file or directory" in printed.err


def test_characters_that_are_more_than_a_byte_and_lines_that_share_an_expression():
    source = Source("x = 1\nä = f('é', ((x *\n 2) + 1).y())\n".encode(), "program.py")
    (site,) = source.sites
    assert source.place_of(site) == (2, 3, 11, 8) and source.replaced_text(site) == "((x *\n 2) + 1)"


def test_a_changed_program_that_computes_something_else(tmp_path, advise):
    write(
        tmp_path,
        """
        import torch
        changed = "safe_inplace" in globals()
        x = torch.ones(200, 200, requires_grad=True)
        for _ in range(2):
            (x * (2 + changed) + 1).sum().backward()
        """,
    )
    done = advise(tmp_path, "--check", "-m", "program")
    assert done.returncode == REFUTED
    said = r"values: MORE THAN ROUNDING; in the first 2 steps (leaf \(200, 200\)|loss 0) of step \d differs most, by \d\.\de-01"
    assert re.search(said, done.stdout)


def write(folder, text):
    (folder / "program.py").write_text(textwrap.dedent(text))


def test_the_status_is_the_programs(tmp_path, advise):
    write(tmp_path, "import torch\nx = torch.ones(200, 200)\nfor _ in range(2):\n    y = (x * 2 + 1).sum()\nraise SystemExit(3)")
    done = advise(tmp_path, "--check", "program.py")
    assert done.returncode == 3 and "+ y = safe_inplace.mul_add(x, 2, 1).sum()" in done.stdout and "checked" not in done.stdout
    write(tmp_path, "1 / 0")
    done = advise(tmp_path, "program.py")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Nothing can be gained here." in done.stdout
    write(tmp_path, "import os\nos._exit(5)")
    done = advise(tmp_path, "program.py")
    assert done.returncode == 5 and "the program ended with status 5 before its end" in done.stderr
    write(tmp_path, "import os\nos.kill(os.getpid(), 9)")
    done = advise(tmp_path, "program.py")
    assert done.returncode == 137 and "the program ended with status 137 before its end" in done.stderr
    write(tmp_path, "x = (")
    done = advise(tmp_path, "program.py")
    assert done.returncode == 1 and "SyntaxError" in done.stderr


def test_nothing_to_run(tmp_path, advise):
    with pytest.raises(SystemExit, match="2"):
        advise(tmp_path, "--check")
    done = advise(tmp_path, "missing.py")
    assert done.returncode == 2 and "can't open file" in done.stderr
    done = advise(tmp_path, "-m", "missing")
    assert done.returncode == 1 and "No module named missing" in done.stderr


def test_the_program_is_watched_unharmed(tmp_path, advise):
    """Deep recursion, names that a class makes up, modes, handlers of signals, metaclasses that answer for others."""
    write(
        tmp_path,
        """
        import signal
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        class Nested:
            def __init__(self, inner):
                self.inner = inner
            def __add__(self, other):
                return Nested(self.inner + other if self.inner is not None else None)

        nested = None
        for _ in range(400):
            nested = Nested(nested)
        print(type(nested + 1).__name__)

        class Names(dict):
            def __missing__(self, key):
                if key.startswith("__"):
                    raise KeyError(key)
                return self.setdefault(key, len(self))

        class Auto(type):
            __prepare__ = classmethod(lambda cls, name, bases: Names())
            __eq__ = None

        class Bits(metaclass=Auto):
            A
            B
            BOTH = A + B

            def __init__(self):
                pass

            def __call__(self, x):
                return x * 2

        print({name: value for name, value in vars(Bits).items() if name.isupper()})

        def twice(x):
            h = Bits()(x)
            return h + 1

        print(twice(torch.ones(3)))

        class Log(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                print(function)
                return function(*args, **(kwargs or {}))

        a, w = torch.ones(256, 256).t(), torch.ones(256, 256)
        for _ in range(2):
            with Log():
                a * w + w

        def handler(*_):
            global n
            n += 1
            a[:4, :4] * w[:4, :4]

        signal.signal(signal.SIGALRM, handler)
        n = 0
        for i in range(500):
            seen = n
            signal.setitimer(signal.ITIMER_REAL, 0.0001 + 0.000001 * (i % 200))
            while n == seen:
                a[:4, :4] * w[:4, :4] + w[:4, :4]
        print(n)
        """,
    )
    plain = run(tmp_path, "program.py", python=())
    done = advise(tmp_path, "program.py")
    assert done.returncode == plain.returncode == 0, done.stderr
    assert plain.stdout.endswith("500\n") and done.stdout.startswith(plain.stdout)


def test_what_runs_last(tmp_path, advise):
    """A thread that is no daemon, and the functions of atexit, hold what the main thread did not."""
    write(
        tmp_path,
        """
        import atexit, sys, threading, time
        import deep
        import torch

        def keep(kept):
            if "held" in kept:
                kept.append(sys._getframe(1).f_locals["h"])

        def f(x, kept):
            h = x.sin()
            keep(kept)
            return h + 1

        def g(x, kept):
            h = x.sin()
            keep(kept)
            return h + 1

        for _ in range(2):
            f(torch.ones(200, 200), []), g(torch.ones(200, 200), [])
        held = sys.argv[1:]
        atexit.register(g, torch.ones(200, 200), held)
        threading.Thread(target=lambda: (time.sleep(0.5), f(torch.ones(200, 200), held))).start()
        """,
    )
    (tmp_path / "deep.py").write_text("q = 1\ntotal = " + " + ".join(["q"] * 450))  # deeper than the walkers of trees may go
    for arguments, changes in ([], 2), (["held"], 0):
        done = advise(tmp_path, "program.py", *arguments)
        assert done.returncode == 0 and f"{changes} changes found" in done.stdout and done.stderr == ""


def test_what_runs_past_the_import(tmp_path, advise):
    """Files that are run in another way as well, or under another name, and functions whose source torch.jit.script compiles."""
    for name in ("imported", "run", "linked", "scripted"):
        (tmp_path / f"{name}.py").write_text("def f(x):\n    h = x - 1\n    return h * 2 + 1\n")
    (tmp_path / "other.py").symlink_to(tmp_path / "linked.py")
    write(
        tmp_path,
        """
        import runpy
        import torch
        import imported, linked, other, run, scripted
        for _ in range(2):
            for module in (imported, linked, run, scripted):
                module.f(torch.ones(200, 200))
        runpy.run_path("run.py")
        torch.jit.script(scripted.f)
        other.f(1)
        """,
    )
    done = advise(tmp_path, "program.py")
    assert "1 change found" in done.stdout and "imported.py:3 in f" in done.stdout, done.stdout
    assert "not looked into, since it cannot be changed safely: run.py" in done.stdout


def test_code_that_is_sent_to_another_process(tmp_path, advise):
    """By value, as joblib does: there nobody knows what watches."""
    write(
        tmp_path,
        """
        import marshal, subprocess, sys
        import torch

        def f(x):
            h = x - 1
            return h * 2 + 1

        for _ in range(2):
            f(torch.ones(200, 200))
        if sys.argv[1:]:
            code = "import marshal, sys; f = lambda: 0; f.__code__ = marshal.load(sys.stdin.buffer); print(f(4))"
            print(subprocess.run([sys.executable, "-c", code], input=marshal.dumps(f.__code__), stdout=-1, check=True).stdout)
        """,
    )
    assert "1 change found" in advise(tmp_path, "program.py").stdout
    done = advise(tmp_path, "program.py", "send")
    assert "b'7\\n'" in done.stdout and "0 changes found" in done.stdout and "1  it also runs where" in done.stdout, done


def test_a_child_that_is_forked_in_the_middle():
    """While another thread watches a file, and judges a sum."""
    with watch._lock, evidence._lock:
        child = os.fork()
        if child == 0:
            source = Source(b"r = x + y", "program.py")
            os._exit(watch.watch(source) is not source.tree)
    assert os.waitpid(child, 0)[1] == 0


def test_a_finder_that_is_not_in_the_list_any_more(tmp_path, monkeypatch):
    """Somebody has put another one around it."""
    (tmp_path / "found_module.py").write_text("r = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finder = Finder(lambda text, name: compile("r = 2", name, "exec"), [])

    class Around:
        find_spec = finder.find_spec

    monkeypatch.setattr(sys, "meta_path", [Around()])
    assert importlib.import_module("found_module").r == 2
    sys.modules.pop("found_module")


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["advise", "--help"])
    assert end.value.code == 0
    assert "--check" in capsys.readouterr().out


def test_what_is_not_looked_into(tmp_path, advise):
    """Files that cannot be changed, and installed packages that nobody asked for."""
    installed = tmp_path / "site-packages"
    (installed / "other").mkdir(parents=True)
    (installed / "other" / "__init__.py").write_text("def twice(x):\n    return x * 2 + 1\n")
    (tmp_path / "own.py").write_bytes(b"# coding: latin-1\ndef twice(x):\n    return x * 2 + 1  # \xe9\n")
    write(
        tmp_path,
        """
        import sys
        sys.path.insert(0, "site-packages")
        import torch
        import other, own
        for _ in range(2):
            other.twice(torch.ones(200, 200)), own.twice(torch.ones(200, 200))
        """,
    )
    told = advise(tmp_path, "program.py").stdout
    assert "0 changes found, among 0" in told and "not looked into, since it cannot be changed safely: own.py" in told
    assert "--include" not in told
    told = advise(tmp_path, "--include", "other", "--include", "othr", "program.py").stdout
    assert "site-packages/other/__init__.py:2 in twice" in told
    assert "--include othr: the program imports no such package" in told and "--include other" not in told
    with pytest.raises(SystemExit, match="2"):
        advise(tmp_path, "--include", "torch", "program.py")


def test_a_program_that_is_a_folder(program, advise):
    shutil.move(program / "train.py", program / "__main__.py")
    done = advise(program, ".")
    assert done.returncode == 0 and "3 changes found" in done.stdout, done.stderr


def test_code_of_every_kind_runs_as_it_would(tmp_path, advise):
    """With a call in the place of each sum and product."""
    text = '''
        from __future__ import annotations
        import asyncio, dataclasses, enum, functools, operator, sys
        from typing import NamedTuple

        order = []

        class Logged:
            def __init__(self, name): self.name = name
            def __add__(self, other): return Logged(f"({self.name}+{other!r})")
            def __radd__(self, other): return Logged(f"({other!r}+{self.name})")
            def __mul__(self, other): return NotImplemented
            def __rmul__(self, other): return Logged(f"({other!r}*{self.name})")
            def __sub__(self, other): raise KeyError(other)
            def __repr__(self): return self.name

        def see(value):
            order.append(value)
            return value

        @dataclasses.dataclass
        class Point:
            x: int = 1 + 2 * 3
            __y = 4
            def area(self, z: "1 + 2" = 3 * 4): return (self.x + self.__y) * z

        class Color(enum.IntFlag):
            RED = 1
            BOTH = RED + 1 * 2

        class Pair(NamedTuple):
            a: int = 2 * 3

        def matched(value):
            match value:
                case 1 + 2j: return "complex"
                case [x, *rest] if x + 1 == 2: return rest * 2
                case {"a": a}: return a + a
                case _: return value * 2

        def running(n):
            for i in range(n):
                got = yield i * 2 + 1
                if got: yield got + 10

        async def later(x):
            await asyncio.sleep(0)
            return x * 2 + await asyncio.sleep(0, 5)

        def tried():
            try:
                return 1 + Logged("c") - 2
            except KeyError as error:
                return error.args[0] * 3 + 1
            finally:
                order.append("fin" + "ally")

        def grouped():
            try:
                raise ExceptionGroup("g", [ValueError(1 + len(order))])
            except* ValueError as found:
                texts = [str(each) * 2 for each in found.exceptions]
            return texts

        def deleted(x):
            y = x + 1
            del x
            try: return x + y
            except UnboundLocalError: return y * y + y

        print(see(2) * see(3) + see(4), see(5) + see(6) * see(7), (see(1) + see(2)) * see(3), see(9) * (see(8) + see(7)), order)
        print(Logged("a") + 1, 1 + Logged("a"), 2 * Logged("b"), [1] + [2] * 3, "a" + "b" * 2, (1,) + (2,))
        print(Point().area(), Color.BOTH, Pair(), f"{1 + 1 = } {2 * 3:>{1 + 4}}", Point.__annotations__, matched.__name__)
        print(matched(1 + 2j), matched([1, 2]), matched({"a": 2}), matched(4))
        generator = running(3)
        print(next(generator), generator.send(3), list(generator), [x * y + z for x, y, z in [(1, 2, 3)]])
        print(asyncio.run(later(4)), tried(), grouped(), deleted(3), (n := 4) + n * 2, (lambda a, b=2 * 3: a * b + 1)(2))
        print(functools.reduce(operator.add, [1 + 1, 2]), 2 * 3 + 4 if order else 5, *[1 + 2], sep=" " + "|")
        try:
            Logged("a") * 2
        except TypeError as error:
            print(error)
        try:
            1 + (
                Logged("a")
                - 3
            )
        except KeyError as error:
            lines = []
            trace = error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code.co_filename == __file__:
                    lines.append(trace.tb_lineno)
                trace = trace.tb_next
            print(lines[0], sys.version_info[0])
        exec("k = 1 + 2 * 3"); print(k, eval("k * 2 + 1"))
        '''
    write(tmp_path, text)
    plain = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    done = advise(tmp_path, "program.py")
    assert done.stdout.partition("\nsafe_inplace advise")[0] == plain.stdout, done.stderr

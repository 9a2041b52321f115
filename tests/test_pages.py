"""Every block of code of every page runs: Python as it stands, sessions with the answers that they show, and commands."""

import contextlib
import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from docs import screenshots

from .guard.test_docs import report_of
from .guard.test_run import NET

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/**/*.md")])
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
RUN = ("python", "pycon", "sh", "console")
# Text is what no program reads. The rest is what Sphinx reads, or is held equal to something by the test that is named.
SHOWN = {
    "text": None,
    "{eval-rst}": None,
    "json": {"docs/run.md": "tests/guard/test_run.py", "docs/advise.md": "tests/advise/test_command.py"},
    "cpp": {"docs/adding-a-backend.md": "tests/test_pages.py"},
}

# What the code of a page takes as given.
GIVEN = {
    "docs/guard.md": """
import torch
import safe_inplace
model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
""",
    "docs/patch.md": """
import torch
import safe_inplace
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
model = torch.nn.Sequential(ConvNextV2GRN(8))
""",
    "docs/trainers.md": """
import tempfile
import torch
from tests.guard.test_trainers import Net, harmless
model, examples, folder = Net(harmless), [{"x": torch.randn(4)} for _ in range(8)], tempfile.mkdtemp()
""",
}


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        indent, language, body = found.groups()
        body = re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)
        yield Block(path.relative_to(ROOT).as_posix(), text.count("\n", 0, found.start(3)) + 1, language, body)


BLOCKS = [block for path in PAGES for block in blocks(path)]
PAGES_OF_PYTHON = list(dict.fromkeys(block.page for block in BLOCKS if block.language in ("python", "pycon")))


def test_each_block_says_what_it_is():
    assert {str(block) for block in BLOCKS if block.language not in (*RUN, *SHOWN)} == set()
    for language, held in SHOWN.items():
        if held is not None:
            assert {block.page for block in BLOCKS if block.language == language} == set(held)
            assert all(Path(page).name in (ROOT / test).read_text() for page, test in held.items())


def test_no_block_is_written_without_a_fence():
    for path in PAGES:
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        assert "```" not in text, f"{path}: a fence that is not closed"
        assert not re.search(r"\n\n    +[^\s*-]", text), f"{path}: an indented block"


def run_page(page: str) -> dict[str, object]:
    names: dict[str, object] = {}
    exec(GIVEN.get(page, ""), names)
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for block in BLOCKS:
        if block.page != page:
            continue
        if block.language == "python":
            # At its lines in the page, which is what a traceback names.
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
        elif block.language == "pycon":
            session = parser.get_doctest(block.text, names, page, str(ROOT / page), block.line - 1)
            runner.run(session, clear_globs=False)
            names = session.globs
    assert runner.failures == 0, "the session answers otherwise"
    return names


@pytest.mark.parametrize("page", PAGES_OF_PYTHON)
def test_python(page, capsys):
    torch._dynamo.reset()
    run_page(page)


def commands() -> Iterator[tuple[Block, str]]:
    for block in BLOCKS:
        if block.language in ("sh", "console"):
            lines = block.text.replace("\\\n", "").splitlines()
            if block.language == "console":
                lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            yield from ((block, line) for line in lines if line.strip() and "cuobjdump" not in block.text)


COMMANDS = list(dict.fromkeys(line.partition(" #")[0].strip() for _, line in commands()))

# The commands say what people have: many processes, hours of programs.
SMALLER = ((r"(--nproc-per-node) \d+", r"\1 2"), (r"(--programs) \d+", r"\1 2"))


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """The environment that it sets, and its words."""
    for pattern, smaller in SMALLER:
        command = re.sub(pattern, smaller, command)
    words = shlex.split(command)
    environment = {}
    while re.match(r"\w+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    return environment, words


@dataclass
class Done:
    status: int
    output: str


@pytest.fixture
def run(tmp_path):
    """Runs the words in the folder of a user, or in the repository where one of them is a file of it."""
    (tmp_path / "train.py").write_text(NET)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(NET)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_train.py").write_text(NET.replace("Net()(", "def test_train(): Net()("))

    def run(*words: str, **changed: str | None) -> Done:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **changed}
        done = subprocess.run(
            words,
            cwd=ROOT if any((ROOT / word).is_file() for word in words[1:]) else tmp_path,
            env={name: value for name, value in environment.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return Done(done.returncode, done.stdout)

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_command(run, command):
    environment, words = words_of(command)
    program = Path(words[0]).name
    if program == "safe-inplace":
        words[:1] = ["python", "-m", "safe_inplace"]
    elif program == "torchrun":
        words[:1] = ["python", "-m", "torch.distributed.run"]
    elif program == "pytest":
        words[:1] = ["python", "-m", "pytest", "-p", "pytest_safe_inplace", "-p", "no:cacheprovider"]
    if program == "make":
        # The suite itself may run in a make, with another torch.
        without = dict.fromkeys(("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "TORCH", "VENV"), None)
        done = run(shutil.which("make"), "-n", "-C", str(ROOT), *words[1:], **without)
        assert done.status == 0, done.output
    elif program == "pip":
        check_installation(words[1:])
    elif words[1:4] == ["-m", "safe_inplace", "advise"]:
        done = run(sys.executable, *words[1:])
        # The program's own status: torch finds the hazard.
        assert done.status == 1 and "safe_inplace advise: " in done.output, done.output
    elif "safe_inplace" in words or "SAFE_INPLACE_GUARD" in environment:
        # A program of the user's, with one hazard in it.
        done = run(sys.executable, *words[1:], **environment)
        hazard = "hazard between 1 pair of lines" in done.output
        assert hazard == any(word.startswith(("run", "train")) for word in words), done.output
        assert (done.status == 0) == ("copy" in {*words, *environment.values()} or not hazard), done.output
    elif words[1:3] == ["-m", "pytest"]:
        if "--safe-inplace-guard" in command:
            done = run(sys.executable, *words[1:], PYTEST_ADDOPTS="")
            assert "1 hazard between 1 pair of lines, in 1 test" in done.output and done.status == 1
        else:
            done = run(sys.executable, *words[1:], "--collect-only", "-q", PYTEST_ADDOPTS="")
            assert done.status == 0 and re.search(r"\d+/\d+ tests collected|\d+ tests collected", done.output)
    elif words[1:3] == ["-m", "benchmarks"]:
        from benchmarks.__main__ import parse

        parse(words[3:])
    elif words[1:2] == ["-m"] and words[2].startswith(("tests.", "examples.")):
        done = run(sys.executable, *words[1:], **environment)
        assert done.status == 0, done.output
    else:
        raise AssertionError(f"nobody knows how to run {command!r}")


def check_installation(words: list[str]) -> None:
    assert words[0] == "install"
    torch_wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["safe_inplace"]["torch"]
    assert {Requirement(word) for word in words[1:] if not word.startswith(("-", "."))} <= {Requirement(torch_wanted)}


def test_shell_blocks_parse():
    for block in BLOCKS:
        if block.language == "sh":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}: {done.stderr}"


def test_the_registration_of_a_backend_is_that_of_a_device():
    (block,) = [block for block in BLOCKS if block.language == "cpp"]
    assert block.page == "docs/adding-a-backend.md"
    cuda = (ROOT / "csrc" / "cuda" / "register.cpp").read_text().replace("cuda::", "").replace("CUDA", "XPU")
    assert block.text.strip().removesuffix("});") in cuda


def test_the_pictures_show_what_the_command_says():
    report = screenshots.report()
    at_once, end, said = report_of("--on-hazard", "warn", screenshots.PROGRAM).rpartition("safe_inplace guard: 1 hazard")
    assert "h.data.add_(1)" in at_once
    for theme in screenshots.THEMES:
        picture = (ROOT / "docs" / f"report-{theme}.svg").read_text(encoding="utf-8")
        assert picture == screenshots.picture(report, theme), theme
        shown = [unescape(text) for text in re.findall(r"<text [^>]*>(.*?)</text>", picture)][1:]
        assert "".join("".join(shown).split()) == "".join((end + said).split()), theme


class TestThatTheseTestsFail:
    """Twins of the above: a page whose code does not run, or answers otherwise."""

    @pytest.mark.parametrize(
        "text, error",
        [
            ("```python\nassert 1 + 1 == 3\n```\n", AssertionError),
            ("```python\nnobody_defined_this\n```\n", NameError),
            ("```pycon\n>>> 1 + 1\n3\n```\n", AssertionError),
            ("```pycon\n>>> 1 / 0\n0\n```\n", AssertionError),
            ("- a list\n\n  ```python\n  1 / 0\n  ```\n", ZeroDivisionError),
        ],
    )
    def test_python(self, monkeypatch, tmp_path, capsys, text, error):
        page = tmp_path / "page.md"
        page.write_text(text)
        monkeypatch.setitem(globals(), "ROOT", tmp_path)
        monkeypatch.setitem(globals(), "BLOCKS", list(blocks(page)))
        with pytest.raises(error):
            run_page("page.md")

    def test_names_go_on_from_block_to_block(self, monkeypatch, tmp_path):
        page = tmp_path / "page.md"
        page.write_text("```python\na = 1\n```\n```pycon\n>>> b = a + 1\n>>> b\n2\n```\n```python\nc = b + 1\n```\n")
        monkeypatch.setitem(globals(), "ROOT", tmp_path)
        monkeypatch.setitem(globals(), "BLOCKS", list(blocks(page)))
        assert run_page("page.md")["c"] == 3

    def test_command(self, run):
        with pytest.raises(AssertionError, match="nobody knows"):
            test_command(run, "nonsense --option")
        with contextlib.suppress(AssertionError):
            test_command(run, "make no-such-target")
            raise RuntimeError("it passed")

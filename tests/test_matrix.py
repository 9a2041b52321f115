"""The matrix of torches and the wheels: what is gone through, what is counted, and what the pages say of it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import matrix.__main__ as command
from benchmarks import pages
from matrix import environments, report, rows, suite, wheels
from matrix.environments import TESTED, Done, Environment
from matrix.rows import Counts, Row, Wheel

from .test_package import SMALL_MODULE

ROOT = pages.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

GREEN = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="0" failures="0" skipped="2" tests="4" time="1.5">
<testcase classname="tests.test_values" name="test_add[1]" time="0.1" />
<testcase classname="tests.test_values" name="test_add[2]" time="0.1"><system-out>said</system-out></testcase>
<testcase classname="tests.test_cuda" name="test_all"><skipped type="pytest.skip" message="no GPU">where</skipped></testcase>
<testcase classname="tests.test_views.TestSome" name="test_x"><skipped type="pytest.xfail" message="torch's" /></testcase>
</testsuite></testsuites>
"""

# A file that cannot be collected, and a test that fails and is then torn down with an error: pytest writes it twice.
RED = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="2" failures="1" skipped="0" tests="4" time="1.5">
<testcase classname="" name="tests.test_cuda"><error message="collection failure">ImportError</error></testcase>
<testcase classname="tests.test_values" name="test_add[1]"><failure message="1 != 2">where</failure></testcase>
<testcase classname="tests.test_values" name="test_add[1]"><error message="in teardown">where</error></testcase>
<testcase classname="tests.test_values" name="test_add[2]" time="0.1" />
</testsuite></testsuites>
"""


class TestList:
    """Of the torches, in pyproject.toml and nowhere else."""

    def test_it_lies_in_the_range_and_spans_it(self):
        supported = Requirement(PROJECT["tool"]["safe_inplace"]["torch"]).specifier
        assert all(supported.contains(version) for version in TESTED)
        bounds = {bound.operator: Version(bound.version) for bound in supported}
        versions = sorted(map(Version, TESTED))
        assert list(map(str, versions)) == list(TESTED)
        assert (versions[0].major, versions[0].minor) == bounds[">="].release[:2]
        assert (versions[-1].major, versions[-1].minor + 1) == bounds["<"].release[:2]

    def test_every_python_in_range_has_a_torch(self):
        supported = SpecifierSet(PROJECT["project"]["requires-python"])
        assert set(TESTED.values()) == {f"3.{minor}" for minor in range(30) if supported.contains(f"3.{minor}")}

    def test_what_is_named_elsewhere_is_in_it(self):
        makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
        named = re.findall(r"^(?:TORCH \?|second)=\s?torch==(\S+)$", makefile + ci, re.MULTILINE)
        assert len(named) == 2
        named += [extra.removeprefix("test-torch-") for extra in PROJECT["project"]["optional-dependencies"] if "torch" in extra]
        assert set(named) <= set(TESTED)

    def test_a_torch_that_is_not_in_it_is_refused(self):
        assert [environment.torch for environment in environments.environments("2.15.0 2.11.0")] == ["2.11.0", "2.15.0"]
        with pytest.raises(SystemExit, match=r"^2\.12\.0 is none of the torches in pyproject\.toml: "):
            environments.environments("2.12.0 2.13.0")


class TestPython:
    @pytest.mark.parametrize(
        "found, python",
        [
            (["3.11", "3.12", "3.13"], ["3.12", "3.11", "3.11", "3.13"]),
            # Those that are there are spread.
            (["3.11", "3.13"], ["3.13", "3.11", "3.11", "3.13"]),
            (["3.12"], ["3.12"] * 4),
        ],
    )
    def test_of_each_torch(self, found, python):
        wanted = dict(zip("abcd", ["3.12", "3.11", "3.11", "3.13"], strict=True))
        assert environments.chosen(wanted, found) == dict(zip("abcd", python, strict=True))

    def test_a_stub_on_path_is_not_one(self, tmp_path, monkeypatch):
        """Managers of versions put a python3.x on PATH that only says that there is none."""
        others = sorted({*TESTED.values()} - {PYTHON})
        for version in others:
            stub = tmp_path / f"python{version}"
            stub.write_text("#!/bin/sh\necho 'there is none' >&2\nexit 127\n")
            stub.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert environments.interpreters() == {PYTHON: sys.executable}
        real = tmp_path / f"python{others[0]}"
        real.write_text(f"#!/bin/sh\necho {others[0]}\n")
        assert environments.interpreters() == {PYTHON: sys.executable, others[0]: real.name}

    def test_an_environment_of_another_python_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(environments, "ROOT", tmp_path)
        environment = Environment("2.14.1", "3.12", "python3.12")
        settings = tmp_path / ".venv" / "torch-2.14.1" / "pyvenv.cfg"
        assert environment.venv == ".venv/torch-2.14.1"
        settings.parent.mkdir(parents=True)
        settings.write_text("home = /usr/bin\nversion = 3.12.1\n")
        assert environment.venv == ".venv/torch-2.14.1"
        settings.write_text("home = /usr/bin\nversion = 3.11.7\n")
        assert environment.venv == ".venv/torch-2.14.1-python3.12"


class TestCounts:
    def counts(self, folder: Path, xml: str) -> Counts | None:
        (folder / "tests.xml").write_text(xml)
        return rows.counts(folder / "tests.xml")

    def test_green(self, tmp_path):
        assert self.counts(tmp_path, GREEN) == Counts(2, 0, 2, [])

    def test_red(self, tmp_path):
        assert self.counts(tmp_path, RED) == Counts(1, 2, 0, ["tests.test_cuda", "tests.test_values::test_add[1]"])

    def test_pytest_itself(self, tmp_path):
        """What it writes, and not only what is thought that it does."""
        (tmp_path / "test_some.py").write_text(
            "import pytest\n"
            "@pytest.fixture\n"
            "def torn():\n"
            "    yield\n"
            "    raise OSError\n"
            "def test_passes(): pass\n"
            "def test_fails_twice(torn): assert False\n"
            "def test_in_teardown(torn): pass\n"
            "@pytest.mark.xfail\n"
            "def test_expected(): assert False\n"
            "@pytest.mark.skip\n"
            "def test_skipped(): pass\n"
        )
        (tmp_path / "test_broken.py").write_text("import nothing_of_this_name\n")
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        pytest = ["-m", "pytest", "--continue-on-collection-errors", "--junitxml=tests.xml"]
        done = subprocess.run([sys.executable, *pytest], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout
        counted = rows.counts(tmp_path / "tests.xml")
        assert counted is not None
        assert (counted.passed, counted.failed, counted.skipped) == (1, 3, 2)
        assert "test_some::test_fails_twice" in counted.failures and any("test_broken" in name for name in counted.failures)

    def test_no_file(self, tmp_path):
        assert rows.counts(tmp_path / "tests.xml") is None


ABOUT = {"commit": "0123456789ab", "date": "2026-01-02", "processor": "Some CPU", "jobs": 2, "load": 0.5}
TESTED_ROW = Row(
    "2.11.0",
    "3.12",
    **ABOUT,
    torch_version="2.11.0+cu130",
    torch_cuda="13.0",
    compiler="g++ 12",
    cuda="13.0",
    cuda_archs="8.0;9.0+PTX",
    build_seconds=125.4,
    tests=Counts(2, 0, 2, []),
)
BUILT_WHEEL = Wheel(
    **vars(TESTED_ROW), with_cuda=True, name="safe_inplace-1.0+torch2.11.0.cu130-cp312-cp312-linux_x86_64.whl", size=2_340_000
)


class TestPage:
    def page(self, folder: Path, *made: Row) -> str:
        for row in made:
            rows.write(row, folder)
        return report.page(folder)

    def line(self, text: str, start: str) -> list[str]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
        return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]

    def test_a_row_says_what_was_tested_with_what(self, tmp_path):
        page = self.page(tmp_path, TESTED_ROW)
        assert self.line(page, "2.11.0") == [
            *("2.11.0+cu130, CUDA 13.0", "3.12", "g++ 12", "CUDA 13.0 for 8.0;9.0+PTX", "2 min 05 s (load before 0.5)"),
            *("2", "0", "2", "the whole suite; commit 0123456789ab, 2026-01-02"),
        ]
        assert "`make test-matrix`" in page and "Some CPU, 2 compilers at a time" in page
        assert self.line(page, "2.13.0") == ["2.13.0", *["-"] * 7, "not run yet"]

    def test_a_shortened_run_says_so(self, tmp_path):
        row = replace(TESTED_ROW, arguments="-k mul_", cuda=None, torch_cuda=None, build_seconds=None)
        others = [replace(row, torch=torch, torch_version=torch) for torch in ("2.13.0", "2.15.0")]
        others[0].arguments = "a | b"
        page = self.page(tmp_path, row, *others)
        assert "**Shortened** on torch 2.11.0, 2.15.0: of the suite only what pytest ran by `-k mul_`." in page
        assert "**Shortened** on torch 2.13.0: of the suite only what pytest ran by `a | b`." in page
        cells = self.line(page, "2.11.0")
        assert cells[-1].startswith("shortened, see below; ")
        assert cells[0] == "2.11.0+cu130, CPU only" and cells[3:5] == ["no", "-"]

    def test_a_torch_that_cannot_be_installed(self, tmp_path):
        row = Row("2.11.0", "3.12", **ABOUT, problem="could not be installed: ERROR: a | b `c`")
        cells = self.line(self.page(tmp_path, row), "2.11.0")
        assert cells[:8] == ["2.11.0", "3.12", *["-"] * 6]
        assert cells[8].startswith(r"`could not be installed: ERROR: a \| b 'c'`; commit ")

    def test_failed_tests_are_named(self, tmp_path):
        names = [f"tests.test_values::test_{number}" for number in range(report.NAMED + 3)]
        few = replace(TESTED_ROW, torch="2.13.0", tests=Counts(5, 1, 0, ["tests.test_views::test_x[a]"]))
        page = self.page(tmp_path, replace(TESTED_ROW, tests=Counts(1, len(names), 0, names)), few)
        head, many, one = page.partition("Failed on torch 2.11.0:")[0], *page.split("Failed on torch ")[1:]
        assert "tests.test_values" not in head
        assert many.splitlines()[2:-1] == [*(f"- `{name}`" for name in names[: report.NAMED]), "- and 3 more"]
        assert one.splitlines() == ["2.13.0:", "", "- `tests.test_views::test_x[a]`"]

    def test_a_wheel(self, tmp_path):
        assert "make wheels" in report.readme_section(tmp_path)
        failed = replace(BUILT_WHEEL, torch="2.13.0", name="x.whl", with_cuda=False, tests=Counts(7, 1, 0, []), arguments="-k x")
        not_built = replace(BUILT_WHEEL, torch="2.14.1", name=None, size=None, tests=None, build_seconds=None, problem="no nvcc")
        for row in (BUILT_WHEEL, failed, not_built):
            rows.write(row, tmp_path)
        section = report.readme_section(tmp_path)
        assert self.line(section, "`safe_inplace-1.0+torch2.11.0.cu130")[2:] == [
            *("2.3 MB", "2 min 05 s (load before 0.5)", "2 passed, 2 skipped; commit 0123456789ab, 2026-01-02"),
        ]
        assert "1 failed, 7 passed, 0 skipped, shortened: `-k x`;" in section
        assert self.line(section, "for torch 2.14.1, with CUDA")[1:] == ["-"] * 3 + [f"`no nvcc`; {report.when(not_built)}"]

    def test_rows_are_read_as_they_were_written(self, tmp_path):
        for row in (TESTED_ROW, BUILT_WHEEL):
            rows.write(row, tmp_path)
            assert rows.read(type(row), ["2.11.0"], tmp_path) == [row]
        assert rows.read(Row, ["2.11"], tmp_path) == []

    def test_the_pages_are_what_the_results_say(self):
        assert report.PAGE.read_text() == report.page()
        text = pages.README.read_text()
        assert pages.insert(text, report.readme_section(), report.BEGIN, report.END) == text


# What make does, without the hours. It fails where the torch's file says so.
MAKE = f"""#!{sys.executable}
import os, shutil, sys
from pathlib import Path

target, *variables = sys.argv[1:]
given = dict(variable.split("=", 1) for variable in variables)
torch = given["TORCH"].removeprefix("torch==")
target = target.rpartition("/")[2]
if target == Path(torch).read_text():
    print({{".torch": "ERROR: No matching distribution found", "built": "safe_inplace cannot be built: no compiler"}}[target])
    print("make: *** [Makefile:1] Error 1")
    sys.exit(2)
if target == ".torch":
    python = Path(given["VENV"], "bin", "python")
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\\necho \\'["{{torch}}+cpu", null]\\'\\n')
    python.chmod(0o755)
elif target == "built":
    Path("safe_inplace").mkdir(exist_ok=True)
    Path("safe_inplace", "_build_info.py").write_text("cuda = None\\ncuda_archs = None\\n")
else:
    if Path("replaced").exists():
        python = Path(given["VENV"], "bin", "python")
        python.write_text(python.read_text().replace(torch, Path("replaced").read_text()))
    xml, _, arguments = given["ARGS"].partition(" ")
    Path("arguments").write_text(arguments)
    shutil.copy(torch + ".xml", xml.removeprefix("--junitxml="))
    sys.exit("<failure" in Path(torch + ".xml").read_text())
"""


class TestMatrix:
    @pytest.fixture
    def tree(self, tmp_path):
        for version in TESTED:
            (tmp_path / version).touch()
            (tmp_path / f"{version}.xml").write_text(GREEN)
        return tmp_path

    @pytest.fixture
    def run(self, tree, monkeypatch):
        make = tree / "programs" / "make"
        make.parent.mkdir()
        make.write_text(MAKE)
        make.chmod(0o755)
        monkeypatch.setenv("PATH", str(make.parent), prepend=os.pathsep)
        for name in ("ARGS", "REUSE", "TORCHES"):
            monkeypatch.delenv(name, raising=False)
        for module in (environments, suite):
            monkeypatch.setattr(module, "ROOT", tree)
            monkeypatch.setattr(module, "LOGS", tree / "build" / "matrix")

        def run(**variables: str) -> tuple[int, str]:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            status = command.main("test-matrix", tree / "results", tree / "page.md")
            return status, (tree / "page.md").read_text()

        return run

    def test_it_goes_on_where_one_fails(self, run, tree):
        (tree / "2.11.0").write_text(".torch")
        (tree / "2.13.0").write_text("built")
        (tree / "2.14.1.xml").write_text(RED)
        status, page = run()
        assert status == 1
        lines = {version: line for line in page.splitlines() for version in TESTED if line.startswith(f"| {version}")}
        assert "`could not be installed: ERROR: No matching distribution found`;" in lines["2.11.0"]
        assert "`not built: safe_inplace cannot be built: no compiler`;" in lines["2.13.0"]
        assert "| 1 | 2 | 0 | the whole suite;" in lines["2.14.1"]
        assert "| 2 | 0 | 2 | the whole suite;" in lines["2.15.0"]
        assert "Failed on torch 2.14.1:\n\n- `tests.test_cuda`" in page

    @pytest.mark.parametrize("torches, status", [("2.14.1 2.15.0", 0), ("2.11.0 2.15.0", 0), ("2.13.0 2.15.0", 1), ("2.11.0", 1)])
    def test_what_is_a_failure(self, run, tree, torches, status):
        """A build that fails; a torch that cannot be installed is none, unless nothing was tested."""
        (tree / "2.11.0").write_text(".torch")
        (tree / "2.13.0").write_text("built")
        assert run(TORCHES=torches)[0] == status

    def test_a_run_that_breaks_off_is_one(self, run, tree):
        (tree / "2.15.0.xml").unlink()
        status, page = run(TORCHES="2.15.0")
        assert status == 1 and "the tests did not end: " in page

    def test_arguments_reach_pytest_and_the_page(self, run, tree):
        status, page = run(TORCHES="2.15.0", ARGS="-k mul_")
        assert status == 0 and "**Shortened** on torch 2.15.0: of the suite only what pytest ran by `-k mul_`." in page
        assert (tree / "arguments").read_text() == "-k mul_"

    def test_it_builds_from_nothing_unless_it_is_told_otherwise(self, run, tree):
        compiled = tree / "build" / "torch-2.15.0" / "some.o"
        compiled.parent.mkdir(parents=True)
        compiled.touch()
        assert "load before" not in run(TORCHES="2.15.0", REUSE="1")[1] and compiled.exists()
        assert "load before" in run(TORCHES="2.15.0", REUSE="")[1] and not compiled.exists()

    def test_a_torch_that_another_package_replaced(self, run, tree):
        """What was tested then is another."""
        (tree / "replaced").write_text("2.14.1")
        status, page = run(TORCHES="2.15.0")
        assert status == 1 and "`.venv/torch-2.15.0 has torch 2.14.1+cpu`; " in page

    def test_rows_of_other_torches_stay(self, run):
        run(TORCHES="2.14.1")
        _, page = run(TORCHES="2.15.0")
        assert page.count("the whole suite") == 2


class Installed(Environment):
    """What the tests run in."""

    venv = "none"
    python = Path(sys.executable)

    def make(self, *targets: str, arguments: str = "", **environment: str) -> Done:
        return Done(0, "")


class TestWheel:
    """Of small sources, by setup.py, in an environment of its own."""

    TEST = """
import sys
import safe_inplace
from safe_inplace import _C, _build_info

def test_where_it_is():
    assert safe_inplace.__file__.startswith(sys.prefix), safe_inplace.__file__

def test_fails():
    assert not FAILS
"""

    def build(
        self, folder: Path, monkeypatch, fails: bool = False, imports: str = "sys", requires: str = "torch==", **options
    ) -> Wheel:
        tree = folder / "tree"
        files = {
            "safe_inplace/__init__.py": f"import {imports}\n__version__ = '0'\n",
            "safe_inplace/__main__.py": "print('CUDA not in this build')\n",
            "csrc/torch_headers.h": "",
            "csrc/small.cpp": SMALL_MODULE.replace("NAME", "_C"),
            "pytest_safe_inplace.py": "",
            "check.py": "import safe_inplace\n",
            "tests/test_small.py": self.TEST.replace("FAILS", str(fails)),
        }
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tree)
        setup = (tree / "setup.py").read_text()
        assert setup.count('"torch==') == 1
        (tree / "setup.py").write_text(setup.replace('"torch==', f'"{requires}'))
        monkeypatch.setattr(wheels, "DIST", folder / "dist")
        monkeypatch.setattr(wheels, "CHECK", tree / "check.py")
        monkeypatch.setattr(wheels, "TESTS", ["test_small.py"])
        for module in (environments, wheels):
            monkeypatch.setattr(module, "ROOT", tree)
            monkeypatch.setattr(module, "LOGS", folder / "logs")
        monkeypatch.setenv("MAX_JOBS", "1")
        return wheels.build(Installed(Version(torch.__version__).public, PYTHON, sys.executable), with_cuda=False, **options)

    def test_it_is_built_and_tested_outside_of_the_tree(self, tmp_path, monkeypatch):
        row = self.build(tmp_path, monkeypatch)
        assert not row.failed and row.problem is None
        (wheel,) = (tmp_path / "dist").iterdir()
        assert row.name == wheel.name and row.size == wheel.stat().st_size
        assert wheel.name.startswith(f"safe_inplace-0+torch{Version(torch.__version__).public}.cpu-")
        assert row.tests == Counts(2, 0, 0, []) and row.build_seconds and row.cuda is None
        (log,) = (tmp_path / "logs").glob("*-wheel.log")
        assert log.read_text().count("building 'safe_inplace._C' extension") == 1, "the time of a build is of one"
        assert not list((tmp_path / "tree").glob("*.egg-info")), "a package that the tests of the tree would find installed"

    def test_a_test_that_fails_on_it(self, tmp_path, monkeypatch):
        row = self.build(tmp_path, monkeypatch, fails=True, reuse=True)
        assert row.build_seconds is None
        assert row.failed and row.tests == Counts(1, 1, 0, ["tests.test_small::test_fails"])

    def test_one_that_cannot_be_imported(self, tmp_path, monkeypatch):
        row = self.build(tmp_path, monkeypatch, imports="nothing_of_this_name")
        assert row.failed and row.tests is None
        assert row.problem == "does not work: ModuleNotFoundError: No module named 'nothing_of_this_name'"

    def test_one_that_requires_what_is_not_there(self, tmp_path, monkeypatch):
        row = self.build(tmp_path, monkeypatch, requires="torch==1!")
        assert row.failed and row.tests is None
        assert row.problem and row.problem.startswith("does not work: ERROR: No matching distribution found for torch==1!")

    @pytest.mark.parametrize(
        "force, torch_cuda, made",
        [("", "13.0", [False, True]), ("", None, [False]), ("0", "13.0", [False]), ("1", "13.0", [True]), ("1", None, [True])],
    )
    def test_with_and_without_cuda(self, monkeypatch, force, torch_cuda, made):
        monkeypatch.setenv("FORCE_CUDA", force)
        monkeypatch.setattr(
            wheels, "build", lambda _, with_cuda, *rest: replace(BUILT_WHEEL, with_cuda=with_cuda, torch_cuda=torch_cuda)
        )
        assert [row.with_cuda for row in wheels.build_all(Installed("2.14.1", PYTHON, sys.executable))] == made

    def test_of_an_unpacked_sdist_there_is_none(self, tmp_path, monkeypatch):
        (tmp_path / "PKG-INFO").touch()
        monkeypatch.setattr(command, "ROOT", tmp_path)
        with pytest.raises(SystemExit, match="all wheels have one name"):
            command.main("wheels")


class TestCheckOfAWheel:
    """Run by the fresh environment; here on the package that is tested, as if it were installed."""

    def check(self, before: str) -> subprocess.CompletedProcess:
        program = f"import runpy, sys, torch, safe_inplace\n{before}\nrunpy.run_path({str(wheels.CHECK)!r})"
        return subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )

    INSTALLED = f"sys.prefix = {str(ROOT)!r}"

    def test_it_passes(self):
        done = self.check(self.INSTALLED)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize(
        "broken, words",
        [
            ("sys.prefix = '/nowhere'", "is not what was installed"),
            (f"{INSTALLED}\nimport contextlib; safe_inplace.guard = contextlib.nullcontext", "guard let a harmful write pass"),
            (f"{INSTALLED}\nsafe_inplace.mul_add = lambda x, scale, shift: x * scale.detach() + shift", "Jacobian mismatch"),
        ],
        ids=["the source tree", "no guard", "a wrong gradient"],
    )
    def test_it_fails(self, broken, words):
        done = self.check(broken)
        assert done.returncode != 0 and words in done.stderr

"""pytest --safe-inplace-guard."""

import os
import re
import tomllib

import pytest
import torch._dynamo  # noqa: F401 - what pytester finds imported it leaves imported, and this must not be imported twice

from safe_inplace._guard import say
from tests.guard.test_run import ROOT

pytest_plugins = "pytester"

STEP = """
import pytest
import torch

def step(write="mul_", value=10):
    x = torch.ones(3, requires_grad=True)
    h = x * 1
    y = h * h
    getattr(h, write)(value)
    return x, y

def silent():
    x = torch.ones(3, requires_grad=True)
    h = x * 1
    y = h * h
    h.data.mul_(10)
    y.sum().backward()
    return x.grad
"""


@pytest.fixture
def suite(pytester, monkeypatch):
    """Runs a suite of tests, in this process unless it has workers; the answer has the summary, without colour, in `section`."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makepyfile(steps=STEP)

    def run(text, *options, mode=None):
        pytester.makepyfile("from steps import *\n" + text)
        option = "--safe-inplace-guard" if mode is None else f"--safe-inplace-guard={mode}"
        start = pytester.runpytest_subprocess if "-n" in options else pytester.runpytest_inprocess
        done = start("-p", "pytest_safe_inplace", "-p", "no:cacheprovider", *options, option)
        after = re.split(r"^=+ safe_inplace guard =+\n", done.stdout.str(), flags=re.MULTILINE)[-1]
        done.section = re.split(r"^=+ .* =+$", after, flags=re.MULTILINE)[0]
        return done

    return run


SILENT = "def test_silent():\n    silent()\n"


def test_a_silently_wrong_gradient_fails_its_test_and_is_told_at_the_end(suite):
    done = suite(SILENT + "def test_right():\n    pass\n")
    done.assert_outcomes(failed=1, passed=1)
    assert done.section.startswith("1 hazard between 1 pair of lines, in 2 tests\n")
    assert "1 time, in test_a_silently_wrong_gradient_fails_its_test_and_is_told_at_the_end.py::test_silent" in done.section
    assert "h.data.mul_(10)" in done.section and "y = h * h" in done.section


def test_no_frame_of_guard_is_shown(suite):
    for mode in ("defer", "raise"):
        text = suite("def test_fails():\n    x, y = step()\n    y.sum().backward()\n", mode=mode).stdout.str()
        assert "HazardError" in text and "safe_inplace/_guard" not in text and "pytest_safe_inplace.py:" not in text


def test_the_modes(suite):
    text = "def test_it():\n    x, y = step()\n"
    for mode, outcome, hazards in (("defer", "passed", 0), ("raise", "failed", 1), ("warn", "passed", 1), ("copy", "passed", 1)):
        done = suite(text, mode=mode)
        done.assert_outcomes(**{outcome: 1})
        assert done.section.startswith(f"{hazards} hazard" if hazards else "no hazards in 1 test"), mode
    text = "def test_it():\n    assert silent().tolist() == [2, 2, 2]\n"
    done = suite(text, mode="copy")
    done.assert_outcomes(passed=1)
    assert "1 time, 12 B copied, in " in done.section


def test_a_mode_that_is_none(suite):
    done = suite(SILENT, mode="loud")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "'loud' is none of defer, raise, warn, copy" in done.stderr.str()


@pytest.mark.parametrize("mode", ["defer", "raise", "warn", "copy"])
def test_what_right_tests_look_at(suite, mode):
    """Each passes without guard."""
    done = suite(
        """
        import warnings

        def test_expects_the_error_of_torch():
            x, y = step()
            with pytest.raises(RuntimeError, match="modified by an inplace"):
                y.sum().backward()

        def test_expects_its_versions():
            x, y = step()
            with pytest.raises(RuntimeError, match="is at version 1; expected version 0 instead"):
                y.sum().backward()

        def test_expects_the_error_of_a_leaf():
            with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
                torch.ones(1, requires_grad=True).mul_(2)

        def test_compares_identities():
            seen = []
            class Own(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x):
                    ctx.save_for_backward(x)
                    return x.clone()
                @staticmethod
                def backward(ctx, g):
                    seen.append(ctx.saved_tensors[0])
                    return g
            x = torch.ones(1, requires_grad=True)
            Own.apply(x).backward()
            assert seen[0] is x

        @pytest.mark.filterwarnings("error")
        def test_turns_warnings_into_errors():
            with torch.autograd.graph.save_on_cpu():
                x = torch.ones(3, requires_grad=True)
                (x * x).sum().backward()
            torch.func.grad(lambda x: x * x)(torch.ones(()))

        @pytest.mark.filterwarnings("error")
        def test_turns_warnings_into_errors_and_drops_a_graph():
            try:
                step()
            except RuntimeError:
                pass

        def test_wants_no_warning(recwarn):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
                    pass
            assert not seen

        def test_uses_hooks_of_its_own():
            packed = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
                x = torch.ones(3, requires_grad=True)
                y = x * x
            assert len(packed) == 2
        """.replace("\n        ", "\n"),
        mode=mode,
    )
    done.assert_outcomes(passed=8)


def test_tests_that_pass_without_guard_alone_are_named(suite):
    done = suite("""
def test_counts():
    x = torch.ones(3, requires_grad=True)
    y = x.sin()
    assert y.grad_fn._saved_self is x
""")
    done.assert_outcomes(passed=1)
    assert "no hazards in" in done.section
    assert re.search(r"ran again without it and passed:\n  \S+::test_counts\n", done.section)


def test_a_hazard_that_a_test_swallows_is_named(suite):
    done = suite("""
def test_swallows():
    try:
        result = silent()
    except RuntimeError:
        result = None
    assert result is not None
""")
    done.assert_outcomes(passed=1)
    assert re.search(r"ran again without it and passed:\n  \S+::test_swallows: \S+steps.py:15, in silent\n", done.section)


def test_errors_that_a_test_expects_are_told_apart(suite):
    done = suite("""
def test_expects():
    x, y = step()
    with pytest.raises(RuntimeError):
        y.sum().backward()
""")
    done.assert_outcomes(passed=1)
    assert done.section.startswith("no hazards in 1 test\n")
    assert re.search(r"caught by the test, which passes:\n  \S+::test_expects: \S+steps.py:8, in step\n", done.section)


def test_a_test_that_fails_by_itself_fails(suite):
    done = suite("""
def test_fails():
    print("ran")
    assert silent is None
@pytest.fixture
def broken():
    raise KeyError
def test_setup(broken):
    pass
@pytest.fixture
def late():
    yield
    raise KeyError
def test_teardown(late):
    pass
@pytest.mark.xfail
def test_xfail():
    assert False
def test_skip():
    pytest.skip()
""")
    done.assert_outcomes(failed=1, errors=2, xfailed=1, skipped=1, passed=1)
    assert "ran again without" not in done.section


def test_fixtures_are_watched(suite):
    done = suite("""
@pytest.fixture
def graph():
    x = torch.ones(3, requires_grad=True)
    h = x * 1
    yield h, h * h
    h.data.mul_(2)

@pytest.fixture
def writes_late():
    x = torch.ones(3, requires_grad=True)
    h = x * 1
    y = h * h
    yield
    h.data.mul_(2)
    y.sum().backward()

def test_writes(graph):
    graph[0].data.mul_(3)
    graph[1].sum().backward()

def test_late(writes_late):
    pass
""")
    done.assert_outcomes(failed=1, errors=1, passed=1)
    assert done.section.startswith("2 hazards between 2 pairs of lines")


def test_who_listened_before_listens_afterwards(suite, monkeypatch):
    """As the command does that the tests run under."""
    heard = []
    monkeypatch.setattr(say, "listener", heard.append)
    suite("def test_says():\n    with torch.autograd.graph.save_on_cpu():\n        step()\n")
    say.say_once("these words", "afterwards")
    assert heard == ["afterwards"]


def test_the_marker(suite):
    done = suite("@pytest.mark.no_safe_inplace_guard\n" + SILENT, "--strict-markers")
    done.assert_outcomes(passed=1)
    assert done.section.startswith("no hazards in 0 tests")


def test_the_marker_without_the_option(pytester):
    pytester.makepyfile("import pytest\n@pytest.mark.no_safe_inplace_guard\ndef test_it(): pass\n")
    done = pytester.runpytest_subprocess("-p", "pytest_safe_inplace", "--strict-markers")
    done.assert_outcomes(passed=1)
    assert "safe_inplace" not in done.stdout.str()


def test_without_the_option_torch_is_not_imported(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile("import sys\ndef test_it(): assert 'torch' not in sys.modules and 'safe_inplace' not in sys.modules\n")
    pytester.runpytest_subprocess("-p", "pytest_safe_inplace").assert_outcomes(passed=1)


def test_workers_bring_their_results_together(suite):
    text = "@pytest.mark.parametrize('i', range(5))\ndef test_silent(i):\n    silent()\ndef test_right():\n    pass\n"
    done = suite(text, "-n", "2")
    done.assert_outcomes(failed=5, passed=1)
    assert done.section.startswith("5 hazards between 1 pair of lines, in 6 tests\n") and " and 2 more: " in done.section
    assert done.section.count("h.data.mul_(10)") == 1


def test_the_controller_of_workers_does_not_import_torch(suite, pytester):
    pytester.makeconftest("import sys\ndef pytest_unconfigure(config):\n    print('torch', 'torch' in sys.modules, flush=True)\n")
    text = "def test_it():\n    __import__('steps').silent()\n"
    done = suite(text.replace("from steps import *", ""), "-n", "1", "-s")
    assert "torch False" in done.stdout.str()


def test_other_plugins_that_run_tests_keep_the_guard(suite, pytester):
    pytester.makeconftest("""
import pytest
from _pytest.runner import runtestprotocol
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    for _ in range(2):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    return True
""")
    done = suite(SILENT)
    done.assert_outcomes(failed=1)
    assert done.section.startswith("1 hazard")


def test_the_entry_point(pytester, monkeypatch):
    """Installed, it is found by itself, and -p names the same plugin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["pytest11"]
    assert project["tool"]["setuptools"]["py-modules"] == list(points.values())
    installed = pytester.mkdir("installed")
    (installed / "some.dist-info").mkdir()
    (installed / "some.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: some\nVersion: 1\n")
    lines = [f"{name} = {module}\n" for name, module in points.items()]
    (installed / "some.dist-info" / "entry_points.txt").write_text("[pytest11]\n" + "".join(lines))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{installed}")
    pytester.makepyfile("def test_it(): pass\n")
    for options in ((), ("-p", "pytest_safe_inplace")):
        done = pytester.runpytest_subprocess(*options, "--safe-inplace-guard")
        done.assert_outcomes(passed=1)
        assert "no hazards in 1 test" in done.stdout.str()


def test_no_failing_test_turns_green(suite, pytester):
    """By what another plugin makes of the second run, or in a group of errors."""
    pytester.makeconftest(
        """
        import pytest

        def pytest_runtest_makereport(item, call):
            if "incremental" in item.keywords and call.excinfo is not None:
                item.parent._previousfailed = item

        def pytest_runtest_setup(item):
            if "incremental" in item.keywords and getattr(item.parent, "_previousfailed", None) is not None:
                pytest.xfail("a test before failed")
        """
    )
    done = suite(
        """
        import asyncio

        @pytest.mark.incremental
        class TestSteps:
            def test_fails(self):
                assert 1 == 2

        def test_group():
            async def one():
                silent()
            async def main():
                async with asyncio.TaskGroup() as group:
                    group.create_task(one())
            asyncio.run(main())

        @pytest.mark.xfail(strict=True)
        def test_expected():
            x = torch.ones(2, requires_grad=True)
            assert x.sin().grad_fn._saved_self is not x

        @pytest.mark.skip
        def test_skipped():
            pass
        """.replace("\n        ", "\n"),
        "-W",
        "ignore::pytest.PytestUnknownMarkWarning",
    )
    done.assert_outcomes(failed=2, xfailed=1, skipped=1)
    assert done.section.startswith("1 hazard between 1 pair of lines")


@pytest.mark.parametrize("options", [(), ("--doctest-continue-on-failure",)])
def test_doctests(suite, options):
    """What an example raised, doctest keeps apart; and it clears the names at the end of a run."""
    done = suite(
        """
        def wrong():
            '''
            >>> silent().tolist()
            [2.0, 2.0, 2.0]
            >>> silent().tolist()
            [2.0, 2.0, 2.0]
            '''

        def looks_at_what_is_saved():
            '''
            >>> x = torch.ones(2, requires_grad=True)
            >>> x.sin().grad_fn._saved_self is x
            True
            '''

        def fails():
            '''
            >>> step("mul")[0].tolist()
            [2.0]
            '''
        """.replace("\n        ", "\n"),
        "--doctest-modules",
        *options,
    )
    done.assert_outcomes(failed=2, passed=1)
    assert "NameError" not in done.stdout.str()
    done.stdout.fnmatch_lines(["FAILED *fails", "FAILED *wrong"])
    assert "between 1 pair of lines, in 1 test\n" in done.section


@pytest.mark.parametrize("mode", ["defer", "raise", "warn"])
def test_what_a_test_says_of_torchs_error_is_an_error_of_its_own(suite, mode):
    """Where torch alone would have raised none, it is guard's."""
    done = suite(
        """
        import unittest

        def wrong():
            x, y = step()
            y.sum().backward()

        def test_words():
            try:
                wrong()
            except RuntimeError as error:
                assert "is at version 1; expected version 0" in str(error)

        def test_raises_another():
            try:
                wrong()
            except RuntimeError as error:
                if "expected version 0" not in str(error):
                    raise ValueError("unexpected") from error

        class TestWords(unittest.TestCase):
            def test_regex(self):
                with self.assertRaisesRegex(RuntimeError, "is at version 1; expected version 0"):
                    wrong()

        def test_silent():
            try:
                silent()
            except RuntimeError as error:
                raise ValueError("training failed") from error
        """.replace("\n        ", "\n"),
        mode=mode,
    )
    # Under warn nothing is raised where torch raises nothing.
    done.assert_outcomes(passed=4) if mode == "warn" else done.assert_outcomes(failed=1, passed=3)
    assert bool(re.search(r"^FAILED .*::test_silent", done.stdout.str(), re.MULTILINE)) == (mode != "warn")


def test_a_second_run_says_its_own(suite, pytester):
    done = suite(
        """
        def test_twice(record_property):
            record_property("runs", 1)
            print("says it")
            x = torch.ones(2, requires_grad=True)
            assert x.sin().grad_fn._saved_self is x
            raise KeyError
        """.replace("\n        ", "\n"),
        "--junitxml=found.xml",
    )
    done.assert_outcomes(failed=1)
    assert done.stdout.str().count("says it") == 2  # the line, and what it printed
    assert (pytester.path / "found.xml").read_text().count('<property name="runs"') == 1


def test_a_plugin_that_makes_reports_of_its_own(suite, pytester):
    pytester.makeconftest(
        """
        import pytest

        @pytest.hookimpl(wrapper=True, tryfirst=True)
        def pytest_runtest_makereport(item, call):
            yield
            return pytest.TestReport.from_item_and_call(item, call)
        """
    )
    done = suite(SILENT + "def test_right():\n    pass\n")
    done.assert_outcomes(failed=1, passed=1)
    assert done.section.startswith("1 hazard between 1 pair of lines, in 2 tests\n")


def test_what_the_fixtures_of_a_class_or_module_keep_is_there_for_a_second_run_and_for_later_tests(suite):
    done = suite(
        """
        import unittest

        class TestClass(unittest.TestCase):
            torn_down = []

            @classmethod
            def setUpClass(cls):
                cls.x = torch.ones(3, requires_grad=True)
                cls.h = cls.x * 1
                cls.y = cls.h * cls.h

            @classmethod
            def tearDownClass(cls):
                cls.torn_down.append(1)

            def test_first(self):
                pass

            def test_overwrites(self):
                self.h.data.mul_(3)

            def test_reads(self):
                assert self.torn_down == []
                self.y.sum().backward()
                self.assertEqual(self.x.grad.tolist(), [2, 2, 2])

        def test_torn_down_once():
            assert TestClass.torn_down == [1]

        @pytest.fixture(scope="module")
        def fails_at_its_end():
            yield torch.ones(3, requires_grad=True)
            raise ValueError("at the end")

        def test_last(fails_at_its_end):
            assert fails_at_its_end.sin().grad_fn._saved_self is fails_at_its_end
        """.replace("\n        ", "\n"),
        mode="warn",
    )
    done.assert_outcomes(failed=1, passed=4, errors=1)
    done.stdout.fnmatch_lines(["E  *ValueError: at the end", "FAILED *test_reads*", "ERROR *test_last*"])
    # Of the fixture that the first test made; told by the test that wrote.
    assert done.section.startswith("1 hazard between 1 pair of lines, in 3 tests\n")
    assert "::TestClass::test_overwrites: a value" in done.section
    assert "ran again without it and passed:\n" in done.section and "::test_last" in done.section

"""pytest --safe-inplace-guard: each test under a guard, and a section of what was found.

A module beside the package, since importing the package imports torch: a session without the option does not pay for it.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from _pytest.doctest import MultipleDoctestFailures
from _pytest.runner import runtestprotocol

MODES = ("defer", "raise", "warn", "copy")
MARKER = "no_safe_inplace_guard"
_TITLE = "safe_inplace guard"


def _mode(value: str) -> str:
    if value not in MODES:
        raise argparse.ArgumentTypeError(
            f"{value!r} is none of {', '.join(MODES)}; a path goes in front of the option, or the mode is written: "
            f"--safe-inplace-guard=defer {value}"
        )
    return value


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("safe_inplace", "in-place writes that destroy what autograd saved").addoption(
        "--safe-inplace-guard",
        nargs="?",
        const="defer",
        type=_mode,
        metavar="MODE",
        help="run each test under safe_inplace.guard: an overwritten value is refused where backward asks for it (defer, the "
        "default), the write is (raise), it is only told of (warn), or repaired by a copy (copy)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}: run without the guard of --safe-inplace-guard")
    mode = config.getoption("safe_inplace_guard")
    if mode is not None:
        worker = hasattr(config, "workerinput")
        if not worker:
            config.pluginmanager.register(_Summary(mode), "safe_inplace_guard_summary")
        # The controller of xdist runs no test itself.
        if worker or config.getoption("dist", "no") == "no":
            config.pluginmanager.register(_Guards(mode), "safe_inplace_guard")


_watch = pytest.StashKey[Any]()  # the guard of a test, or None
# What is told of each phase; another plugin may put a report of its own in the place of ours.
_told = pytest.StashKey[dict[str, dict[str, Any]]]()


class _Guards:
    def __init__(self, mode: str) -> None:
        from safe_inplace import guard
        from safe_inplace._guard import say
        from safe_inplace._guard.hazards import comes_of_a_hazard

        self._say = say
        self._mode = mode
        self._guard = guard
        self._comes_of_a_hazard = comes_of_a_hazard
        self._said: list[str] = []
        # What was told of each guard that anything still holds, such as a graph that a fixture of a module keeps.
        self._told: weakref.WeakKeyDictionary[Any, dict[str, dict[str, Any]]] = weakref.WeakKeyDictionary()
        # A warning would be an error, or one too many, in tests that look at these.
        self._listened, say.listener = say.listener, self._said.append

    def pytest_unconfigure(self) -> None:
        self._say.listener = self._listened

    # -- each phase of a test under its guard, whoever runs it

    @contextmanager
    def _watched(self, item: pytest.Item) -> Iterator[None]:
        if _watch not in item.stash:  # somebody else runs it
            self._begin(item, self._mode)
        watch = item.stash[_watch]
        if watch is None:
            yield
        else:
            with watch:
                yield

    def _begin(self, item: pytest.Item, mode: str | None) -> None:
        if mode is None or item.get_closest_marker(MARKER) is not None:
            item.stash[_watch] = None
            return
        watch: Any = self._guard(mode)  # type: ignore[arg-type]
        watch._findings.teller = lambda hazard: None  # the section tells
        self._told[watch] = {}
        item.stash[_watch] = watch

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._watched(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._watched(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._watched(item):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        report = yield
        # Plain values: they travel to the process that prints.
        told: dict[str, Any] = {"error": any(self._comes_of_a_hazard(error, silent=True) for error in _errors(call))}
        if call.when == "teardown":
            told |= {
                "watched": item.stash.get(_watch, None) is not None,
                "how": "",
                "said": self._said[:],
                "hazards": self._news(),
            }
            self._said.clear()
            del item.stash[_watch]
        report._safe_inplace = item.stash.setdefault(_told, {})[call.when] = told
        return report

    def _news(self) -> list[dict[str, Any]]:
        """What was found since the last test, by its own guard, and by those of tests before of which it used the graphs."""
        news = []
        for watch, told in list(self._told.items()):
            for hazard in map(_plain, watch.hazards):
                before = told.get(hazard["pair"], {"count": 0, "bytes_copied": 0})
                told[hazard["pair"]] = hazard
                if hazard["count"] > before["count"]:
                    news.append({**hazard, **{key: hazard[key] - before[key] for key in ("count", "bytes_copied")}})
        return news

    # -- a test that fails under guard and is right

    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Guard changes what a test can look at: which object ctx.saved_tensors gives, or that torch refuses, and where. So a
        test that fails by another error than guard's runs again without. One that guard stopped at a write runs again with
        the stop in backward, where torch's own is: it passes if it waits for that."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = self._reports(item)
        self._leave(item, nextitem, reports)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        del item.stash[_told]
        return True

    def _leave(self, item: pytest.Item, nextitem: pytest.Item | None, reports: list[Any]) -> None:
        """Once, after the last run: what the next test does not need is torn down."""
        self._begin(item, self._mode)

        def tear_down() -> None:
            with self._watched(item):
                item.session._setupstate.teardown_exact(nextitem)

        call = pytest.CallInfo.from_call(tear_down, when="teardown", reraise=(pytest.exit.Exception, KeyboardInterrupt))
        last = reports[-1]
        if call.excinfo is None:
            last._safe_inplace["hazards"] += self._news()
            del item.stash[_watch]
            return
        report: Any = item.ihook.pytest_runtest_makereport(item=item, call=call)
        last._safe_inplace["hazards"] += item.stash[_told]["teardown"]["hazards"]
        report._safe_inplace = {}
        if last.passed:
            report._safe_inplace = reports.pop()._safe_inplace
        reports.append(report)

    def _reports(self, item: pytest.Item) -> list[Any]:
        # A doctest clears its names at its end.
        names = getattr(getattr(item, "dtest", None), "globs", {})
        before = names.copy(), item.user_properties[:]

        def run(mode: str | None) -> list[Any]:
            self._begin(item, mode)
            names.clear()
            names.update(before[0])
            item.user_properties[:] = before[1]
            item._report_sections.clear()
            # What is torn down after one run is not there for another.
            reports: list[Any] = runtestprotocol(item, log=False, nextitem=item.parent)  # type: ignore[arg-type]
            for report in reports:
                report._safe_inplace = item.stash[_told][report.when]
            return reports

        def fails(reports: list[Any]) -> bool:
            return any(report.failed for report in reports)

        def passes(reports: list[Any]) -> bool:
            """That nothing failed is not enough: what ran before may have another plugin skip it, or expect it to fail."""
            expected = item.get_closest_marker("xfail") is not None
            calls = [report for report in reports if report.when == "call"]
            return not fails(reports) and any(report.passed or (report.skipped and expected) for report in calls)

        def stopped_by_guard(reports: list[Any]) -> bool:
            return any(report.failed and report._safe_inplace["error"] for report in reports)

        reports = run(self._mode)
        if item.get_closest_marker(MARKER) is not None:
            return reports
        if self._mode == "raise" and stopped_by_guard(reports):
            later = run("defer")
            if stopped_by_guard(later) or not later[-1]._safe_inplace["hazards"]:
                return reports
            reports = later
        hazards = reports[-1]._safe_inplace["hazards"]
        if fails(reports) and not stopped_by_guard(reports):
            without = run(None)
            if passes(without):
                reports = without
                reports[-1]._safe_inplace.update(how="without", hazards=hazards)
            elif fails(without):
                reports = without
        elif self._mode in ("defer", "raise") and not fails(reports):
            reports[-1]._safe_inplace["how"] = "caught"
        return reports


def _errors(call: pytest.CallInfo[None]) -> list[BaseException]:
    """What was raised. A doctest keeps apart what its examples raised."""
    if call.excinfo is None:
        return []
    import doctest

    error = call.excinfo.value
    failures = error.failures if isinstance(error, MultipleDoctestFailures) else [error]
    return [failure.exc_info[1] if isinstance(failure, doctest.UnexpectedException) else failure for failure in failures]


def _plain(hazard: Any) -> dict[str, Any]:
    return {
        "pair": f"{hazard.kind} {hazard.mutation} {hazard.save}",
        "line": str(hazard.mutation or hazard.save),
        "texts": [hazard.text(False), hazard.text(True)],
        "count": hazard.count,
        "bytes_copied": hazard.bytes_copied,
    }


class _Summary:
    """Where the results of all workers come together."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._watched = 0
        self._caught: dict[str, list[str]] = {}
        self._without: dict[str, list[str]] = {}
        self._said: dict[str, None] = {}
        self._found: dict[str, tuple[dict[str, Any], list[str]]] = {}

    def pytest_report_header(self) -> str:
        return f"{_TITLE}: {self._mode}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = getattr(report, "_safe_inplace", {})
        if "watched" not in told:
            return
        self._watched += told["watched"]
        self._said.update(dict.fromkeys(told["said"]))
        lines = [hazard["line"] for hazard in told["hazards"]]
        if told["how"] == "without":
            self._without[report.nodeid] = lines
        elif told["how"] == "caught" and lines:
            self._caught[report.nodeid] = lines
        for hazard in told["hazards"] if not told["how"] else ():
            first, tests = self._found.setdefault(hazard["pair"], (hazard, []))
            if first is not hazard:
                first["count"] += hazard["count"]
                first["bytes_copied"] += hazard["bytes_copied"]
            tests.append(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        tr = terminalreporter
        tr.section(_TITLE)
        tests = f"{self._watched} test{'s' * (self._watched != 1)}"
        pairs = len(self._found)
        count = sum(hazard["count"] for hazard, _ in self._found.values())
        tr.line(
            f"{count} hazard{'s' * (count != 1)} between {pairs} pair{'s' * (pairs != 1)} of lines, in {tests}"
            if pairs
            else f"no hazards in {tests}"
        )
        for hazard, nodes in sorted(self._found.values(), key=lambda found: (-len(found[1]), found[0]["pair"])):
            times = f"{hazard['count']} time{'s' * (hazard['count'] != 1)}"
            if hazard["bytes_copied"]:
                times += f", {hazard['bytes_copied']} B copied"
            shown = nodes if tr.config.get_verbosity() > 0 else nodes[:3]
            rest = f" and {len(nodes) - len(shown)} more" if len(shown) < len(nodes) else ""
            tr.line(f"\n{times}, in {', '.join(shown)}{rest}: {hazard['texts'][tr.hasmarkup]}")
        for what, tests_and_lines in (
            ("raised, and caught by the test, which passes", self._caught),
            ("failed under guard by an error of their own, ran again without it and passed", self._without),
        ):
            if tests_and_lines:
                tr.line(f"\n{what}:")
            for node, lines in tests_and_lines.items():
                tr.line(f"  {node}" + (f": {', '.join(lines)}" if lines else ""))
        for words in self._said:
            tr.line(f"\n{words}")

"""python -m matrix test-matrix | wheels, by make. TORCHES are those to go through, ARGS more arguments for pytest; with REUSE
what is compiled already is used, and no time of a build is told."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import README, ROOT

from . import report, suite, wheels
from .environments import environments
from .rows import RESULTS, Row, Wheel, write


def main(command: str, results: Path = RESULTS, page: Path = report.PAGE, readme: Path = README) -> int:
    arguments, reuse = os.environ.get("ARGS", ""), bool(os.environ.get("REUSE"))
    matrix = command == "test-matrix"
    if not matrix and (ROOT / "PKG-INFO").is_file():
        raise SystemExit("of an unpacked sdist all wheels have one name: make wheels works in a checkout")
    rows: list[Row] = []
    made: Sequence[Row]
    for environment in environments(os.environ.get("TORCHES", "")):
        print(f"==> torch {environment.torch}, Python {environment.version}", flush=True)
        kind = Row if matrix else Wheel
        made = [suite.test(environment, arguments, reuse)] if matrix else wheels.build_all(environment, arguments, reuse)
        if not os.environ.get("FORCE_CUDA"):
            for name in kind.files(environment.torch):
                (results / name).unlink(missing_ok=True)
        for row in made:
            write(row, results)
        rows += made
        # After each: the next may take hours.
        if matrix:
            report.write_page(results, page)
        else:
            report.write_readme(results, readme)
    print(f"\n{report.page(results) if matrix else report.readme_section(results)}")
    # A torch that cannot be had is no fault, but nothing at all is no test.
    return int(any(row.failed for row in rows) or not any(row.tests for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

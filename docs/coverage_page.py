"""The page of `make coverage`, from the files that its tools leave in a folder: `python docs/coverage_page.py FOLDER TREE`."""

import json
import os
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath

from benchmarks.pages import markdown
from matrix.rows import counts

PAGE = """# Coverage

Which lines and branches the tests reach, as `make coverage` found it, which writes this page and leaves the reports of each line
in `build/`.

**{about}: `{command}`: {outcome}**

A line is reached where any process of the tests ran it: workers of pytest, what they fork, the programs that they start; but not
by a process that was killed. Not reached is what is there for another torch, another Python or another CPU. Branches of C++ are
counted without those of exceptions, and in a template for each of its instances: where there are thousands, the lines say more.
Of CUDA there is what the tests run on the CPU, the planning and the code of its kernels in `csrc/cuda/*.h`, where
`tests/test_cuda_plan.py` is among them; the `.cu` files are not compiled here.

{tables}

A file of which all is reached has no row of its own.
"""


@dataclass(frozen=True)
class Reached:
    file: PurePath
    lines: int
    lines_of: int
    branches: int
    branches_of: int

    @property
    def whole(self) -> bool:
        return (self.lines, self.branches) == (self.lines_of, self.branches_of)


def python(text: str) -> list[Reached]:
    """Of coverage.py's report."""
    summaries = {name: file["summary"] for name, file in json.loads(text)["files"].items()}
    fields = ("covered_lines", "num_statements", "covered_branches", "num_branches")
    return [Reached(PurePath(name), *(summary[field] for field in fields)) for name, summary in summaries.items()]


def core(text: str) -> list[Reached]:
    """Of gcovr's summary."""
    fields = ("line_covered", "line_total", "branch_covered", "branch_total")
    return [Reached(PurePath(file["filename"]), *(file[field] for field in fields)) for file in json.loads(text)["files"]]


def outcome(report: Path, status: int) -> str:
    """Of pytest's report, and of how it ended: 2 is by a signal."""
    found = counts(report)
    if found is None:
        raise FileNotFoundError(report)
    numbers = {"passed": found.passed, "failed": found.failed, "skipped": found.skipped}
    words = ", ".join(f"{count:,} {what}" for what, count in numbers.items() if count)
    return f"{words}, and then it was interrupted, by which counts are lost" if status == 2 else words


def share(part: int, whole: int) -> str:
    # Rounded down: 100% is all.
    return f"{1000 * part // whole / 10:.1f}% of {whole:,}" if whole else "-"


def row(name: str, found: list[Reached]) -> list[str]:
    lines = share(sum(one.lines for one in found), sum(one.lines_of for one in found))
    branches = share(sum(one.branches for one in found), sum(one.branches_of for one in found))
    return [name, lines, branches]


def table(heading: str, found: list[Reached]) -> str:
    body = [row("**all**", found)]
    for folder in sorted({one.file.parent for one in found}):
        here = sorted((one for one in found if one.file.parent == folder), key=lambda one: one.file)
        if folder.name:
            body.append(row(f"**{folder}**", here))
        body += [row(str(one.file) if not folder.name else one.file.name, [one]) for one in here if not one.whole]
    return markdown([heading, "lines", "branches"], body)


def page(folder: Path, about: str, command: str, status: int = 0) -> str:
    found = {"Python": python((folder / "python.json").read_text()), "C++": core((folder / "core.json").read_text())}
    tables = "\n\n".join(table(heading, reached) for heading, reached in found.items())
    return PAGE.format(about=about, command=command, outcome=outcome(folder / "tests.xml", status), tables=tables)


def main() -> None:
    import torch

    about = (
        f"torch {torch.__version__}, Python {platform.python_version()}, a CPU with {torch.backends.cpu.get_cpu_capability()}, "
        f"commit {os.environ['COMMIT']}, {datetime.now(UTC):%Y-%m-%d}"
    )
    text = page(Path(sys.argv[1]), about, os.environ["COMMAND"], int(os.environ["STATUS"]))
    Path(sys.argv[2], "docs", "coverage.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

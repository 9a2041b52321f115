"""The page of the matrix and the README's part on wheels, made from the rows in results/ and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks import pages

from .environments import TESTED
from .rows import RESULTS, Counts, Row, Wheel, read

PAGE = pages.ROOT / "docs" / "matrix.md"
BEGIN, END = "<!-- wheels: written by make wheels, not by hand -->", "<!-- /wheels -->"
# Of a torch where everything fails nobody reads every name.
NAMED = 20


def cell(text: str) -> str:
    return text.replace("|", r"\|")


def quoted(text: str) -> str:
    """As it was typed or said: of a word of Markdown in it, or of HTML, nothing is made."""
    return f"`{text.replace('`', chr(39))}`"


def build_time(row: Row) -> str:
    """The load tells what else the machine was doing."""
    if row.build_seconds is None:
        return "-"
    seconds = round(row.build_seconds)
    return f"{seconds // 60} min {seconds % 60:02d} s (load before {row.load})"


def torch_cell(row: Row) -> str:
    if row.torch_version is None:
        return row.torch
    return f"{row.torch_version}, {f'CUDA {row.torch_cuda}' if row.torch_cuda else 'CPU only'}"


def cuda_cell(row: Row) -> str:
    return f"CUDA {row.cuda} for {row.cuda_archs}" if row.cuda else "no"


def counts_cells(tests: Counts | None) -> list[str]:
    return ["-"] * 3 if tests is None else [str(tests.passed), str(tests.failed), str(tests.skipped)]


def machines(rows: Iterable[Row]) -> str:
    return "; ".join(dict.fromkeys(f"{row.processor}, {row.jobs} compilers at a time" for row in rows if row.build_seconds))


def when(row: Row) -> str:
    return f"commit {row.commit}, {row.date}"


def matrix_cells(torch: str, row: Row | None) -> list[str]:
    if row is None:
        return [torch, *["-"] * 7, "not run yet"]
    built = row.tests is not None or row.build_seconds is not None
    ran = "shortened, see below" if row.arguments else "the whole suite"
    return [
        torch_cell(row),
        row.python,
        cell(row.compiler or "-"),
        cuda_cell(row) if built else "-",
        build_time(row),
        *counts_cells(row.tests),
        f"{cell(quoted(row.problem)) if row.problem else ran}; {when(row)}",
    ]


def page(folder: Path = RESULTS) -> str:
    rows = {row.torch: row for row in read(Row, TESTED, folder)}
    header = ["torch", "Python", "compiler", "CUDA code", "build", "passed", "failed", "skipped", "what ran"]
    parts = [
        "# Tested with",
        "Written by `make test-matrix`, which installs each torch that `pyproject.toml` lists, builds the extension for it and "
        "runs [the tests](testing.md). Kernels of CUDA code run in them where there is a GPU.",
        pages.markdown(header, [matrix_cells(torch, rows.get(torch)) for torch in TESTED], right=5),
    ]
    if machines(rows.values()):
        parts.append(
            f"A build starts from nothing and includes what only the tests use; its time is that of {machines(rows.values())}."
        )
    for arguments in dict.fromkeys(row.arguments for row in rows.values() if row.arguments):
        those = ", ".join(torch for torch, row in rows.items() if row.arguments == arguments)
        parts.append(f"**Shortened** on torch {those}: of the suite only what pytest ran by {quoted(arguments)}.")
    for row in rows.values():
        if row.tests and row.tests.failed:
            more = row.tests.failed - NAMED
            names = [*(f"`{name}`" for name in row.tests.failures[:NAMED]), *([f"and {more} more"] if more > 0 else [])]
            parts += [f"Failed on torch {row.torch}:", "\n".join(f"- {name}" for name in names)]
    return "\n\n".join(parts) + "\n"


def wheel_cells(row: Wheel) -> list[str]:
    if row.problem or row.tests is None:
        said = cell(quoted(row.problem or "not tested"))
    else:
        failed = f"{row.tests.failed} failed, " if row.tests.failed else ""
        shortened = f", shortened: {cell(quoted(row.arguments))}" if row.arguments else ""
        said = f"{failed}{row.tests.passed} passed, {row.tests.skipped} skipped{shortened}"
    return [
        f"`{row.name}`" if row.name else f"for torch {row.torch}, {'with' if row.with_cuda else 'without'} CUDA",
        cuda_cell(row) if row.name else "-",
        f"{row.size / 1e6:.1f} MB" if row.size else "-",
        build_time(row),
        f"{said}; {when(row)}",
    ]


def readme_section(folder: Path = RESULTS) -> str:
    rows = read(Wheel, TESTED, folder)
    if not rows:
        return "No wheel has been built yet: `make wheels` builds them."
    table = pages.markdown(["wheel", "CUDA code", "size", "build", "tests"], [wheel_cells(row) for row in rows], right=5)
    return f"{table}\n\nThe times are those of {machines(rows)}." if machines(rows) else table


def write_page(folder: Path = RESULTS, path: Path = PAGE) -> None:
    path.write_text(page(folder))


def write_readme(folder: Path = RESULTS, path: Path = pages.README) -> None:
    path.write_text(pages.insert(path.read_text(), readme_section(folder), BEGIN, END))

"""Two builds of the package side by side: `python -m benchmarks compare --base some.whl`.

One process cannot load both, so each has a process of its own, which measures while the other waits. They take turns at
every case, and a ratio is taken within a turn: what else the machine does hits both. The cases, what measures them and
torch are this tree's for both; only the package differs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table as RichTable
from rich.text import Text

import safe_inplace

from .cases import Case
from .implementations import OURS
from .models import Model
from .pages import ROOT, commit
from .report import bytes_text, seconds_text
from .results import Measured, Row, provenance
from .runner import Effort, Reference, run_case, run_model

Job = Case | Model


@dataclass(frozen=True)
class Compared(Measured):
    """Seconds with either build, the medians of the turns; ratio is the median of new over base, low and high the ends.

    The rows of torch's own implementations show what the machine alone does to a ratio.
    """

    base: float
    new: float
    ratio: float
    low: float
    high: float
    turns: int


class BuildFailed(RuntimeError):
    pass


class Build:
    """A process that has loaded one build."""

    def __init__(self, name: str, package: Path, arguments: list[str]) -> None:
        self.name = name
        # Not the folder that runs this: where it is a tree, its package would come first.
        path = os.pathsep.join([str(package.parent), str(ROOT)])
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks", *arguments, "--serve"],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about = self.answer()
        if Path(self.about["package"]) != package.resolve():
            raise BuildFailed(f"{name}: loaded {self.about['package']} instead of {package.resolve()}")

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise BuildFailed(f"the process of the {self.name} build ended with {self.process.wait()}")
        return json.loads(line)

    def measure(self, job: int) -> list[Row]:
        self.process.stdin.write(f"{job}\n")
        self.process.stdin.flush()
        return [Row(**row) for row in self.answer()]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(jobs: list[Job], device: torch.device, effort: Effort) -> None:
    """The inside of a Build: says what it has loaded, then measures the job whose number it reads, until there is none."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What libraries print is no answer.
    os.dup2(2, 1)
    about = provenance(device) | {"package": str(Path(safe_inplace.__file__).resolve().parent)}
    lacks = [i for i, job in enumerate(jobs) if isinstance(job, Case) and not hasattr(safe_inplace, job.op.name)]
    answers.write(json.dumps(about | {"lacks": lacks}) + "\n")
    reference = Reference(device)
    for line in sys.stdin:
        job = jobs[int(line)]
        if isinstance(job, Case):
            rows = run_case(job, device, effort, reference)
        else:
            rows = run_model(job, device, effort, compile=False)
        answers.write(json.dumps([asdict(row) for row in rows]) + "\n")


@contextmanager
def package_of(base: Path) -> Iterator[Path]:
    """The package in a wheel, or in a folder that has one built, where nothing else can be imported beside it."""
    with TemporaryDirectory() as folder:
        package = Path(folder, "safe_inplace")
        if base.is_dir():
            package.symlink_to((base / "safe_inplace").resolve())
        else:
            with zipfile.ZipFile(base) as wheel:
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("safe_inplace/")])
        yield package


def name_of(base: Path) -> str:
    """The commit of a tree, the file's name of a wheel, or what BASE_COMMIT says."""
    return commit(base, "BASE_COMMIT") if base.is_dir() else os.environ.get("BASE_COMMIT", base.name)


def in_turns(new: Build, base: Build, job: int, turns: int) -> list[Compared]:
    found: dict[tuple, list[tuple[float, float]]] = {}
    for turn in range(turns):
        order = (base, new) if turn % 2 == 0 else (new, base)
        rows = {build.name: build.measure(job) for build in order}
        for mine, theirs in zip(rows[new.name], rows[base.name], strict=True):
            found.setdefault((*mine.case, mine.implementation), []).append((mine.p50, theirs.p50))
    return [compared(key, pairs) for key, pairs in found.items()]


def compared(key: tuple, pairs: list[tuple[float, float]]) -> Compared:
    ratios = [mine / theirs for mine, theirs in pairs]
    new, base = (statistics.median(times) for times in zip(*pairs, strict=True))
    return Compared(*key, base, new, statistics.median(ratios), min(ratios), max(ratios), len(ratios))


@contextmanager
def builds(base: Path, arguments: list[str]) -> Iterator[tuple[Build, Build]]:
    """This tree's build, and the one at `base`."""
    with ExitStack() as stack:
        packages = {"new": ROOT / "safe_inplace", "base": stack.enter_context(package_of(base))}
        pair = []
        for name, package in packages.items():
            pair.append(Build(name, package, arguments))
            stack.callback(pair[-1].close)
        yield pair[0], pair[1]


def table(rows: list[Compared]) -> RichTable:
    """Our row of every case, and beside it the ratio of torch's own: what lies within that is noise. Slower is red."""
    made = RichTable(title="Time with this build over that with the base", title_justify="left")
    for column in ("op", "layout", "dtype", "size", "mode"):
        made.add_column(column)
    for column in ("base", "new", "new / base", "in turns", "torch's own"):
        made.add_column(column, justify="right", no_wrap=True)
    cases: dict[tuple, dict[str, Compared]] = {}
    for row in rows:
        cases.setdefault((row.op, row.layout, row.dtype, row.size, row.mode), {})[row.implementation] = row
    for by in cases.values():
        ours = by.pop(OURS)
        made.add_row(
            ours.op,
            ours.layout,
            ours.dtype,
            bytes_text(ours.size),
            ours.mode,
            seconds_text(ours.base),
            seconds_text(ours.new),
            Text(f"{ours.ratio:.3f}", style="red" if ours.low > 1 else ""),
            f"{ours.low:.3f} to {ours.high:.3f}",
            " ".join(f"{row.ratio:.3f}" for row in by.values()),
        )
    return made


def summary(rows: list[Compared]) -> str:
    ours, others = [], []
    for row in rows:
        (ours if row.implementation == OURS else others).append(row.ratio)
    median, noise = statistics.median(ours), statistics.median(others)
    return f"median of new / base: {median:.3f} in {len(ours)} cases, {noise:.3f} of torch's own"

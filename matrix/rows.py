"""What came of a torch, and the file in results/ that it is kept in."""

from __future__ import annotations

import ast
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

from benchmarks.pages import ROOT, commit, processor

from .environments import Environment, compiler

RESULTS = ROOT / "matrix" / "results"


@dataclass
class Counts:
    passed: int
    failed: int
    skipped: int
    failures: list[str]


def counts(xml: Path) -> Counts | None:
    """Of pytest's --junitxml. A test that fails and whose teardown fails as well is one; what is expected to fail is skipped."""
    if not xml.is_file():
        return None
    outcomes = defaultdict(set)
    for case in ElementTree.parse(xml).iter("testcase"):
        module = case.get("classname", "")
        name = "::".join(part for part in (module, case.get("name", "")) if part)
        outcomes[name].update({child.tag for child in case} & {"failure", "error", "skipped"})
    failures = [name for name, found in outcomes.items() if found & {"failure", "error"}]
    skipped = sum(found == {"skipped"} for found in outcomes.values())
    return Counts(len(outcomes) - len(failures) - skipped, len(failures), skipped, failures)


@dataclass
class Row:
    """`problem` is what went wrong in one line; `failed` says whether that, or a test, is a fault of ours."""

    torch: str
    python: str
    commit: str = field(default_factory=commit)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d"))
    processor: str = field(default_factory=processor)
    jobs: int = field(default_factory=lambda: int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    # What else the machine was doing.
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 1))
    # What pytest was given besides.
    arguments: str = ""
    torch_version: str | None = None
    torch_cuda: str | None = None
    compiler: str | None = None
    cuda: str | None = None
    cuda_archs: str | None = None
    # None where some of it was compiled before.
    build_seconds: float | None = None
    tests: Counts | None = None
    problem: str | None = None
    failed: bool = False

    def install(self, environment: Environment) -> bool:
        """Whether the torch can be had. That it cannot is no fault of ours: not every one is there for every machine."""
        done = environment.make(f"{environment.venv}/.torch")
        if done.status:
            self.problem = f"could not be installed: {done.last_words}"
            return False
        self.compiler = compiler()
        return self.has_its_torch(environment)

    def has_its_torch(self, environment: Environment) -> bool:
        """What is installed besides may have brought another."""
        self.torch_version, self.torch_cuda = environment.about_torch()
        if self.torch_version.partition("+")[0] == environment.torch:
            return True
        self.problem, self.failed = f"{environment.venv} has torch {self.torch_version}", True
        return False

    def read_note(self, note: str) -> None:
        """What the build left beside the extension."""
        facts = {name: ast.literal_eval(value) for name, value in re.findall(r"^(\w+) = (.+)$", note, re.MULTILINE)}
        self.cuda, self.cuda_archs = facts["cuda"], facts["cuda_archs"]

    @property
    def file(self) -> str:
        return self.files(self.torch)[0]

    @classmethod
    def files(cls, torch: str) -> list[str]:
        return [f"torch-{torch}.json"]


@dataclass
class Wheel(Row):
    """Of each torch one without CUDA, and one with."""

    with_cuda: bool = False
    name: str | None = None
    size: int | None = None

    @property
    def file(self) -> str:
        return self.files(self.torch)[self.with_cuda]

    @classmethod
    def files(cls, torch: str) -> list[str]:
        return [f"wheel-torch-{torch}-{which}.json" for which in ("cpu", "cuda")]


R = TypeVar("R", bound=Row)


def write(row: Row, folder: Path = RESULTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / row.file).write_text(json.dumps(asdict(row), indent=1) + "\n")


def read(kind: type[R], torches: Iterable[str], folder: Path = RESULTS) -> list[R]:
    """The rows that are there, of these torches, in their order."""
    found = []
    for path in (folder / name for torch in torches for name in kind.files(torch)):
        if path.is_file():
            row = kind(**json.loads(path.read_text()))
            if row.tests is not None:
                row.tests = Counts(**row.tests)
            found.append(row)
    return found

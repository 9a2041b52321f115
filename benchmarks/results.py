"""Rows, and the file they are kept in: one per device and torch version."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

import safe_inplace

from .cases import past_cache
from .pages import commit, processor

RESULTS = Path(__file__).resolve().parent / "results"

MODELS = RESULTS / "models"

R = TypeVar("R")

# The ways to run a step of a real model, in what, and what of it.
PLAIN, TORCH, IN_PLACE, PATCHED = "plain", "torch's best", "in place", "patched"
WAYS = (PLAIN, TORCH, IN_PLACE, PATCHED)
STEP_DTYPES = ("float32", "autocast", "bfloat16")
STEP_MODES = ("train", "inference")


@dataclass(frozen=True)
class Measured:
    """What a row of a result file is about."""

    op: str
    layout: str
    dtype: str
    size: int
    mode: str
    implementation: str

    @property
    def case(self) -> tuple:
        return self.op, self.layout, self.dtype, self.size, self.mode

    @property
    def title(self) -> str:
        return f"{self.op:12s} {self.layout}"


@dataclass(frozen=True)
class Row(Measured):
    """Times in seconds, sizes in bytes. `copy` is the reference's bytes per second beside this very case."""

    p20: float
    p50: float
    p80: float
    samples: int
    bytes: int | None
    copy: float | None
    share: float | None
    peak: int | None
    saved: int | None


@dataclass(frozen=True)
class StepRow:
    """Seconds of a step; ratio is plain's over it in the same round, low to high the interval of its median.

    `size` is what the largest tensor has that goes into a block. What only a GPU's profile has is None on the CPU. `sums` is the
    share of the time in operators that sums and products take, on the CPU.
    """

    family: str
    library: str
    dtype: str
    mode: str
    way: str
    size: int
    p20: float
    p50: float
    p80: float
    ratio: float
    low: float
    high: float
    rounds: int
    replaced: int
    peak: int
    takeovers: int
    copyslices: int
    kernel_time: float | None
    launches: int | None
    copies: int | None
    sums: float | None = None

    @property
    def case(self) -> tuple:
        return self.family, self.dtype, self.mode

    @property
    def title(self) -> str:
        return f"{self.family:12s} {self.dtype} {self.mode}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def command_line(arguments: Sequence[str]) -> str:
    """What measures this again. Where the results were written to is no part of it."""
    kept = list(arguments)
    if "--output" in kept:
        at = kept.index("--output")
        del kept[at : at + 2]
    return shlex.join(["python", "-m", "benchmarks", *kept])


def provenance(device: torch.device) -> dict[str, str]:
    extension = Path(safe_inplace._C.__file__)
    return {
        "kind": device.type,
        "device": device_name(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "commit": commit(),
        "extension": hashlib.sha256(extension.read_bytes()).hexdigest()[:12],
        "command": command_line(sys.argv[1:]),
        # Bytes from which on an input counts as past the last cache of the device.
        "past_cache": str(past_cache(device)),
        # Of the last minute, before this run added to it: what else the machine was doing.
        "load": f"{os.getloadavg()[0]:.1f}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def file_name(about: dict[str, str]) -> str:
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{about['device']} torch {about['torch'].split('+')[0]}".lower())
    return slug.strip("-") + ".csv"


def _kept(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def as_kept(row: R) -> R:
    """As a file of it is read again: a number that is rounded twice may be another one."""
    numbers = {name: float(_kept(value)) for name, value in vars(row).items() if isinstance(value, float)}
    return replace(row, **numbers)  # type: ignore[type-var]


def write(path: Path, about: dict[str, str], rows: Sequence[Any]) -> None:
    """The whole file, or nothing of it. Of rows of one dataclass, whichever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        file.write(f"# {json.dumps(about)}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _kept(v) for k, v in asdict(row).items()})
    partial.replace(path)


def read(path: Path, kind: type[R] = Row) -> tuple[dict[str, str], list[R]]:
    kinds = {"str": str, "int": int, "float": float, "int | None": int, "float | None": float}
    convert = {f.name: kinds[f.type] for f in fields(kind)}
    with path.open(newline="") as file:
        about = json.loads(file.readline().removeprefix("# "))
        rows = [
            kind(**{k: None if v == "" else convert[k](v) for k, v in record.items()}) for record in csv.DictReader(file)
        ]
    return about, rows


def result_files(folder: Path = RESULTS) -> list[Path]:
    return sorted(folder.glob("*.csv"))


class Table:
    """Rows by case and implementation."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.cases: dict[tuple, dict[str, Row]] = {}
        for row in rows:
            self.cases.setdefault(row.case, {})[row.implementation] = row

    def get(self, implementation: str, *case) -> Row | None:
        return self.cases.get(case, {}).get(implementation)

    def ratio(self, implementation: str, rival: str, *case) -> float | None:
        """Time of the implementation over the rival's: below one, the implementation is faster."""
        one, other = self.get(implementation, *case), self.get(rival, *case)
        return one.p50 / other.p50 if one and other else None

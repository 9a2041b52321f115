"""The program and the changed one, side by side: do they compute the same, and what is gained?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from .steps import Named, is_gradient


@dataclass(frozen=True)
class Difference:
    """The greatest one between two runs, as a share of the norm of what it was found in, and of what rounding may make."""

    of_norm: float = 0.0
    of_allowed: float = 0.0
    where: str = "nothing"

    @property
    def is_rounding(self) -> bool:
        return self.of_allowed <= 1.0


# Of the values of the changed program, beside those of the plain one.
Verdict = Literal["none to compare", "not repeated", "equal", "rounding", "more than rounding"]

_UNLIKE = Difference(math.inf, math.inf, "what is there at all")


def greatest(found: Iterable[Difference]) -> Difference:
    return max(found, key=lambda each: (each.of_allowed, each.of_norm), default=Difference())


def _norm(values: torch.Tensor) -> float:
    return torch.linalg.vector_norm(values[values.isfinite()]).item()


def _is_whole(values: torch.Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex())


def _widest(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _apart(one: torch.Tensor, other: torch.Tensor, eps: float, whole: float, where: str) -> Difference:
    a, b = _widest(one), _widest(other)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return Difference(math.inf, math.inf, where)
    apart, size = _norm(a - b), _norm(a)
    if apart == 0:
        return Difference()
    of_norm = apart / size if size else math.inf
    if _is_whole(one):  # a choice among values that are nearly equal may go the other way
        return Difference(of_norm, 0.0, f"{where} (whole numbers: no verdict)")
    coarsest = max(eps, torch.finfo(one.dtype).eps)
    return Difference(of_norm, apart / (math.sqrt(coarsest) * size + coarsest * whole), where)


def difference(one: list[Named], other: list[Named], eps: float) -> Difference:
    """What both hold of each step. `eps` is that of the coarsest dtype that the changed lines compute in.

    Rounding is let change a tensor by the root of eps of its own norm. What ought to be zero is nothing but rounding: a gradient
    may differ by a few eps of the norm of all gradients of its step, and anything else by a hundred eps.
    """
    if len(one) != len(other):
        return _UNLIKE
    found = []
    for step, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        if _kinds(ours) != _kinds(theirs):
            return _UNLIKE
        gradients = 4 * math.hypot(*(_norm(_widest(value)) for name, value in ours if is_gradient(name)))
        for (name, a), (_, b) in zip(ours, theirs, strict=True):
            found.append(_apart(a, b, eps, gradients if is_gradient(name) else 100.0, f"{name} of step {step + 1}"))
    return greatest(found)


def _kinds(values: Named) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, value.shape, value.dtype) for name, value in values]


@dataclass(frozen=True)
class Run:
    """Of one child."""

    result: dict[str, Any]
    values: dict[str, list[Named]]

    def apart_from(self, other: Run, eps: float) -> Difference:
        return greatest(difference(self.values[kind], other.values[kind], eps) for kind in ("calls", "passes"))

    def step_time(self) -> float | None:
        ends = self.result["ends"]["passes"] or self.result["ends"]["calls"]
        times = [after - before for before, after in itertools.pairwise(ends)]
        return statistics.median(times) if times else None


@dataclass(frozen=True)
class Check:
    plain: list[Run]
    changed: list[Run]
    guarded: Run
    eps: float
    itself_guarded_error: str | None = None  # of the plain program, where guard stopped the changed one

    @property
    def compared(self) -> int:
        """Steps with values that can be compared."""
        values = self.plain[0].values
        return sum(map(bool, values["passes"])) or sum(map(bool, values["calls"]))

    @property
    def error(self) -> str | None:
        """Of the changed program alone."""
        return next((run.result["error"] for run in self.changed if run.result["error"] is not None), None)

    @cached_property
    def repeats_itself(self) -> Difference:
        return greatest(self.plain[0].apart_from(run, self.eps) for run in self.plain[1:])

    @cached_property
    def differs(self) -> Difference:
        runs = [run for run in (self.guarded, *self.changed) if run.result["error"] is None or run is not self.guarded]
        return greatest(self.plain[0].apart_from(run, self.eps) for run in runs)

    @property
    def verdict(self) -> Verdict:
        if not self.compared:
            return "none to compare"
        if self.repeats_itself.of_norm:
            return "not repeated"
        if not self.differs.of_norm:
            return "equal"
        return "rounding" if self.differs.is_rounding else "more than rounding"

    @property
    def is_right(self) -> bool:
        """Nothing speaks against the changed program."""
        stopped = self.guarded.result["error"] is not None and not self.itself_guarded_error
        return not stopped and self.error is None and self.verdict != "more than rounding"

    def times(self) -> list[float]:
        """The time of a step, changed over plain, of each pair of runs."""
        pairs = [(new.step_time(), old.step_time()) for new, old in zip(self.changed, self.plain, strict=True)]
        return [new / old for new, old in pairs if new is not None and old]

    def peaks(self) -> tuple[int, int]:
        """Bytes at the most, plain and changed: the least of the runs, which nothing else disturbed."""
        return min(run.result["peak"] for run in self.plain), min(run.result["peak"] for run in self.changed)

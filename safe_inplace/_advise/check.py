"""The program and the changed one, side by side: do they compute the same, and what is gained?"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from .steps import Named


@dataclass(frozen=True)
class Difference:
    """The greatest one between two runs, as a share of the norm of what it was found in, and of what rounding may make."""

    of_norm: float = 0.0
    of_allowed: float = 0.0
    where: str = "nothing"

    @property
    def is_rounding(self) -> bool:
        return self.of_allowed <= 1.0


_UNLIKE = Difference(math.inf, math.inf, "what is there at all")


def _norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)).item()


def _kinds(values: Named) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, value.shape, value.dtype) for name, value in values]


def difference(one: list[Named], other: list[Named], eps: float) -> Difference:
    """What both hold of each step. `eps` is that of the coarsest dtype that the changed lines compute in.

    Rounding is let change a tensor by the root of eps of its own norm, or by a few eps of the norm of all of its step: a gradient
    that ought to be zero is nothing but rounding.
    """
    worst = Difference()
    if len(one) != len(other):
        return _UNLIKE
    for step, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        if _kinds(ours) != _kinds(theirs):
            return _UNLIKE
        whole = math.hypot(*(_norm(value) for _, value in ours))
        for (name, a), (_, b) in zip(ours, theirs, strict=True):
            if torch.allclose(a, b, rtol=0, atol=0, equal_nan=True):
                continue
            coarsest = max(eps, torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0)
            apart, size = _norm(a - b), _norm(a)
            allowed = math.sqrt(coarsest) * size + 4 * coarsest * whole
            found = Difference(
                apart / size if size else math.inf,
                apart / allowed if allowed and math.isfinite(apart) else math.inf,
                f"{name} of step {step + 1}",
            )
            worst = max(worst, found, key=lambda each: each.of_allowed)
    return worst


@dataclass(frozen=True)
class Run:
    """Of one child."""

    result: dict[str, Any]
    values: dict[str, list[Named]]

    def apart_from(self, other: Run, eps: float) -> Difference:
        both = (difference(self.values[kind], other.values[kind], eps) for kind in ("calls", "passes"))
        return max(both, key=lambda found: found.of_allowed)

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
        values = self.plain[0].values
        return len(values["passes"]) or len(values["calls"])

    def repeats_itself(self) -> Difference:
        return max((self.plain[0].apart_from(run, self.eps) for run in self.plain[1:]), key=lambda found: found.of_allowed)

    def differs(self) -> Difference:
        runs = [run for run in (self.guarded, *self.changed) if run.result["error"] is None or run is not self.guarded]
        return max((self.plain[0].apart_from(run, self.eps) for run in runs), key=lambda found: found.of_allowed)

    def times(self) -> list[float]:
        """The time of a step, changed over plain, of each pair of runs."""
        pairs = [(new.step_time(), old.step_time()) for new, old in zip(self.changed, self.plain, strict=True)]
        return [new / old for new, old in pairs if new is not None and old]

    def peaks(self) -> tuple[int, int]:
        """Bytes at the most, plain and changed: the least of the runs, which nothing else disturbed."""
        return min(run.result["peak"] for run in self.plain), min(run.result["peak"] for run in self.changed)

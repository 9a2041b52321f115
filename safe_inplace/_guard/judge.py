"""The policy of a guard: events, as C++ tells them, to its mode; and what it has found."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from .. import _C
from . import parts
from .findings import Findings
from .hazards import Hazard, HazardError
from .modes import MODES, OnHazard
from .policy import Note, Policy
from .say import say_once
from .sites import Place
from .values import same_bytes, value_of

__tracebackhide__ = True

# What to report where the tensor, which stays on its device, is true.
Compared: TypeAlias = "tuple[Note, torch.Tensor]"


@dataclass
class _Pass:
    """What verify has compared in one backward pass. The engine's callback alone holds it: a pass that fails takes it along."""

    results: list[Compared]


class Judge(Policy):
    def __init__(self, on_hazard: OnHazard, verify: bool) -> None:
        if on_hazard not in MODES:
            raise ValueError(f'guard: on_hazard must be "raise", "warn", "copy" or "defer", got {on_hazard!r}')
        self._mode = MODES[on_hazard]
        self.verify = verify
        self._findings = Findings()
        self._passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()

    def _on_write(self, saved: list[_C.Saved], op: str, place: Place, update: bool) -> list[Note | None] | None:
        return self._mode.write(self._findings, saved, op, place, update)

    def _on_version(self, saved: _C.Saved, op: str, place: Place) -> None:
        self._mode.version(self._findings, saved, op, place)

    def _on_stale(self, saved: _C.Saved) -> None:
        self._mode.asked(self._findings, saved)

    def _on_exchange(self, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        if not saved.stale and same_bytes(saved.value, now):
            return now
        hazard = self._findings.found(self._findings.note("exchanged", saved), saved)
        if saved.stale:
            raise HazardError(hazard)
        return self._mode.exchanged(self._findings, hazard, saved, now)

    def _on_mismatch(self, saved: _C.Saved) -> None:
        hazard = self._findings.found(self._findings.note("corrupted", saved), saved)
        self._mode.corrupted(self._findings, hazard, saved)

    def _compare(self, saved: _C.Saved, then: torch.Tensor, now: torch.Tensor) -> None:
        """Read once, when backward is through, not at every value."""
        key, described = self._findings.note("corrupted", saved)
        result = ((key, replace(described, **value_of(saved))), then != now)
        task = torch._C._current_graph_task_id()
        if task == -1:
            self._settle(_Pass([result]))
            return
        with self._findings.lock:
            running = self._passes.get(task)
            if running is not None:
                running.results.append(result)
                return
            running = self._passes[task] = _Pass([result])
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._settle, running))

    def _settle(self, through: _Pass) -> None:
        by_device: dict[torch.device, list[Compared]] = {}
        for result in through.results:
            by_device.setdefault(result[1].device, []).append(result)
        found: list[Hazard] = []
        for group in by_device.values():
            flags = torch.stack([differs for _, differs in group]).tolist()
            found += [self._findings.found(note) for (note, _), differs in zip(group, flags, strict=True) if differs]
        for hazard in found:
            self._mode.corrupted(self._findings, hazard, None)

    def _parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(parts.parts_of(tensor))

    def _arrived_parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(parts.parts_of(tensor, arrived=True))

    def _written_parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return parts.written_parts(tensor)

    def _no_digest(self, device: str) -> None:
        kind = device.partition(":")[0]
        say_once(
            f"digest {kind}",
            f"safe_inplace.guard: this build has no kernel that fingerprints on {kind}, so verify=True does not reach what is "
            "saved there; writes that operators declare are judged as ever.",
        )

"""What each event leads to, one class for each mode. A new mode is a class here and its line in MODES."""

from __future__ import annotations

from typing import Any, Literal

import torch

from .. import _C
from .findings import Findings
from .hazards import Hazard, HazardError
from .modules import is_of_a_module
from .policy import Note
from .sites import Place
from .values import bytes_of, private_copy

__tracebackhide__ = True

OnHazard = Literal["raise", "warn", "copy", "defer"]


class Raise:
    """Stops at the write, or, where correct programs write day after day, in the backward that asks for the value."""

    def write(self, findings: Findings, entries: list[_C.Saved], op: str, place: Place, update: bool) -> list[Note | None] | None:
        """These values are about to be overwritten (see Policy._on_write)."""
        notes: list[Note | None] = []
        for entry in entries:
            note = findings.note("overwritten", entry, op, place)
            if not _may_be_for_good(entry, note, update):
                raise HazardError(findings.found(note, entry))
            notes.append(note)
        return notes

    def version(self, findings: Findings, saved: _C.Saved, op: str, place: Place) -> None:
        """The version of the value rose, its bytes are as they were."""
        if saved.note is None:
            saved.note = findings.note("version", saved, op, place)

    def asked(self, findings: Findings, saved: _C.Saved) -> None:
        """Backward asks for a value that was overwritten, or whose version rose."""
        raise _late(findings.found(findings.late_note(saved), saved), saved)

    def corrupted(self, findings: Findings, hazard: Hazard, saved: _C.Saved | None) -> None:
        """Backward asks for a value whose bytes are not what they were; None: it has asked for one."""
        raise HazardError(hazard)

    def exchanged(self, findings: Findings, hazard: Hazard, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        """Backward asks for a tensor that lies in other memory now; the answer is what it gets."""
        raise HazardError(hazard)


class Defer(Raise):
    """Stops in the backward that asks for the value, whatever was written."""

    def write(self, findings: Findings, entries: list[_C.Saved], op: str, place: Place, update: bool) -> list[Note | None] | None:
        return [findings.note("overwritten", entry, op, place) for entry in entries]


class Warn(Raise):
    """Tells where Raise would stop, and leaves the rest to torch."""

    def write(self, findings: Findings, entries: list[_C.Saved], op: str, place: Place, update: bool) -> list[Note | None] | None:
        notes: list[Note | None] = []
        told: set[int] = set()
        for entry in entries:
            note = findings.note("overwritten", entry, op, place)
            waits = _may_be_for_good(entry, note, update)
            notes.append(note if waits else None)
            if not waits:
                entry.note = note
                entry.release()
                if id(note[1]) not in told:
                    told.add(id(note[1]))
                    findings.warn(findings.found(note, entry))
        return notes

    def asked(self, findings: Findings, saved: _C.Saved) -> None:
        note = findings.late_note(saved)
        hazard = None if saved.lost or note[0][0] != "overwritten" else findings.known(note)
        if hazard is None:
            hazard = findings.found(note, saved)
            findings.warn(hazard)
        if saved.stale:
            raise _late(hazard, saved)

    def corrupted(self, findings: Findings, hazard: Hazard, saved: _C.Saved | None) -> None:
        if saved is not None:
            saved.release()
        findings.warn(hazard)

    def exchanged(self, findings: Findings, hazard: Hazard, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        findings.warn(hazard)
        return now


class Copy(Raise):
    """Copies what is about to be lost."""

    def write(self, findings: Findings, entries: list[_C.Saved], op: str, place: Place, update: bool) -> list[Note | None] | None:
        copied: dict[tuple[Any, ...], torch.Tensor] = {}
        pairs: dict[int, tuple[Note, _C.Saved, int]] = {}
        for entry in entries:
            if entry.unaccounted:
                continue  # lost before this guard could see it: a copy would hide that from backward
            note = findings.note("overwritten", entry, op, place)
            nbytes, before = bytes_of(entry.value), len(copied)
            entry.replace(private_copy(entry.value, copied))
            _, first, so_far = pairs.get(id(note[1]), (note, entry, 0))
            pairs[id(note[1])] = (note, first, so_far + (nbytes if len(copied) > before else 0))
        for note, entry, nbytes in pairs.values():
            findings.found(note, entry, nbytes, repaired=True)
        return None

    def version(self, findings: Findings, saved: _C.Saved, op: str, place: Place) -> None:
        findings.found(findings.note("version", saved, op, place), saved, repaired=True)
        saved.accept()

    def exchanged(self, findings: Findings, hazard: Hazard, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        with findings.lock:
            hazard.repaired += 1
        return saved.value


def _late(hazard: Hazard, saved: _C.Saved) -> HazardError:
    error = HazardError(hazard)
    error.of_torch = bool(saved.stale)
    return error


MODES: dict[str, Raise] = {"raise": Raise(), "warn": Warn(), "copy": Copy(), "defer": Defer()}


def _may_be_for_good(entry: _C.Saved, note: Note, update: bool) -> bool:
    """Correct programs overwrite such values day after day, since nothing goes backward through them any more: those of a
    graph that has been through backward already, and parameters and buffers, by an update."""
    if entry.unpacked > 0 or entry.parameter or (update and entry.leaf):
        return True
    if not entry.leaf:
        return False
    hazard = note[1]
    if hazard.of_a_module is None:
        # Nothing in such a tensor tells, so the modules are asked: once for two lines.
        called = entry.place[2]
        hazard.of_a_module = is_of_a_module(entry.value, called() if called is not None else None)
    return hazard.of_a_module

"""What a guard has found, one hazard for each pair of lines."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import _C
from .facts import Kind
from .hazards import Hazard, HazardWarning
from .modules import parameter_name
from .policy import Note
from .rewrite import Rewritten, out_of_place
from .sites import NOWHERE, Place, site_of, writer
from .values import value_of
from .words import short

__tracebackhide__ = True


def _describe(kind: Kind, saved: _C.Saved, op: str | None, place: Place) -> Hazard:
    save, mutation = site_of(saved.place), site_of(place)
    frame, by = writer(place[0])
    rewritten = Rewritten()
    if kind == "overwritten" and op is not None:
        rewritten = out_of_place(*place[:2], op, frame)
    if saved.parameter and not rewritten.parameter:
        rewritten = Rewritten(parameter=True)
    return Hazard(
        kind,
        mutation,
        save,
        op and short(op),
        **value_of(saved),
        rewritten=rewritten,
        result=saved.result,
        unread=saved.unread,
        by=by,
    )


class Findings:
    """Notes are made at a write, hazards are what comes of them. Used by all threads that a guard holds for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hazards: dict[tuple[Any, ...], Hazard] = {}
        self.teller: Callable[[Hazard], None] = _warn  # of what it goes on from
        self.listener: Callable[[], None] | None = None  # told of each new hazard
        self._described: dict[tuple[Any, ...], Hazard] = {}

    def note(self, kind: Kind, saved: _C.Saved, op: str | None = None, place: Place = NOWHERE) -> Note:
        """What happened between two lines is described once, while the frame that writes still runs."""
        key = (kind, place[:2], saved.place[:2])
        hazard = self._described.get(key)
        if hazard is None:
            hazard = self._described.setdefault(key, _describe(kind, saved, op, place))
        return key, hazard

    def late_note(self, saved: _C.Saved) -> Note:
        """The note that was made at the write, as it reads in backward."""
        if saved.note is None and saved.beside is not None:
            return self.note("overwritten" if saved.away else "version", saved, *saved.beside)
        if saved.note is None:
            return self.note("unseen", saved)
        key, hazard = saved.note
        if key[0] == "overwritten" and saved.lost:
            hazard = replace(hazard, late=True)
        return key, hazard

    def known(self, note: Note) -> Hazard | None:
        return self.hazards.get(note[0])

    def found(self, note: Note, saved: _C.Saved | None = None, bytes_copied: int = 0, repaired: bool = False) -> Hazard:
        """It is a hazard: listed from now on, with the first value that it befell, and counted."""
        key, described = note
        new = False
        with self.lock:
            hazard = self.hazards.get(key)
            if hazard is None:
                new = True
                hazard = described
                if saved is not None:
                    # A parameter is mostly saved by a call of a module. Elsewhere a search of all modules would find none.
                    look = saved.place[2] is not None
                    named = parameter_name(saved.value, look) if saved.parameter else None
                    hazard = replace(described, parameter=named, **value_of(saved))
                for site in (hazard.mutation, hazard.save):
                    if site is not None:
                        site.look_up()
                self.hazards[key] = hazard
            hazard.count += 1
            hazard.repaired += repaired
            hazard.bytes_copied += bytes_copied
        if new and self.listener is not None:
            self.listener()
        return hazard

    def warn(self, hazard: Hazard) -> None:
        with self.lock:
            if hazard.told:
                return
            hazard.told = True
        self.teller(hazard)


def _warn(hazard: Hazard) -> None:
    site = hazard.mutation or hazard.save
    if site is None:
        warnings.warn(HazardWarning(hazard), stacklevel=3)
    else:
        warnings.warn_explicit(HazardWarning(hazard), None, site.filename, site.lineno)

"""What is reported: a pair of lines, a write and the save that it destroys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .advice import remedies
from .facts import Facts
from .sites import Site
from .words import bytes_in_words


@dataclass
class Hazard(Facts):
    """One pair of lines, as it is reported."""

    @property
    def remedies(self) -> list[str]:
        return remedies(self)

    def text(self, color: bool = False) -> str:
        def paint(code: str, words: str) -> str:
            return f"\x1b[{code}m{words}\x1b[0m" if color else words

        modified = "one of the variables needed for gradient computation has been modified by an inplace operation"
        headline = {
            "overwritten": modified
            if self.late
            else "a value needed for gradient computation is about to be modified by an inplace operation",
            "version": f"{modified} (its version alone: backward would be right)",
            "unseen": f"{modified} that guard did not see",
            "corrupted": "a value needed for gradient computation changed, and no operator says that it wrote it",
            "exchanged": "a tensor needed for gradient computation was given other memory with other values (x.data = ...): "
            "torch alone would take these in backward",
        }[self.kind]
        lines = [paint("1;31", headline), ""]
        for label, code, site, what in (
            ("written", "1;31", self.mutation, self.op),
            ("saved", "1;33", self.save, self.saved_by),
        ):
            if site is None:
                continue
            lines.append(f"  {paint(code, f'{label:<8}')}{paint('1', str(site))}   [{what}]")
            number = f"{site.lineno} | "
            lines.append(f"    {paint('2', number)}{site.source}")
            if site.columns and site.expression != site.source:
                begin, end = site.columns
                lines.append("    " + " " * (len(number) + begin) + paint(code, "^" * (end - begin)))
            if site.module is not None:
                lines.append(f"    in {site.module}")
            if site.caller is not None:
                lines.append(f"    called from {site.caller}")
                lines.append(f"    {paint('2', f'{site.caller.lineno} | ')}{site.caller.source}")
        device = f" on {self.device}" if self.device.type != "cpu" else ""
        shape = ", ".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        parameter = f", parameter {self.parameter}" if self.parameter is not None else ""
        lines.append(f"  {'value':<8}{dtype}[{shape}]{device}, {bytes_in_words(self.nbytes)}{parameter}")
        lines += ["", *(f"  {number}. {remedy}" for number, remedy in enumerate(self.remedies, 1))]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        def site(value: Site | None) -> dict[str, Any] | None:
            if value is None:
                return None
            return {
                "filename": value.filename,
                "lineno": value.lineno,
                "columns": value.columns and list(value.columns),
                "function": value.function,
                "source": value.source,
                "module": value.module,
                "module_path": value.module_path,
                "caller": site(value.caller),
            }

        return {
            "kind": self.kind,
            "mutation": site(self.mutation),
            "save": site(self.save),
            "op": self.op,
            "saved_by": self.saved_by,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "device": str(self.device),
            "parameter": self.parameter,
            "count": self.count,
            "repaired": self.repaired,
            "bytes_copied": self.bytes_copied,
            "remedies": self.remedies,
        }


def summary(hazards: Collection[Hazard], color: bool = False, who: str = "safe_inplace guard") -> str:
    """The hazards, the dearest first, one report each."""
    if not hazards:
        return f"{who}: no hazards"
    seen = sum(hazard.count for hazard in hazards)
    copied = sum(hazard.bytes_copied for hazard in hazards)
    total = f"{who}: {seen} hazard{'s' * (seen != 1)} between {len(hazards)} pair{'s' * (len(hazards) != 1)} of lines"
    if copied:
        total += f", {bytes_in_words(copied)} copied"
    paragraphs = [total]
    for hazard in sorted(hazards, key=lambda hazard: (-hazard.bytes_copied, -hazard.count)):
        times = f"{hazard.count} time{'s' * (hazard.count != 1)}"
        if hazard.bytes_copied:
            times += f", {bytes_in_words(hazard.bytes_copied)} copied"
        paragraphs.append(f"{times}: {hazard.text(color)}")
    return "\n\n".join(paragraphs)


class _Report(Exception):
    """What HazardError and HazardWarning have in common: the hazard's fields, and a text with both source lines.

    The text is the argument, as of any exception: who makes one anew from a text (a worker's error, raised again in the process
    that reads from it) gets one with the text and without the fields."""

    def __init__(self, *arguments: Any) -> None:
        hazard = arguments[0] if arguments and isinstance(arguments[0], Hazard) else None
        # Plain: a message may end up in a log. `python -m safe_inplace run` colours its summary on a terminal.
        super().__init__(*((hazard.text(), *arguments[1:]) if hazard else arguments))
        self.hazard = hazard
        self.mutation = hazard and hazard.mutation
        self.save = hazard and hazard.save
        self.op = hazard and hazard.op
        self.saved_by = hazard and hazard.saved_by
        self.shape = hazard and hazard.shape
        self.dtype = hazard and hazard.dtype
        self.device = hazard and hazard.device
        self.parameter = hazard and hazard.parameter
        self.remedies = hazard.remedies if hazard else []


class HazardError(_Report, RuntimeError):
    """A write would destroy (or, found in backward: has destroyed) a value that autograd saved. Nothing has been written
    where it is raised at the write; in backward, nothing has been computed from the value.

    ``mutation`` and ``save`` are the two lines, each a :class:`Site`, with the ``module`` that was being called and, for a
    line of an installed package, the ``caller``; ``op`` wrote, ``saved_by`` saved; ``shape``, ``dtype`` and ``device`` are
    the saved value's, and ``parameter`` is its name where it is a parameter.
    ``mutation`` and ``op`` are None where nothing saw the write. All are None in an error that was made from a text, as that
    of a DataLoader's worker is.
    """

    of_torch = False  # torch alone would refuse here, too


class HazardWarning(_Report, UserWarning):
    """The same as :class:`HazardError`, under ``guard("warn")``."""


def comes_of_a_hazard(error: BaseException | None, silent: bool = False) -> bool:
    """Whether the error is guard's, or has one of guard's among its causes, or in its group. `silent`: whether torch alone would
    not have raised: among the causes, only of an error that torch has no error in the place of."""
    seen: set[int] = set()
    waiting = [(error, False)]
    while waiting:
        error, is_cause = waiting.pop()
        if error is None or id(error) in seen:
            continue
        if isinstance(error, HazardError) and not (silent and is_cause and error.of_torch):
            return True
        seen.add(id(error))
        if isinstance(error, BaseExceptionGroup):
            waiting += [(one, is_cause) for one in error.exceptions]
        waiting.append((error.__cause__ or (None if error.__suppress_context__ else error.__context__), True))
    return False

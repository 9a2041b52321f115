"""From what was seen to what is advised: the lines, their new code, and what it gains."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evidence import SMALLEST
from .find import Site
from .forms import Option
from .source import Source

# Once is no evidence.
_LEAST_STEPS = 2


def here() -> str:
    """This folder, as the names of watched files have it."""
    return os.path.realpath(os.getcwd())


@dataclass(frozen=True)
class Change:
    """One site, and the op that takes its place."""

    site: Site
    option: Option
    calls: int
    steps: int
    largest: int
    gained: int
    eps: float


@dataclass(frozen=True)
class File:
    source: Source
    changes: list[Change]

    @property
    def chosen(self) -> dict[int, Option]:
        return {change.site.index: change.option for change in self.changes}

    def lines(self) -> list[list[Change]]:
        """The changes, those together that share a line."""
        groups: list[list[Change]] = []
        for change in sorted(self.changes, key=lambda change: change.site.position[0]):
            if groups and change.site.position[0] <= max(other.site.position[1] for other in groups[-1]):
                groups[-1].append(change)
            else:
                groups.append([change])
        return groups

    def diff(self, root: str) -> str:
        """For who applies it in `root`."""
        name = os.path.relpath(self.source.filename, root)
        old, new = (_lines(text.decode()) for text in (self.source.text, self.source.final(self.chosen)))
        end = "\t" if " " in name else ""  # or a tool takes the name to end there
        lines = difflib.unified_diff(old, new, f"a/{name}{end}", f"b/{name}{end}")
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


@dataclass(frozen=True)
class Advice:
    files: list[File]
    sites: int  # of which results were large
    against: Counter[str]
    left_alone: list[str]  # files
    not_imported: list[str]  # packages that were to be looked into

    @property
    def changes(self) -> list[Change]:
        return [change for file in self.files for change in file.changes]

    def root(self) -> str:
        """The folder in which the diff applies: this one, if all is in it."""
        folders = [os.path.dirname(os.path.abspath(file.source.filename)) for file in self.files]
        return here() if os.path.commonpath([here(), *folders]) == here() else os.path.commonpath(folders)

    def diff(self) -> str:
        return "".join(file.diff(self.root()) for file in self.files)

    def as_task(self) -> dict[str, dict[int, int]]:
        return {
            file.source.filename: {change.site.index: change.site.options.index(change.option) for change in file.changes}
            for file in self.files
        }


def _lines(text: str) -> list[str]:
    """As the tools for patches count them."""
    lines = text.split("\n")
    return [f"{line}\n" for line in lines[:-1]] + lines[-1:] * bool(lines[-1])


def _choose(site: Site, seen: dict[str, Any]) -> Change | None:
    gained = {site.options[int(index)]: gain for index, gain in seen["gained"].items()}
    if not gained or seen["steps"] < _LEAST_STEPS:
        return None
    # Of equal ones the first that writes nothing: it is right whatever becomes of the program.
    option = max(gained, key=lambda option: (gained[option], option.writes is None))
    return Change(site, option, seen["calls"], seen["steps"], seen["largest"], gained[option], seen["eps"])


def _as_it_ran(name: str, digest: str) -> Source | None:
    """Somebody may have changed the file meanwhile, or removed it."""
    try:
        source = Source(Path(name).read_bytes(), name)
    except (FileNotFoundError, SyntaxError, RecursionError):
        return None
    return source if source.digest == digest else None


def advice_from(found: dict[str, Any], not_imported: Sequence[str] = ()) -> Advice:
    large = [seen for seen in found["seen"] if seen["largest"] >= SMALLEST]
    sources = {name: _as_it_ran(name, found["texts"][name]) for name in sorted({seen["file"] for seen in large})}
    changes: dict[str, list[Change]] = {}
    against: Counter[str] = Counter()
    for seen in large:
        source = sources[seen["file"]]
        change = None if source is None else _choose(source.sites[seen["index"]], seen)
        if change is not None:
            changes.setdefault(seen["file"], []).append(change)
        elif source is None:
            against["the file has changed since"] += 1
        elif seen["steps"] < _LEAST_STEPS:
            against["seen in one step only"] += 1
        else:
            against[max(seen["against"], key=seen["against"].__getitem__, default="not always plain tensors")] += 1
    files = [File(source, changes[name]) for name, source in sources.items() if source is not None and name in changes]
    return Advice(files, len(large), against, found["left alone"], list(not_imported))

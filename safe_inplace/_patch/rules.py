"""What a rule is: the structure of a forward that is known, what it computes itself of its submodules, and what runs instead."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .structure import innermost, structure_of

Forward = Callable[..., Any]

LIBRARIES = ("transformers", "timm", "diffusers")

# From Python 3.14 on asking for annotations evaluates them, and they may name what is not there.
_AS_WRITTEN: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    from annotationlib import Format

    _AS_WRITTEN["annotation_format"] = Format.STRING


@dataclass(frozen=True, eq=False)
class Known:
    """Structures of functions that compute the same, and the functions of their libraries that they call."""

    structures: tuple[str, ...]
    # Functions of the library that are called by their global name, and the structures that these may have.
    helpers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def obstacle(self, function: Forward) -> str | None:
        """Why the function is not one of these, in words that follow its name; None where it is."""
        structure = structure_of(function)
        if structure is None:
            return "has a forward whose source cannot be read"
        if structure not in self.structures:
            return f"has a forward that is not known (structure {structure})"
        closed_over = set(function.__code__.co_freevars) - {"__class__"}  # type: ignore[attr-defined]
        if closed_over:
            return f"has a forward that is closed over {', '.join(sorted(closed_over))}"
        for name, structures in self.helpers.items():
            helper = function.__globals__.get(name)
            if helper is None or structure_of(helper) not in structures:
                return f"calls a function {name} that is not known"
        return None

    def called_by(self, function: Forward) -> tuple[Any, ...]:
        return tuple(function.__globals__[name] for name in self.helpers)


@dataclass(frozen=True, eq=False)
class Leaf(Known):
    """A submodule that a rule computes itself, from the submodule's parameters and attributes."""

    name: str = ""
    # What it does to a branch, as arguments of ``scaled_residual``.
    takes: Callable[[Any], dict[str, Any]] = lambda module: {}
    # Why `takes` would not say what this module does, in words that follow its name; None where it does.
    wants: Callable[[Any], str | None] = lambda module: None


# A LayerScale or a DropPath that a configuration leaves out.
IDENTITY = Leaf(("86f79cd83044",), name="Identity")


@dataclass(frozen=True, eq=False)
class Rule(Known):
    # Of the family: the forwards that a block has in other releases have rules of the same name.
    name: str = ""
    # The classes that it was written from, the first of each library: "package.module.Class".
    homes: tuple[str, ...] = ()
    inlines: Mapping[str, tuple[Leaf, ...]] = field(default_factory=dict)
    ops: str = ""
    # What else must be so of a module: why it is not, in words that follow its name; None where it is.
    wants: Callable[[Any], str | None] = lambda module: None
    forward: Forward = lambda: None

    def arguments(self) -> list[inspect.Parameter]:
        return _arguments(self.forward)

    def argument_obstacle(self, function: Forward) -> str | None:
        """Copies of a block may call its arguments otherwise, and callers may pass them by name."""
        theirs, ours = _arguments(function), self.arguments()
        for their, our in zip(theirs, ours, strict=False):
            if (their.name, their.kind) != (our.name, our.kind):
                return f"has an argument {their.name!r} where the rule has {our.name!r}"
        return None if len(theirs) == len(ours) else f"has {len(theirs)} arguments where the rule has {len(ours)}"


def _arguments(function: Forward) -> list[inspect.Parameter]:
    return list(inspect.signature(innermost(function), follow_wrapped=False, **_AS_WRITTEN).parameters.values())


RULES: list[Rule] = []


def rule(
    *structures: str,
    name: str,
    homes: str | tuple[str, ...],
    ops: str,
    inlines: Mapping[str, Leaf | tuple[Leaf, ...]] | None = None,
    helpers: Mapping[str, tuple[str, ...]] | None = None,
    wants: Callable[[Any], str | None] = lambda module: None,
) -> Callable[[Forward], Forward]:
    """Makes a rule of the forward below it."""

    def register(forward: Forward) -> Forward:
        leaves = {path: leaf if isinstance(leaf, tuple) else (leaf,) for path, leaf in (inlines or {}).items()}
        RULES.append(
            Rule(
                structures=structures,
                helpers=helpers or {},
                name=name,
                homes=homes if isinstance(homes, tuple) else (homes,),
                inlines=leaves,
                ops=ops,
                wants=wants,
                forward=forward,
            )
        )
        return forward

    return register


def rules_for(structure: str | None) -> Rule | None:
    return next((rule for rule in RULES if structure in rule.structures), None)

"""python -m safe_inplace check-sources: which known structures the installed libraries have. Nothing of them is imported."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from .rules import LIBRARIES, RULES
from .structure import Function, structure_of_source

_SHOWN = 6


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "names", nargs="*", help="classes or functions (package.module.Name), of which the structures are printed instead"
    )
    command.set_defaults(run=run)


def _definitions(source: str) -> Iterator[tuple[str, Function]]:
    """The functions of a file, and the forwards of its classes, by name."""
    for node in ast.parse(source).body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            # The last definition counts, as it does when the class is made.
            forwards = [item for item in node.body if isinstance(item, Function) and item.name == "forward"]
            if forwards:
                yield node.name, forwards[-1]


def _folder(library: str) -> Path | None:
    spec = importlib.util.find_spec(library)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _file(module: str) -> Path | None:
    """The file of a module, without importing its package."""
    library, *inside = module.split(".")
    folder = _folder(library)
    if folder is None:
        return None
    path = folder.joinpath(*inside)
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _argument_names(node: Function) -> tuple[str, ...]:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return tuple(argument.arg for argument in [*plain, *filter(None, (arguments.vararg, arguments.kwarg))])


def structures_in(folder: Path) -> dict[str, list[str]]:
    """Of each structure of a forward whose arguments have the names of a rule's: the names of the classes that have it."""
    classes: dict[str, list[str]] = defaultdict(list)
    wanted = {tuple(argument.name for argument in rule.arguments()) for rule in RULES}
    for path in sorted(folder.rglob("*.py")):
        # A modular file of transformers is what a modeling file is made from.
        source = "" if path.name.startswith("modular_") else path.read_text(encoding="utf-8")
        if "def forward" in source:
            for name, node in _definitions(source):
                if node.name == "forward" and _argument_names(node) in wanted:
                    classes[structure_of_source(node)].append(name)
    return classes


def structure_at(name: str) -> str | None:
    """The structure of a class's forward, or of a function, by its full name; None where there is no such thing."""
    module, _, own = name.rpartition(".")
    path = _file(module)
    node = None if path is None else dict(_definitions(path.read_text(encoding="utf-8"))).get(own)
    return None if node is None else structure_of_source(node)


def _library(library: str, folder: Path) -> tuple[list[str], bool]:
    classes = structures_in(folder)
    lines, known = [f"{library} {importlib.metadata.version(library)}"], True
    for family in dict.fromkeys(rule.name for rule in RULES):
        rules = [rule for rule in RULES if rule.name == family]
        structures = [structure for rule in rules for structure in rule.structures]
        names = list(dict.fromkeys(name for structure in structures for name in classes.get(structure, [])))
        homes = dict.fromkeys(home for rule in rules for home in rule.homes if home.startswith(f"{library}."))
        if not names and not homes:
            continue
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        lines.append(f"  {family:<24} {shown or '-'}")
        for home in homes:
            structure = structure_at(home)
            if structure not in structures:
                known = False
                lines.append(f"  {'':<24} {home} " + (f"is not known: structure {structure}" if structure else "is not there"))
    return lines, known


def run(options: argparse.Namespace) -> int:
    """1 where a class that a rule was written from is another one in an installed library."""
    if options.names:
        structures = {name: structure_at(name) for name in options.names}
        for name, structure in structures.items():
            print(f"{structure or 'not found':<12}  {name}")
        return int(None in structures.values())
    status = 0
    for library in LIBRARIES:
        folder = _folder(library)
        if folder is None:
            print(f"{library}: not installed")
            continue
        lines, known = _library(library, folder)
        print("\n".join(lines))
        status |= not known
    return status

"""Gives a program, and the modules of its own that it imports, another code than their files hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from .._guard.sites import whose_file
from .._program import Compile


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, compile: Compile) -> None:
        super().__init__(name, path)
        self._compile = compile

    def get_code(self, fullname: str) -> CodeType:
        """From the source: what is cached beside it is the plain code, and stays that."""
        path = self.get_filename(fullname)
        return self._compile(self.get_data(path), path)


class Finder(MetaPathFinder):
    """Finds what the others find; where that is a module of the program's own, it is compiled by `compile`."""

    def __init__(self, compile: Compile, include: Sequence[str]) -> None:
        self._compile = compile
        self.not_imported = set(include)
        self._include = frozenset(include)
        self._behind: list[Any] = list(sys.meta_path)

    def is_meant(self, name: str, path: str) -> bool:
        package = name.partition(".")[0]
        self.not_imported.discard(package)
        whose = whose_file(path)
        return whose == 2 or (whose == 1 and package in self._include)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        # Somebody may have put another list, or another finder around this one.
        others = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else self._behind
        spec = next((spec for spec in (finder.find_spec(fullname, path, target) for finder in others) if spec is not None), None)
        if spec is not None and type(spec.loader) is SourceFileLoader and self.is_meant(fullname, spec.origin or ""):
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self._compile)
        return spec

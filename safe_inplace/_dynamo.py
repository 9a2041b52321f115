"""What Dynamo traces in place of a C function, and what it leaves alone.

Importing Dynamo takes as long as importing the rest of torch, and most programs never compile: it is told when something
imports it.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_DYNAMO = "torch._dynamo"
_waiting: list[Callable[[], Any]] = []


def when_there(tell: Callable[[], Any]) -> None:
    if _DYNAMO in sys.modules:
        tell()
        return
    if not _waiting:
        sys.meta_path.insert(0, _Watcher())
    _waiting.append(tell)


def trace_as(function: Callable[..., Any], traced: Callable[..., Any]) -> None:
    """Makes compilers see `traced` wherever a program calls `function`."""
    when_there(lambda: torch.compiler.substitute_in_graph(function)(traced))


def break_graph_at(function: Callable[[Any], Any]) -> None:
    """Compilers leave a call of the C function to the interpreter, without a warning that they do not know it."""

    def tell() -> None:
        untraced = torch._dynamo.disable(function)
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(lambda argument: untraced(argument))

    when_there(tell)


def keep_out_of(package: str) -> None:
    """Of the functions in it none is traced, and none is compiled where a broken graph calls it."""
    when_there(lambda: torch._dynamo.trace_rules.add(package))


class _Watcher(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _DYNAMO:
            return None
        # Whoever asks may only want to know, and the import may fail: the watch ends when Dynamo has run.
        behind = list(itertools.dropwhile(lambda finder: finder is not self, sys.meta_path))[1:]
        specs = (finder.find_spec(fullname, path, target) for finder in behind)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            while _waiting:
                _waiting.pop()()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec

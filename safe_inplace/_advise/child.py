"""python -m safe_inplace._advise.child TASK script.py ...: the program in a process of its own, watched or changed."""

from __future__ import annotations

import builtins
import inspect
import json
import os
import resource
import sys
from contextlib import ExitStack
from pathlib import Path
from types import CodeType
from typing import Any

import torch
import torch._sources

import safe_inplace

from .. import _process, _run
from . import watch
from .forms import Option
from .instrument import CALLEE, OPERAND, PROBE
from .loading import Finder
from .source import Source
from .steps import Record, counted


def watched(text: bytes, filename: str) -> CodeType:
    try:
        code = compile(watch.watch(Source(text, filename)), filename, "exec", dont_inherit=True)
    except RecursionError:  # of a tree that is deeper than its walkers may go
        code = compile(text, filename, "exec", dont_inherit=True)
    _ours.append(code)
    return code


_ours: list[CodeType] = []


def _see_what_else_runs() -> None:
    """A program may run a file otherwise than by importing it, and have its source compiled by others."""

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "exec" and isinstance(arguments[0], CodeType) and not any(code is arguments[0] for code in _ours):
            watch.leave_alone(arguments[0])

    def source_lines(thing: Any) -> tuple[list[str], int]:
        lines, first = plain(thing)
        if sys._getframe(1).f_code.co_filename == torch._sources.__file__:  # of torch.jit.script
            watch.read_as_source(inspect.getsourcefile(thing) or "", first, first + len(lines))
        return lines, first

    sys.addaudithook(heard)
    plain = inspect.getsourcelines
    inspect.getsourcelines = source_lines  # type: ignore[assignment]


class Changed:
    """Compiles files with what was chosen for them."""

    def __init__(self, chosen: dict[str, dict[str, int]]) -> None:
        self._chosen = chosen

    def __call__(self, text: bytes, filename: str) -> CodeType:
        source = Source(text, filename)
        wanted = self._chosen.get(os.path.realpath(filename), {})
        chosen: dict[int, Option] = {int(index): source.sites[int(index)].options[option] for index, option in wanted.items()}
        return compile(source.final(chosen) if chosen else text, filename, "exec", dont_inherit=True)


def run(task: dict[str, Any], program: list[str]) -> int:
    pid = os.getpid()
    record = Record() if task["what"] != "watch" else None
    compiled: dict[str, Any] = {}
    finder = None
    if task["what"] == "watch":
        for name, function in ((PROBE, watch.probe), (CALLEE, watch.callee), (OPERAND, watch.operand)):
            setattr(builtins, name, function)
        compiled["compile"] = watched
        sys.setrecursionlimit(4 * sys.getrecursionlimit())  # what watches an operator is deeper by three calls
        _see_what_else_runs()
        os.environ["SAFE_INPLACE_ADVISE"] = task["others"]
        _process.reach_children()
    elif task["what"] == "changed":
        compiled["compile"] = Changed(task["chosen"])
    if compiled:
        finder = Finder(compiled["compile"], task["include"])
        sys.meta_path.insert(0, finder)
    loaded = _run.load(task["prog"], task["module"], program, **compiled)
    if isinstance(loaded, int):
        return loaded
    with ExitStack() as stack:
        stack.enter_context(counted(record))
        if task["guard"]:
            stack.enter_context(safe_inplace.guard(verify=True))
        status, raised = _run.outcome(loaded)
        _run.finish()
    if os.getpid() == pid:
        error = None if raised is None else f"{type(raised).__qualname__}: {raised}"
        found: dict[str, Any] = {"status": status, "error": error}
        if record is None:
            assert finder is not None
            found |= watch.found(task["others"]) | {"not imported": sorted(finder.not_imported)}
        else:
            torch.save({"passes": record.passes, "calls": record.calls}, task["values"])
            found |= {"ends": record.ends, "peak": _peak()}
        Path(task["result"]).write_text(json.dumps(found))
    return status


def _peak() -> int:
    """Bytes: of the device where there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:]))

"""What is watched in this process: files, their sums, and what the program shows of itself."""

from __future__ import annotations

import ast
import mmap
import os
import threading
from dataclasses import dataclass
from types import BuiltinMethodType, CodeType
from typing import Any

import torch

from .evidence import NUMBERS, Seen, is_plain
from .fresh import is_fresh, is_one_of
from .instrument import instrumented
from .source import Source

_ELSEWHERE = "it also runs where it is not watched: compiled, traced, or in another process"


@dataclass(frozen=True)
class _File:
    source: Source
    first_seen: int  # the numbers of its sites, and of what it shows, begin here
    first_shown: int


_lock = threading.RLock()  # a forked process watches nothing, and does not ask for it
_files: dict[str, _File] = {}
_seen: list[Seen] = []
_shown: list[set[bool]] = []  # of what decides whether a new tensor is made, and nobody keeps it: did it say so?
_settled: list[bool] = []  # of the same: is it always this one that is called?
_left_alone: set[str] = set()

# A flag for each site that has run where nothing can be seen of it.
_PID = os.getpid()
_elsewhere = mmap.mmap(-1, 1 << 20)


def _run_elsewhere(number: int) -> None:
    if number < len(_elsewhere):
        _elsewhere[number] = 1


# Dynamo calls it while it traces, and takes what it returns for a constant: torch._dynamo.assume_constant_result, which would
# import Dynamo.
_run_elsewhere._dynamo_marked_constant = True  # type: ignore[attr-defined]


def watch(source: Source) -> ast.Module:
    """The tree of the source, in which its sites are watched."""
    name = os.path.realpath(source.filename)
    if os.getpid() != _PID:
        return source.tree
    with _lock:
        if name not in _files:
            _files[name] = _File(source, len(_seen), len(_shown))
            _seen.extend(Seen(name, site) for site in source.sites)
            _shown.extend(set() for _ in source.shown)
            _settled.extend(source.settled)
        file = _files[name]
        if source.left_alone or file.source.text != source.text:
            _left_alone.add(name)
            return source.tree
    return instrumented(source, file.first_seen, file.first_shown)


def forget() -> None:
    """All that was watched."""
    for each in (_files, _seen, _shown, _settled, _left_alone):
        each.clear()  # type: ignore[attr-defined]
    _elsewhere[:] = bytes(len(_elsewhere))


def probe(number: int, form: str, *operands: Any) -> Any:
    """Stands in the program in the place of a sum or product, and returns what that would have been."""
    seen = _seen[number]
    # Dynamo reads no further than to the first of these.
    if torch.compiler.is_compiling() or os.getpid() != _PID or torch._C._get_tracing_state() is not None:
        _run_elsewhere(number)
        return seen.site.form.plain(*operands)
    return seen.run(operands)


def callee(number: int, function: Any) -> Any:
    """Stands around what the program calls there, and returns it."""
    if not torch.compiler.is_compiling():
        is_method = type(function) is BuiltinMethodType and isinstance(function.__self__, torch.Tensor)
        _shown[number].add(is_fresh(function) and (is_method or _settled[number]))
    return function


def operand(number: int, value: Any) -> Any:
    """Stands around what the program computes with there, and returns it."""
    if not torch.compiler.is_compiling():
        with torch._C.DisableTorchFunction():  # what modes see is the program's own
            _shown[number].add(is_one_of(value, NUMBERS) or is_plain(value))
    return value


def leave_alone(code: CodeType) -> None:
    """The program runs a file's code that is not watched."""
    name = os.path.realpath(code.co_filename)
    if name in _files and _files[name].source.sites:
        _left_alone.add(name)


def read_as_source(filename: str, first: int, last: int) -> None:
    """Somebody compiles these lines anew."""
    file = _files.get(os.path.realpath(filename))
    if file is not None:
        for site in file.source.sites:
            if first <= site.position[0] <= last:
                _run_elsewhere(file.first_seen + site.index)


def found(others: str = "") -> dict[str, Any]:
    """`others` names the file in which other processes leave the numbers of sites whose code they were sent."""
    if os.path.exists(others):
        with open(others) as file:
            for number in map(int, file):
                _run_elsewhere(number)
    for number, seen in enumerate(_seen):
        if number >= len(_elsewhere) or _elsewhere[number]:
            seen.refute(_ELSEWHERE)
        if seen.within_itself:
            seen.refute("it also ran within itself")
        if seen.of_others:
            seen.refute("not always plain tensors")
        for written, shown in seen.site.writable.items():
            if any(_shown[_files[seen.file].first_shown + each] != {True} for each in shown):
                seen.refute_unsure(written)
    known = [seen.as_dict() for seen in _seen if seen.file not in _left_alone]
    texts = {name: file.source.digest for name, file in _files.items()}
    return {"seen": known, "left alone": sorted(_left_alone), "texts": texts}

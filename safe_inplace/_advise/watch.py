"""What is watched in this process: files, their sums, and what the program shows of itself."""

from __future__ import annotations

import ast
import mmap
import os
import threading
from types import CodeType
from typing import Any

import torch

from . import evidence
from .evidence import NUMBERS, Seen, is_plain
from .fresh import is_fresh
from .instrument import instrumented
from .source import Source

_ELSEWHERE = "it also runs where it is not watched: compiled, traced, or in another process"

_lock = threading.Lock()
_sources: dict[str, Source] = {}
_seen: list[Seen] = []
_numbers: dict[tuple[str, int], int] = {}  # of sites, by file
_shown: list[set[bool]] = []  # of what decides whether a new tensor is made: did it say so?
_shown_numbers: dict[tuple[str, int], int] = {}
_left_alone: set[str] = set()

# A flag for each site that has run where nothing can be seen of it.
_PID = os.getpid()
_elsewhere = mmap.mmap(-1, 1 << 20)


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()
    evidence.new_lock()


os.register_at_fork(after_in_child=_in_child)


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
        before = _sources.setdefault(name, source)
        if source.left_alone or before.text != source.text:
            _left_alone.add(name)
            return source.tree
        for site in source.sites:
            if (name, site.index) not in _numbers:
                _numbers[name, site.index] = len(_seen)
                _seen.append(Seen(name, site))
        for index in range(len(source.shown)):
            if (name, index) not in _shown_numbers:
                _shown_numbers[name, index] = len(_shown)
                _shown.append(set())
        sites = [_numbers[name, site.index] for site in source.sites]
        shown = [_shown_numbers[name, index] for index in range(len(source.shown))]
    return instrumented(source, sites, shown)


def forget() -> None:
    """All that was watched."""
    for each in (_sources, _seen, _numbers, _shown, _shown_numbers, _left_alone):
        each.clear()  # type: ignore[attr-defined]
    _elsewhere[:] = bytes(len(_elsewhere))


def probe(number: int, form: str, *operands: Any) -> Any:
    """Stands in the program in the place of a sum or product, and returns what that would have been."""
    seen = _seen[number]
    if torch.compiler.is_compiling():
        _run_elsewhere(number)
        return seen.site.form.plain(*operands)
    if os.getpid() != _PID or torch._C._get_tracing_state() is not None:
        _run_elsewhere(number)
        return seen.site.form.plain(*operands)
    return seen.run(operands)


def callee(number: int, function: Any) -> Any:
    """Stands around what the program calls there, and returns it."""
    if not torch.compiler.is_compiling():
        _shown[number].add(is_fresh(function))
    return function


def operand(number: int, value: Any) -> Any:
    """Stands around what the program computes with there, and returns it."""
    if not torch.compiler.is_compiling():
        _shown[number].add(type(value) in NUMBERS or is_plain(value))
    return value


def leave_alone(code: CodeType) -> None:
    """The program runs a file's code that is not watched."""
    name = os.path.realpath(code.co_filename)
    if name in _sources and _sources[name].sites:
        _left_alone.add(name)


def read_as_source(filename: str, first: int, last: int) -> None:
    """Somebody compiles these lines anew."""
    name = os.path.realpath(filename)
    source = _sources.get(name)
    for site in source.sites if source is not None else []:
        if first <= site.position[0] <= last and (name, site.index) in _numbers:
            _run_elsewhere(_numbers[name, site.index])


def found(others: str = "") -> dict[str, Any]:
    """`others` names the file in which other processes leave the numbers of sites whose code they were sent."""
    if os.path.exists(others):
        with open(others) as file:
            for number in map(int, file):
                _run_elsewhere(number)
    for number, seen in enumerate(_seen):
        if number >= len(_elsewhere) or _elsewhere[number]:
            seen.refute(_ELSEWHERE)
        if seen.of_others:
            seen.refute("not always plain tensors")
        for written, shown in seen.site.writable.items():
            if any(_shown[_shown_numbers[seen.file, each]] != {True} for each in shown):
                seen.refute_unsure(written)
    known = [seen.as_dict() for seen in _seen if seen.file not in _left_alone]
    return {"seen": known, "left alone": sorted(_left_alone)}

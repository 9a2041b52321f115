"""What is seen of each sum and product while the program runs: could an option have stood there, and what had it gained?"""

from __future__ import annotations

import ast
import mmap
import os
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

import safe_inplace

from .. import _C
from . import steps
from .find import Site
from .forms import Option
from .fresh import is_fresh
from .instrument import instrumented
from .source import Source

# Nobody would notice what smaller results gain.
SMALLEST = 64 * 1024


def _places(values: Sequence[Any], index: int) -> int:
    """How many places in this process hold the value: references, and what running frames borrow. -1 where that is unknown."""
    borrowed = _C.guard_borrowed(values[index])
    return -1 if borrowed < 0 else sys.getrefcount(values[index]) + borrowed


# What the probe's own arguments and calls hold of it.
_OF_A_TEMPORARY = _places((torch.empty(0),), 0)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NUMBERS = (int, float, complex, bool)
_DEFAULT = torch._C._autograd.CreationMeta.DEFAULT


def _is_plain(value: Any) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return type(value) in _PLAIN and value.layout == torch.strided and not value.is_nested and not wrapped(value)


def _may_be_written(tensor: torch.Tensor) -> bool:
    """Autograd allows it, whatever the result is used for, and nobody sees it but the one place that has it."""
    if weakref.getweakrefcount(tensor) or tensor.__dict__:
        return False
    if tensor._is_view() and torch._C._autograd._get_creation_meta(tensor) != _DEFAULT:
        return False
    return _C.may_take_over(tensor)


class Seen:
    """Of one site, over all its calls."""

    def __init__(self, source: Source, site: Site) -> None:
        self.source = source
        self.site = site
        self.calls = 0
        self.steps: set[int] = set()
        self.largest = 0
        self.eps = 0.0  # of the coarsest dtype
        self.gained: dict[Option, int] = dict.fromkeys(site.options, 0)  # bytes, by those that could have stood there so far
        self.against: Counter[str] = Counter()

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.source.filename,
            "index": self.site.index,
            "calls": self.calls,
            "steps": steps.distinct(self.steps) if steps.are_counted() else self.calls,
            "largest": self.largest,
            "eps": self.eps,
            "gained": {str(self.site.options.index(option)): gain for option, gain in self.gained.items()},
            "against": dict(self.against),
        }

    def refute(self, why: str) -> None:
        self.gained.clear()
        self.against[why] += 1

    def refute_unsure(self, operand: int) -> None:
        """What the operand holds was not always made by who makes new tensors alone."""
        left = {option: gain for option, gain in self.gained.items() if option.writes != operand}
        if self.gained and not left:
            self.against["what could be written comes from a call that may return what it was given"] = self.calls
        self.gained = left

    def run(self, operands: tuple[Any, ...]) -> Any:
        """Computes what the program would have."""
        form = self.site.form
        # What modes see is the program's own.
        with torch._C.DisableTorchFunction():
            free = self._free(operands)
        if form.first is None:
            first = None
            result = form.last(*operands)
        else:
            first = form.first(*operands)
            result = form.last(first, *operands)
        with torch._C.DisableTorchFunction(), _lock:
            if _is_plain(result):
                self._judge(operands, first, result, free)
            else:
                self.refute("not always plain tensors")
        return result

    def _free(self, operands: tuple[Any, ...]) -> tuple[int, ...]:
        """The operands whose memory nobody sees but the variable or the calling expression that has them."""
        return tuple(
            i
            for i in range(len(operands))
            if _is_plain(operands[i])
            and _places(operands, i) == _OF_A_TEMPORARY + (i in self.site.names)
            and _may_be_written(operands[i])
        )

    def _judge(self, operands: tuple[Any, ...], first: Any, result: torch.Tensor, free: tuple[int, ...]) -> None:
        self.calls += 1
        self.steps.add(steps.current())
        size = result.nbytes
        self.largest = max(self.largest, size)
        why = self._why_none(operands, first, result)
        if why is not None:
            self.refute(why)
            return
        self.eps = max(self.eps, torch.finfo(result.dtype).eps)
        fits = [i for i in free if operands[i].shape == result.shape and operands[i].stride() == result.stride()]
        made = 1 + (first is not None)
        for option in list(self.gained):
            gain = made - self._made_by(option, operands, fits)
            if _is_possible(option, operands, result, fits) and (gain > 0 or size < SMALLEST):
                self.gained[option] += gain * size
            else:
                del self.gained[option]
        if not self.gained:
            self.against["what could be written is read again, or held by somebody else"] += 1

    def _made_by(self, option: Option, operands: tuple[Any, ...], fits: list[int]) -> int:
        """How many values of the size of the result would come into being."""
        taken = any(i not in self.site.names and not option.needs(i, operands) for i in fits)
        return option.keeps(operands) + (option.writes is None and not taken)

    def _why_none(self, operands: tuple[Any, ...], first: Any, result: torch.Tensor) -> str | None:
        for value in operands:
            if _is_plain(value):
                if value.dtype != result.dtype or value.device != result.device:
                    return "operands of several dtypes or devices"
            elif type(value) not in _NUMBERS:
                return "an operand is neither a plain tensor nor a number"
        if not (result.is_floating_point() or result.is_complex()):
            return "whole numbers"
        if first is not None and not (_is_plain(first) and first.shape == result.shape):
            return "the first of two results is smaller than the second"
        return None


def _is_possible(option: Option, operands: tuple[Any, ...], result: torch.Tensor, fits: list[int]) -> bool:
    """Whether the result would be what it is: of the same layout, and with the same history or none."""
    if not isinstance(operands[option.order[0]], torch.Tensor):
        return False
    if option.writes is not None:
        written = operands[option.writes]
        same_kind = result.requires_grad >= written.requires_grad and result.is_inference() == written.is_inference()
        return option.writes in fits and same_kind
    # The op knows how it lays out what it makes.
    tensors = [value for value in operands if isinstance(value, torch.Tensor)]
    if all(value.is_contiguous() for value in (*tensors, result)):
        return True
    given = [_described(operands[i]) for i in option.order]
    return getattr(safe_inplace, option.op)(*given).stride() == result.stride()


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


_lock = threading.RLock()
_sources: dict[str, Source] = {}
_numbers: dict[tuple[str, int], int] = {}
_seen: list[Seen] = []
_callees: list[set[bool]] = []  # whether what was called there makes new tensors alone
_callee_numbers: dict[tuple[str, int], int] = {}
_left_alone: set[str] = set()

# A flag for each site that has run where nothing can be seen of it: in a forked process, or as code of a compiler's.
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
    name = source.filename
    with _lock:
        before = _sources.setdefault(name, source)
        if source.left_alone or before.text != source.text:
            _left_alone.add(name)
            return source.tree
        for site in source.sites:
            if (name, site.index) not in _numbers:
                _numbers[name, site.index] = len(_seen)
                _seen.append(Seen(source, site))
        for index in range(len(source.calls)):
            if (name, index) not in _callee_numbers:
                _callee_numbers[name, index] = len(_callees)
                _callees.append(set())
        sites = [_numbers[name, site.index] for site in source.sites]
        calls = [_callee_numbers[name, index] for index in range(len(source.calls))]
    return instrumented(source, sites, calls)


def forget() -> None:
    """All that was watched."""
    for each in (_sources, _numbers, _seen, _callees, _callee_numbers, _left_alone):
        each.clear()  # type: ignore[attr-defined]
    _elsewhere[:] = bytes(len(_elsewhere))


def probe(number: int, *operands: Any) -> Any:
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
        _callees[number].add(is_fresh(function))
    return function


def found() -> dict[str, Any]:
    for number, seen in enumerate(_seen):
        name = seen.source.filename
        if number >= len(_elsewhere) or _elsewhere[number]:
            seen.refute("it also runs where it is not watched: compiled, traced, or in another process")
        for operand, calls in seen.site.writable.items():
            if any(_callees[_callee_numbers[name, call]] != {True} for call in calls):
                seen.refute_unsure(operand)
    known = [seen.as_dict() for seen in _seen if seen.source.filename not in _left_alone]
    return {"seen": known, "left alone": sorted(_left_alone)}

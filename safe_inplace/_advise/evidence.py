"""What is seen of each sum and product while the program runs: could an option have stood there, and what had it gained?"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

import safe_inplace

from .. import _C
from . import steps
from .find import Site
from .forms import Option
from .fresh import PLAIN, is_one_of

# Nobody would notice what smaller results gain.
SMALLEST = 64 * 1024


def _places(values: Sequence[Any], index: int) -> int:
    """How many places in this process hold the value: references, and what running frames borrow. -1 where that is unknown."""
    borrowed = _C.guard_borrowed(values[index])
    return -1 if borrowed < 0 else sys.getrefcount(values[index]) + borrowed


# What the probe's own arguments and calls hold of it.
_OF_A_TEMPORARY = _places((torch.empty(0),), 0)
NUMBERS = (int, float, complex, bool)
_DEFAULT = torch._C._autograd.CreationMeta.DEFAULT


def is_plain(value: Any) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return is_one_of(value, PLAIN) and value.layout == torch.strided and not value.is_nested and not wrapped(value)


def _may_be_written(tensor: torch.Tensor) -> bool:
    """Autograd allows it, whatever the result is used for, and nobody sees it but the one place that has it."""
    if weakref.getweakrefcount(tensor) or tensor.__dict__:
        return False
    if tensor._is_view() and torch._C._autograd._get_creation_meta(tensor) != _DEFAULT:
        return False
    return _C.may_take_over(tensor)


# Taken again in one thread: a handler of a signal, or a finalizer, may run the program's code anywhere.
_lock = threading.RLock()


class Seen:
    """Of one site, over all its calls."""

    def __init__(self, file: str, site: Site) -> None:
        self.file = file
        self.site = site
        self.calls = 0
        self.steps: set[int] = set()
        self.largest = 0
        self.eps = 0.0  # of the coarsest dtype
        self.gained: dict[Option, int] = dict.fromkeys(site.options, 0)  # bytes, by those that could have stood there so far
        self.against: Counter[str] = Counter()
        self.is_judged = False  # just now
        self.within_itself = False
        self.of_others = False  # it has also computed with something else than plain tensors

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
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
        """What the operand holds was not always made, and read, by who makes new tensors alone."""
        left = {option: gain for option, gain in self.gained.items() if option.writes != operand}
        if self.gained and not left:
            self.against["who made or read what could be written may, another time, keep or return what it got"] = self.calls
        self.gained = left

    def run(self, operands: tuple[Any, ...]) -> Any:
        """Computes what the program would have."""
        form = self.site.form
        if not any(issubclass(type(value), torch.Tensor) for value in operands):
            self.of_others = True
            return form.plain(*operands)
        # What modes see is the program's own.
        with torch._C.DisableTorchFunction():
            free = self._free(operands) if self.gained else ()
        if form.first is None:
            first = None
            result = form.last(*operands)
        else:
            first = form.first(*operands)
            result = form.last(first, *operands)
        with torch._C.DisableTorchFunction(), _lock:
            if self.is_judged:
                self.within_itself = True
            elif is_plain(result):
                self.is_judged = True
                try:
                    self._judge(operands, first, result, free)
                finally:
                    self.is_judged = False
            else:
                self.of_others = True
        return result

    def _free(self, operands: tuple[Any, ...]) -> tuple[int, ...]:
        """The operands whose memory nobody sees but the variable or the calling expression that has them."""
        return tuple(
            i
            for i in range(len(operands))
            if is_plain(operands[i])
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
            if is_plain(value):
                if value.dtype != result.dtype or value.device != result.device:
                    return "operands of several dtypes or devices"
            elif not is_one_of(value, NUMBERS):
                return "an operand is neither a plain tensor nor a number"
        if not (result.is_floating_point() or result.is_complex()):
            return "whole numbers"
        if first is not None and not (is_plain(first) and first.shape == result.shape):
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
    with _disable_current_modes():
        given = [_described(operands[i]) for i in option.order]
        return getattr(safe_inplace, option.op)(*given).stride() == result.stride()


def _described(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

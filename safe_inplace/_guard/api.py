"""The context manager and decorator `guard`."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, SupportsIndex, TypeVar

import torch

from .. import _C
from .._dynamo import break_graph_at, keep_out_of
from .findings import Findings
from .hazards import Hazard, summary
from .judge import Judge
from .modes import OnHazard
from .say import say_once
from .torch_patches import hand_out_what_was_saved, let_higher_order_operators_pass, torch_patches

__tracebackhide__ = True

F = TypeVar("F", bound=Callable[..., Any])

_C.guard_parameter_type(torch.nn.Parameter)
keep_out_of(__package__)
# Compiled autograd traces the hooks of what was saved.
break_graph_at(_C.guard_pack)
break_graph_at(_C.guard_unpack)


def _outside_of_graphs(function: F) -> F:
    """What a compiler says that was to make one graph of it."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "a safe_inplace.guard cannot be opened inside of a compiled region; open it around the call of the compiled function"
    )
    return function



class _Opening(NamedTuple):
    guard: guard
    caller: int  # the frame that entered it, which is not kept alive


class _Openings(list[_Opening]):
    """Of a thread, which may end with some of them open."""

    def __del__(self) -> None:
        for _ in self:
            torch_patches.exit()


_entered = threading.local()


def open_here() -> _Openings:
    """The guards that this thread has entered and not left, the innermost last."""
    return _entered.__dict__.setdefault("guards", _Openings())


def _leave(here: _Openings, at: int) -> None:
    inside = len(here) - 1 - at
    del here[at]
    torch_patches.exit()
    _C.guard_exit(here[-1].guard if here else None, inside)


class guard(Judge):
    """Names every write to memory that a live autograd node saved; context manager and decorator.

    Args:
        on_hazard: ``"raise"`` raises :class:`HazardError` at the write, before anything is written. ``"warn"`` issues a
            :class:`HazardWarning` once per pair of lines and lets torch go on as ever. ``"copy"`` copies the saved value,
            and only it, just before the write: backward is then right. ``"defer"`` is silent at the write and raises, with
            both lines, in the backward that asks for the value. ``"raise"`` and ``"warn"`` wait for that backward as well
            where correct programs write day after day: where a parameter is written, or a value of a graph that has been
            through a backward already.
        verify: also fingerprint each saved tensor, and compare before backward uses it. Finds writes that no operator
            declares: NumPy, raw pointers, kernels that write where they should not.

    A guard holds for the thread that entered it, and for the backward that this thread starts. What was saved under it is
    checked in backward wherever that runs. Guards nest; the innermost decides.

    ``hazards`` lists what was found, one per pair of lines, with the fields of :class:`HazardError` and how often it was met,
    ``count``; ``hazards_seen`` and ``bytes_copied`` are the totals.

    As a decorator: ``@guard``, ``@guard("copy")``; type checkers know ``@guard()``.

    >>> import torch, safe_inplace
    >>> x = torch.ones(3, requires_grad=True)
    >>> with safe_inplace.guard("copy") as watched:
    ...     h = x * 2
    ...     y = h * h
    ...     h.add_(1)
    ...     y.sum().backward()
    tensor([3., 3., 3.], grad_fn=<AddBackward0>)
    >>> x.grad, watched.hazards_seen, watched.bytes_copied
    (tensor([8., 8., 8.]), 1, 12)
    """

    @_outside_of_graphs
    def __new__(cls, on_hazard: OnHazard | Callable[..., Any] = "raise", verify: bool = False) -> Any:
        if callable(on_hazard):
            return cls(verify=verify)(on_hazard)  # @guard
        return super().__new__(cls)

    @_outside_of_graphs
    def __init__(self, on_hazard: OnHazard = "raise", verify: bool = False) -> None:
        super().__init__(on_hazard, verify)
        self.on_hazard = on_hazard
        self._left_by_exception = 0

    # -- as a context manager and decorator

    @_outside_of_graphs
    def __enter__(self) -> guard:
        let_higher_order_operators_pass()
        hand_out_what_was_saved()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0] is not _C.guard_pack:
            say_once(
                "hooks around",
                "safe_inplace.guard: the saved-tensor hooks around the guard are not called for what is saved inside of it.",
            )
        here = open_here()
        _C.guard_enter(self)
        try:
            torch_patches.enter()
        except BaseException:
            _C.guard_exit(here[-1].guard if here else None, 0)
            raise
        here.append(_Opening(self, id(sys._getframe(1))))
        return self

    @_outside_of_graphs
    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        here = open_here()
        # Usually the last; guards that overlap (an ExitStack, two generators) may be left in any order.
        at = next((at for at in reversed(range(len(here))) if here[at].guard is self), None)
        if at is None:
            if self._left_by_exception:
                self._left_by_exception -= 1
                return
            raise RuntimeError(
                "guard: left in another thread than the one that entered it, where it is still open; a generator or a "
                "coroutine that holds one must be closed where it ran"
            )
        # Those that a function entered by hand, which an exception has ended since.
        ended: set[int] = set()
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
            ended.add(id(traceback.tb_frame))
        for inner in reversed(range(at + 1, len(here))):
            if here[inner].caller in ended:
                here[inner].guard._left_by_exception += 1
                _leave(here, inner)
        _leave(here, at)

    def __call__(self, function: F) -> F:
        if any(
            suspends(code)
            for code in (function, getattr(function, "__call__", None))  # noqa: B004
            for suspends in (inspect.iscoroutinefunction, inspect.isgeneratorfunction)
        ):
            raise TypeError(
                f"guard: {getattr(function, '__qualname__', function)} suspends, and the guard would then hold for whatever "
                "else the thread runs; use `with guard():` around the code between two suspensions"
            )

        if inspect.isasyncgenfunction(function):
            return _watched_steps(self, function)  # type: ignore[return-value]

        @_outside_of_graphs
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return guarded  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "guard: neither copied nor pickled, since it watches the threads of this process that entered it; make another: "
            f"guard({self.on_hazard!r}{', verify=True' * self.verify}). What it found, `hazards`, can be pickled"
        )

    def _forget(self) -> None:
        """In a process made by fork: what was found before is the other process's, and so are the threads that hold locks."""
        self._findings = Findings()
        torch_patches.after_fork()

    # -- what was found

    @property
    def hazards(self) -> list[Hazard]:
        return list(self._findings.hazards.values())

    @property
    def hazards_seen(self) -> int:
        return sum(hazard.count for hazard in self._findings.hazards.values())

    @property
    def bytes_copied(self) -> int:
        return sum(hazard.bytes_copied for hazard in self._findings.hazards.values())

    def summary(self, color: bool = False) -> str:
        """The hazards, the dearest first, one report each."""
        return summary(self.hazards, color)

    def as_dict(self) -> dict[str, Any]:
        return {
            "on_hazard": self.on_hazard,
            "verify": self.verify,
            "hazards_seen": self.hazards_seen,
            "bytes_copied": self.bytes_copied,
            "hazards": [hazard.as_dict() for hazard in self._findings.hazards.values()],
        }


def _watched_steps(watch: guard, function: Callable[..., AsyncGenerator[Any, Any]]) -> Callable[..., AsyncGenerator[Any, Any]]:
    """An async generator, watched while its own code runs: where it waits or has yielded, the thread runs other things."""

    @types.coroutine
    def watched(step: Any) -> Generator[Any, Any, Any]:
        resume: Callable[[], Any] = functools.partial(step.send, None)
        while True:
            try:
                with watch:
                    waiting_for = resume()
            except StopIteration as done:
                return done.value
            try:
                resume = functools.partial(step.send, (yield waiting_for))
            except BaseException as error:
                resume = functools.partial(step.throw, error)

    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        steps = function(*args, **kwargs)
        try:
            step: Any = steps.asend(None)
            while True:
                try:
                    item = await watched(step)
                except StopAsyncIteration:
                    return
                try:
                    step = steps.asend((yield item))
                except GeneratorExit:
                    raise
                except BaseException as error:  # a task that is cancelled
                    step = steps.athrow(error)
        finally:
            await watched(steps.aclose())

    return guarded

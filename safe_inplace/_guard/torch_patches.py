"""What torch does otherwise while a guard is open."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from .. import _C
from .say import say_once

__tracebackhide__ = True

_AOT = os.path.join("torch", "_functorch", "_aot_autograd") + os.sep


def let_higher_order_operators_pass() -> None:
    """Higher-order operators refuse every dispatch key that they do not know."""
    key = torch._C._parse_dispatch_key("TESTING_ONLY_GenericMode")
    known = torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS
    assert key is not None
    if key not in known:
        known.append(key)
        for operator in torch._ops._higher_order_ops.values():
            operator.fallthrough(key)


_saved_tensors_of = vars(torch._C._FunctionBase)["saved_tensors"].__get__


def hand_out_what_was_saved() -> None:
    """What `ctx.saved_tensors` holds is what the forward saved, as without hooks: a Function may set its `.grad`, or read what
    somebody set on it. For good: a graph outlives the guard that it was made under."""
    if "saved_tensors" not in vars(BackwardCFunction):
        BackwardCFunction.saved_tensors = property(_saved_tensors)  # type: ignore[assignment]


def _saved_tensors(ctx: Any) -> tuple[torch.Tensor | None, ...]:
    packed = [raw.data for raw in ctx._raw_saved_tensors]  # which clear_saved_tensors_on_access drops with the tensors
    return tuple(map(_original, packed, _saved_tensors_of(ctx)))


def _original(packed: Any, given: torch.Tensor | None) -> torch.Tensor | None:
    original = packed.original_of(given) if given is not None and isinstance(packed, _C.Saved) else None
    return given if original is None else original


class TorchPatches:
    """What torch does while a guard is open. torch.func refuses to run below saved-tensor hooks, so guard's step aside for a
    transform; hooks pushed inside hide what is saved from guard's, so guard looks through those of checkpoint and says once
    that it cannot look through others. No operator says that a storage gives its memory back, or that a compiled region is
    about to write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._torch_disable: Callable[[str], Any] | None = None
        self._torch_enter: Callable[[saved_tensors_hooks], None] | None = None
        self._torch_increment: Callable[[Any], None] | None = None

    def enter(self) -> None:
        with self._lock:
            self._open += 1
            if self._open == 1:
                self._torch_disable = torch.autograd.graph.disable_saved_tensors_hooks
                self._torch_enter = saved_tensors_hooks.__enter__
                torch.autograd.graph.disable_saved_tensors_hooks = self._step_aside  # type: ignore[assignment]
                saved_tensors_hooks.__enter__ = _enter_hooks  # type: ignore[method-assign]
                torch.UntypedStorage.resize_ = _resize_storage  # type: ignore[method-assign, assignment]
                self._torch_increment = torch._C._increment_version
                torch._C._increment_version = self._increment_version

    def exit(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                torch.autograd.graph.disable_saved_tensors_hooks = self._torch_disable  # type: ignore[assignment]
                saved_tensors_hooks.__enter__ = self._torch_enter  # type: ignore[method-assign, assignment]
                del torch.UntypedStorage.resize_
                torch._C._increment_version = self._torch_increment  # type: ignore[assignment]

    def after_fork(self) -> None:
        """Another thread may have held the lock, and is not there any more."""
        self._lock = threading.Lock()

    def _increment_version(self, tensors: Iterable[torch.Tensor]) -> None:
        """A compiled region says what its kernels write by raising the versions, before it runs. Whoever else raises one has
        written already."""
        assert self._torch_increment is not None
        caller = sys._getframe(1).f_back
        if caller is not None and _AOT in caller.f_code.co_filename and _C.guard_current() is not None:
            _C.guard_compiled_writes(tuple(tensors), self._torch_increment)
        else:
            self._torch_increment(tensors)

    @contextmanager
    def _step_aside(self, error_message: str) -> Iterator[None]:
        autograd = torch._C._autograd
        ours = (_C.guard_pack, _C.guard_unpack)
        aside = 0
        assert self._torch_disable is not None
        try:
            while autograd._top_saved_tensors_default_hooks(True) == ours:
                autograd._pop_saved_tensors_default_hooks()
                aside += 1
            if aside:
                say_once(
                    "torch.func",
                    "safe_inplace.guard: torch.func transforms allow no saved-tensor hooks, so what they save is not "
                    "judged; torch's own check holds for it.",
                )
            with self._torch_disable(error_message):
                yield
        finally:
            for _ in range(aside):
                autograd._push_saved_tensors_default_hooks(*ours)


torch_patches = TorchPatches()


def _resize_storage(storage: torch.UntypedStorage, size: int) -> Any:
    result = super(torch.UntypedStorage, storage).resize_(size)
    _C.guard_resized(storage._cdata)
    return result


def _enter_hooks(hooks: saved_tensors_hooks) -> None:
    pack, unpack = hooks.pack_hook, hooks.unpack_hook
    if _C.guard_current() is not None:
        if isinstance(hooks, checkpoint._checkpoint_hook):
            unpack = _recomputing(unpack)
        elif isinstance(hooks, checkpoint._recomputation_hook):
            if _recomputation.watched:
                pack = _through(pack)
        else:
            say_once(
                "hooks",
                "safe_inplace.guard: what is saved under other saved-tensor hooks (save_on_cpu, your own) is not judged, "
                "and torch does not check it either.",
            )
    torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


class _Recomputation(threading.local):
    watched = False


_recomputation = _Recomputation()


def _recomputing(unpack: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """checkpoint's unpack hook: computes the region again when it is asked for its first value, and hands out what that
    saved without looking at its version."""

    def watched(packed: Any) -> torch.Tensor:
        before, _recomputation.watched = _recomputation.watched, True
        try:
            tensor = unpack(packed)
        finally:
            _recomputation.watched = before
        saved = getattr(tensor, "_safe_inplace_saved", None)
        return tensor if saved is None else _C.guard_unpack(saved)

    return watched


def _through(pack: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """The hook that keeps what a recomputation saves. It is given an alias that carries guard's entry: both live as long as
    checkpoint keeps them."""

    def watched(tensor: torch.Tensor) -> Any:
        saved = _C.guard_pack(tensor)
        alias = saved.value.detach()
        alias._safe_inplace_saved = saved  # type: ignore[attr-defined]
        return pack(alias)

    return watched

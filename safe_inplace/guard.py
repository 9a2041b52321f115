"""guard: names every write to memory that autograd saved, at the line of the write, or makes it harmless.

The watching is done in C++ (csrc/guard.cpp). This module is called only when there is something to decide: it knows what
a hazard means, what to tell the user, and what to copy.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import sys
import sysconfig
import threading
import types
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from types import CodeType, FrameType, TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes

from . import _C
from ._modules import is_of_a_module, module_in_words, parameter_name
from ._rewrite import Rewritten, out_of_place

__all__ = ["HazardError", "HazardWarning", "Site", "guard"]

OnHazard = Literal["raise", "warn", "copy", "defer"]
Kind = Literal["overwritten", "version", "unseen", "corrupted", "exchanged"]
# Code and instruction of a line, the innermost module that was being called, code and instruction of the caller's line.
Place = tuple[CodeType | None, int, "weakref.ref[torch.nn.Module] | None", CodeType | None, int]
_NOWHERE: Place = (None, -1, None, None, -1)
F = TypeVar("F", bound=Callable[..., Any])


# ---- whose code a frame is

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_SITE = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
_STDLIB = tuple({sysconfig.get_path("stdlib") + os.sep, sysconfig.get_path("platstdlib") + os.sep})
_LIBRARIES = (
    _PACKAGE + os.sep,
    *(os.path.join(_SITE, name) + os.sep for name in ("torch", "functorch", "torchgen", "triton")),
)
_INSTALLED = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)
_OPTIMIZERS = os.path.join(_SITE, "torch", "optim") + os.sep
_DDP = os.path.join(_SITE, "torch", "nn", "parallel", "distributed.py")
_AOT = os.path.join("torch", "_functorch", "_aot_autograd") + os.sep
_COMPILED_REGION = os.path.join("_aot_autograd", "runtime_wrappers.py")


def _whose_code(code: CodeType) -> int:
    """0 for torch, this package and the standard library, 1 for other installed packages, 2 for the user's own. The line in a
    model of timm or transformers says more than the line that called the model: it is named, and its caller as well."""
    filename = code.co_filename
    if filename.endswith(_COMPILED_REGION):
        _say_once(
            "compiled region",
            "safe_inplace.guard: of a compiled region only what it saves and which of its inputs it writes is known; what else "
            "its kernels write is found by guard(verify=True).",
        )
    if filename.startswith(("<frozen ", "<eval_with_key>", *_LIBRARIES)):
        return 0
    if any(part in filename for part in _INSTALLED):
        return 1
    return 0 if filename.startswith(_STDLIB) else 2


_C.guard_whose_code(_whose_code, torch.nn.Module.__call__.__code__)
_C.guard_parameter_type(torch.nn.Parameter)


@dataclass(frozen=True)
class Site:
    """A line of the user's code."""

    filename: str
    lineno: int
    function: str
    source: str
    columns: tuple[int, int] | None = field(default=None, compare=False, repr=False)
    called: weakref.ref[torch.nn.Module] | str | None = field(default=None, compare=False, repr=False)
    caller: Site | None = field(default=None, compare=False)  # the user's line that led there, into an installed package

    @property
    def module(self) -> str | None:
        """The innermost module that was being called, by its path. Looked up when it is asked for: most lines never are."""
        if not isinstance(self.called, weakref.ref):
            return self.called
        module = self.called()
        words = module_in_words(module) if module is not None else None
        object.__setattr__(self, "called", words)
        return words

    def __reduce__(self) -> tuple[Any, ...]:
        return Site, (self.filename, self.lineno, self.function, self.source, self.columns, self.module, self.caller)

    def __str__(self) -> str:
        return f"{self.filename}:{self.lineno}, in {self.function}"

    @property
    def expression(self) -> str:
        """The part of the line that ran, as far as the interpreter knows it."""
        return self.source[slice(*self.columns)] if self.columns else self.source


def _site(place: Place) -> Site | None:
    code, instruction, module, caller, at = place
    if code is None:
        return None
    return _line(code, instruction, module, _line(caller, at) if caller is not None else None)


def _line(
    code: CodeType, instruction: int, called: weakref.ref[torch.nn.Module] | None = None, caller: Site | None = None
) -> Site:
    lineno, end_lineno, column, end_column = next(
        islice(code.co_positions(), max(instruction, 0) // 2, None), (None, None, None, None)
    )
    lineno = lineno or code.co_firstlineno
    line = linecache.getline(code.co_filename, lineno)
    source = line.strip()
    columns = None
    if column is not None and end_column is not None and end_lineno == lineno and source:
        # The columns count bytes of UTF-8.
        raw, indent = line.encode(), len(line) - len(line.lstrip())
        begin = len(raw[:column].decode(errors="replace")) - indent
        columns = (begin, begin + len(raw[column:end_column].decode(errors="replace")))
    return Site(code.co_filename, lineno, code.co_qualname, source, columns, called, caller)


# ---- what is reported


def _bytes_in_words(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@dataclass
class Hazard:
    """One pair of lines: a write and the save that it destroys. What happened again between the same lines is counted."""

    kind: Kind
    mutation: Site | None
    save: Site | None
    op: str | None
    saved_by: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    used: bool = False  # by a backward before
    rewritten: Rewritten = field(default_factory=Rewritten)
    result: bool = False  # the operator saved what it returned, not what it was given
    unread: bool = False  # saved, but backward would be right without it
    by: Literal["optimizer", "ddp"] | None = None  # the part of torch that wrote, where it is one of these
    late: bool = False  # found when backward asked for the value, not at the write
    parameter: str | None = None  # the name of the parameter that the value is, or is a view of
    count: int = 0
    bytes_copied: int = 0
    told: bool = False  # by a warning
    of_a_module: bool | None = None  # the value lies in a buffer or parameter of a module; None: not asked

    @property
    def remedies(self) -> list[str]:
        write = self.mutation.source if self.mutation else ""
        op = (self.op or "").removeprefix("aten.").split(".")[0]
        advice: list[str] = []
        if self.kind == "corrupted":
            return [
                "Look between the save and backward for what writes without telling torch: NumPy or DLPack aliases, raw "
                "pointers, custom kernels (Triton, ctypes).",
                "Give the saving line a value of its own: clone() what that code writes to.",
            ]
        if self.kind == "exchanged":
            return [
                "Write the new values into the memory that is there (with torch.no_grad(): x.copy_(new)) after backward, or "
                "compute the forward again after the exchange.",
                'Or guard("copy"): backward then has the values of the forward.',
            ]
        if self.kind == "unseen":
            return [
                "Put the code between this save and its backward under guard as well (guard is per thread): the write "
                "is then named, too.",
                "Save a value of its own: clone() at the line of the save.",
            ]
        update = self.by == "optimizer" or self.rewritten.parameter
        # The line does not name the operator: a function or a module that it calls does.
        called_within = self.mutation is not None and op.strip("_") not in write and "]" not in write.partition("=")[0]
        if self.rewritten.leaf:
            advice.append("Write under `with torch.no_grad():`; elsewhere torch refuses to write to a leaf that requires grad.")
        if self.used and self.kind == "overwritten" and not self.late:
            advice.append(
                "The graph has been through backward already: where nothing goes through it again, drop what keeps it (its "
                "outputs, its loss) before this write."
            )
        if op == "embedding_renorm_":
            advice.append(
                "max_norm rescales the weight in place at every lookup: look up before the weight is used, or use a clone() "
                "of the weight there."
            )
        elif update:
            what = "step" if self.by == "optimizer" else "update"
            advice.append(f"Run backward() before this {what}, or compute the forward again after it.")
        elif self.by == "ddp":
            advice.append(
                "DistributedDataParallel broadcasts buffers before each forward: run backward() between the two forwards, "
                "or build it with broadcast_buffers=False."
            )
        elif self.rewritten.code:
            advice.append(f"Write it out of place: {self.rewritten.code}")
        elif self.rewritten.clone:
            name = self.rewritten.clone
            advice.append(
                f"Assign into a clone ({name} = {name}.clone() before this line), or build the result with torch.where or "
                "torch.stack."
            )
        elif "out=" in write:
            advice.append("Leave out= away, or hand it memory that nothing has saved.")
        elif op.endswith("batch_norm"):
            advice.append("Run backward of the eval-mode forward before the next forward in train mode.")
        elif called_within and op.endswith("_") and (hasattr(torch.Tensor, op[:-1]) or hasattr(torch.nn.functional, op[:-1])):
            advice.append(
                f"What runs here writes with {op}(): use its out-of-place form, {op[:-1]}() (a module: inplace=False), and its "
                "result from here on."
            )
        if self.unread:
            advice.append(
                "Backward does not read the running statistics that batch norm in train mode saved: torch refuses by the "
                "version alone. Run backward before the write."
            )
        elif self.kind == "version":
            advice.append(
                "The saved bytes are intact: torch counts versions for all views of one tensor together. Save a clone() "
                "of the view, or collect the parts in a list and torch.stack them."
            )
        elif update:
            saving = f" ({self.save.filename.rpartition(os.sep)[2]}:{self.save.lineno})" if self.save else ""
            advice.append(
                f"Where no gradient is to flow through the save{saving}, compute it under torch.no_grad(), detach() its "
                "result, or drop the outputs that are kept."
            )
        elif self.save is not None:
            advice.append(self._apart(self.save))
        advice.append(
            f'Or let guard("copy") do it: it copies this value only, {_bytes_in_words(self.nbytes)} each time.'
            if self.kind == "overwritten"
            else 'Or guard("copy"), which lets such a write pass.'
        )
        return advice[:3]

    def _apart(self, save: Site) -> str:
        """The remedy at the save: what it keeps, and what is written, are two."""
        where = f"{save.filename.rpartition(os.sep)[2]}:{save.lineno}"
        whole = f" of `{save.expression}`" if save.columns else ""
        if self.result:
            return f"Keep the saved value apart, at {where}: clone() the result{whole}, and go on with the clone."
        return f"Keep the saved value apart, at {where}: clone() the operand{whole} that is written here."

    def text(self, color: bool = False) -> str:
        def paint(code: str, words: str) -> str:
            return f"\x1b[{code}m{words}\x1b[0m" if color else words

        modified = "one of the variables needed for gradient computation has been modified by an inplace operation"
        headline = {
            "overwritten": modified
            if self.late
            else "a value needed for gradient computation is about to be modified by an inplace operation",
            "version": f"{modified} (its version alone: backward would be right)",
            "unseen": f"{modified} that guard did not see",
            "corrupted": "a value needed for gradient computation changed, and no operator says that it wrote it",
            "exchanged": "a tensor needed for gradient computation was given other memory with other values (x.data = ...): "
            "torch alone would take these in backward",
        }[self.kind]
        lines = [paint("1;31", headline), ""]
        for label, code, site, what in (
            ("written", "1;31", self.mutation, self.op),
            ("saved", "1;33", self.save, self.saved_by),
        ):
            if site is None:
                continue
            lines.append(f"  {paint(code, f'{label:<8}')}{paint('1', str(site))}   [{what}]")
            number = f"{site.lineno} | "
            lines.append(f"    {paint('2', number)}{site.source}")
            if site.columns and site.expression != site.source:
                begin, end = site.columns
                lines.append("    " + " " * (len(number) + begin) + paint(code, "^" * (end - begin)))
            if site.module is not None:
                lines.append(f"    in {site.module}")
            if site.caller is not None:
                lines.append(f"    called from {site.caller}")
                lines.append(f"    {paint('2', f'{site.caller.lineno} | ')}{site.caller.source}")
        device = f" on {self.device}" if self.device.type != "cpu" else ""
        shape = ", ".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        parameter = f", parameter {self.parameter}" if self.parameter is not None else ""
        lines.append(f"  {'value':<8}{dtype}[{shape}]{device}, {_bytes_in_words(self.nbytes)}{parameter}")
        lines += ["", *(f"  {number}. {remedy}" for number, remedy in enumerate(self.remedies, 1))]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        def site(value: Site | None) -> dict[str, Any] | None:
            if value is None:
                return None
            return {
                "filename": value.filename,
                "lineno": value.lineno,
                "function": value.function,
                "source": value.source,
                "module": value.module,
                "caller": site(value.caller),
            }

        return {
            "kind": self.kind,
            "mutation": site(self.mutation),
            "save": site(self.save),
            "op": self.op,
            "saved_by": self.saved_by,
            "shape": list(self.shape),
            "dtype": str(self.dtype),
            "device": str(self.device),
            "parameter": self.parameter,
            "count": self.count,
            "bytes_copied": self.bytes_copied,
            "remedies": self.remedies,
        }


class _Report(Exception):
    """What HazardError and HazardWarning have in common: the hazard's fields, and a text with both source lines."""

    def __init__(self, hazard: Hazard) -> None:
        super().__init__(hazard)
        self.hazard = hazard
        self.mutation = hazard.mutation
        self.save = hazard.save
        self.op = hazard.op
        self.saved_by = hazard.saved_by
        self.shape = hazard.shape
        self.dtype = hazard.dtype
        self.device = hazard.device
        self.parameter = hazard.parameter
        self.remedies = hazard.remedies

    def __str__(self) -> str:
        # Plain: a message may end up in a log. `python -m safe_inplace run` colours its summary on a terminal.
        return self.hazard.text()


class HazardError(_Report, RuntimeError):
    """A write would destroy (or, found in backward: has destroyed) a value that autograd saved. Nothing has been written
    where it is raised at the write; in backward, nothing has been computed from the value.

    ``mutation`` and ``save`` are the two lines, each a :class:`Site`, with the ``module`` that was being called and, for a
    line of an installed package, the ``caller``; ``op`` wrote, ``saved_by`` saved; ``shape``, ``dtype`` and ``device`` are
    the saved value's, and ``parameter`` is its name where it is a parameter.
    ``mutation`` and ``op`` are None where nothing saw the write.
    """


class HazardWarning(_Report, UserWarning):
    """The same as :class:`HazardError`, under ``guard("warn")``."""


_said: set[str] = set()


def _say_once(about: str, words: str) -> None:
    if about not in _said:
        _said.add(about)
        warnings.warn(words, UserWarning, stacklevel=2)


# ---- what torch has to be told


def _let_higher_order_operators_pass() -> None:
    """Higher-order operators refuse every dispatch key that they do not know."""
    key = torch._C._parse_dispatch_key("TESTING_ONLY_GenericMode")
    known = torch._ops._HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS
    assert key is not None
    if key not in known:
        known.append(key)
        for operator in torch._ops._higher_order_ops.values():
            operator.fallthrough(key)


class _TorchPatches:
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
        while autograd._top_saved_tensors_default_hooks(True) == ours:
            autograd._pop_saved_tensors_default_hooks()
            aside += 1
        if aside:
            _say_once(
                "torch.func",
                "safe_inplace.guard: torch.func transforms allow no saved-tensor hooks, so what they save is not "
                "judged; torch's own check holds for it.",
            )
        assert self._torch_disable is not None
        try:
            with self._torch_disable(error_message):
                yield
        finally:
            for _ in range(aside):
                autograd._push_saved_tensors_default_hooks(*ours)


_torch_patches = _TorchPatches()


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
            _say_once(
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


def _short(operator: str) -> str:
    return operator.replace("::", ".")


def _parts(tensor: torch.Tensor, arrived: bool = False) -> Iterator[torch.Tensor]:
    """The plain tensors that a traceable wrapper subclass is made of (DTensor, jagged nested tensors, ...). With `arrived`,
    what a collective is still bringing is waited for."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    if not torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        yield tensor
        return
    if not hasattr(tensor, "__tensor_flatten__"):
        _say_once(
            f"type {type(tensor)}",
            f"safe_inplace.guard: {type(tensor).__name__} does not tell where its memory is; only its version is checked.",
        )
        return
    if arrived and hasattr(tensor, "trigger_wait"):  # AsyncCollectiveTensor
        with _disable_current_modes():
            value = tensor.trigger_wait()
        yield from _parts(value, arrived)
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, torch.Tensor):  # a DTensor names its mesh, too
            yield from _parts(part, arrived)


# ---- what a guard does about it

# What is known of a write, made while it runs and kept with the value until backward asks for it: no frame, no tensor.
_Note: TypeAlias = "tuple[tuple[Any, ...], Hazard]"
# What to report where the tensor, which stays on its device, is true.
_Compared: TypeAlias = "tuple[_Note, torch.Tensor]"


class _Raise:
    """What each event leads to. This one stops at the write, or, where correct programs write day after day, in the
    backward that asks for the value."""

    def write(
        self, watch: guard, entries: list[_C.Saved], op: str, place: Place, update: bool
    ) -> list[_Note | None] | None:
        """These values are about to be overwritten; each with a note is refused to backward once they are. `update` tells a
        write that no gradient flows through: under no_grad, or by a batch norm to its statistics."""
        notes: list[_Note | None] = []
        for entry in entries:
            note = watch._note("overwritten", entry, op, place)
            if not _may_be_for_good(entry, note, update):
                raise HazardError(watch._found(note, entry))
            notes.append(note)
        return notes

    def version(self, watch: guard, entries: list[_C.Saved], op: str, place: Place) -> None:
        """The version of these values rose, their bytes are as they were."""
        for entry in entries:
            if entry.note is None:
                entry.note = watch._note("version", entry, op, place)

    def asked(self, watch: guard, saved: _C.Saved) -> None:
        """Backward asks for a value that was overwritten, or whose version rose: what plain torch refuses."""
        raise HazardError(watch._found(_late(watch, saved), saved))

    def corrupted(self, watch: guard, hazard: Hazard) -> None:
        """Backward asks for a value whose bytes are not what they were, or has asked for it."""
        raise HazardError(hazard)

    def exchanged(self, watch: guard, hazard: Hazard, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        """Backward asks for a tensor that lies in other memory now; the answer is what it gets."""
        raise HazardError(hazard)


class _Defer(_Raise):
    """Stops in the backward that asks for the value, whatever was written."""

    def write(
        self, watch: guard, entries: list[_C.Saved], op: str, place: Place, update: bool
    ) -> list[_Note | None] | None:
        return [watch._note("overwritten", entry, op, place) for entry in entries]


class _Warn(_Raise):
    """Tells where _Raise would stop, and leaves the rest to torch."""

    def write(
        self, watch: guard, entries: list[_C.Saved], op: str, place: Place, update: bool
    ) -> list[_Note | None] | None:
        notes: list[_Note | None] = []
        told: set[int] = set()
        for entry in entries:
            note = watch._note("overwritten", entry, op, place)
            waits = _may_be_for_good(entry, note, update)
            notes.append(note if waits else None)
            if not waits:
                entry.note = note
                entry.release()
                if id(note[1]) not in told:
                    told.add(id(note[1]))
                    watch._warn(watch._found(note, entry))
        return notes

    def asked(self, watch: guard, saved: _C.Saved) -> None:
        note = _late(watch, saved)
        hazard = None if saved.lost or note[0][0] != "overwritten" else watch._known(note)
        if hazard is None:
            hazard = watch._found(note, saved)
            watch._warn(hazard)
        if saved.stale:
            raise HazardError(hazard)

    def corrupted(self, watch: guard, hazard: Hazard) -> None:
        watch._warn(hazard)

    def exchanged(self, watch: guard, hazard: Hazard, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        watch._warn(hazard)
        return now


class _Copy(_Raise):
    """Copies what is about to be lost."""

    def write(
        self, watch: guard, entries: list[_C.Saved], op: str, place: Place, update: bool
    ) -> list[_Note | None] | None:
        copied: dict[tuple[Any, ...], torch.Tensor] = {}
        pairs: dict[int, tuple[_Note, _C.Saved, int]] = {}
        for entry in entries:
            if entry.unaccounted:
                continue  # lost before this guard could see it: a copy would hide that from backward
            note = watch._note("overwritten", entry, op, place)
            nbytes, before = _nbytes(entry.value), len(copied)
            entry.replace(_private_copy(entry.value, copied))
            _, first, so_far = pairs.get(id(note[1]), (note, entry, 0))
            pairs[id(note[1])] = (note, first, so_far + (nbytes if len(copied) > before else 0))
        for note, entry, nbytes in pairs.values():
            watch._found(note, entry, nbytes)
        return None

    def version(self, watch: guard, entries: list[_C.Saved], op: str, place: Place) -> None:
        for entry in entries:
            watch._found(watch._note("version", entry, op, place), entry)
            entry.accept()

    def exchanged(self, watch: guard, hazard: Hazard, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        return saved.value


_MODES: dict[str, _Raise] = {"raise": _Raise(), "warn": _Warn(), "copy": _Copy(), "defer": _Defer()}


def _may_be_for_good(entry: _C.Saved, note: _Note, update: bool) -> bool:
    """Correct programs overwrite such values day after day, since nothing goes backward through them any more: those of a
    graph that has been through backward already, and parameters and buffers, by an update."""
    if entry.unpacked > 0 or entry.parameter or (update and entry.leaf):
        return True
    if not entry.leaf:
        return False
    hazard = note[1]
    if hazard.of_a_module is None:
        # Nothing in such a tensor tells, so the modules are asked: once for two lines.
        hazard.of_a_module = is_of_a_module(entry.value)
    return hazard.of_a_module


def _late(watch: guard, saved: _C.Saved) -> _Note:
    """The note that was made at the write, as it reads in backward."""
    if saved.note is None and saved.beside is not None:
        return watch._note("overwritten" if saved.away else "version", saved, *saved.beside)
    if saved.note is None:
        return watch._note("unseen", saved, None, _NOWHERE)
    key, hazard = saved.note
    if key[0] == "overwritten" and saved.lost:
        hazard = replace(hazard, late=True)
    return key, hazard


_entered = threading.local()


def _open_here() -> list[guard]:
    """The guards that this thread has entered and not left, the innermost last."""
    return _entered.__dict__.setdefault("guards", [])


class guard:
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

    ``hazards`` lists what was found, one :class:`Hazard` per pair of lines; ``hazards_seen`` and ``bytes_copied`` are the
    totals.

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

    def __init__(self, on_hazard: OnHazard = "raise", verify: bool = False) -> None:
        if on_hazard not in _MODES:
            raise ValueError(f'guard: on_hazard must be "raise", "warn", "copy" or "defer", got {on_hazard!r}')
        self.on_hazard = on_hazard
        self.verify = verify
        self._lock = threading.Lock()
        self._hazards: dict[tuple[Any, ...], Hazard] = {}
        self._described: dict[tuple[Any, ...], Hazard] = {}
        self._passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()

    # -- as a context manager and decorator

    def __enter__(self) -> guard:
        _let_higher_order_operators_pass()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0] is not _C.guard_pack:
            _say_once(
                "hooks around",
                "safe_inplace.guard: the saved-tensor hooks around the guard are not called for what is saved inside of it.",
            )
        _C.guard_enter(self)
        _torch_patches.enter()
        _open_here().append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        here = _open_here()
        if self not in here:
            raise RuntimeError(
                "guard: left in another thread than the one that entered it, where it is still open; a generator or a "
                "coroutine that holds one must be closed where it ran"
            )
        # Usually the last; guards that overlap (an ExitStack, two generators) may be left in any order.
        inside = here[::-1].index(self)
        del here[len(here) - 1 - inside]
        _torch_patches.exit()
        _C.guard_exit(here[-1] if here else None, inside)

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

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return guarded  # type: ignore[return-value]

    # -- what was found

    @property
    def hazards(self) -> list[Hazard]:
        return list(self._hazards.values())

    @property
    def hazards_seen(self) -> int:
        return sum(hazard.count for hazard in self._hazards.values())

    @property
    def bytes_copied(self) -> int:
        return sum(hazard.bytes_copied for hazard in self._hazards.values())

    def summary(self, color: bool = False) -> str:
        """The hazards, the dearest first, one report each."""
        if not self._hazards:
            return "safe_inplace guard: no hazards"
        hazards = sorted(self._hazards.values(), key=lambda hazard: (-hazard.bytes_copied, -hazard.count))
        total = f"safe_inplace guard: {self.hazards_seen} hazard{'s' * (self.hazards_seen != 1)}"
        total += f" between {len(hazards)} pair{'s' * (len(hazards) != 1)} of lines"
        if self.bytes_copied:
            total += f", {_bytes_in_words(self.bytes_copied)} copied"
        paragraphs = [total]
        for hazard in hazards:
            times = f"{hazard.count} time{'s' * (hazard.count != 1)}"
            if hazard.bytes_copied:
                times += f", {_bytes_in_words(hazard.bytes_copied)} copied"
            paragraphs.append(f"{times}: {hazard.text(color)}")
        return "\n\n".join(paragraphs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "on_hazard": self.on_hazard,
            "verify": self.verify,
            "hazards_seen": self.hazards_seen,
            "bytes_copied": self.bytes_copied,
            "hazards": [hazard.as_dict() for hazard in self._hazards.values()],
        }

    # -- called from csrc/guard.cpp

    def _on_write(
        self, saved: list[_C.Saved], op: str, place: Place, update: bool
    ) -> list[_Note | None] | None:
        """`op` at `place` is about to overwrite these saved values."""
        return _MODES[self.on_hazard].write(self, saved, op, place, update)

    def _on_version(self, saved: list[_C.Saved], op: str, place: Place, update: bool) -> None:
        """`op` at `place` raised the version of these saved values and left their bytes as they were."""
        _MODES[self.on_hazard].version(self, saved, op, place)

    def _on_stale(self, saved: _C.Saved) -> None:
        """Backward asks for a value that was overwritten, or whose version has changed."""
        _MODES[self.on_hazard].asked(self, saved)

    def _on_exchange(self, saved: _C.Saved, now: torch.Tensor) -> torch.Tensor:
        """Backward asks for a tensor that lies in other memory than when it was saved (x.data = ...). Torch alone takes what is
        there now, which may be the same: parameters that were away, and came back."""
        if not saved.stale and _same_bytes(saved.value, now):
            return now
        hazard = self._found(self._note("exchanged", saved, None, _NOWHERE), saved)
        if saved.stale:
            raise HazardError(hazard)
        return _MODES[self.on_hazard].exchanged(self, hazard, saved, now)

    def _on_mismatch(self, saved: _C.Saved) -> None:
        """Backward asks for a value whose bytes have changed."""
        hazard = self._found(self._note("corrupted", saved, None, _NOWHERE), saved)
        if self.on_hazard == "warn":
            saved.release()
        _MODES[self.on_hazard].corrupted(self, hazard)

    def _compare(self, saved: _C.Saved, then: torch.Tensor, now: torch.Tensor) -> None:
        """The same on a device that works on its own: asked once, when backward is through, not at every value."""
        key, described = self._note("corrupted", saved, None, _NOWHERE)
        result = ((key, replace(described, **_value_of(saved))), then != now)
        task = torch._C._current_graph_task_id()
        if task == -1:
            self._settle(_Pass([result]))
            return
        with self._lock:
            running = self._passes.get(task)
            if running is not None:
                running.results.append(result)
                return
            running = self._passes[task] = _Pass([result])
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._settle, running))

    def _settle(self, through: _Pass) -> None:
        by_device: dict[torch.device, list[_Compared]] = {}
        for result in through.results:
            by_device.setdefault(result[1].device, []).append(result)
        found: list[Hazard] = []
        for group in by_device.values():
            flags = torch.stack([differs for _, differs in group]).tolist()
            found += [self._found(note) for (note, _), differs in zip(group, flags, strict=True) if differs]
        for hazard in found:
            _MODES[self.on_hazard].corrupted(self, hazard)

    @staticmethod
    def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(_parts(tensor))

    @staticmethod
    def _arrived_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        return list(_parts(tensor, arrived=True))

    @staticmethod
    def _written_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        """A write leaves alone what describes the values: nested tensors of one structure share their offsets, and indices
        lie beside values of the tensor's own dtype."""
        if tensor.layout == torch.jagged and hasattr(tensor, "_values"):
            return list(_parts(tensor._values))  # type: ignore[arg-type]
        parts = list(_parts(tensor))
        if any(part.dtype == tensor.dtype for part in parts):
            parts = [part for part in parts if part.dtype == tensor.dtype or part.dtype not in (torch.int32, torch.int64)]
        return parts

    @staticmethod
    def _no_digest(device: str) -> None:
        kind = device.partition(":")[0]
        _say_once(
            f"digest {kind}",
            f"safe_inplace.guard: this build has no kernel that fingerprints on {kind}, so verify=True does not reach what is "
            "saved there; writes that operators declare are judged as ever.",
        )

    # -- the rest

    def _describe(self, kind: Kind, saved: _C.Saved, op: str | None, place: Place) -> Hazard:
        save, mutation = _site(saved.place), _site(place)
        frame, by = _writer(place[0])
        rewritten = Rewritten()
        if kind == "overwritten" and op is not None:
            rewritten = out_of_place(*place[:2], op, frame)
        if saved.parameter and not rewritten.parameter:
            rewritten = Rewritten(parameter=True)
        return Hazard(
            kind,
            mutation,
            save,
            op and _short(op),
            **_value_of(saved),
            rewritten=rewritten,
            result=saved.result,
            unread=saved.unread,
            by=by,
        )

    def _note(self, kind: Kind, saved: _C.Saved, op: str | None, place: Place) -> _Note:
        """What happened between two lines is described once, while the frame that writes still runs."""
        key = (kind, place[:2], saved.place[:2])
        hazard = self._described.get(key)
        if hazard is None:
            hazard = self._described.setdefault(key, self._describe(kind, saved, op, place))
        return key, hazard

    def _known(self, note: _Note) -> Hazard | None:
        return self._hazards.get(note[0])

    def _found(self, note: _Note, saved: _C.Saved | None = None, bytes_copied: int = 0) -> Hazard:
        """It is a hazard: listed from now on, with the first value that it befell, and counted."""
        key, described = note
        with self._lock:
            hazard = self._hazards.get(key)
            if hazard is None:
                hazard = described
                if saved is not None:
                    # A parameter is mostly saved by a call of a module. Elsewhere a search of all modules would find none.
                    look = saved.place[2] is not None
                    named = parameter_name(saved.value, look) if saved.parameter else None
                    hazard = replace(described, parameter=named, **_value_of(saved))
                self._hazards[key] = hazard
            hazard.count += 1
            hazard.bytes_copied += bytes_copied
        return hazard

    def _warn(self, hazard: Hazard) -> None:
        with self._lock:
            if hazard.told:
                return
            hazard.told = True
        site = hazard.mutation or hazard.save
        if site is None:
            warnings.warn(HazardWarning(hazard), stacklevel=2)
        else:
            warnings.warn_explicit(HazardWarning(hazard), None, site.filename, site.lineno)


@dataclass
class _Pass:
    """What verify has compared in one backward pass. The engine's callback alone holds it: a pass that fails takes it along."""

    results: list[_Compared]


def _value_of(saved: _C.Saved) -> dict[str, Any]:
    """The fields of a hazard that tell of the value."""
    value = saved.value
    saved_by = saved.op and _short(saved.op)
    if saved_by is None:
        # No operator was running: an autograd.Function, named as the line that called it does.
        save = _site(saved.place)
        saved_by = save.expression.split("(")[0] if save else "autograd.Function"
    return {
        "saved_by": saved_by,
        "shape": _shape(value),
        "dtype": value.dtype,
        "device": value.device,
        "nbytes": _nbytes(value),
        "used": saved.unpacked > 0,
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
                except Exception as error:
                    step = steps.athrow(error)
        finally:
            await watched(steps.aclose())

    return guarded


def _writer(code: CodeType | None) -> tuple[FrameType | None, Literal["optimizer", "ddp"] | None]:
    """The frame of `code` among the callers of this function, and the part of torch that it called."""
    by: Literal["optimizer", "ddp"] | None = None
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        filename = frame.f_code.co_filename
        if filename.startswith(_OPTIMIZERS):
            by = "optimizer"
        elif filename == _DDP:
            by = "ddp"
        frame = frame.f_back
    return (None, None) if frame is None else (frame, by)


def _shape(value: torch.Tensor) -> tuple[int | str, ...]:
    """A size that differs from one part of a nested tensor to the next is written as torch does, or *."""
    if value.is_nested and value.layout == torch.strided:
        columns = value._nested_tensor_size().t().tolist()
        return (value.size(0), *(column[0] if len(set(column)) == 1 else "*" for column in columns))
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def _nbytes(value: torch.Tensor) -> int:
    if value.layout == torch.sparse_coo:
        return value._indices().nbytes + value._values().nbytes
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return value.crow_indices().nbytes + value.col_indices().nbytes + value.values().nbytes
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return value.ccol_indices().nbytes + value.row_indices().nbytes + value.values().nbytes
    if value.layout == torch.jagged:
        return value.values().nbytes
    return value.numel() * value.element_size()


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout):
        return False
    with _unseen():
        raw = [tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return torch.equal(*raw)


@contextmanager
def _unseen() -> Iterator[None]:
    """What guard computes itself: no graph, whatever mode the write runs under, and no mode sees it."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
        yield


def _private_copy(value: torch.Tensor, copied: dict[tuple[Any, ...], torch.Tensor]) -> torch.Tensor:
    """A copy of `value` in memory of its own. Values that occupy the very same bytes, such as a weight and its transpose,
    share one."""
    with _unseen():
        plain = (
            type(value) is torch.Tensor
            and value.layout == torch.strided
            and not (value.is_nested or value.is_conj() or value.is_neg())
        )
        if not (plain and torch.ops.aten.is_non_overlapping_and_dense(value)):
            alone = copied[(id(value),)] = value.clone()
            return alone
        key = (value.data_ptr(), value.numel(), value.dtype)
        flat = copied.get(key)
        if flat is None:
            flat = copied[key] = value.as_strided((value.numel(),), (1,), value.storage_offset()).clone()
        return flat.as_strided(value.size(), value.stride(), 0)

"""Where in the user's code: lines, and whose code they are."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import re
import sys
import sysconfig
import textwrap
import weakref
from dataclasses import dataclass, field
from itertools import islice
from types import CodeType, FrameType
from typing import Any, Literal

import torch

from .. import _C
from .modules import named
from .say import say_once

# Code and instruction of a line, the innermost module that was being called, code and instruction of the caller's line.
Place = tuple[CodeType | None, int, "weakref.ref[torch.nn.Module] | None", CodeType | None, int]
NOWHERE: Place = (None, -1, None, None, -1)

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SITE = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
_STDLIB = tuple({sysconfig.get_path("stdlib") + os.sep, sysconfig.get_path("platstdlib") + os.sep})
_LIBRARIES = (
    _PACKAGE + os.sep,
    *(os.path.join(_SITE, name) + os.sep for name in ("torch", "functorch", "torchgen", "triton")),
)
_INSTALLED = (os.sep + "site-packages" + os.sep, os.sep + "dist-packages" + os.sep)
_OPTIMIZERS = os.path.join(_SITE, "torch", "optim") + os.sep
_DDP = os.path.join(_SITE, "torch", "nn", "parallel", "distributed.py")
_RESUMED = re.compile(r"torch_dynamo_resume_in_(\w+)_at_\d+$")
_COMPILED_REGION = os.path.join("_aot_autograd", "runtime_wrappers.py")


def whose_file(filename: str) -> int:
    """0 for torch, this package and the standard library, 1 for other installed packages, 2 for the user's own."""
    if filename.startswith(("<frozen ", "<eval_with_key>", *_LIBRARIES)):
        return 0
    # In a virtual environment these lie below the folder that platstdlib names.
    if any(part in filename for part in _INSTALLED):
        return 1
    return 0 if filename.startswith(_STDLIB) else 2


def whose_code(code: CodeType) -> int:
    """As of its file. The line in a model of timm or transformers says more than the line that called the model: it is named, and
    its caller as well."""
    filename = code.co_filename
    if filename.endswith(_COMPILED_REGION):
        say_once(
            "compiled region",
            "safe_inplace.guard: of a compiled region only what it saves and which of its inputs it writes is known; what else "
            "its kernels write is found by guard(verify=True).",
        )
    return whose_file(filename)


_C.guard_whose_code(whose_code, torch.nn.Module.__call__.__code__)


@dataclass(frozen=True)
class Site:
    """A line of the user's code."""

    filename: str
    lineno: int
    function: str
    source: str
    columns: tuple[int, int] | None = field(default=None, compare=False, repr=False)
    called: weakref.ref[torch.nn.Module] | tuple[str, str] | None = field(default=None, compare=False, repr=False)
    caller: Site | None = field(default=None, compare=False)  # the user's line that led there, into an installed package

    def look_up(self) -> tuple[str, str] | None:
        """Path and words of the innermost module that was being called. Looked up when the line is reported: most never are,
        and at the end of a program the module is gone."""
        if isinstance(self.called, weakref.ref):
            module = self.called()
            object.__setattr__(self, "called", named(module) if module is not None else None)
        return self.called  # type: ignore[return-value]

    @property
    def module(self) -> str | None:
        """The innermost module that was being called, in words, with its path."""
        called = self.look_up()
        return called and (f"{called[0]}: {called[1]}" if called[0] else called[1])

    @property
    def module_path(self) -> str | None:
        """Where that module lies in the outermost one that holds it; empty for the outermost itself."""
        called = self.look_up()
        return called and called[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return Site, (self.filename, self.lineno, self.function, self.source, self.columns, self.look_up(), self.caller)

    def __str__(self) -> str:
        return f"{self.filename}:{self.lineno}, in {self.function}"

    @property
    def expression(self) -> str:
        """The part of the line that ran, as far as the interpreter knows it."""
        return self.source[slice(*self.columns)] if self.columns else self.source


def site_of(place: Place) -> Site | None:
    code, instruction, module, caller, at = place
    if code is None:
        return None
    return line_of(code, instruction, module, line_of(caller, at) if caller is not None else None)


def line_of(
    code: CodeType, instruction: int, called: weakref.ref[torch.nn.Module] | None = None, caller: Site | None = None
) -> Site:
    lineno, end_lineno, column, end_column = next(
        islice(code.co_positions(), max(instruction, 0) // 2, None), (None, None, None, None)
    )
    lineno = lineno or code.co_firstlineno
    if column is None and lineno == code.co_firstlineno:
        lineno = _line_of_def(code)
    line = linecache.getline(code.co_filename, lineno)
    source = line.strip()
    columns = None
    if column is not None and end_column is not None and end_lineno == lineno and source:
        # The columns count bytes of UTF-8.
        raw, indent = line.encode(), len(line) - len(line.lstrip())
        begin = len(raw[:column].decode(errors="replace")) - indent
        columns = (begin, begin + len(raw[column:end_column].decode(errors="replace")))
    return Site(code.co_filename, lineno, _RESUMED.sub(r"\1", code.co_qualname), source, columns, called, caller)


def _line_of_def(code: CodeType) -> int:
    """Code begins at its decorators. Of code that a compiler made nothing else is known."""
    first = code.co_firstlineno
    lines = linecache.getlines(code.co_filename)[first - 1 :]
    if not lines or not lines[0].lstrip().startswith("@"):
        return first
    try:
        (definition,) = ast.parse(textwrap.dedent("".join(inspect.getblock(lines)))).body
    except (SyntaxError, ValueError):
        return first
    return first - 1 + definition.lineno


def is_compiled(code: CodeType | None) -> bool:
    """Made by Dynamo: the function's, and of its lines only those that a break of the graph leaves to the interpreter."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")
    return dynamo is not None and code in dynamo.output_codes


def writer(code: CodeType | None) -> tuple[FrameType | None, Literal["optimizer", "ddp"] | None]:
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

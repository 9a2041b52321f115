"""python -m safe_inplace run: an unchanged program under guard."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, TextIO

import torch

from . import _program
from ._guard import HazardError, guard
from ._guard.hazards import summary
from ._guard.modes import MODES

# Of the layout of the file that --json writes (docs/run.md); raised when a key goes or changes its meaning.
SCHEMA = 1
# What the exit status tells where there were hazards. A program that exits with it by itself is told apart.
HAZARDS = 86

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_OURS = (__file__, _program.__file__, runpy.__file__)


def _wants_color(stream: Any) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def parser(prog: str) -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--on-hazard {{{','.join(MODES)}}}] [--verify] [--json FILE] [--exit-zero] "
        "(script.py | -m module) [arguments of the program ...]",
        description="Run an unchanged program under guard: each write to a value that backward needs is named, with both lines.",
        epilog=f"The exit status is the program's own, or {HAZARDS} where hazards were found that guard did not repair.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--on-hazard",
        choices=tuple(MODES),
        default="raise",
        help="stop at the first hazard (raise, the default), only tell (warn), repair each by a copy (copy), or stop where "
        "backward asks for a value that was overwritten (defer)",
    )
    command.add_argument("--verify", action="store_true", help="also find writes that no operator declares")
    command.add_argument("--json", metavar="FILE", help="write what was found to FILE, for machines")
    command.add_argument("--exit-zero", action="store_true", help="let no hazard change the exit status")
    return command


def _split(arguments: list[str]) -> tuple[list[str], bool, list[str]]:
    """Options of `run`, whether -m names the program, and the program with its arguments, whatever these look like."""
    end = 0
    while end < len(arguments) and arguments[end].startswith("-") and arguments[end] != "--":
        if arguments[end].startswith("-m"):
            name = arguments[end][2:]
            return arguments[:end], True, [name] * bool(name) + arguments[end + 1 :]
        end += 1 + (arguments[end] in ("--on-hazard", "--json"))
    return arguments[:end], False, arguments[end + (arguments[end : end + 1] == ["--"]) :]


def _rank() -> int | None:
    """Of this process among those of a launcher such as torchrun."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() and "WORLD_SIZE" in os.environ else None


def _of_this_rank(path: str) -> str:
    """Ranks write files of their own: found.json becomes found.rank3.json."""
    rank = _rank()
    stem, extension = os.path.splitext(path)
    return path if rank is None else f"{stem}.rank{rank}{extension}"


def _print_exception(error: BaseException) -> None:
    """As the interpreter prints it for the program alone; the text of a hazard is left to the summary."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen ", os.path.join(_HERE, "_guard", ""))) and frame.filename not in _OURS
    ]
    if isinstance(error, HazardError):
        print("Traceback (most recent call last):", file=sys.stderr)
        sys.stderr.writelines(traceback.format_list(frames))
        print(f"{type(error).__qualname__}\n", file=sys.stderr)
    else:
        described = traceback.TracebackException.from_exception(error)
        described.stack = traceback.StackSummary.from_list(frames)
        print("".join(described.format()), end="", file=sys.stderr)


class _Run:
    """One program under guard, and what is told of it at its end, however that comes."""

    def __init__(self, options: argparse.Namespace, file: TextIO | None) -> None:
        self._options = options
        self._file = file
        self._guard = guard(options.on_hazard, verify=options.verify)
        self._told = False

    def status(self, program: Callable[[], None]) -> int:
        self._argv = list(sys.argv)
        self._report_on_sigterm()
        stopped = False
        try:
            with self._guard:
                program()
            status = 0
        except SystemExit as exit:
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
            status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except KeyboardInterrupt:
            status = 130
        except Exception as error:
            _print_exception(error)
            stopped = isinstance(error, HazardError)
            status = 1
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        self.tell(status)
        return self._verdict(status, stopped)

    def _verdict(self, status: int, stopped: bool) -> int:
        if self._options.exit_zero:
            return 0 if stopped else status
        if any(hazard.repaired < hazard.count for hazard in self._guard.hazards):
            return HAZARDS
        if status & 0xFF == HAZARDS:
            print(f"safe_inplace guard: the program itself exits with {HAZARDS}; 1 stands for it", file=sys.stderr)
            return 1
        return status

    def tell(self, status: int) -> None:
        if self._told:
            return
        self._told = True
        sys.stdout.flush()
        rank = _rank()
        who = "safe_inplace guard" if rank is None else f"safe_inplace guard, rank {rank}"
        print(summary(self._guard.hazards, _wants_color(sys.stderr), who), file=sys.stderr)
        if self._file is not None:
            with self._file:
                json.dump(self._as_dict(status), self._file, indent=2)
                self._file.write("\n")

    def _as_dict(self, status: int) -> dict[str, Any]:
        from . import __version__

        return {
            "schema": SCHEMA,
            "safe_inplace": __version__,
            "torch": torch.__version__,
            "program": self._argv,
            "status": status,
            "rank": _rank(),
            **self._guard.as_dict(),
        }

    def _report_on_sigterm(self) -> None:
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            return

        def report(number: int, frame: FrameType | None) -> None:
            self.tell(-number)
            sys.stderr.flush()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, report)


def main(prog: str, arguments: list[str]) -> int:
    command = parser(prog)
    own, is_module, program = _split(arguments)
    options = command.parse_args(own)
    if not program:
        command.error("nothing to run: name a script, or a module with -m")
    file = None
    if options.json:
        try:
            file = open(_of_this_rank(options.json), "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            command.error(f"--json {options.json}: {error.strerror}")
    try:
        load = (_program.module if is_module else _program.script)(program)
    except _program.NoProgram as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.status
    except Exception as error:
        _print_exception(error)
        return 1
    return _Run(options, file).status(load)

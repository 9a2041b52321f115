"""python -m safe_inplace run: an unchanged program under guard."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, TextIO

import torch

from . import _process, _program
from ._guard import HazardError
from ._guard.hazards import comes_of_a_hazard
from ._guard.modes import MODES

# Of the layout of the file that --json writes (docs/run.md); raised when a key goes or changes its meaning.
SCHEMA = 1
# What the exit status tells where there were hazards. A program that exits with it by itself is told apart.
HAZARDS = 86

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PARTS = tuple(os.path.join(_HERE, part, "") for part in ("_guard", "_advise"))
_OURS = (__file__, _program.__file__, _process.__file__)


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


def _of_the_program(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in _OURS:
        trace = trace.tb_next
    return trace


def print_exception(error: BaseException) -> None:
    """As the interpreter prints it for the program alone; the text of a hazard is left to the summary."""
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, _of_the_program(error.__traceback__))
        return
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen ", *_PARTS)) and frame.filename not in _OURS
    ]
    if isinstance(error, HazardError) and error.hazard is not None:
        print("Traceback (most recent call last):", file=sys.stderr)
        sys.stderr.writelines(traceback.format_list(frames))
        print(f"{type(error).__qualname__}\n", file=sys.stderr)
    else:
        described = traceback.TracebackException.from_exception(error)
        described.stack = traceback.StackSummary.from_list(frames)
        print("".join(described.format()), end="", file=sys.stderr)


def load(prog: str, is_module: bool, program: list[str], **compiled: Any) -> Callable[[], None] | int:
    """The program, or, where there is none, the status; that is told."""
    try:
        return (_program.module if is_module else _program.script)(program, **compiled)
    except _program.NoProgram as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.status
    except Exception as error:
        print_exception(error)
        return 1


def outcome(program: Callable[[], None]) -> tuple[int, BaseException | None]:
    """Runs it: the status with which it ends, and what it raised, which is told."""
    try:
        program()
    except SystemExit as exit:
        if not (exit.code is None or isinstance(exit.code, int)):
            print(exit.code, file=sys.stderr)
        return exit.code & 0xFF if isinstance(exit.code, int) else int(exit.code is not None), None
    except BaseException as error:
        print_exception(error)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1, error
    return 0, None


def finish() -> None:
    """As the interpreter does before it ends: it tells pools of threads to end, waits for all that are no daemons, and calls the
    functions of atexit, of which one waits for processes."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except KeyboardInterrupt as error:
        print_exception(error)
    atexit._run_exitfuncs()


class _Run(_process.FirstGuard):
    """One program under guard, and what is told of it at its end, however that comes."""

    def __init__(self, options: argparse.Namespace, file: TextIO | None) -> None:
        super().__init__(options.on_hazard, options.verify)
        self._exit_zero = options.exit_zero
        self._file = file
        self._stopped = False

    def run(self, program: Callable[[], None]) -> int:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._end_by)
        self.start()
        status, error = outcome(program)
        self._stopped = error is not None and comes_of_a_hazard(error)
        atexit.unregister(self._at_exit)  # guard's own has no part in it
        finish()
        self.leave()
        return self.end(status)

    def end(self, status: int) -> int:
        super().end(status)
        if os.getpid() != self._pid:
            return status
        if self._exit_zero:
            return 0 if self._stopped else status
        if not all(record.repaired for record in (self.record, *self.others)):
            if not _process.flushed(sys.stdout):
                sys.stdout = None  # type: ignore[assignment]  # the interpreter cannot either: its status would be 120
            return HAZARDS
        if status & 0xFF == HAZARDS:
            _process.say(lambda _: f"safe_inplace guard: the program itself exits with {HAZARDS}; 1 stands for it")
            return 1
        return status

    def told(self, status: int | None) -> None:
        if self._file is None:
            return
        from . import __version__

        found = {
            "schema": SCHEMA,
            "safe_inplace": __version__,
            "torch": torch.__version__,
            "status": status,
            **self.record.as_dict(),
            **self.guard.as_dict(),
            "processes": [record.as_dict() for record in self.others if record.hazards],
            "unguarded": _process.unguarded([self.record, *self.others]),
        }
        with self._file:
            json.dump(found, self._file, indent=2)
            self._file.write("\n")

    def _end_by(self, number: int, frame: FrameType | None) -> None:
        try:
            self.end(-number)
        finally:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _in_child(self) -> None:
        super()._in_child()
        # A worker may be stopped where it waits in C, and Python would never come to answer.
        if signal.getsignal(signal.SIGTERM) == self._end_by:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(prog: str, arguments: list[str]) -> int:
    command = parser(prog)
    options, is_module, program = _program.parse(command, arguments, ("--on-hazard", "--json"))
    file = _program.opened(command, "--json", _process.of_this_rank(options.json)) if options.json else None
    loaded = load(prog, is_module, program)
    if isinstance(loaded, int):
        return loaded
    outer = _process.current()
    if outer is not None:
        outer.stop()
    status = _Run(options, file).run(loaded)
    if status == -signal.SIGINT:
        # The interpreter's own way: all is told already.
        sys.excepthook = lambda *_: None
        raise KeyboardInterrupt
    return status

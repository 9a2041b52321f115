"""python -m safe_inplace run: an unchanged program under guard."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any

from ._guard import HazardError, guard
from ._guard.modes import MODES

_GUARD = os.path.dirname(guard.__init__.__code__.co_filename) + os.sep


def _wants_color(stream: Any) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.usage = (
        "python -m safe_inplace run [--on-hazard {raise,warn,copy,defer}] [--verify] [--json FILE] "
        "(script.py | -m module) [arguments of the program ...]"
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
    command.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as python -m does")
    command.add_argument("program", nargs=argparse.REMAINDER, help="a script and its arguments")
    command.set_defaults(run=run, error=command.error)


def _program(options: argparse.Namespace) -> tuple[Callable[[], Any], list[str], str]:
    """What to run, its sys.argv, and the first entry of its sys.path."""
    if options.module:
        name = options.module[0]
        return lambda: runpy.run_module(name, run_name="__main__", alter_sys=True), options.module, os.getcwd()
    if options.program:
        script = options.program[0]
        return lambda: runpy.run_path(script, run_name="__main__"), options.program, os.path.dirname(os.path.abspath(script))
    options.error("nothing to run: name a script, or a module with -m")
    raise AssertionError("unreachable")


def _print_exception(error: BaseException) -> None:
    """As the interpreter prints it for the program alone; the text of a hazard is left to the summary."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ")
        and frame.filename not in (__file__, runpy.__file__)
        and not frame.filename.startswith(_GUARD)
    ]
    if isinstance(error, HazardError):
        print("Traceback (most recent call last):", file=sys.stderr)
        sys.stderr.writelines(traceback.format_list(frames))
        print(f"{type(error).__qualname__}\n", file=sys.stderr)
    else:
        described = traceback.TracebackException.from_exception(error)
        described.stack = traceback.StackSummary.from_list(frames)
        print("".join(described.format()), end="", file=sys.stderr)


def run(options: argparse.Namespace) -> int:
    """Runs the program; 1 when hazards were found or it failed, else what the program exits with."""
    program, argv, folder = _program(options)
    sys.argv[:] = argv
    sys.path[0] = folder
    watched = guard(options.on_hazard, verify=options.verify)
    status = 0
    try:
        with watched:
            program()
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        _print_exception(error)
        status = 1
    finally:
        sys.stdout.flush()
        print(watched.summary(color=_wants_color(sys.stderr)), file=sys.stderr)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(watched.as_dict(), file, indent=2)
                file.write("\n")
    return 1 if watched.hazards else status

"""python -m safe_inplace advise: which lines of an unmodified program could be in place."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import _process, _program
from .advice import Advice, advice_from, here
from .check import Check, Run
from .facts import advice_as_dict, check_as_dict
from .report import advice_in_words, check_in_words

# With what it was started with, as multiprocessing does.
_INTERPRETER = [sys.executable, *subprocess._args_from_interpreter_flags()]  # type: ignore[attr-defined]
# Where the check speaks against the changed program.
REFUTED = 87
# Of the layout of the file that --json writes (docs/advise.md); raised when a key goes or changes its meaning.
SCHEMA = 1


def parser(prog: str) -> argparse.ArgumentParser:
    command = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--check] [--diff FILE] [--json FILE] [--include PACKAGE] "
        "(script.py | -m module) [arguments of the program ...]",
        description="Run an unchanged program and say which of its sums and products could be in place, or one op for two.",
        epilog=f"The exit status is the program's own; with --check {REFUTED} where the changed program is not right.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="run the program five times more, plain and changed, once of these under guard; compare values, time and memory",
    )
    command.add_argument("--diff", metavar="FILE", help="write the changes to FILE, for git apply or patch -p1")
    command.add_argument("--json", metavar="FILE", help="write what was found to FILE, for machines")
    command.add_argument(
        "--include",
        metavar="PACKAGE",
        action="append",
        default=[],
        help="look into this installed package as well; may be repeated",
    )
    return command


def _as_shells_have_it(status: int) -> int:
    return status if status >= 0 else 128 - status


class _Ended(Exception):
    """A run of the program that left nothing to go by. The status is the program's."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _Program:
    """Runs the program in processes of their own."""

    def __init__(self, prog: str, options: argparse.Namespace, is_module: bool, program: list[str], folder: Path) -> None:
        self._common = {"prog": prog, "include": options.include, "module": is_module}
        self._program = program
        self._folder = folder
        self._runs = 0

    def run(self, what: str, *, quiet: bool, guard: bool = False, chosen: Any = None) -> dict[str, Any]:
        self._runs += 1
        names = {name: str(self._folder / f"{self._runs}.{name}") for name in ("task", "result", "values", "others")}
        task = {**self._common, "what": what, "guard": guard, "chosen": chosen, **names}
        Path(names["task"]).write_text(json.dumps(task))
        nowhere = subprocess.DEVNULL if quiet else None
        done = subprocess.run(
            [*_INTERPRETER, "-m", "safe_inplace._advise.child", names["task"], *self._program],
            stdin=nowhere,
            stdout=nowhere,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
        )
        if not os.path.exists(names["result"]):
            status = _as_shells_have_it(done.returncode)
            raise _Ended(f"the program ended with status {status} before its end\n{done.stderr or ''}", status)
        return json.loads(Path(names["result"]).read_text()) | {"values": names["values"]}

    def record(self, what: str, *, guard: bool = False, chosen: Any = None) -> Run:
        result = self.run(what, quiet=True, guard=guard, chosen=chosen)
        return Run(result, torch.load(result["values"], weights_only=True))

    def check(self, advice: Advice) -> Check:
        chosen = advice.as_task()
        plain = [self.record("plain")]
        guarded = self.record("changed", guard=True, chosen=chosen)
        changed = [self.record("changed", chosen=chosen)]
        plain.append(self.record("plain"))
        changed.append(self.record("changed", chosen=chosen))
        itself = self.record("plain", guard=True).result["error"] if guarded.result["error"] else None
        return Check(plain, changed, guarded, max(change.eps for change in advice.changes), itself)


def main(prog: str, arguments: list[str]) -> int:
    command = parser(prog)
    options, is_module, program = _program.parse(command, arguments, ("--diff", "--json", "--include"))
    if "torch" in options.include:
        command.error("--include torch: what watches a program is made of torch")
    with ExitStack() as stack:
        diff, facts = (
            stack.enter_context(_program.opened(command, option, _process.of_this_rank(path))) if path else None
            for option, path in (("--diff", options.diff), ("--json", options.json))
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            found = _advise(_Program(prog, options, is_module, program, folder), program[0], options.check, diff)
        except _Ended as ended:
            print(f"{prog}: {ended}".rstrip(), file=sys.stderr)
            return ended.status
        if facts is not None:
            json.dump({**_versions(), "program": program, **found}, facts, indent=2, allow_nan=False)
            facts.write("\n")
        return found["status"]


def _versions() -> dict[str, Any]:
    from .. import __version__

    return {"schema": SCHEMA, "safe_inplace": __version__, "torch": torch.__version__}


def _advise(program: _Program, name: str, wants_check: bool, diff: TextIO | None) -> dict[str, Any]:
    """What is found, and the status with which the command ends."""
    watched = program.run("watch", quiet=False)
    advice = advice_from(watched, watched["not imported"])
    print(f"\n{advice_in_words(name, advice)}", flush=True)
    found = {"status": watched["status"], **advice_as_dict(advice), "check": None}
    if diff is not None:
        diff.write(advice.diff() if advice.files else "")
        if advice.files and advice.root() != here():
            print(f"{diff.name} is to be applied in {advice.root()}")
    if wants_check and advice.changes and not watched["status"]:
        check = program.check(advice)
        print(check_in_words(check))
        found |= {"status": 0 if check.is_right else REFUTED, "check": check_as_dict(check)}
    return found

"""What one call costs on 16 elements: in nanoseconds, or in instructions counted by callgrind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch.utils.benchmark import Timer

from tests.op_table import BY_NAME, Op

from .pages import ROOT

ELEMENTS = 16
# Calls that share one graph: the multiplication that starts it weighs little, and the graph's end is paid for.
CHAIN = 32
# Chains that callgrind counts.
REPEATS = 20


@dataclass(frozen=True)
class Call:
    op: str
    tensors: bool
    grad: bool
    ours: bool

    def statement(self) -> Callable[[], None]:
        op = BY_NAME[self.op]
        method = op.torch_method if self.tensors or len(op.operands) == 1 else None
        theirs = getattr(torch.Tensor, method) if method else op.two_step
        f = op.function if self.ours else theirs
        operands = [torch.ones(ELEMENTS) if self.tensors else 1.5 for _ in op.operands]
        leaf = torch.ones(ELEMENTS, requires_grad=self.grad)

        # Written out: passing operands by * would weigh as much as a call.
        def chain_of_one() -> None:
            x, (a,) = leaf * 1, operands
            for _ in range(CHAIN):
                f(x, a)

        def chain_of_two() -> None:
            x, (a, b) = leaf * 1, operands
            for _ in range(CHAIN):
                f(x, a, b)

        return chain_of_one if len(operands) == 1 else chain_of_two


def selection(ops: list[Op]) -> list[Call]:
    kinds = [(tensors, grad) for tensors in (True, False) for grad in (True, False)]
    return [Call(op.name, *kind, ours) for op in ops for kind in kinds for ours in (False, True)]


def nanoseconds(calls: list[Call]) -> list[float]:
    timers = [Timer("chain()", globals={"chain": call.statement()}) for call in calls]
    return [timer.blocked_autorange(min_run_time=0.2).median * 1e9 / CHAIN for timer in timers]


def instructions(ops: list[Op]) -> list[float]:
    """Counts all of them in one process: under callgrind, importing torch takes longer than everything else.

    `Timer.collect_callgrind` would start a process for each.
    """
    if shutil.which("valgrind") is None:
        raise SystemExit("callgrind is part of valgrind, which is not installed")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind")
        options = ["--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={out}"]
        child = [sys.executable, "-m", "benchmarks.calls", *(op.name for op in ops)]
        done = subprocess.run(["valgrind", *options, *child], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"valgrind failed:\n{done.stderr}")
        dumps = [Path(f"{out}.{i}").read_text() for i in range(1, len(selection(ops)) + 1)]
    return [int(re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)[1]) / REPEATS / CHAIN for dump in dumps]


def report(ops: list[Op], callgrind: bool) -> RichTable:
    """Every op, with tensors and with numbers, recorded and not, beside torch's in-place form of it."""
    calls = selection(ops)
    with Console(stderr=True).status("counting instructions: minutes" if callgrind else "timing calls"):
        found = instructions(ops) if callgrind else nanoseconds(calls)
    table = RichTable(title=f"One call on {ELEMENTS} elements: {'instructions' if callgrind else 'nanoseconds'}")
    for column in ("op", "operands", "grad"):
        table.add_column(column)
    for column in ("torch in place", "safe_inplace", "ratio"):
        table.add_column(column, justify="right")
    for call, theirs, ours in zip(calls[::2], found[::2], found[1::2], strict=True):
        cells = (f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.2f}")
        kind = "tensors" if call.tensors else "numbers"
        table.add_row(call.op, kind, "on" if call.grad else "off", *cells)
    return table


def count_under_callgrind(ops: list[Op]) -> None:
    """The inside of `instructions`: one dump of callgrind's counter for each call of the selection."""
    torch.set_num_threads(1)
    for call in selection(ops):
        statement = call.statement()
        for _ in range(5):
            statement()
        # What torch.utils.benchmark brackets its statements with.
        torch._C._valgrind_toggle()
        for _ in range(REPEATS):
            statement()
        torch._C._valgrind_toggle_and_dump_stats()


if __name__ == "__main__":
    count_under_callgrind([BY_NAME[name] for name in sys.argv[1:]])

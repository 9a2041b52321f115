"""What one call costs on 16 elements: in nanoseconds, or in instructions counted by callgrind."""

from __future__ import annotations

from dataclasses import dataclass

from rich.progress import Progress
from rich.table import Table as RichTable
from torch.utils.benchmark import Timer

from tests.op_table import Op

from .results import ROOT

ELEMENTS = 16
# Calls that share one graph: the multiplication that starts it weighs little, and the graph's end is paid for.
CHAIN = 32

SETUP = """
import sys
sys.path.insert(0, {root!r})
import torch
from benchmarks.implementations import torch_in_place
from tests.op_table import BY_NAME
torch.set_num_threads(1)
op = BY_NAME[{name!r}]
tensors = {tensors}
operands = [torch.ones({elements}) if tensors else 1.5 for _ in op.operands]
a, b = (*operands, None)[:2]
x = leaf = torch.ones({elements}, requires_grad={grad})
f = {function}
"""


@dataclass(frozen=True)
class Call:
    op: Op
    tensors: bool
    grad: bool
    ours: bool

    def timer(self) -> Timer:
        method = self.op.torch_method if self.tensors or len(self.op.operands) == 1 else None
        theirs = f"torch.Tensor.{method}" if method else "op.two_step"
        setup = SETUP.format(
            root=str(ROOT),
            name=self.op.name,
            tensors=self.tensors,
            grad=self.grad,
            elements=ELEMENTS,
            function="op.function" if self.ours else theirs,
        )
        call = f"f(x, {', '.join('ab'[: len(self.op.operands)])})\n"
        return Timer("x = leaf * 1\n" + call * CHAIN + "del x", setup=setup)


def count(call: Call) -> float:
    """Instructions per call."""
    return call.timer().collect_callgrind(number=4, collect_baseline=False).counts(denoise=True) / 4 / CHAIN


def time(call: Call) -> float:
    """Nanoseconds per call."""
    return call.timer().blocked_autorange(min_run_time=0.2).median * 1e9 / CHAIN


def report(ops: list[Op], callgrind: bool) -> RichTable:
    """Every op, with tensors and with numbers, recorded and not, beside torch's in-place form of it."""
    unit = "instructions" if callgrind else "ns"
    table = RichTable(title=f"One call on {ELEMENTS} elements, {unit}")
    for column in ("op", "operands", "grad"):
        table.add_column(column)
    for column in ("torch in place", "safe_inplace", "ratio"):
        table.add_column(column, justify="right")
    pairs = [(op, tensors, grad) for op in ops for tensors in (True, False) for grad in (True, False)]
    with Progress(transient=True) as progress:
        for op, tensors, grad in progress.track(pairs, description="calls"):
            theirs, ours = ((count if callgrind else time)(Call(op, tensors, grad, who)) for who in (False, True))
            kind = "tensors" if tensors else "numbers"
            cells = (f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.2f}")
            table.add_row(op.name, kind, "on" if grad else "off", *cells)
    return table

"""What the ops promise, beside what was measured. Judges rows; measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.op_table import BY_NAME, OPS

from .cases import CALL, LAYOUTS, MEETING, MODES, RECORDED, TRAINING, TRAINING_STEP, Case, same
from .implementations import COMPILED, IN_PLACE, OURS, OUT_OF_PLACE
from .results import Row, Table


@dataclass(frozen=True)
class Verdict:
    """One promise about one thing measured. Ratios are speeds or shares to reach, or costs to stay under."""

    promise: str
    what: str
    target: float
    measured: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.measured <= self.target if self.at_most else self.measured >= self.target


def judge(rows: list[Row], about: dict[str, str]) -> list[Verdict]:
    """All that the rows say, by what their file says of the machine that they were measured on."""
    table, on_cpu, past_cache = Table(rows), about["kind"] == "cpu", int(about["past_cache"])
    return [
        *calls(table),
        *(cpu_forward(table, past_cache) if on_cpu else cuda_bandwidth(table, past_cache)),
        *(training(table) if on_cpu else ()),
        *meeting(table),
        *peak_of_backward(rows),
        *saved(rows),
    ]


def calls(table: Table) -> Iterator[Verdict]:
    for op in OPS:
        for layout, operands in (("full", "tensors"), ("scalar", "numbers")):
            ratio = table.ratio(OURS, IN_PLACE, op.name, layout, "float32", CALL, RECORDED.name)
            if ratio is None:
                continue
            fused = op.torch_method is None
            beside = "torch's two in-place calls" if fused else "torch's in-place op"
            promise = f"one call of 16 elements, grad on: time over {beside}"
            yield Verdict(promise, f"{op.name} of {operands}", 0.6 if fused else 1.0, ratio, at_most=True)


def forward_rows(table: Table, dtype: str, past_cache: int) -> list[Row]:
    rows = [r for r in table.rows if r.implementation == OURS and r.mode == "forward" and r.dtype == dtype and r.share]
    rows = [r for r in rows if r.layout not in MEETING]
    return [r for r in rows if r.size == max(r.size for r in rows) and r.size >= past_cache]


def cpu_forward(table: Table, past_cache: int) -> Iterator[Verdict]:
    plain = forward_rows(table, "float32", past_cache)
    for row in plain:
        full = row.layout == "full"
        operands = "full operands" if full else "broadcast operands or numbers"
        promise = f"forward past the last cache, {operands}: bytes per second over torch's contiguous add_"
        yield Verdict(promise, f"{row.op} {row.layout}", 0.95 if full else 0.95 * 0.9, row.share)
    shares = {(r.op, r.layout): r.share for r in plain}
    for dtype in ("float16", "bfloat16"):
        for row in forward_rows(table, dtype, past_cache):
            if (row.op, row.layout) in shares:
                ratio = row.share / shares[row.op, row.layout]
                promise = f"forward, {dtype}: bytes per second over float32's"
                yield Verdict(promise, f"{row.op} {row.layout}", 0.85, ratio)


def training(table: Table) -> Iterator[Verdict]:
    promise = "forward + backward, mul_add_ with trainable vectors, 65536x512 float32: times faster than"
    for mode in TRAINING:
        if mode.timed != "forward+backward" or not mode.trainable:
            continue
        wanted = {OUT_OF_PLACE: 2.0, COMPILED: 1.25} if mode.holder == "caller" else {OUT_OF_PLACE: 3.0, COMPILED: 2.0}
        for rival, target in wanted.items():
            ratio = table.ratio(rival, OURS, "mul_add_", "last_dim_vector", "float32", TRAINING_STEP, mode.name)
            if ratio is not None:
                who = "eager" if rival == OUT_OF_PLACE else rival
                yield Verdict(promise, f"{who}, gradient held by the {mode.holder}", target, ratio)


def meeting(table: Table) -> Iterator[Verdict]:
    promise = "a gradient or an operand in another order of memory: times faster than torch out of place"
    for row in table.rows:
        if row.implementation == OURS and row.layout in MEETING:
            ratio = table.ratio(OUT_OF_PLACE, OURS, *row.case)
            if ratio is not None:
                yield Verdict(promise, f"{row.op} {row.layout} {row.dtype}, {row.mode}", 1.0, ratio)


def cuda_bandwidth(table: Table, past_cache: int) -> Iterator[Verdict]:
    for row in table.rows:
        if row.implementation != OURS or not row.share or row.size < past_cache or row.layout in MEETING:
            continue
        what = f"{row.op} {row.layout} {row.dtype} {row.size >> 20} MiB, {row.mode}"
        yield Verdict("bytes per second over a device copy's", what, 0.95, row.share)
        ratio = table.ratio(COMPILED, OURS, *row.case)
        if ratio is not None:
            yield Verdict("never behind torch.compile: times faster", what, 1.0, ratio)


def peak_of_backward(rows: list[Row]) -> Iterator[Verdict]:
    for row in rows:
        if row.implementation != OURS or not row.mode.startswith("backward") or "engine" not in row.mode:
            continue
        # The gradient of a full-size operand is a result that may have no dead tensor to take over.
        results = same in LAYOUTS[row.layout].operands and "trainable" in row.mode
        if not results:
            promise = "full-size tensors allocated by backward when the gradient may be reused"
            yield Verdict(promise, f"{row.op} {row.layout}, {row.mode}", 0, row.peak // row.size, at_most=True)


def saved(rows: list[Row]) -> Iterator[Verdict]:
    promise = "bytes saved for backward beyond the op table's"
    for row in rows:
        if row.implementation == OURS and row.saved is not None and row.mode in MODES:
            dtype = getattr(torch, row.dtype)
            case = Case(BY_NAME[row.op], LAYOUTS[row.layout], dtype, row.size, MODES[row.mode])
            extra = row.saved - case.saved()
            yield Verdict(promise, f"{row.op} {row.layout}, {row.mode}", 0, extra, at_most=True)


@dataclass(frozen=True)
class Summary:
    """A promise, how often it was kept, and where it was furthest from being kept."""

    promise: str
    target: float
    at_most: bool
    met: int
    of: int
    median: float
    worst: Verdict


def summarize(verdicts: list[Verdict]) -> list[Summary]:
    groups: dict[tuple, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.promise, verdict.target, verdict.at_most), []).append(verdict)
    return [
        Summary(
            promise,
            target,
            at_most,
            sum(v.met for v in group),
            len(group),
            statistics.median(v.measured for v in group),
            (max if at_most else min)(group, key=lambda v: v.measured),
        )
        for (promise, target, at_most), group in groups.items()
    ]

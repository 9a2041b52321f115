"""The picture on top of the README: a silently wrong gradient, what guard says of it, and what patched models gain.

The texts are what the program prints, the bars are rows of the newest result file of models.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from .pages import ROOT
from .results import MODELS, PATCHED, StepRow, read, result_files

PICTURE = ROOT / "docs" / "first-look.png"
PROGRAM = Path("examples") / "silently_wrong.py"
MODULE, CASE = "safe_inplace", ("float32", "train")
COLUMNS = 92
INK, GAIN = "0.15", "#D55E00"


def said(*options: str) -> str:
    """What the program prints, by itself or by `python -m safe_inplace run`."""
    done = subprocess.run(
        [sys.executable, *options, str(PROGRAM)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return (done.stdout + done.stderr).replace(f"{ROOT}{os.sep}", "").strip()


def program() -> str:
    return (ROOT / PROGRAM).read_text().partition('"""\n\n')[2].strip()


def report_of_guard() -> str:
    """Without the traceback before it."""
    return said("-m", MODULE, "run").partition("1 time: ")[2]


def rows() -> tuple[dict[str, str], list[StepRow]]:
    """Of the file that measured the most models, the patched steps in the case that is drawn, the greatest gain first."""
    found = [read(path, StepRow) for path in result_files(MODELS)]
    about, every = max(found, key=lambda one: len(one[1]))
    drawn = [row for row in every if row.way == PATCHED and (row.dtype, row.mode) == CASE and row.replaced]
    return about, sorted(drawn, key=lambda row: -row.ratio)


def draw(out: Path = PICTURE) -> Path:
    figure = plt.figure(figsize=(13, 6.6), layout="constrained")
    texts, bars = figure.subplots(1, 2, width_ratios=[1.35, 1])
    parts = [
        (f"$ cat {PROGRAM}", program()),
        (f"$ python {PROGRAM}    # torch alone: no error, each element too large by 1", said()),
        (f"$ python -m {MODULE} run {PROGRAM}", report_of_guard()),
    ]
    lines = [line for head, body in parts for line in (head, *body.splitlines(), "")]
    lines = [part for line in lines for part in textwrap.wrap(line, COLUMNS, subsequent_indent="     ") or [""]]
    texts.set_axis_off()
    texts.set_ylim(len(lines), 0)
    for number, line in enumerate(lines):
        style = {"color": INK, "weight": "bold"} if line.startswith("$ ") else {"color": "0.3"}
        texts.text(0, number, line, family="monospace", fontsize=8.2, va="top", parse_math=False, **style)
    about, drawn = rows()
    heights = range(len(drawn))
    bars.barh(heights, [row.ratio - 1 for row in drawn], left=1, color=GAIN, alpha=0.7, height=0.6)
    bars.hlines(heights, [row.low for row in drawn], [row.high for row in drawn], color=INK, linewidth=1)
    bars.axvline(1, color=INK, linewidth=1)
    bars.set_yticks(heights, [f"{row.family}  {row.ratio:.2f}" for row in drawn], fontsize=8)
    bars.invert_yaxis()
    bars.spines[["top", "right", "left"]].set_visible(False)
    bars.tick_params(axis="y", length=0)
    bars.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    heading = f"safe_inplace.patch(model): times faster\nA step of training, {CASE[0]}. The line: where the median may be, 95%"
    bars.set_title(f"{heading}\n{about['device']}\ntorch {about['torch']}, {about['date']}", fontsize=9, loc="left")
    figure.savefig(out, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return out

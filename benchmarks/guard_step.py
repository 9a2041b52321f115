"""python -m benchmarks.guard_step: what guard adds to a training step, beside torch's own two tools.

Every tool takes its turn in each round, in one process, so that a change of the machine hits all alike; the ratio of a
round is taken within that round. What is said of a target is said of the 95% confidence interval of the median ratio. On
a machine that others use as well, `--clock cpu --threads 1` counts the time that the process had, not the time that passed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from safe_inplace import guard

from . import pages
from .measure import interval_of_median, quantiles
from .report import about_text, seconds_text
from .results import RESULTS, file_name, provenance, read, result_files, write

KEPT = RESULTS / "guard"
PAGE = pages.ROOT / "docs" / "guard.md"
BEGIN, END = "<!-- guard_step: written by python -m benchmarks.guard_step, not by hand -->", "<!-- /guard_step -->"

Step = Callable[[], None]

TOOLS: dict[str, Callable[[], AbstractContextManager]] = {
    "plain": nullcontext,
    "guard": guard,
    "guard copy": lambda: guard("copy"),
    "guard verify": lambda: guard(verify=True),
    "detect_anomaly": torch.autograd.detect_anomaly,
    "allow_mutation_on_saved_tensors": torch.autograd.graph.allow_mutation_on_saved_tensors,
}

STEPS = ("resnet18", "transformer", "resnet50", "overhead")

# What the project set itself to reach, over the plain step.
REACH = {
    ("resnet18", "guard"): 1.05,
    ("resnet18", "guard verify"): 1.2,
    ("resnet50", "guard"): 1.2,
    ("resnet50", "guard verify"): 1.6,
    ("overhead", "guard"): 1.3,
    ("overhead", "guard verify"): 1.5,
}


@dataclass(frozen=True)
class Row:
    """Seconds of one training step; ratio is to the plain step of the same round, low to high its median's interval."""

    step: str
    tool: str
    p20: float
    p50: float
    p80: float
    ratio: float
    ratio_p20: float
    ratio_p80: float
    ratio_low: float
    ratio_high: float
    rounds: int


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def resnet18() -> nn.Module:
    """As torchvision builds it; torchvision itself exists for some versions of torch only."""
    widths = [64, 64, 128, 256, 512]
    blocks = [
        BasicBlock(widths[stage] if i == 0 else widths[stage + 1], widths[stage + 1], 2 if i == 0 and stage else 1)
        for stage in range(4)
        for i in range(2)
    ]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if inputs != 4 * width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def resnet50(width: int) -> nn.Module:
    """As torchvision builds it, with `width` channels where that has 64."""
    blocks = []
    inputs = width
    for stage, depth in enumerate((3, 4, 6, 3)):
        for i in range(depth):
            blocks.append(Bottleneck(inputs, width << stage, 2 if i == 0 and stage else 1))
            inputs = 4 * (width << stage)
    stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(x))


def train(model: nn.Module, x: Tensor, target: Tensor, optimizer: type[torch.optim.Optimizer]) -> Step:
    stepper = optimizer(model.parameters(), lr=1e-4)

    def step() -> None:
        stepper.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), target).backward()
        stepper.step()

    return step


def steps(device: torch.device) -> dict[str, Step]:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True), 4, enable_nested_tensor=False
        ),
        nn.Linear(256, 512),
    )
    overhead = nn.Sequential(*(Residual(64) for _ in range(20)))
    cases = {
        "resnet18": (resnet18(), torch.randn(8, 3, 128, 128), torch.randint(0, 1000, (8,)), torch.optim.SGD),
        "transformer": (encoder, torch.randn(8, 64, 256), torch.randint(0, 512, (512,)), torch.optim.AdamW),
        # Its 161 parameters, so small that all is overhead: what the host of a GPU has to do for a ResNet-50.
        "resnet50": (resnet50(4), torch.randn(4, 3, 32, 32), torch.randint(0, 1000, (4,)), torch.optim.AdamW),
        "overhead": (overhead, torch.randn(32, 64), torch.randint(0, 64, (32,)), torch.optim.AdamW),
    }
    return {
        name: train(model.to(device), x.to(device), target.to(device), optimizer)
        for name, (model, x, target, optimizer) in cases.items()
    }


def measure(name: str, step: Step, rounds: int, seconds: float, clock: Callable[[], float]) -> list[Row]:
    def under(tool: str) -> Step:
        def run() -> None:
            with TOOLS[tool]():
                step()

        return run

    # Timer waits for a GPU before and after each measurement.
    timers = {
        tool: Timer("run()", globals={"run": under(tool)}, num_threads=torch.get_num_threads(), timer=clock)
        for tool in TOOLS
    }
    repeats = {tool: max(1, round(seconds / timer.timeit(2).mean)) for tool, timer in timers.items()}
    times: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    for _ in range(rounds):
        for tool, timer in timers.items():
            times[tool].append(timer.timeit(repeats[tool]).mean)
    rows = []
    for tool, samples in times.items():
        ratios = [sample / plain for sample, plain in zip(samples, times["plain"], strict=True)]
        ratio_p20, ratio, ratio_p80 = quantiles(ratios)
        interval = interval_of_median(ratios)
        rows.append(Row(name, tool, *quantiles(samples), ratio, ratio_p20, ratio_p80, *interval, rounds))
    return rows


def verdict(row: Row, reach: float) -> str:
    if row.ratio_high <= reach:
        return "reached"
    return "missed" if row.ratio_low > reach else "undecided"


def show(rows: list[Row]) -> None:
    table = Table("step", "under", "median ms", "over plain", "20% to 80%", "95% interval", "to reach")
    for row in rows:
        reach = REACH.get((row.step, row.tool))
        table.add_row(
            row.step,
            row.tool,
            f"{row.p50 * 1e3:.2f}",
            f"{row.ratio:.2f}x",
            f"{row.ratio_p20:.2f} to {row.ratio_p80:.2f}",
            f"{row.ratio_low:.2f} to {row.ratio_high:.2f}",
            "" if reach is None else f"{reach:g}x {verdict(row, reach)}",
        )
    Console().print(table)


def times(row: Row) -> str:
    return f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"


def section(folder: Path = KEPT) -> str:
    """What docs/guard.md says of a step: how many times as long it takes."""
    parts = []
    for path in result_files(folder):
        about, rows = read(path, Row)
        table = {(row.step, row.tool): row for row in rows}
        body = [
            [step, seconds_text(table[step, "plain"].p50), *(times(table[step, tool]) for tool in list(TOOLS)[1:])]
            for step in dict.fromkeys(row.step for row in rows)
        ]
        parts += [f"**{about_text(about)}**", pages.markdown(["step", *TOOLS], body)]
    return "\n\n".join(parts)


def write_page(folder: Path = KEPT, page: Path = PAGE) -> None:
    page.write_text(pages.insert(page.read_text(), section(folder), BEGIN, END))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.guard_step", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="of each turn, at least")
    parser.add_argument("--steps", nargs="+", choices=STEPS, help="only these; writes none")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
    rows: list[Row] = []
    for name, step in steps(device).items():
        if not options.steps or name in options.steps:
            rows += measure(name, step, options.rounds, options.seconds, clock)
    show(rows)
    if not options.steps:
        about = provenance(device) | {"command": " ".join(["python -m benchmarks.guard_step", *sys.argv[1:]])}
        path = KEPT / file_name(about)
        write(path, about, rows)
        write_page()
        print(path.relative_to(RESULTS.parent.parent))


if __name__ == "__main__":
    main()

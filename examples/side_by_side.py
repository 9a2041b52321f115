"""Two trainings in turns, of one model as it was and as it is with the ops: losses, step times and memory beside each other."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

import safe_inplace
from examples.digits import Digits, allocations

Batch = tuple[Tensor, Tensor]


@dataclass
class Run:
    """One training. `loss` takes the model, images and labels."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer = field(init=False)
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    memory: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self, batch: Batch, seed: int) -> None:
        # Of each run the same: which samples are dropped, which noise is drawn.
        torch.manual_seed(seed)
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss(self.model, *batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.times.append(time.perf_counter() - began)

    def measure_memory(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.memory = max(allocations(lambda: self.loss(self.model, *batch).backward()))


def batches(options: argparse.Namespace) -> Iterator[Batch]:
    digits, generator = Digits.load(0, torch.device("cpu")), torch.Generator().manual_seed(0)
    while True:
        yield from digits.batches(options.batch_size, generator)


def train(runs: list[Run], options: argparse.Namespace) -> None:
    found = batches(options)
    for seed in (bar := tqdm(range(options.steps))):
        batch = next(found)
        # A write that would break a gradient shows in the first steps: then it is told at its line. Later ones go without.
        with safe_inplace.guard() if seed < options.guarded_steps else nullcontext():
            for run in runs[:: 1 if seed % 2 else -1]:
                run.step(batch, seed)
        bar.set_postfix({run.name: f"{run.losses[-1]:.4f}" for run in runs})
    for run in runs:
        run.measure_memory(batch)


def summary(runs: list[Run], options: argparse.Namespace) -> str:
    lines = [f"{'':14}{'last loss':>12}{'step, ms':>12}{'peak, MiB':>12}"]
    for run in runs:
        # Without the guarded steps, which cost a little more, where there are others.
        step = 1e3 * statistics.median(run.times[options.guarded_steps :] or run.times)
        lines.append(f"{run.name:14}{run.losses[-1]:12.4f}{step:12.1f}{run.memory / 2**20:12.1f}")
    return "\n".join(lines)


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--steps", type=int, default=100)
    made.add_argument("--guarded-steps", type=int, default=3, help="of these, under guard()")
    made.add_argument("--batch-size", type=int, default=64)
    return made

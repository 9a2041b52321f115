"""A residual network on scikit-learn's handwritten digits, trained with torch's out-of-place ops and with safe_inplace.

The model is written once; what changes between the runs is where its five elementwise ops come from. A third run, with
torch's own fused `addcmul`, shows how far two correct ways of rounding drift apart in training.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import safe_inplace


class Ops(Protocol):
    def add_(self, input: Tensor, other: Tensor) -> Tensor: ...
    def mul_(self, input: Tensor, other: Tensor) -> Tensor: ...
    def add_mul_(self, input: Tensor, other: Tensor, scale: Tensor) -> Tensor: ...
    def mul_add_(self, input: Tensor, scale: Tensor, shift: Tensor) -> Tensor: ...
    def addcmul_(self, input: Tensor, tensor1: Tensor, tensor2: Tensor) -> Tensor: ...


out_of_place = SimpleNamespace(
    add_=lambda input, other: input + other,
    mul_=lambda input, other: input * other,
    add_mul_=lambda input, other, scale: (input + other) * scale,
    mul_add_=lambda input, scale, shift: input * scale + shift,
    addcmul_=lambda input, tensor1, tensor2: input + tensor1 * tensor2,
)
out_of_place_fused = SimpleNamespace(
    **{
        **vars(out_of_place),
        "mul_add_": lambda input, scale, shift: torch.addcmul(shift, input, scale),
        "addcmul_": lambda input, tensor1, tensor2: torch.addcmul(input, tensor1, tensor2),
    }
)


class Block(nn.Module):
    """Two residual branches: one over space, modulated by a summary of the image and scaled per channel (LayerScale);
    one over channels, let through by a gate per image and channel.

    The stream x may be overwritten by each branch's result because both branches begin with relu, which saves its own
    result for backward and not x. After a LayerNorm or a convolution of x the write would be a hazard, and refused.
    """

    def __init__(self, ops: Ops, width: int) -> None:
        super().__init__()
        self.ops = ops
        self.space = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, width, affine=False)
        self.condition = nn.Linear(width, 3 * width)
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 0.1))
        self.widen = nn.Conv2d(width, 2 * width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(2 * width, 1, 1))
        self.gain = nn.Parameter(torch.ones(2 * width, 1, 1))
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, gate = self.condition(x.mean((2, 3)))[..., None, None].chunk(3, dim=1)
        h = self.norm(self.space(x.relu()))
        h = self.ops.mul_add_(h, 1 + scale, shift)
        x = self.ops.addcmul_(x, self.layer_scale, h)
        h = self.ops.add_mul_(self.widen(x.relu()), self.bias, self.gain)
        return self.ops.addcmul_(x, gate.sigmoid(), self.narrow(h.relu()))


class Network(nn.Module):
    def __init__(self, ops: Ops, width: int, depth: int) -> None:
        super().__init__()
        self.ops = ops
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.position = nn.Parameter(0.02 * torch.randn(width, 8, 8))
        self.blocks = nn.Sequential(*(Block(ops, width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        x = self.ops.add_(self.stem(images), self.position)
        return self.ops.mul_(self.head(self.blocks(x).relu().mean((2, 3))), self.logit_scale)


class Lines(nn.Module):
    """The sums and products of a Block's first branch alone, on activations that no cache holds: what the ops are for, without
    the convolutions that most of a step goes to."""

    def __init__(self, ops: Ops, batch: int, width: int) -> None:
        super().__init__()
        self.ops = ops
        self.x, self.h = (nn.Parameter(torch.randn(batch, width, 64, 32)) for _ in range(2))
        self.scale, self.shift = (nn.Parameter(torch.randn(batch, width, 1, 1)) for _ in range(2))
        self.layer_scale = nn.Parameter(torch.full((width, 1, 1), 0.1))
        self.register_buffer("grad", torch.randn_like(self.x))

    def start(self) -> tuple[Tensor, Tensor]:
        """The stream and the branch, which may be written to, as convolutions would give them."""
        return self.x + 0, self.h + 0

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        h = self.ops.mul_add_(h, 1 + self.scale, self.shift)
        return self.ops.addcmul_(x, self.layer_scale, h)

    def forward_and_backward(self, x: Tensor, h: Tensor) -> None:
        self(x, h).backward(self.grad)


@dataclass(frozen=True)
class Digits:
    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    @classmethod
    def load(cls, seed: int, device: torch.device) -> "Digits":
        images, labels = load_digits(return_X_y=True)
        images = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
        parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
        train, held_out, train_labels, held_out_labels = (torch.from_numpy(part).to(device) for part in parts)
        return cls(train, train_labels, held_out, held_out_labels)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
        for chosen in order.split(size)[: len(order) // size]:
            yield self.images[chosen], self.labels[chosen]


def allocations(run: Callable[[], object], cuda: bool = False) -> list[int]:
    """Bytes allocated on top of what a run began with, at each allocation and release.

    From the allocator's own reports, which every kernel's memory passes through: a Python-level tracker would see neither
    what a C++ node keeps nor what a kernel allocates.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    reports = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == int(cuda)]
    live = 0
    return [live := live + report["args"]["Bytes"] for report in sorted(reports, key=lambda report: report["ts"])]


def saved_bytes(forward: Callable[[], Tensor], *apart: Tensor) -> int:
    """Bytes of the distinct storages that the graph keeps, without these tensors."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # held: what it alone keeps alive keeps its address
    for tensor in apart:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@dataclass
class Measured:
    """What forward and backward took."""

    times: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    memory: list[int] = field(default_factory=list)


@dataclass
class Run:
    """One training: its model and optimizer, and what was seen of them, and of the lines that differ alone."""

    name: str
    model: Network
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    accuracy: float = float("nan")
    whole: Measured = field(default_factory=Measured)
    alone: Measured = field(default_factory=Measured)

    def step(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def measure_accuracy(self, digits: Digits) -> None:
        guessed = self.model(digits.held_out_images).argmax(1)
        self.accuracy = (guessed == digits.held_out_labels).float().mean().item()

    def measure_memory(self, images: Tensor, labels: Tensor, lines: Lines) -> None:
        def forward() -> Tensor:
            return F.cross_entropy(self.model(images), labels)

        self.optimizer.zero_grad(set_to_none=False)
        self.whole.saved_bytes = saved_bytes(forward, *self.model.parameters(), images, labels)
        self.whole.memory = allocations(lambda: forward().backward(), cuda=images.is_cuda)
        lines.zero_grad()
        self.alone.saved_bytes = saved_bytes(lambda: lines(*lines.start()), *lines.parameters())
        self.alone.memory = allocations(lambda: lines.forward_and_backward(*lines.start()), cuda=images.is_cuda)


def train(runs: list[Run], digits: Digits, options: argparse.Namespace, console: Console) -> None:
    steps = len(digits.images) // options.batch_size * options.epochs
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"), console=console) as progress:
        for run in runs:
            task = progress.add_task(f"{run.name:<28}", total=steps, loss=float("nan"))
            generator = torch.Generator().manual_seed(options.seed)
            for _ in range(options.epochs):
                for images, labels in digits.batches(options.batch_size, generator):
                    run.losses.append(run.step(images, labels))
                    run.schedule.step()
                    progress.update(task, advance=1, loss=run.losses[-1])
            run.measure_accuracy(digits)


def measure(runs: list[Run], digits: Digits, options: argparse.Namespace, console: Console) -> None:
    images, labels = digits.images[: options.batch_size], digits.labels[: options.batch_size]
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    torch.manual_seed(options.seed)
    lines = Lines(out_of_place, options.batch_size, options.width).to(images.device)

    def time(measured: Measured, compute: Callable[..., object], *arguments: Tensor) -> None:
        synchronize()
        start = perf_counter()
        compute(*arguments)
        synchronize()
        measured.times.append(perf_counter() - start)

    for run in runs:
        lines.ops = run.model.ops
        run.measure_memory(images, labels, lines)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        for _ in progress.track(range(options.timed_steps), description=f"{'timing, taking turns':<28}"):
            # Taking turns: what else the machine does in the meantime meets all of them alike.
            for run in runs:
                time(run.whole, run.step, images, labels)
                lines.ops = run.model.ops
                lines.zero_grad()
                time(run.alone, lines.forward_and_backward, *lines.start())


def per_epoch(losses: list[float], epochs: int) -> list[float]:
    return [statistics.fmean(part) for part in np.array_split(losses, epochs)]


def costs(measured: list[Measured]) -> dict[tuple[str, str], list[float]]:
    """Of each run, by what was measured and its unit."""
    return {
        ("time", "ms"): [1e3 * statistics.median(one.times) for one in measured],
        ("peak", "MiB"): [max(one.memory) / 2**20 for one in measured],
        ("saved", "MiB"): [one.saved_bytes / 2**20 for one in measured],
    }


def drift(run: Run, reference: Run) -> np.ndarray:
    return np.abs(np.subtract(run.losses, reference.losses))


def report(runs: list[Run], options: argparse.Namespace, console: Console) -> None:
    torch_run, ours, _ = runs
    console.print("\nLoss, mean of each epoch")
    curves = Table(box=box.SIMPLE_HEAD)
    curves.add_column("epoch", justify="right")
    for run in runs:
        curves.add_column(run.name, justify="right")
    curves.add_column("ours - torch", justify="right")
    rows = zip(*(per_epoch(run.losses, options.epochs) for run in runs), strict=True)
    for epoch, row in enumerate(rows, start=1):
        curves.add_row(str(epoch), *(f"{loss:.6f}" for loss in row), f"{row[1] - row[0]:+.1e}")
    console.print(curves)

    console.print("The same model on the same batches")
    summary = Table(box=box.SIMPLE_HEAD)
    summary.add_column("")
    for run in runs:
        summary.add_column(run.name, justify="right")
    summary.add_column("ours / torch", justify="right")

    def row(name: str, show, values: list[float]) -> None:
        summary.add_row(name, *map(show, values), f"{values[1] / values[0]:.2f}")

    row("accuracy, held out", lambda v: f"{v:.1%}", [run.accuracy for run in runs])
    for part, measured in (("step", [run.whole for run in runs]), ("alone", [run.alone for run in runs])):
        for (kind, unit), values in costs(measured).items():
            row(f"{part}: {kind}, {unit}", lambda v: f"{v:.2f}", values)
    console.print(summary)
    console.print(
        "step: of training, the median; alone: the sums and products of one branch, forward and backward, on activations of\n"
        f"{options.batch_size} x {options.width} x 64 x 32, which no cache holds\n"
        "peak: bytes allocated at once by forward and backward, on top of what they began with\n"
        "saved: bytes that the graph keeps between the two, parameters and batch left out\n"
        f"largest distance of a step's loss from torch's: safe_inplace {drift(ours, torch_run).max():.1e}, "
        f"torch with its own addcmul {drift(runs[2], torch_run).max():.1e}",
        highlight=False,
        soft_wrap=True,
    )


def plot(runs: list[Run], options: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    torch_run, ours, fused = runs
    colors = {torch_run.name: "#9aa5b1", ours.name: "#c2410c", fused.name: "#2563eb"}
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})
    figure, ((gain, memory), (losses, drifts)) = plt.subplots(2, 2, figsize=(10.5, 7), layout="constrained")
    epochs = np.linspace(0, options.epochs, len(torch_run.losses), endpoint=False)

    losses.plot(epochs, torch_run.losses, color=colors[torch_run.name], linewidth=5, label=torch_run.name)
    losses.plot(epochs, ours.losses, color=colors[ours.name], linewidth=1.2, label=ours.name)
    losses.set(title="Loss of each step", xlabel="epoch", ylabel="cross entropy", yscale="log")
    losses.legend(frameon=False)

    for run in (fused, ours):
        drifts.plot(epochs, drift(run, torch_run), color=colors[run.name], linewidth=1, label=run.name)
    # Below the rounding of the loss itself there is nothing to see; a log axis cannot show the zeros among it.
    drifts.set(title="Distance of each step's loss from torch's", xlabel="epoch", ylabel="|difference|")
    drifts.set_yscale("symlog", linthresh=1e-7)
    drifts.set_ylim(bottom=0)
    drifts.legend(frameon=False)

    for run in (torch_run, ours):
        moments = np.linspace(0, 1, len(run.whole.memory))
        mebibytes = np.array(run.whole.memory) / 2**20
        memory.fill_between(moments, mebibytes, color=colors[run.name], alpha=0.25, step="post")
        memory.step(moments, mebibytes, where="post", color=colors[run.name], linewidth=1, label=run.name)
        memory.axhline(mebibytes.max(), color=colors[run.name], linewidth=0.8, linestyle=":")
    memory.set(title="Memory allocated in one step (dotted: peak)", xlabel="forward, then backward", ylabel="MiB above the start")
    memory.set_xticks([])
    memory.set_ylim(bottom=0)
    memory.legend(frameon=False, loc="lower center")

    names: list[str] = []
    for part, measured in (("alone", [run.alone for run in runs]), ("whole step", [run.whole for run in runs])):
        for (kind, unit), values in costs(measured).items():
            for offset, run, one, value in zip((-0.2, 0.2), runs[1:], measured[1:], values[1:], strict=True):
                at = len(names) + offset
                label = None if names else run.name
                gain.barh(at, value / values[0], height=0.36, color=colors[run.name], alpha=0.5, label=label)
                if kind == "time":
                    low, _, high = (1e3 * quartile / values[0] for quartile in statistics.quantiles(one.times, n=4))
                    gain.hlines(at + 0.14, low, high, color="black", linewidth=1)
                gain.text(0.02, at, f"{value:.1f} {unit}", va="center", fontsize=8)
            names.append(f"{part}: {kind}\n{torch_run.name} {values[0]:.1f} {unit}")
    gain.axvline(1, color=colors[torch_run.name], linewidth=2)
    gain.set_yticks(range(len(names)), names, fontsize=8)
    gain.invert_yaxis()
    gain.set(title="Beside torch's (1): sums and products alone, and a whole step", xlabel="black: the middle half of the times")
    gain.set_xlim(0, max(gain.get_xlim()[1], 1.6))
    gain.legend(frameon=False, loc="lower right", fontsize=8)

    figure.suptitle(f"scikit-learn digits, {options.depth} residual blocks of width {options.width}", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=6e-3, help="the highest of the cycle")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--depth", type=int, default=4, help="residual blocks")
    parser.add_argument("--timed-steps", type=int, default=60, help="steps of each model, after the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, default=Path("demo-output/digits.png"))
    options = parser.parse_args()

    console = Console()
    device = torch.device(options.device)
    digits = Digits.load(options.seed, device)
    console.print(
        f"{len(digits.images)} digits to learn from, {len(digits.held_out_images)} held out; "
        f"torch {torch.__version__} on {device}, seed {options.seed}",
        highlight=False,
    )
    runs = []
    for name, ops in (
        ("torch", out_of_place),
        ("safe_inplace", safe_inplace),
        ("torch, addcmul", out_of_place_fused),
    ):
        torch.manual_seed(options.seed)
        model = Network(ops, options.width, options.depth).to(device)
        optimizer = torch.optim.AdamW(model.parameters())
        steps = options.epochs * (len(digits.images) // options.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=options.learning_rate, total_steps=steps + 1, pct_start=0.1
        )
        runs.append(Run(name, model, optimizer, schedule))
    train(runs, digits, options, console)
    measure(runs, digits, options, console)
    report(runs, options, console)
    plot(runs, options, options.plot)
    console.print(f"Plot: {options.plot}", highlight=False)


if __name__ == "__main__":
    main()

"""Random training programs: modules, optimizers, kept and retained graphs, and all that writes to their values.

Each runs in plain torch, under guard in every mode, and once with hooks that keep a snapshot of every value that autograd
saves. The snapshots are the judge: which backward asks for a value that is no longer what was saved, what a write
destroyed, and what the gradients are where it is given the snapshot.

    python -m tests.guard.graphs --programs 20000 --seed 0
"""

import argparse
import random
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from safe_inplace import HazardError, HazardWarning, guard

from .programs import REFUSED, VIEWS, agree

ROWS, WIDTH = 3, 4


# ---- layers


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x):
        h = self.inner(x) * 1.5
        h += x
        return h


class ResidualOverwrites(Residual):
    def forward(self, x):
        h = self.inner(x)
        h += x + 0.125  # where x is all zeros, too, it changes something
        return h


class SigmoidInPlace(nn.Module):
    def forward(self, x):
        return x.sigmoid_()


class Gate(nn.Linear):
    def forward(self, x):
        return x * super().forward(x).sigmoid()


class Halves(nn.Linear):
    """Saves views of its input."""

    def forward(self, x):
        return torch.cat([x[:, :2] * x[:, 2:], super().forward(x)[:, ::2].tanh()], 1)


class Columns(nn.Module):
    """Writes one column after the other, beside and over what it has saved."""

    def forward(self, x):
        h = x * 1
        h[:, 0] = h[:, 1] * 2
        h[:, 2] = h[:, 3] * h[:, 3]
        return h


class Running(nn.Module):
    """A buffer that each forward in train mode moves, and saves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return x * self.mean


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softmax": lambda: nn.Softmax(-1),
    "dropout": nn.Dropout,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "sigmoid in place": lambda: SigmoidInPlace(),
    "residual": Residual,
    "residual that overwrites": ResidualOverwrites,
    "gate": lambda: Gate(WIDTH, WIDTH),
    "halves": lambda: Halves(WIDTH, WIDTH),
    "columns": Columns,
    "running": Running,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
}
WEIGHTS = [6, 3, 3, 3, 1, 3, 2, 2, 1, 1, 1, 2, 1, 1, 2, 1, 2, 2, 1, 2, 1, 1]

# Weight decay moves a parameter whose gradient is zero, too: a step that writes is a step that changes every byte.
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
}

# How a write reaches a tensor: whether autograd sees it, and whether it raises the version.
WAYS: dict[str, Callable[[torch.Tensor], None]] = {
    "grad": lambda x: x.add_(0.125),
    "grad mul": lambda x: x.mul_(1.5).add_(0.25),
    "detach": lambda x: x.detach().add_(0.125),
    "data": lambda x: x.data.add_(0.125),
    "no_grad": torch.no_grad()(lambda x: x.add_(0.125)),
    "foreach": torch.no_grad()(lambda x: torch._foreach_add_([x], 0.125)),
    "out": torch.no_grad()(lambda x: torch.add(x, 0.125, out=x)),
}


def lerp(target: nn.Module, online: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


def through_data(target: nn.Module, online: nn.Module) -> None:
    for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
        mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)


def foreach(target: nn.Module, online: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.1)


def whole_state(target: nn.Module, online: nn.Module) -> None:
    theirs = online.state_dict()
    for name, mine in target.state_dict().items():
        if mine.is_floating_point():
            mine.copy_(0.9 * mine + 0.1 * theirs[name] + 0.01)


AVERAGES = {"lerp": lerp, "data": through_data, "foreach": foreach, "state": whole_state}


# ---- programs


@dataclass(frozen=True)
class Step:
    kind: str
    name: str = ""
    of: int = 0
    other: int = 0
    flag: bool = False

    @property
    def updates(self) -> bool:
        """What correct programs do to parameters and buffers, and may do while graphs are kept."""
        return self.kind in ("step", "average", "clamp", "buffer", "load")


@dataclass(frozen=True)
class Program:
    name: str
    layers: tuple[tuple[str, ...], ...]  # of the trunk, which the target has too, and of two heads
    optimizers: tuple[str, ...]
    frozen: bool  # the target's parameters
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = [f"trunk {self.layers[0]}, heads {self.layers[1:]}, {self.optimizers}, frozen {self.frozen}"]
        return "\n".join([f"program {self.name}", *lines, *(f"  {i}: {step}" for i, step in enumerate(self.steps))])


KINDS = {
    "forward": 7, "backward": 7, "penalty": 1, "step": 4, "average": 2, "clamp": 1, "write": 4, "input": 1, "buffer": 1,
    "drop": 1, "load": 1, "zero": 1,
}  # fmt: skip
CLAMPS = ("data", "no_grad", "foreach")
ROUTES = ("trunk", "one head", "two heads", "target", "target of trunk")
SOURCES = ("fresh", "leaf", "last", "last, detached")


def generate(name: str) -> Program:
    rng = random.Random(name)

    def layers(count):
        return tuple(rng.choices(list(LAYERS), WEIGHTS, k=count))

    steps = [Step("forward", rng.choice(ROUTES), SOURCES.index("fresh"), flag=True)]
    for _ in range(rng.randint(4, 11)):
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        of, other, flag = rng.randrange(1000), rng.randrange(1000), rng.random() < 0.5
        name_of = {
            "forward": ROUTES, "write": tuple(WAYS), "input": tuple(WAYS), "buffer": tuple(WAYS), "clamp": CLAMPS,
            "average": tuple(AVERAGES),
        }.get(kind, ("",))  # fmt: skip
        if kind == "backward":
            of = 0 if rng.random() < 0.5 else of  # the latest
        steps.append(Step(kind, rng.choice(name_of), of, other, flag))
    return Program(
        name,
        (layers(rng.randint(1, 4)), layers(rng.randint(1, 2)), layers(rng.randint(1, 2))),
        tuple(rng.choices(list(OPTIMIZERS), k=rng.choice((1, 1, 2)))),
        rng.random() < 0.5,
        tuple(steps),
    )


# ---- running one


@dataclass
class Graph:
    output: torch.Tensor
    input: torch.Tensor
    values: list[torch.Tensor]


class Run:
    """What the program has built. `stopped` is the step at which a value was refused, with the error."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graphs: list[Graph] = []
        self.skipped: list[int] = []
        self.stopped: tuple[int, RuntimeError] | None = None
        self.at = -1
        torch.manual_seed(0)
        stacks = [nn.Sequential(*(LAYERS[layer]() for layer in layers)) for layers in (program.layers[0], *program.layers)]
        self.target, self.trunk, *self.heads = [stack.double() for stack in stacks]
        self.values: list[torch.Tensor] = []
        for stack in stacks:
            for p in stack.parameters():
                p.data.add_(torch.randn_like(p), alpha=0.3)
            for layer in stack:
                layer.register_forward_hook(lambda module, arguments, output: self.values.append(output))
        self.target.requires_grad_(not program.frozen)
        learned = [[*self.trunk.parameters(), *self.heads[0].parameters()], list(self.heads[1].parameters())]
        if len(program.optimizers) == 1:
            learned = [learned[0] + learned[1]]
        self.optimizers = [
            OPTIMIZERS[name](parameters or [torch.zeros(1, requires_grad=True)])
            for name, parameters in zip(program.optimizers, learned, strict=True)
        ]

    @property
    def modules(self) -> list[nn.Module]:
        return [self.trunk, *self.heads, self.target]

    def state(self) -> list[torch.Tensor]:
        """All that training has changed, and the gradients."""
        parameters = [p for module in self.modules for p in module.parameters()]
        buffers = [b for module in self.modules for b in module.buffers()]
        return [t.detach() for t in (*parameters, *buffers, *(p.grad for p in parameters if p.grad is not None))]

    def run(self) -> "Run":
        for at, step in enumerate(self.program.steps):
            self.at = at
            torch.manual_seed(at)
            try:
                getattr(self, step.kind)(step)
            except RuntimeError as error:
                if isinstance(error, HazardError) or REFUSED in str(error):
                    self.stopped = (at, error)
                    return self
                # Refused by torch for another reason: a leaf that is written, a graph that is gone.
                self.skipped.append(at)
        return self

    def _graph(self, step: Step) -> Graph:
        return self.graphs[-1 - step.of % len(self.graphs)]

    def forward(self, step: Step) -> None:
        for module in self.modules:
            module.train(step.flag)
        source = SOURCES[step.of % len(SOURCES)]
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        if source == "leaf":
            x.requires_grad_()
        elif source != "fresh" and self.graphs and self.graphs[-1].output.dim() == 2:
            x = self.graphs[-1].output
            x = x.detach() if "detached" in source else x
        self.values = []
        route = step.name
        h = self.target(x) if route == "target" else self.trunk(x)
        outputs = {
            "trunk": lambda: [h],
            "target": lambda: [h],
            "one head": lambda: [self.heads[0](h)],
            "two heads": lambda: [self.heads[0](h), self.heads[1](h)],
            "target of trunk": lambda: [self.target(h)],
        }[route]()
        self.graphs += [Graph(output, x, self.values) for output in outputs]

    def backward(self, step: Step) -> None:
        if self.graphs:
            self._graph(step).output.square().mean().backward(retain_graph=step.flag)

    def penalty(self, step: Step) -> None:
        if self.graphs:
            graph = self._graph(step)
            (gradient,) = torch.autograd.grad(
                graph.output.square().sum(), graph.values[0], create_graph=True, allow_unused=True
            )
            if gradient is not None:
                self.graphs.append(Graph(gradient.square().sum(), graph.input, graph.values))

    def step(self, step: Step) -> None:
        self.optimizers[step.of % len(self.optimizers)].step()

    def zero(self, step: Step) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=step.flag)

    def average(self, step: Step) -> None:
        AVERAGES[step.name](self.target, self.trunk)

    def load(self, step: Step) -> None:
        self.target.load_state_dict({name: value + 0.01 for name, value in self.trunk.state_dict().items()})

    def clamp(self, step: Step) -> None:
        for p in self.modules[step.of % 4].parameters():
            bound = float(p.detach().min()) - 0.125  # every element is written with another value
            if step.name == "data":
                p.data.clamp_(max=bound)
            elif step.name == "no_grad":
                with torch.no_grad():
                    p.clamp_(max=bound)
            else:
                with torch.no_grad():
                    torch._foreach_clamp_max_([p], bound)

    def buffer(self, step: Step) -> None:
        for buffer in self.modules[step.of % 4].buffers():
            if buffer.is_floating_point():
                WAYS[step.name](buffer)

    def input(self, step: Step) -> None:
        if self.graphs:
            WAYS[step.name](self._graph(step).input)

    def write(self, step: Step) -> None:
        graph = self._graph(step) if self.graphs else None
        if graph and graph.values:
            value = graph.values[step.other % len(graph.values)]
            views = [None, None, *VIEWS]
            view = views[step.other // 7 % len(views)]
            WAYS[step.name](value if view is None else VIEWS[view](value))

    def drop(self, step: Step) -> None:
        if self.graphs:
            del self.graphs[-1 - step.of % len(self.graphs)]
            self.values = []


# ---- the judge


@dataclass(eq=False)
class Snapshot:
    alias: torch.Tensor
    copy: torch.Tensor
    version: int
    unread: bool  # running statistics of a batch norm that trains: saved, not read

    @property
    def changed(self) -> bool:
        return not torch.equal(_bytes(self.alias), _bytes(self.copy))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.contiguous()
    return plain.view(torch.int64) if plain.dtype == torch.float64 else plain


@dataclass
class Judged:
    run: Run
    # By step: the shape of the first value that backward asked for and that had been written since it was saved.
    asked: dict[int, torch.Size] = field(default_factory=dict)
    refused: int | None = None  # the first step in which the version tells, and so torch
    lost: set[int] = field(default_factory=set)  # steps in which bytes of a live value changed
    raised: set[int] = field(default_factory=set)  # steps in which the version of one rose


def judge(program: Program) -> Judged:
    """Runs it with the snapshots: backward gets them where the value has changed, as it does from guard("copy")."""
    run = Run(program)
    judged = Judged(run)
    live: weakref.WeakSet[Snapshot] = weakref.WeakSet()
    changed: weakref.WeakSet[Snapshot] = weakref.WeakSet()
    norms = [layer for module in run.modules for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]

    def pack(tensor: torch.Tensor) -> Snapshot:
        unread = any(
            norm.training and statistics.data_ptr() == tensor.data_ptr()
            for norm in norms
            for statistics in (norm.running_mean, norm.running_var)
        )
        snapshot = Snapshot(tensor.detach(), tensor.detach().clone(), tensor._version, unread)
        live.add(snapshot)
        return snapshot

    def unpack(snapshot: Snapshot) -> torch.Tensor:
        stale = snapshot.alias._version != snapshot.version
        if (snapshot.changed and not snapshot.unread) or stale:
            judged.asked.setdefault(run.at, snapshot.alias.shape)
        if stale and judged.refused is None:
            judged.refused = run.at
        return snapshot.copy if snapshot.changed else snapshot.alias

    def look() -> None:
        sound = [snapshot for snapshot in live if snapshot not in changed and not snapshot.unread]
        if any(snapshot.alias._version != snapshot.version for snapshot in sound):
            judged.raised.add(run.at)
        now = [snapshot for snapshot in sound if snapshot.changed]
        changed.update(now)
        if now:
            judged.lost.add(run.at)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        for kind in {step.kind for step in program.steps}:
            plain = getattr(run, kind)

            def watched(step, plain=plain):
                try:
                    plain(step)
                finally:
                    look()

            setattr(run, kind, watched)
        run.run()
    return judged


class Wrong(AssertionError):
    pass


def check(program: Program, under: Callable[..., AbstractContextManager] = guard) -> str:
    """How the program ends. Raises Wrong where guard did not do what the snapshots say."""
    judged = judge(program)
    first = min(judged.asked, default=None)

    def expect(truth: object, what: str) -> None:
        if not truth:
            raise Wrong(f"{what}\nasked {judged.asked}, lost {sorted(judged.lost)}")

    def run(context: AbstractContextManager) -> tuple[Run, object]:
        with context as watch:
            return Run(program).run(), watch

    def same_as(one: Run, other: Run) -> bool:
        return one.skipped == other.skipped and agree(one.state(), other.state())

    plain, _ = run(nullcontext())
    stopped = plain.stopped and plain.stopped[0]
    expect(stopped == judged.refused, f"the judge does not see what torch refuses: {plain.stopped}")

    verify = random.Random(program.name).random() < 0.3
    deferred, watch = run(under("defer", verify=verify))
    if first is None:
        expect(deferred.stopped is None and watch.hazards == [], f"a false alarm of defer: {deferred.stopped}")
        expect(same_as(deferred, plain), "defer changed what the program computes")
    else:
        expect(deferred.stopped is not None and deferred.stopped[0] == first, f"defer missed it: {deferred.stopped}")
        _, error = deferred.stopped
        expect(isinstance(error, HazardError) and error.mutation and error.save, f"defer does not name it: {error}")
        expect(error.shape == tuple(judged.asked[first]), f"defer names another value: {error}")

    raised, watch = run(under("raise", verify=verify))
    ended = "clean" if first is None else "in backward"
    if raised.stopped is not None and raised.stopped[0] != first:
        at, error = raised.stopped
        expect(isinstance(error, HazardError) and not error.hazard.late, f"raise stops where no backward asks: {error}")
        expect(first is None or at < first, f"raise missed it: {error}")
        # A relu may write what is there already; torch refuses that as well, by the version.
        again = "relu_" in error.op and at in judged.raised
        expect(at in judged.lost or again, f"raise stops a write that destroys nothing: {error}")
        expect(not program.steps[at].updates and not error.hazard.used, f"raise stops an update: {error}")
        ended = "at the write"
    elif first is None:
        expect(raised.stopped is None and watch.hazards == [], f"a false alarm of raise: {watch.hazards}")
        expect(same_as(raised, plain), "raise changed what the program computes")
    else:
        expect(raised.stopped is not None and isinstance(raised.stopped[1], HazardError), f"raise missed it: {raised.stopped}")

    warned, watch = run(under("warn"))
    expect((warned.stopped and warned.stopped[0]) == (plain.stopped and plain.stopped[0]), "warn does not end as torch does")
    expect(same_as(warned, plain), "warn changed what the program computes")
    expect(watch.hazards if first is not None else ended == "at the write" or not watch.hazards, "warn tells the wrong thing")

    copied, watch = run(under("copy"))
    expect(copied.stopped is None, f"copy stops: {copied.stopped}")
    expect(same_as(copied, judged.run), "copy does not give the gradients of the snapshots")
    return ended


def fuzz(seed: object, indices: Iterable[int], under: Callable[..., AbstractContextManager] = guard) -> Counter[str]:
    ends: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HazardWarning)
        for index in indices:
            program = generate(f"{seed}:{index}")
            try:
                ends[check(program, under)] += 1
            except Exception as error:
                error.add_note(str(program))
                raise
    return ends


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.guard.graphs", description=__doc__.split("\n")[0])
    parser.add_argument("--programs", type=int, default=20_000, help="how many (20000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole series (0)")
    parser.add_argument("--start", type=int, default=0, help="first program of the series (0)")
    parser.add_argument("--only", type=int, help="print and check only this program")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    programs = range(options.start, options.start + options.programs)
    if options.only is not None:
        programs = range(options.only, options.only + 1)
        print(generate(f"{options.seed}:{options.only}"))
    try:
        ends = fuzz(options.seed, programs)
    except Wrong as error:
        print(error, *error.__notes__, sep="\n", file=sys.stderr)
        return 1
    print(f"{ends.total()} programs of seed {options.seed}: {dict(ends.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

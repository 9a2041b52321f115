"""The programs, their steps, and a run of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from safe_inplace import HazardError

from .. import engine
from ..guards import of_an_overwritten_value
from ..overwrites import VIEWS
from .models import AVERAGES, LAYERS, OPTIMIZERS, ROWS, WAYS, WEIGHTS, WIDTH

ROUTES = ("trunk", "one head", "two heads", "target", "target of trunk")
SOURCES = ("fresh", "leaf", "last", "last, detached")


@dataclass
class Program(engine.Program):
    layers: tuple[tuple[str, ...], ...] = ()  # of the trunk, which the target has too, and of two heads
    optimizers: tuple[str, ...] = ()
    frozen: bool = False  # the target's parameters

    def heading(self) -> str:
        return f"{self.name}: trunk {self.layers[0]}, heads {self.layers[1:]}, {self.optimizers}, frozen {self.frozen}"


class Generator(engine.Generator):
    def start(self, name):
        return Program(name)

    def generate(self):
        rng = self.rng
        self.add(Forward(rng.choice(ROUTES), SOURCES.index("fresh"), 0, True))
        for _ in range(rng.randint(4, 11)):
            (kind,) = self.choose(Step)
            kind.generate(self)

        def layers(count):
            return tuple(rng.choices(list(LAYERS), WEIGHTS, k=count))

        self.program.layers = layers(rng.randint(1, 4)), layers(rng.randint(1, 2)), layers(rng.randint(1, 2))
        self.program.optimizers = tuple(rng.choices(list(OPTIMIZERS), k=rng.choice((1, 1, 2))))
        self.program.frozen = rng.random() < 0.5
        return self.program


@dataclass
class Graph:
    output: torch.Tensor
    input: torch.Tensor
    values: list[torch.Tensor] = field(default_factory=list)


class Run(engine.Run):
    """What the program has built. `stopped` is the step at which a value was refused, with the error."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.graphs: list[Graph] = []
        self.skipped: list[int] = []
        self.stopped: engine.Refused | None = None
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

    def graph(self, of: int) -> Graph | None:
        return self.graphs[-1 - of % len(self.graphs)] if self.graphs else None

    def run(self, stop: int | None = None) -> Run:
        for index in range(len(self.program.steps[:stop])):
            torch.default_generator.manual_seed(index)  # torch.manual_seed asks for every kind of device
            refused = self.step(index)
            if refused is None:
                continue
            if isinstance(refused.error, HazardError) or of_an_overwritten_value(refused):
                self.stopped = refused
                break
            # Refused by torch for another reason: a leaf that is written, a graph that is gone.
            self.skipped.append(index)
        return self


class Step(engine.Step):
    """What it refers to is there, whatever steps are left out: `of` and `other` are taken modulo what there is."""

    name: str
    of: int
    other: int
    flag: bool

    names: ClassVar[tuple[str, ...]] = ("",)
    # What correct programs do to parameters and buffers, and may do while graphs are kept: guard may not stop it.
    updates: ClassVar[bool] = True
    latest: ClassVar[float] = 0.0  # how often it is the latest graph that is meant

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        of, other, flag = rng.randrange(1000), rng.randrange(1000), rng.random() < 0.5
        if cls.latest and rng.random() < cls.latest:
            of = 0
        generator.add(cls(rng.choice(cls.names), of, other, flag))


class Forward(Step):
    names = ROUTES
    weight = 7
    updates = False

    def run(self, run):
        for module in run.modules:
            module.train(self.flag)
        x = self.source(run)
        run.values = []
        h = run.target(x) if self.name == "target" else run.trunk(x)
        outputs = {
            "trunk": lambda: [h],
            "target": lambda: [h],
            "one head": lambda: [run.heads[0](h)],
            "two heads": lambda: [run.heads[0](h), run.heads[1](h)],
            "target of trunk": lambda: [run.target(h)],
        }[self.name]()
        run.graphs += [Graph(output, x, run.values) for output in outputs]

    def source(self, run):
        source = SOURCES[self.of % len(SOURCES)]
        x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
        if source == "leaf":
            return x.requires_grad_()
        if source == "fresh" or not run.graphs or run.graphs[-1].output.dim() != 2:
            return x
        last = run.graphs[-1].output
        return last.detach() if "detached" in source else last


class Backward(Step):
    weight = 7
    updates = False
    latest = 0.5

    def run(self, run):
        graph = run.graph(self.of)
        if graph:
            graph.output.square().mean().backward(retain_graph=self.flag)


class Penalty(Step):
    weight = 1
    updates = False

    def run(self, run):
        graph = run.graph(self.of)
        if graph:
            loss = graph.output.square().sum()
            (gradient,) = torch.autograd.grad(loss, graph.values[0], create_graph=True, allow_unused=True)
            if gradient is not None:
                run.graphs.append(Graph(gradient.square().sum(), graph.input, graph.values))


class OptimizerStep(Step):
    weight = 4

    def run(self, run):
        run.optimizers[self.of % len(run.optimizers)].step()


class Average(Step):
    names = tuple(AVERAGES)
    weight = 2

    def run(self, run):
        AVERAGES[self.name](run.target, run.trunk)


class Clamp(Step):
    names = ("data", "no_grad", "foreach")
    weight = 1

    def run(self, run):
        for p in run.modules[self.of % 4].parameters():
            bound = float(p.detach().min()) - 0.125  # every element is written with another value
            if self.name == "data":
                p.data.clamp_(max=bound)
                continue
            with torch.no_grad():
                if self.name == "no_grad":
                    p.clamp_(max=bound)
                else:
                    torch._foreach_clamp_max_([p], bound)


class Write(Step):
    names = tuple(WAYS)
    weight = 4
    updates = False

    def run(self, run):
        graph = run.graph(self.of)
        if graph and graph.values:
            value = graph.values[self.other % len(graph.values)]
            views = [None, None, *VIEWS]
            view = views[self.other // 7 % len(views)]
            WAYS[self.name](value if view is None else VIEWS[view](value))


class Input(Step):
    names = tuple(WAYS)
    weight = 1
    updates = False

    def run(self, run):
        graph = run.graph(self.of)
        if graph:
            WAYS[self.name](graph.input)


class Buffer(Step):
    names = tuple(WAYS)
    weight = 1

    def run(self, run):
        for buffer in run.modules[self.of % 4].buffers():
            if buffer.is_floating_point():
                WAYS[self.name](buffer)


class Drop(Step):
    weight = 1
    updates = False

    def run(self, run):
        if run.graphs:
            del run.graphs[-1 - self.of % len(run.graphs)]
            run.values = []


class Load(Step):
    weight = 1

    def run(self, run):
        run.target.load_state_dict({name: value + 0.01 for name, value in run.trunk.state_dict().items()})


class Zero(Step):
    weight = 1
    updates = False

    def run(self, run):
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=self.flag)

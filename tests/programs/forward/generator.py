"""How the programs of the differential test are made of its steps."""

from __future__ import annotations

import torch

from .. import engine
from ..engine import Var
from ..machines import TensorProgram
from .passes import Backward
from .steps import Leaf, Step, Unary, Write

SHAPES = [(2, 3), (3,), (3, 3), (2, 2, 3), (), (1, 3), (4, 2), (2, 1, 2), (0, 3)]
SHAPE_WEIGHTS = [6, 3, 4, 3, 1, 1, 2, 1, 1]


class Generator(engine.Generator):
    def start(self, name):
        return TensorProgram(name, dtype=torch.float32 if self.rng.random() < 0.1 else torch.float64)

    def generate(self):
        rng = self.rng
        shape = rng.choices(SHAPES, SHAPE_WEIGHTS)[0]
        first = Leaf.generate(self, shape, rng.random() < 0.85)
        Leaf.generate(self, shape[-1:], rng.random() < 0.7)
        if rng.random() < 0.5:
            Leaf.generate(self, rng.choice([(), (1,), shape]), rng.random() < 0.7)
        Unary.generate(self, first, rng.choice(["clone", "neg", "sin", "sigmoid"]))
        for kind in self.choose(Step, rng.randint(3, 11)):
            kind.generate(self)
        if not any(isinstance(step, Write) for step in self.program.steps):
            Write.generate(self)
        Backward.generate(self)
        return self.program

    def written(self, target, operands, no_grad=False):
        """Everything that shares the memory may require grad now."""
        if no_grad or not any(self.known[o].requires_grad for o in operands if isinstance(o, Var)):
            return
        memory = self.known[target].memory
        for v in self.known.values():
            if v.memory is memory:
                v.leaf &= v.requires_grad
                v.requires_grad = True

    def target(self, no_grad=False):
        """A written leaf that requires grad is refused: now and then, to see it refused."""
        careless = self.rng.random() < 0.02
        return self.pick(lambda v: careless or no_grad or not (v.leaf and v.requires_grad))

    def differentiable(self):
        return self.pick(lambda v: v.requires_grad)

    def trained(self):
        return self.pick(lambda v: v.leaf and v.requires_grad)

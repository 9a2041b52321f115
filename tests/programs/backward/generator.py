"""How the programs of the test of backward are made of its steps."""

from __future__ import annotations

import torch

from .. import engine
from ..machines import TensorProgram
from .hooks import Hook, MultiHook, NodeHook, PostAccumulate, RetainGrad
from .passes import Backward, Batched, Grad, GradAssign, GradHold, GradNone, GradScale, GradZero, Update
from .steps import Given, Leaf, Op, Passing, Producer, View

SHAPES = [(2, 3), (4,), (2, 2), (1, 3), (2, 1, 2), ()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
DTYPE_WEIGHTS = [12, 3, 2, 2, 1]


class Generator(engine.Generator):
    latest = 0.5

    def start(self, name):
        self.recent = []  # what the program works with, last used last
        (dtype,) = self.rng.choices(DTYPES, DTYPE_WEIGHTS)
        return TensorProgram(name, dtype=dtype)

    def add(self, step, known=None):
        var = super().add(step, known)
        if var is not None:
            self.recent.append(var)
        return var

    def candidates(self):
        return self.recent

    def generate(self):
        rng = self.rng
        shape = rng.choice(SHAPES)
        for size in (shape, shape, shape[-1:], rng.choice([(), shape, (1,)])):
            Leaf.generate(self, size, rng.random() < 0.8)
        for _ in range(rng.randint(0, 2)):
            Given.generate(self, shape)
        if rng.random() < 0.3:
            self.watch_leaf()
        for _ in range(rng.randint(1, 2)):
            # a block again is a loop's next step: the same choices, over variables of its own
            outside, state = list(self.recent), rng.getstate()
            for _ in range(rng.choice([1, 1, 2, 3])):
                rng.setstate(state)
                self.recent = self.still_leaves(outside)
                self.block()
            self.recent = self.still_leaves(outside)
        return self.program

    def still_leaves(self, variables):
        """Less the frozen ones that were written: they belong to a graph that is gone."""
        return [var for var in variables if self.known[var].leaf or not self.known[var].requires_grad]

    def block(self):
        rng = self.rng
        if not self.recent:
            Leaf.generate(self, (2, 3), True)
        for _ in range(rng.randint(0, 3)):
            (action,) = rng.choices([self.forward, self.op, self.watch], [4, 5, 1.5])
            action()
        self.op()
        if rng.random() < 0.6:
            rng.choice([lambda: Passing.generate(self), lambda: View.generate(self), self.forward])()
        if rng.random() < 0.3:
            self.watch()
        count = rng.choice([1, 1, 1, 2, 3])
        for number in range(count):
            retain = rng.random() < (0.97 if number < count - 1 else 0.1)
            (kind,) = rng.choices([Backward, Grad, Batched], [6, 2, 0.3])
            kind.generate(self, retain)
            if rng.random() < 0.4:
                self.between()

    def forward(self):
        (kind,) = self.choose(Producer)
        kind.generate(self)

    def op(self):
        Op.generate(self)

    def watch(self):
        kind = self.rng.choice([Hook, Hook, Hook, NodeHook, RetainGrad, MultiHook])
        source = self.pick(lambda v: v.requires_grad and not v.leaf and self.on_the_way(v))
        if source is not None:
            kind.generate(self, source)
            self.leave(source)

    def leave(self, hooked):
        """A view that is written after it was hooked has another node; that of before is passed by the ideal ops alone."""
        viewed = self.known[hooked].viewed
        for v in self.known.values():
            if viewed is not None and v.viewed == viewed:
                v.writable = False

    def watch_leaf(self):
        leaf = self.trained()
        if leaf is not None:
            (Hook if self.rng.random() < 0.5 else PostAccumulate).generate(self, leaf)

    def between(self):
        leaf = self.trained()
        if leaf is None:
            return
        kind = self.rng.choice([GradZero, GradNone, GradScale, GradAssign, GradHold, Update, None])
        if kind is None:
            self.watch_leaf()
        else:
            kind.generate(self, leaf)

    # What a step takes

    def source(self):
        found = self.pick(lambda v: v.writable) if self.rng.random() < 0.97 else None
        return found or self.pick()

    def pair(self):
        a = self.source()
        b = self.pick(lambda v: v.shape == self.known[a].shape)
        return a, b, self.known[a].requires_grad or self.known[b].requires_grad

    def differentiable(self):
        return self.pick(lambda v: v.requires_grad and not v.leaf)

    def trained(self):
        return self.pick(lambda v: v.requires_grad and v.leaf)

    def on_the_way(self, v):
        """A private view that is viewed in its turn, and one of the two written, lies beside the way to the other: both lead to a
        base that the reference has not."""
        private = v.viewed is not None and self.known[v.viewed] is v
        return not private or sum(other.viewed == v.viewed for other in self.known.values()) == 1

    def gathering(self):
        return self.pick(lambda v: v.requires_grad and self.on_the_way(v))

    def inputs(self):
        chosen = {self.trained(), self.trained(), self.gathering()}
        return tuple(sorted(var for var in chosen if var is not None))

    def given(self, found):
        """Nobody writes it from now on: who keeps a gradient that was handed on as it came would see that."""
        base = self.known[found].viewed or found
        for var, v in self.known.items():
            if base in (var, v.viewed):
                v.writable = False
        return found

    def gradient(self, source):
        shape = self.known[source].shape
        if self.rng.random() < 0.5:
            found = self.pick(lambda v: v.shape == shape and not v.writable and not v.requires_grad)
            if found is not None:
                return self.given(found)
        if self.rng.random() < 0.1:
            # Not a leaf, which an update writes.
            found = self.pick(lambda v: v.shape == shape and not v.leaf)
            if found is not None:
                return self.given(found)
        return Given.generate(self, shape)

"""The steps of backward: what watches it, its passes, and a gradient between them."""

from __future__ import annotations

import torch

from ..engine import Var
from ..tensors import values
from .steps import Known, Producer, Step


class Watch(Step):
    source: Var
    kind: str

    weight = 0.5

    @classmethod
    def generate(cls, generator):
        source = generator.differentiable()
        if source is not None:
            generator.add(cls(source, generator.rng.choice(["hook", "retain_grad"])))

    def run(self, run):
        tensor = run.refreshed(self.source)
        if self.kind == "retain_grad":
            tensor.retain_grad()
        else:
            run.hooked.setdefault(self.source, tensor._version)
            tensor.register_hook(lambda grad: run.seen.append((grad, grad.detach().clone())))

    def reference(self, run):
        """What is watched is compared with torch alone."""


def weight_of(tensor, offset):
    return values(tensor.shape, offset % 2000, tensor.dtype)


LOSSES = {
    "sum": lambda t, offset: t.sum(),
    "weighted": lambda t, offset: (t * weight_of(t, offset)).sum(),
    "sin": lambda t, offset: t.sin().sum(),
    "given": lambda t, offset: t,
    "two": lambda t, offset: (t * weight_of(t, offset)).sum() + (t * 0.5).sum(),
}


def differentiate(tensor, kind, offset, backward):
    """Calls with a loss and the gradient given for it, which nobody may write."""
    given = weight_of(tensor, offset) if kind == "given" else None
    result = backward(LOSSES[kind](tensor, offset), given)
    if given is not None and not torch.equal(given, weight_of(tensor, offset)):
        raise AssertionError("the caller's gradient was written")
    return result


class Backward(Step):
    source: Var
    loss: str
    offset: int
    retain_graph: bool

    weight = 0.7

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        source = generator.differentiable()
        if source is not None:
            loss = rng.choice(["sum", "weighted", "weighted", "sin", "given", "two"])
            generator.add(cls(source, loss, rng.randrange(4000), rng.random() < 0.5))

    def run(self, run, keep=False):
        retain_graph = self.retain_graph or keep
        differentiate(
            run[self.source], self.loss, self.offset, lambda loss, given: loss.backward(given, retain_graph=retain_graph)
        )

    def reference(self, run):
        # its graphs save more than torch's: what is still there is for torch to say
        self.run(run, keep=True)


class Grad(Producer):
    source: Var
    wrt: Var
    loss: str
    offset: int
    create_graph: bool
    retain_graph: bool

    weight = 0.5

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        source, wrt = generator.differentiable(), generator.trained()
        if source is None or wrt is None:
            return
        create_graph = rng.random() < 0.5
        loss = rng.choice(["weighted", "sin", "given"])
        step = cls(source, wrt, loss, rng.randrange(4000), create_graph, rng.random() < 0.7)
        # a gradient's strides and its sharing of memory with others are torch's business
        return generator.add(step, Known(generator.known[wrt].shape, create_graph, contiguous=False))

    def run(self, run, keep=False):
        (grad,) = differentiate(
            run[self.source],
            self.loss,
            self.offset,
            lambda loss, given: torch.autograd.grad(
                loss,
                run.leaves[self.wrt],
                given,
                create_graph=self.create_graph,
                retain_graph=self.create_graph or self.retain_graph or keep,
                allow_unused=True,
                materialize_grads=True,
            ),
        )
        # torch may hand out the caller's own tensor, or a view of it
        return grad * 1

    def reference(self, run):
        return self.run(run, keep=True)


class GradWrite(Step):
    leaf: Var

    weight = 0.3

    @classmethod
    def generate(cls, generator):
        leaf = generator.trained()
        if leaf is not None:
            generator.add(cls(leaf))

    def run(self, run):
        grad = run.leaves[self.leaf].grad
        if grad is not None:
            with torch.no_grad():
                grad.mul_(0.5)

    reference = run

"""The steps of backward, and what happens to a leaf's gradient between them."""

from __future__ import annotations

import warnings
from abc import abstractmethod

import torch

from .. import engine
from ..engine import Var
from ..tensors import share_storage, values
from .steps import Building, Known, Step

LOSSES = ["given", "given", "given", "given", "sum", "thrice", "weighted", "twice"]


class Backward(Step):
    source: Var
    loss: str
    given: Var
    retain_graph: bool
    create_graph: bool
    inputs: tuple | None

    @classmethod
    def generate(cls, generator, retain):
        rng = generator.rng
        source = generator.differentiable()
        if source is None:
            return
        loss = rng.choice(LOSSES)
        given = generator.gradient(source)
        if rng.random() < 0.04:
            loss = "of_grad"
            shape = generator.known[source].shape
            given = generator.pick(lambda v: v.leaf and v.requires_grad and v.shape == shape) or given
        inputs = None
        if rng.random() < 0.15:
            inputs = (generator.gathering(), generator.trained())
            inputs = tuple(sorted({i for i in inputs if i is not None}))
        create = rng.random() < 0.08
        if rng.random() < 0.3:
            # the same graph once before
            before = given if rng.random() < 0.5 else generator.gradient(source)
            generator.add(cls(source, loss, before, True, False, inputs))
        generator.add(cls(source, loss, given, retain, create, inputs))

    def run(self, run):
        tensor = run[self.source]
        if not tensor.requires_grad:
            return
        tensor, gradient = self.objective(run, tensor, run[self.given])
        inputs = None if self.inputs is None else run.operands(self.inputs)
        with warnings.catch_warnings():
            # of a parameter and its gradient's graph that keep one another
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
            retain_graph = self.retain_graph or self.create_graph
            tensor.backward(gradient, retain_graph=retain_graph, create_graph=self.create_graph, inputs=inputs)

    def objective(self, run, tensor, given):
        if self.loss == "of_grad":
            given = given.detach() if not given.is_leaf or given.grad is None else given.grad
            if accumulates_into(tensor, given):
                given = given.detach().clone()
            run.grads_were_given = True
        if self.loss in ("given", "of_grad"):
            return tensor, run.give(given)
        if self.loss == "twice":
            tensor = tensor.view_as(tensor) + tensor
        elif self.loss != "sum":
            tensor = tensor * (3.0 if self.loss == "thrice" else given.detach())
        tensor = tensor.sum()
        return tensor, torch.ones_like(tensor)


def accumulates_into(tensor, grad):
    """Whether the backward of the tensor writes the gradient: torch's nodes would read what was added to it."""
    seen, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        of_checkpoint = "Checkpoint" in type(node).__name__  # its nodes are not there yet
        if of_checkpoint or (variable is not None and variable.grad is not None and share_storage(variable.grad, grad)):
            return True
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return False


class Grad(Step, engine.Producer):
    source: Var
    inputs: tuple
    given: Var
    retain_graph: bool
    create_graph: bool

    @classmethod
    def generate(cls, generator, retain):
        rng = generator.rng
        source, inputs = generator.differentiable(), generator.inputs()
        if source is None or not inputs:
            return
        create = rng.random() < 0.5
        step = cls(source, inputs, generator.gradient(source), retain, create)
        first = generator.add(step, Known(generator.known[inputs[0]].shape, create, writable=False))
        if create and rng.random() < 0.7:
            second = generator.gradient(first)
            generator.add(Backward(first, rng.choice(LOSSES), second, retain, False, None))

    def run(self, run):
        source, inputs = run[self.source], run.operands(self.inputs)
        if not source.requires_grad:
            return torch.zeros_like(inputs[0])
        grads = torch.autograd.grad(
            source,
            inputs,
            run.give(run[self.given]),
            retain_graph=self.retain_graph or self.create_graph,
            create_graph=self.create_graph,
            allow_unused=True,
        )
        run.returns(grads)
        first = torch.zeros_like(inputs[0]) if grads[0] is None else grads[0]
        # Of its own: what was given may come back as it is from one run's nodes, and copied from another's.
        return first.clone()


class Batched(Step):
    source: Var
    inputs: tuple
    offset: int

    @classmethod
    def generate(cls, generator, retain):
        source, inputs = generator.differentiable(), generator.inputs()
        if source is not None and inputs:
            generator.add(cls(source, inputs, generator.rng.randrange(4000)))

    def run(self, run):
        tensor = run[self.source]
        if not tensor.requires_grad or any(v.retains_grad and not v.is_leaf for v in run.variables):
            return  # torch would leave a tensor of vmap's where a gradient is retained
        given = values((2, *tensor.shape), self.offset, run.program.dtype).to(tensor.dtype)
        run.vectorized = True
        try:
            grads = torch.autograd.grad(
                tensor, run.operands(self.inputs), given, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        finally:
            run.vectorized = False
        run.returns(grads)


class OfGrad(Step):
    """Something that is done to the gradient of a leaf, where it has one."""

    leaf: Var

    @classmethod
    def generate(cls, generator, leaf):
        generator.add(cls(leaf))

    def run(self, run):
        leaf = run[self.leaf]
        if leaf.grad is not None:
            with torch.no_grad():
                self.change(run, leaf)

    @abstractmethod
    def change(self, run, leaf): ...


class GradZero(OfGrad):
    def change(self, run, leaf):
        leaf.grad.zero_()


class GradNone(OfGrad):
    def change(self, run, leaf):
        leaf.grad = None


class GradScale(OfGrad):
    def change(self, run, leaf):
        leaf.grad.mul_(0.5)


class Update(OfGrad):
    def change(self, run, leaf):
        leaf.add_(leaf.grad, alpha=-0.25)


class GradHold(Building, OfGrad):
    def change(self, run, leaf):
        run.stash(("grad_hold", run.index), leaf.grad, alias=True)


class GradAssign(Step):
    leaf: Var
    other: Var

    @classmethod
    def generate(cls, generator, leaf):
        shape = generator.known[leaf].shape
        generator.add(cls(leaf, generator.pick(lambda v: v.leaf and v.requires_grad and v.shape == shape)))

    def run(self, run):
        leaf, other = run[self.leaf], run[self.other]
        # Two leaves with one `.grad`, of which a hook changes it: what comes of that depends on the engine's order.
        hooked = leaf._post_accumulate_grad_hooks or other._post_accumulate_grad_hooks
        leaf.grad = other.grad.clone() if hooked and other.grad is not None else other.grad

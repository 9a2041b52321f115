"""The steps that watch a gradient on its way, keep it, and put another in its place."""

from __future__ import annotations

import torch

from ..engine import Var
from ..tensors import values
from .steps import Building

HOOKS = ["see", "see", "view", "flat", "detach", "same", "new", "view_back", "fixed", "fixed_view", "previous"]


class Hook(Building):
    source: Var
    kind: str
    offset: int

    @classmethod
    def generate(cls, generator, source):
        kind = generator.rng.choice(HOOKS)
        if generator.known[source].leaf and kind in ("view", "flat", "detach"):
            # A leaf takes over a gradient of which its hook has kept an alias, whoever made it: not an op's to prevent.
            kind = "see"
        generator.add(cls(source, kind, generator.rng.randrange(4000)))

    def run(self, run):
        label = ("hook", run.index)
        run.refreshed(self.source).register_hook(lambda grad: self.see(run, label, grad))

    def see(self, run, label, grad):
        kind = self.kind
        if run.vectorized or kind == "same":
            return grad
        if kind == "new":
            return grad * 2
        if kind == "view_back":
            return grad.view_as(grad)
        if kind.startswith("fixed"):
            if label not in run.previous:
                run.previous[label] = values(grad.shape, self.offset, run.program.dtype).to(grad.dtype)
                run.stash(label, run.previous[label])
            fixed = run.previous[label]
            return run.give(fixed.view_as(fixed) if kind == "fixed_view" else fixed)
        seen = {"view": lambda: grad[...], "flat": lambda: grad.reshape(-1), "detach": grad.detach}.get(kind, lambda: grad)()
        stashed = run.stash(label, seen)
        if kind == "previous":
            previous, run.previous[label] = run.previous.get(label), stashed
            return None if previous is None else run.give(previous)
        return None


class NodeHook(Building):
    source: Var
    kind: str

    @classmethod
    def generate(cls, generator, source):
        generator.add(cls(source, generator.rng.choice(["pre", "pre_view", "pre_new", "post"])))

    def run(self, run):
        label = ("node_hook", run.index)
        node = run.refreshed(self.source).grad_fn

        def pre(grads):
            if run.vectorized or grads[0] is None:
                return None
            run.stash(label, grads[0])
            replaced = {"pre_view": lambda g: g.view_as(g), "pre_new": lambda g: g * 2}.get(self.kind)
            return None if replaced is None else (replaced(grads[0]), *grads[1:])

        def post(grad_inputs, grad_outputs):
            for grad in (*grad_inputs, *grad_outputs):
                if grad is not None and not run.vectorized:
                    # What the node made: a leaf behind a view of torch's takes it over all the same.
                    run.stash(label, grad, alias=any(grad is made for made in grad_inputs), compared=False)

        if node is not None:
            node.register_hook(post) if self.kind == "post" else node.register_prehook(pre)


class RetainGrad(Building):
    source: Var

    @classmethod
    def generate(cls, generator, source):
        generator.add(cls(source))

    def run(self, run):
        run.refreshed(self.source).retain_grad()


class MultiHook(Building):
    sources: tuple

    @classmethod
    def generate(cls, generator, source):
        other = generator.gathering()
        generator.add(cls(tuple(sorted({source, other}))))
        generator.leave(other)

    def run(self, run):
        label = ("multi_hook", run.index)

        def hook(grads):
            for position, grad in enumerate(grads):
                if grad is not None and not run.vectorized:
                    run.stash((*label, position), grad)

        tensors = [run.refreshed(s) for s in self.sources]
        torch.autograd.graph.register_multi_grad_hook([t for t in tensors if t.requires_grad], hook)


class PostAccumulate(Building):
    leaf: Var
    kind: str

    @classmethod
    def generate(cls, generator, leaf):
        generator.add(cls(leaf, generator.rng.choice(["hold", "scale", "take"])))

    def run(self, run):
        label = ("post_accumulate", run.index)

        def hook(parameter):
            if parameter.grad is None:
                return  # taken by another hook
            if self.kind == "scale":
                with torch.no_grad():
                    parameter.grad.mul_(0.5)
                return
            run.stash(label, parameter.grad, alias=True)
            if self.kind == "take":
                parameter.grad = None

        run[self.leaf].register_post_accumulate_grad_hook(hook)

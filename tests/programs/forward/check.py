"""The judge of the differential test."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..engine import Disagreement, Fuzz
from ..machines import ByOurs, ByTorch, Functional, TensorRun, Unsupported
from ..tensors import largest, retained_grad
from . import __doc__ as description
from .generator import Generator
from .passes import Backward, Grad
from .steps import Step


class Watched(TensorRun):
    def __init__(self, program):
        super().__init__(program)
        self.seen = []  # by hooks: the gradient, and a copy of it
        self.hooked = {}  # each variable with a hook, and its version when it got the first

    def result(self):
        """Values of all variables, and gradients of the leaves."""
        return self.variables, gradients(self)


class Ours(ByOurs, Watched):
    pass


class Torch(ByTorch, Watched):
    pass


class Reference(Functional):
    def result(self):
        return [self.read(place) for place in self.variables], gradients(self)


def gradients(run):
    return [leaf.grad if leaf.is_leaf else None for leaf in run.leaves.values()]


def close(actual, expected, tolerance):
    if actual is None or expected is None:
        return actual is expected
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    actual, expected = actual.detach(), expected.detach()
    if torch.equal(actual, expected):
        return True
    error = (actual - expected).abs().max()
    # NaN where something overflowed: it may do so one step earlier or later
    return bool(error <= tolerance) or not expected.isfinite().all()


def scale(run) -> float:
    """That of a run's rounding errors: they are amplified with what it computes."""
    values, grads = run.result()
    return max([1.0, *(largest(t) for t in (*values, *grads) if t is not None)])


def amplified(run) -> float:
    """What a rounding of the leaves becomes in a run: the sine of a large value, say, makes it larger than any bound on
    the values' own size tells."""
    nudged = replace(run.program, nudge=4 * torch.finfo(run.program.dtype).eps)
    moved = type(run)(nudged).run(run.stop).result()
    pairs = [(a, e) for got, want in zip(run.result(), moved, strict=True) for a, e in zip(got, want, strict=True)]
    return max(largest(a.detach() - e.detach()) for a, e in pairs if a is not None)


def compare(first, second, what, hooks=True):
    """Raises Disagreement where a value, a gradient or what a hook saw is not the same but for rounding."""
    rtol = 1e-3 if second.program.dtype == torch.float32 else 1e-8
    try:
        compare_within(rtol * scale(second), first, second, what, hooks)
    except Disagreement:
        compare_within(16 * amplified(second), first, second, what, hooks)


def compare_within(tolerance, first, second, what, hooks):
    compare_results(tolerance, first, second, what, hooks)
    keeps_what_hooks_hold(first, what)
    if hooks and not second.extra_nodes and not sees_what_passes_by_the_base(first, second):
        compare_hooks(tolerance, first, second, what)


def compare_results(tolerance, first, second, what, hooks):
    for kind, ours, theirs in zip(("v", "gradient of leaf "), first.result(), second.result(), strict=True):
        if len(ours) != len(theirs):
            raise Disagreement(f"{what}: {len(ours)} {kind} instead of {len(theirs)}")
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not close(a, b, tolerance):
                raise Disagreement(f"{what}: {kind}{index} is\n{a}\ninstead of\n{b}")
            if hooks and kind == "v" and a.requires_grad != b.requires_grad:
                # Through its own write to a view of no elements torch loses the history of the gradient.
                if a.requires_grad and a.numel() == 0:
                    continue
                raise Disagreement(f"{what}: v{index}.requires_grad is {a.requires_grad}")


def keeps_what_hooks_hold(run, what):
    # Of a gradient that a hook holds torch makes the leaf's, and adds to that in place, if a view lies in between.
    accumulated = {g.untyped_storage().data_ptr() for g in gradients(run) if g is not None}
    for held, copied in run.seen:
        written = not torch.equal(held.detach(), copied) and not copied.isnan().any()
        if written and held.untyped_storage().data_ptr() not in accumulated:
            raise Disagreement(f"{what}: a gradient that a hook holds was written")


def sees_what_passes_by_the_base(ours, theirs):
    """A write after a hook takes the gradient of a view through its base: the hook of the view sees the rest only. Ours is
    a tensor of its own by then, and all its gradient is seen."""
    return any(
        theirs[var]._is_view() and not ours[var]._is_view() and theirs[var]._version != version
        for var, version in theirs.hooked.items()
    )


def compare_hooks(tolerance, first, second, what):
    if len(first.seen) != len(second.seen):
        raise Disagreement(f"{what}: hooks ran {len(first.seen)} times instead of {len(second.seen)}")
    for (_, a), (_, b) in zip(first.seen, second.seen, strict=True):
        if not close(a, b, tolerance):
            raise Disagreement(f"{what}: a hook saw\n{a}\ninstead of\n{b}")
    for index, (a, b) in enumerate(zip(first.variables, second.variables, strict=True)):
        a, b = retained_grad(a), retained_grad(b)
        if not close(a, b, tolerance):
            raise Disagreement(f"{what}: the retained gradient of v{index} is\n{a}\nnot\n{b}")


def keeping_graphs(program):
    """The same program, with `retain_graph` wherever it walks a graph."""
    steps = [replace(s, retain_graph=True) if isinstance(s, Backward | Grad) else s for s in program.steps]
    return replace(program, steps=steps)


def check(program, functions=None) -> str:
    """How the program ended; raises Disagreement where it may not end so."""
    ours, theirs = Ours(program, functions).run(), Torch(program).run()
    refused, refused_by_torch = ours.refused, theirs.refused
    if refused_by_torch is None:
        return finishes(ours, theirs, functions)
    if refused is not None and refused.step == refused_by_torch.step:
        return "both refuse"
    if refused is not None and refused.step < refused_by_torch.step:
        raise Disagreement(f"ours refuses step {refused.step}, torch step {refused_by_torch.step}: {refused.error}")
    stop = None if refused is None else refused.step
    try:
        reference = Reference(program).run(stop)
    except Unsupported:
        return "only torch refuses, no reference"
    words = f"torch refuses step {refused_by_torch.step}: {refused_by_torch.error}; ours"
    if reference.refused is not None:
        step, error = reference.refused.step, reference.refused.error
        raise Disagreement(f"{words} goes on; the reference cannot do step {step}: {error}")
    if stop is not None:
        # what our own refused step left unfinished has no counterpart
        ours = Ours(program, functions).run(stop)
    compare(ours, reference, words, False)
    return "only torch refuses"


def finishes(ours, theirs, functions):
    """Where torch does."""
    program, refused = ours.program, ours.refused
    if refused is not None and "backward through the graph a second time" in str(refused.error):
        kept = keeping_graphs(program)
        if kept.steps != program.steps and check(kept, functions) == "agree":
            return "a fused form's one node was freed where torch's two were half used"
    if refused is not None:
        raise Disagreement(f"torch finishes; ours refuses step {refused.step}: {refused.error}")
    compare(ours, theirs, "ours against torch")
    try:
        reference = Reference(program).run()
    except Unsupported:
        return "agree"
    if reference.refused is not None:
        raise Disagreement(f"torch finishes; the reference cannot do step {reference.refused.step}: {reference.refused.error}")
    compare(theirs, reference, "torch against reference", False)
    return "agree"


FUZZ = Fuzz("forward", description.split("\n")[0], Step, lambda name: Generator(name).generate(), check)

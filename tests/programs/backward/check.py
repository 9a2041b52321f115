"""The judge of the test of backward."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..engine import Disagreement, Fuzz
from ..tensors import flat, largest
from . import __doc__ as description
from .generator import Generator
from .runs import Ideal, Ours, Reference, Torch
from .steps import Step


class Expected:
    """What the reference shows after a step."""

    def __init__(self, reference):
        self.program, self.index = reference.program, reference.index
        self.tensors = {label: tensor.detach() for label, tensor in reference.visible().items()}
        self.values = flat(self.tensors.values())
        self.scale = max(1.0, largest(self.values[self.values.isfinite()]))
        self.eps = torch.finfo(self.program.dtype).eps

    def rounding(self):
        """What a rounding of the leaves becomes in each tensor."""
        moved = Reference(replace(self.program, nudge=4 * self.eps)).run(self.index + 1).visible()
        return {k: largest(moved[k].detach() - t) if k in moved else 0.0 for k, t in self.tensors.items()}

    def unequal(self, tensors, allowed):
        for label in sorted(tensors.keys() | self.tensors.keys(), key=str):
            a, b = tensors.get(label), self.tensors.get(label)
            if a is None or b is None or a.shape != b.shape:
                return label
            # NaN where something overflowed: it may do so one step earlier or later
            if b.isfinite().all() and not largest(a.detach() - b) <= allowed(label):
                return label
        return None

    def compare(self, run):
        """Raises Disagreement where a tensor is not the same but for rounding."""
        tensors = run.visible()
        tolerance = 32 * self.eps * self.scale
        shapes = [{label: t.shape for label, t in those.items()} for those in (tensors, self.tensors)]
        if shapes[0] == shapes[1] and largest(flat(tensors[label] for label in self.tensors) - self.values) <= tolerance:
            return
        label = self.unequal(tensors, lambda label: tolerance)
        if label is not None:
            rounding = self.rounding()
            label = self.unequal(tensors, lambda label: tolerance + 32 * rounding[label])
        if label is not None:
            ours, theirs = tensors.get(label), self.tensors.get(label)
            raise Disagreement(f"after step {self.index}: {label} is\n{ours}\ninstead of\n{theirs}")


def judge(ours, ideal, expected, torchs):
    expected.compare(ours)
    label = ours.overwritten()
    if label is not None:
        raise Disagreement(f"after step {ours.index}: what {label} kept was written")
    pairs = ours.shared() - ideal.shared()
    if pairs:
        known = torchs.visible().keys() if torchs else set()
        allowed = torchs.shared() if torchs else set()
    # Through a recorded gradient torch's own nodes lead, and no op may be on the way.
    recorded = any(getattr(step, "create_graph", False) for step in ours.program.steps[: ours.index])
    for pair in pairs:
        of_leaf = any(label[0] == "grad" for label in pair)
        if (of_leaf and not (recorded and pair in allowed)) or (pair <= known and pair not in allowed):
            raise Disagreement(f"after step {ours.index}: {sorted(map(str, pair))} share memory")


def is_right(ideal, expected):
    try:
        expected.compare(ideal)
    except Disagreement:
        return False
    return ideal.overwritten() is None


def check(program, functions=None) -> str:
    """How the program ended; raises Disagreement where it may not end so."""
    ours, ideal, reference, torchs = Ours(program, functions), Ideal(program), Reference(program), Torch(program)
    for index, step in enumerate(program.steps):
        refused = ours.step(index)
        impossible = [run.step(index) for run in (ideal, reference)]
        refused_by_torch = torchs.step(index) if torchs else None
        if refused is not None:
            if impossible == [None, None] and torchs and refused_by_torch is None:
                raise Disagreement(f"torch finishes; ours refuses step {index}: {refused.error}")
            return "refused"
        if impossible != [None, None]:
            return "no reference"
        if refused_by_torch is not None:
            torchs = None
        if not step.compared and index + 1 < len(program.steps):
            continue
        expected = Expected(reference)
        try:
            judge(ours, ideal, expected, torchs)
        except Disagreement:
            if is_right(ideal, expected):
                raise
        if not is_right(ideal, expected):
            return "wrong by torch's own nodes"
    return "agree"


FUZZ = Fuzz("backward", description.split("\n")[0], Step, lambda name: Generator(name).generate(), check)

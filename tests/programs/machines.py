"""The ways to run a program of tensors: by the ops under test, by torch, and by a reference that never writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..op_table import OPS
from .engine import Producer, Program, Run, Var
from .tensors import same_elements, share_storage, values


@dataclass
class TensorProgram(Program):
    dtype: torch.dtype = torch.float64
    nudge: float = 0.0  # relative, of the leaves' values

    def heading(self):
        return f"{self.name}, {self.dtype}"


class TensorRun(Run):
    def __init__(self, program):
        super().__init__(program)
        self.dtype = program.dtype
        self.leaves = {}

    def values(self, shape, offset):
        """Those of the program's dtype, in the run's."""
        return values(shape, offset, self.program.dtype).to(self.dtype)

    def leaf(self, shape, offset, requires_grad):
        leaf = self.values(shape, offset).mul_(1 + self.program.nudge).requires_grad_(requires_grad)
        self.leaves[Var(len(self.variables))] = leaf
        return leaf

    def operands(self, operands):
        return [self[o] if isinstance(o, Var) else o for o in operands]

    def refreshed(self, var):
        """torch's `register_hook` crashes on a view whose base was written, if nobody has asked for its new `grad_fn` yet."""
        tensor = self[var]
        assert tensor.grad_fn is not None or tensor.is_leaf
        return tensor


class Leaf(Producer):
    shape: tuple
    offset: int
    requires_grad: bool

    known: ClassVar[Any]  # what the fuzz's generator notes of a variable

    @classmethod
    def generate(cls, generator, shape, requires_grad):
        step = cls(shape, generator.rng.randrange(4000), requires_grad)
        return generator.add(step, cls.known(shape, requires_grad, leaf=True))

    def run(self, run):
        return run.leaf(self.shape, self.offset, self.requires_grad)


class ByOurs:
    """Writes by safe_inplace, or by other functions of its names."""

    def __init__(self, program, functions=None):
        super().__init__(program)
        self.functions = functions or {op.name: op.function for op in OPS}

    def write(self, op, target, operands, parameters):
        before, version = target.detach().clone(), target._version
        try:
            result = self.functions[op.name](target, *operands, **parameters)
        except RuntimeError:
            if not torch.equal(before, target.detach()) or target._version != version:
                raise AssertionError("refused after a byte or the version changed") from None
            raise
        if result is not target or target._version != version + 1:
            raise AssertionError("not the same object, one version later")


class ByTorch:
    """Writes by torch's own methods, one after the other for the fused forms; out of place and by `copy_` where an operand of
    a fused form shares the input's memory."""

    extra_nodes = False  # hooks set before them see what ours has no node for

    def write(self, op, target, operands, parameters):
        shared = [o for o in operands if isinstance(o, torch.Tensor) and share_storage(o, target)]
        native = op.torch_method and all(same_elements(target, o) for o in shared)
        if native or not shared:
            op.two_step(target, *operands, **parameters)
            return
        # For torch's refusals: to its in-place methods a view of what only now requires grad
        # is a leaf until somebody reads it, as the formula would.
        target.mul_(1)
        self.extra_nodes = True
        refuse_partial_overlap(target, shared)
        target.copy_(op.out_of_place(target, *operands, **parameters))


def refuse_partial_overlap(target, operands):
    """Torch's own refusal, tried on memory that autograd does not watch."""
    data = target.data
    before = data.clone()
    for operand in operands:
        data.add_(operand.data)
    data.copy_(before)


class Unsupported(Exception):
    """The functional reference has no meaning for this step."""


@dataclass(frozen=True)
class Place:
    """A variable where nothing is written: positions in the value of a family."""

    family: int
    positions: torch.Tensor
    whole: bool = False


class Functional(TensorRun):
    """Nothing is written: each memory has a value per autograd family of its views, and a view is positions in it.

    A family is the tensors that are differentiable views of one another; `detach` starts
    another one over the same memory. A write through a member makes the next value of its
    family; the other families, and all of them under `no_grad`, follow in value only.
    """

    def __init__(self, program):
        super().__init__(program)
        self.families = []  # [memory, value]

    def perform(self, step):
        return step.reference(self)

    def add(self, made):
        super().add(self.new_memory(made) if isinstance(made, torch.Tensor) else made)

    def new_memory(self, made):
        memory = len(self.families)
        self.families.append([memory, made.reshape(-1)])
        return Place(memory, torch.arange(made.numel()).view(made.shape), whole=True)

    def __getitem__(self, var):
        return self.read(self.place(var))

    def read(self, place):
        return self.families[place.family][1].take(place.positions)

    def place(self, var):
        return super().__getitem__(var)

    def view(self, var, function):
        return self.view_of(self.place(var), function)

    def view_of(self, place, function):
        return Place(place.family, function(place.positions))

    def detach(self, var):
        place = self.place(var)
        memory, value = self.families[place.family]
        self.families.append([memory, value.detach()])
        return Place(len(self.families) - 1, place.positions, place.whole)

    def assign(self, place, value, no_grad=False):
        positions = place.positions
        if positions.unique().numel() < positions.numel():
            raise Unsupported("torch's fill_ of an expanded view")
        if not place.whole and not positions.numel() and value.requires_grad:
            # A leaf that took part in it has a gradient of None in torch's second derivatives, in place, and one of 0 here.
            raise Unsupported("a write through an empty view")
        memory, old = self.families[place.family]
        value = value.to(old.dtype).expand(positions.shape)
        # Of a tensor that is written whole nothing is left, not even a graph to a gradient of 0: as in torch.
        new = old.clone().copy_(value.reshape(-1)) if place.whole else old.put(positions, value)
        for index, (other, current) in enumerate(self.families):
            if other != memory:
                continue
            if index == place.family and not no_grad:
                self.families[index][1] = new
            else:
                # gradients pass through as if the write had not been; exact in value
                self.families[index][1] = _with_value(current, new)


class _WithValue(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx, tensor, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _with_value(tensor, value):
    return _WithValue.apply(tensor, value.detach()) if tensor.requires_grad else value.detach()

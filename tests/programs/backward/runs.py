"""The four ways to run a program, and what a user can see of each."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch

from ..machines import ByOurs, ByTorch, TensorRun
from ..tensors import bytes_of, flat, retained_grad


@dataclass
class Stash:
    """A gradient that somebody keeps. `value`: what it was, where nobody may change it."""

    tensor: torch.Tensor
    value: torch.Tensor | None
    compared: bool = True


class User(TensorRun):
    """A run, and what the user's code in it does with the gradients that it sees, keeps and gives away."""

    def __init__(self, program):
        super().__init__(program)
        self.trained_leaves = set()
        self.stashes: dict[tuple, Stash] = {}
        self.returned = {}
        self.calls = Counter()
        self.previous = {}  # what a hook has kept for its next call
        self.vectorized = False
        self.grads_were_given = False

    def trained(self, tensor):
        self.trained_leaves.add(len(self.variables))
        return tensor.requires_grad_()

    def leaf(self, shape, offset, requires_grad):
        leaf = super().leaf(shape, offset, False)
        return self.trained(leaf) if requires_grad else leaf

    def stash(self, label, tensor, alias=False, compared=True):
        label = (*label, self.calls[label])
        self.calls[label[:-1]] += 1
        self.stashes[label] = Stash(tensor, None if alias else tensor.detach().clone(), compared)
        return tensor

    def private_view(self, tensor):
        """Of what no variable holds: to ours it becomes a tensor of its own, so it is one to the others."""
        return tensor

    def give(self, tensor):
        return tensor

    def returns(self, grads):
        self.returned |= {(self.index, p): g for p, g in enumerate(grads) if g is not None}

    def visible(self):
        """The tensors by their names, where the other runs must have the same."""
        tensors = {}
        for index, tensor in enumerate(self.variables):
            tensors["v", index] = tensor
            if index in self.trained_leaves:
                if tensor.grad is not None:
                    tensors["grad", index] = tensor.grad
            elif (retained := retained_grad(tensor)) is not None:
                tensors["retained", index] = retained
        tensors |= {("returned", *label): tensor for label, tensor in self.returned.items()}
        if self.grads_were_given:
            return tensors  # who keeps such a gradient sees it accumulate
        return tensors | {("kept", *label): stash.tensor for label, stash in self.stashes.items() if stash.compared}

    def overwritten(self):
        """What somebody keeps that is not what it was."""
        stashes = {label: stash for label, stash in self.stashes.items() if stash.value is not None}
        if self.grads_were_given or not stashes:
            return None
        if same(flat(s.tensor for s in stashes.values()), flat(s.value for s in stashes.values())):
            return None
        return next((k for k, s in stashes.items() if not same(s.tensor.detach(), s.value)), None)

    def shared(self):
        """The pairs of tensors that share memory, less those that the program made so: of two variables."""
        storages = defaultdict(list)
        for label, tensor in self.visible().items():
            if tensor.numel():
                storages[tensor.untyped_storage()._cdata].append((label, tensor))
        return {
            frozenset((a, b))
            for those in storages.values()
            for (a, x), (b, y) in itertools.combinations(those, 2)
            if (a[0], b[0]) != ("v", "v") and bytes_of(x) & bytes_of(y)
        }


def same(a, b):
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


class Ours(ByOurs, User):
    def __init__(self, program, functions=None):
        super().__init__(program, functions)
        self.owns_views = functions is None  # other functions leave a view one

    def private_view(self, tensor):
        return tensor[...] if self.owns_views else tensor


class Torch(ByTorch, User):
    pass


class Fresh(torch.autograd.Function):
    """The value and the gradient, in memory of their own.

    The gradient is contiguous as from an op: whether a leaf takes a gradient that somebody keeps, or copies it, is decided by its
    layout.
    """

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(memory_format=torch.contiguous_format)


class Replace(torch.autograd.Function):
    """Writes a value, whose the gradient is."""

    @staticmethod
    def forward(ctx, target, value):
        ctx.mark_dirty(target)  # counts the version
        target.data.copy_(value)
        return target

    @staticmethod
    def backward(ctx, grad):
        # not None: torch would lose the gradient of what lies around a written view
        return torch.zeros_like(grad, memory_format=torch.contiguous_format), grad.clone()


def write_ideally(op, target, operands, parameters):
    fresh = [Fresh.apply(t) if isinstance(t, torch.Tensor) else t for t in (target, *operands)]
    Replace.apply(target, op.out_of_place(*fresh, **parameters))


class Ideal(User):
    write = staticmethod(write_ideally)


class Reference(Ideal):
    def __init__(self, program):
        super().__init__(program)
        self.dtype = torch.complex128 if program.dtype.is_complex else torch.float64

    def leaf(self, shape, offset, requires_grad):
        leaf = super().leaf(shape, offset, requires_grad)
        if requires_grad:
            leaf.register_hook(lambda grad: grad.clone())
        return leaf

    def stash(self, label, tensor, alias=False, compared=True):
        return super().stash(label, tensor if alias else tensor.clone(), alias, compared)

    def give(self, tensor):
        return tensor.clone()

"""The steps that make and write tensors.

Whatever a step writes, keeps or gives away goes through the run (`write`, `stash`, `give`): so the reference is the same step.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from ...op_table import BY_NAME, OPS
from .. import engine, machines
from ..engine import Var
from ..tensors import NUMBERS, broadcasts, take_view, view_arguments, view_shape

PASSING = ["same", "view", "view", "stash", "stash_same", "stash_detached", "buffer", "expand", "saved", "kept"]
OP_WEIGHTS = {"add_": 3, "mul_add_": 2, "addcmul_": 2}


@dataclass
class Known:
    shape: tuple
    requires_grad: bool = False
    leaf: bool = False
    writable: bool = True
    viewed: Var | None = None  # what it is a view of


class Step(engine.Step):
    compared = True  # after it all that a user can see is compared


class Building(Step):
    """Compared by what comes later of it."""

    compared = False


class Producer(Building, engine.Producer):
    pass


class Leaf(machines.Leaf, Producer):
    known = Known


class Given(Producer):
    """A gradient for backward."""

    shape: tuple
    kind: str
    offset: int

    @classmethod
    def generate(cls, generator, shape):
        kind = generator.rng.choice(["own", "own", "expanded", "row", "slice", "transposed", "tracked"])
        return generator.add(cls(shape, kind, generator.rng.randrange(4000)), Known(shape, writable=False))

    def run(self, run):
        kind, shape = self.kind, self.shape
        if kind == "expanded":
            return run.values((), self.offset).expand(shape)
        if kind == "row" and shape:
            return run.values(shape[-1:], self.offset).expand(shape)
        if kind == "slice":
            return run.values((3, *shape), self.offset)[1].detach()
        if kind == "transposed":
            return run.values(shape[::-1], self.offset).permute(tuple(reversed(range(len(shape)))))
        tensor = run.values(shape, self.offset)
        return run.trained(tensor) if kind == "tracked" else tensor


class Unary(Producer):
    source: Var
    name: str

    weight = 2

    @classmethod
    def generate(cls, generator, source=None):
        source = source or generator.source()
        v = generator.known[source]
        name = generator.rng.choice(["clone", "clone", "clone", "neg", "once", "double", "viewed", "viewed"])
        # A view that is hooked before it is written stays one.
        viewed = Var(len(generator.known)) if name == "viewed" else None
        return generator.add(cls(source, name), Known(v.shape, v.requires_grad, viewed=viewed))

    def run(self, run):
        tensor = run[self.source]
        if self.name == "viewed":
            return run.private_view(tensor.clone())
        number = {"once": 1, "double": 2.0}.get(self.name)
        return getattr(tensor, self.name)() if number is None else tensor * number


class View(Producer):
    source: Var
    kind: str
    arguments: tuple

    weight = 3

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        source = generator.source()
        v = generator.known[source]
        kinds = ["alias", "unsqueeze", "reshape"]
        if v.shape:
            kinds += ["select", "narrow", "unbind", "chunk"]
        if len(v.shape) > 1:
            kinds += ["transpose", "transpose"]
        kind = rng.choice(["expand"] if rng.random() < 0.1 else kinds)
        arguments = view_arguments(rng, v.shape, kind, empty=False)
        # torch refuses to write most of them: outputs of several, elements seen twice, views of leaves
        writable = v.writable and kind not in ("unbind", "chunk", "expand") and not (v.leaf and v.requires_grad)
        shape, viewed = view_shape(v.shape, kind, arguments), v.viewed or source
        return generator.add(cls(source, kind, arguments), Known(shape, v.requires_grad, writable=writable, viewed=viewed))

    def run(self, run):
        return take_view(run[self.source], self.kind, self.arguments)


class Identity(torch.autograd.Function):
    """`pass_on(ctx, grad)` is its backward."""

    @staticmethod
    def forward(ctx, x, pass_on, save, view):
        ctx.pass_on = pass_on
        if save:
            ctx.save_for_backward(x)
        return x.view_as(x) if view else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.pass_on(ctx, grad), None, None, None


class Passing(Producer):
    """An identity of many minds about its gradient."""

    source: Var
    kind: str
    view: bool

    weight = 3

    @classmethod
    def generate(cls, generator, source=None):
        source = source or generator.source()
        v = generator.known[source]
        view = generator.rng.random() < 0.3
        step = cls(source, generator.rng.choice(PASSING), view)
        viewed = (v.viewed or source) if view else None
        return generator.add(step, Known(v.shape, v.requires_grad, writable=not view, viewed=viewed))

    def run(self, run):
        label = ("passing", run.index)
        return Identity.apply(
            run[self.source], lambda ctx, grad: self.pass_on(run, label, ctx, grad), self.kind == "saved", self.view
        )

    def pass_on(self, run, label, ctx, grad):
        kind = self.kind
        if run.vectorized or kind == "same":
            return grad
        if kind == "view":
            return grad.view_as(grad)
        if kind == "expand":
            return grad.sum().expand(grad.shape)
        if kind == "buffer":
            buffer = torch.cat([grad.reshape(-1), grad.reshape(-1)])
            run.stash(label, buffer)
            return run.give(buffer[grad.numel() :].view(grad.shape))
        if kind == "kept":
            kept = run.previous.setdefault(label, grad.clone())
            run.stash(label, kept)
            return run.give(kept)
        if kind == "saved":
            (saved,) = ctx.saved_tensors
            return grad * 1 if saved.dim() == 0 else grad
        run.stash(label, grad.detach() if kind == "stash_detached" else grad)
        return grad.view_as(grad) if kind == "stash" else grad


class Binary(Producer):
    a: Var
    b: Var
    sign: str

    weight = 2

    @classmethod
    def generate(cls, generator):
        a = generator.source()
        va = generator.known[a]
        b = generator.pick(lambda v: broadcasts(v.shape, va.shape))
        requires_grad = va.requires_grad or generator.known[b].requires_grad
        return generator.add(cls(a, b, generator.rng.choice("++*")), Known(va.shape, requires_grad))

    def run(self, run):
        a, b = run[self.a], run[self.b]
        return a + b if self.sign == "+" else a * b


class TwiceTheSame(torch.autograd.Function):
    """A sum that returns the gradient that it gets twice."""

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class Fork(Producer):
    a: Var
    b: Var

    weight = 0.7

    @classmethod
    def generate(cls, generator):
        a, b, requires_grad = generator.pair()
        return generator.add(cls(a, b), Known(generator.known[a].shape, requires_grad))

    def run(self, run):
        return TwiceTheSame.apply(run[self.a], run[self.b])


class Cat(Producer):
    a: Var
    b: Var

    weight = 0.5

    @classmethod
    def generate(cls, generator):
        a, b, requires_grad = generator.pair()
        shape = generator.known[a].shape
        if shape:
            generator.add(cls(a, b), Known((2 * shape[0], *shape[1:]), requires_grad))

    def run(self, run):
        return torch.cat([run[self.a], run[self.b]])


class SumExpand(Producer):
    source: Var

    weight = 0.5

    @classmethod
    def generate(cls, generator):
        source = generator.source()
        v = generator.known[source]
        return generator.add(cls(source), Known(v.shape, v.requires_grad, writable=False))

    def run(self, run):
        tensor = run[self.source]
        return tensor.sum().expand(tensor.shape)


class Checkpoint(Producer):
    source: Var
    operand: Var
    op: str
    reentrant: bool

    weight = 0.3

    @classmethod
    def generate(cls, generator):
        source = generator.differentiable()
        if source is None:
            return
        shape = generator.known[source].shape
        operand = generator.pick(lambda v: broadcasts(v.shape, shape))
        op = generator.rng.choice(OPS)
        generator.add(cls(source, operand, op.name, generator.rng.random() < 0.3), Known(shape, True))

    def run(self, run):
        op = BY_NAME[self.op]

        def body(x, y):
            x = x * 1
            run.write(op, x, [y] * len(op.operands), {})
            return x * 1

        arguments = run[self.source], run[self.operand]
        return checkpoint(body, *arguments, use_reentrant=self.reentrant, preserve_rng_state=False)


class Op(Building):
    target: Var
    op: str
    operands: tuple
    parameter: float | None
    packing: str | None

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        target = cls.choose_target(generator)
        (op,) = rng.choices(OPS, [OP_WEIGHTS.get(op.name, 1) for op in OPS])
        operands: tuple = ()
        for _ in op.operands:
            operands += (cls.choose_operand(generator, target, operands),)
        parameter = rng.choice(NUMBERS) if op.parameter and rng.random() < 0.3 else None
        packing = rng.choice(["identity", "copy", "keep"]) if rng.random() < 0.12 else None
        generator.add(cls(target, op.name, operands, parameter, packing))
        if any(isinstance(o, Var) and generator.known[o].requires_grad for o in operands):
            generator.known[target].requires_grad = True
            generator.known[target].leaf = False
        generator.recent.remove(target)
        generator.recent.append(target)

    @staticmethod
    def choose_target(generator):
        rng = generator.rng
        careless = rng.random() < 0.02

        def refused(v):
            """By torch. Not a gradient that was given or returned: torch hands one on as it is, so that others see the write."""
            root = v if v.viewed is None else generator.known[v.viewed]
            return v.requires_grad and (root.leaf or (v.viewed is not None and root.writable))

        target = generator.pick(lambda v: (careless and refused(v)) or (v.writable and not (v.leaf and v.requires_grad)))
        if target is not None and rng.random() >= 0.5:
            return target
        leaf = generator.trained() if rng.random() < 0.5 else None
        target = rng.choice([Unary, Unary, Passing]).generate(generator, leaf or target)
        return target if generator.known[target].writable else Unary.generate(generator, target)

    @staticmethod
    def choose_operand(generator, target, others):
        rng, shape = generator.rng, generator.known[target].shape
        if rng.random() < 0.2:
            return float(rng.choice(NUMBERS))
        if rng.random() < 0.06:
            return target
        if others and isinstance(others[0], Var) and rng.random() < 0.15:
            return others[0]
        leaf, full = rng.random() < 0.8, rng.random() < 0.7
        found = generator.pick(lambda v: broadcasts(v.shape, shape) and v.leaf >= leaf and (v.shape == shape or not full))
        return 0.5 if found is None else found

    def run(self, run):
        op = BY_NAME[self.op]
        with contextlib.nullcontext() if self.packing is None else self.packed(run):
            run.write(op, run[self.target], run.operands(self.operands), op.parameters(self.parameter))

    def packed(self, run):
        label = ("packed", run.index)

        def pack(tensor):
            visible = {v.untyped_storage()._cdata for v in run.variables}
            if self.packing == "keep" and tensor.untyped_storage()._cdata not in visible:
                run.stash(label, tensor, compared=False)
            tensor = tensor.clone() if self.packing == "copy" else tensor
            return tensor, tensor._version

        def unpack(packed):
            tensor, version = packed
            if tensor._version != version:
                raise RuntimeError("modified by an inplace operation")  # where torch asks no more
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

"""The steps that make and write tensors, each with what it means where nothing is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...op_table import BY_NAME, OPS
from .. import engine, machines
from ..engine import Var
from ..machines import Unsupported
from ..tensors import NUMBERS, broadcasts, take_view, view_arguments, view_shape


@dataclass
class Known:
    """What the generator knows about a variable without running anything."""

    shape: tuple
    requires_grad: bool = False
    leaf: bool = False
    contiguous: bool = True
    memory: object = field(default_factory=object)


class Step(engine.Referenced):
    """The reference is a `Functional` run."""


class Write(Step):
    target: Var
    op: str
    operands: tuple
    parameter: float | None
    no_grad: bool

    weight = 8

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        no_grad = rng.random() < 0.08
        target = generator.target(no_grad)
        if target is None:
            return
        if rng.random() < 0.4:
            # nothing has saved what was just made: most programs should get through their backward
            made = rng.choice([Unary, Unary, PrivateView])
            target = made.generate(generator, target, rng.choice(["clone", "neg"]))
        op = rng.choice(OPS)
        operands = tuple(cls.operand(generator, target) for _ in op.operands)
        parameter = rng.choice(NUMBERS) if op.parameter and rng.random() < 0.4 else None
        generator.add(cls(target, op.name, operands, parameter, no_grad))
        generator.written(target, operands, no_grad)

    @staticmethod
    def operand(generator, target):
        rng, shape = generator.rng, generator.known[target].shape
        if rng.random() < 0.2:
            return float(rng.choice(NUMBERS))
        if rng.random() < 0.08:
            return target
        careless = rng.random() < 0.01
        found = generator.pick(lambda v: careless or broadcasts(v.shape, shape))
        return 0.5 if found is None else found

    def run(self, run):
        op = BY_NAME[self.op]
        with torch.set_grad_enabled(not self.no_grad):
            run.write(op, run[self.target], run.operands(self.operands), op.parameters(self.parameter))

    def reference(self, run):
        op = BY_NAME[self.op]
        value = op.out_of_place(run[self.target], *run.operands(self.operands), **op.parameters(self.parameter))
        run.assign(run.place(self.target), value, self.no_grad)


class Producer(Step, engine.Producer):
    pass


class View(Producer):
    source: Var
    kind: str
    arguments: tuple
    no_grad: bool

    weight = 4

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        source = generator.pick(lambda v: not v.leaf or not v.requires_grad or rng.random() < 0.2)
        if source is None:
            return
        v = generator.known[source]
        kind, arguments, shape, contiguous = cls.choose(rng, v)
        known = Known(shape, v.requires_grad, False, contiguous, v.memory)
        return generator.add(cls(source, kind, arguments, rng.random() < 0.04), known)

    @classmethod
    def choose(cls, rng, v):
        kind = rng.choice(["expand"] if rng.random() < 0.1 else cls.possible(v))
        arguments = view_arguments(rng, v.shape, kind, empty=True)
        along = not arguments or arguments[0] == 0
        kept = kind in ("alias", "unsqueeze") or (kind in ("select", "unbind", "narrow") and along)
        return kind, arguments, view_shape(v.shape, kind, arguments), kind == "flatten" or (v.contiguous and kept)

    @staticmethod
    def possible(v):
        kinds = ["alias", "unsqueeze"]
        if v.shape:
            kinds += ["select", "narrow", "narrow", "select"] if 0 not in v.shape else ["narrow"]
        if len(v.shape) > 1:
            kinds += ["transpose", "unbind"] if 0 not in v.shape else ["transpose"]
        if len(v.shape) == 2 and v.shape[0] == v.shape[1]:
            kinds.append("diagonal")
        if v.contiguous:
            kinds.append("flatten")
        return kinds

    def run(self, run):
        with torch.set_grad_enabled(not self.no_grad):
            return take_view(run[self.source], self.kind, self.arguments)

    def reference(self, run):
        if self.no_grad:
            # It requires grad when its base does, without a grad_fn until its base gets one.
            raise Unsupported("a view made under no_grad")
        return run.view(self.source, lambda t: take_view(t, self.kind, self.arguments))


UNARY = {"square": lambda t: t * t, "exp": lambda t: t.tanh().exp()} | {
    name: lambda t, name=name: getattr(t, name)() for name in ("sin", "sigmoid", "tanh", "clone", "neg")
}


class Unary(Producer):
    source: Var
    name: str

    weight = 2.5

    @classmethod
    def generate(cls, generator, source=None, name=None):
        source = source or generator.pick()
        v = generator.known[source]
        name = name or generator.rng.choice(["sin", "sigmoid", "tanh", "square", "clone", "neg", "exp"])
        return generator.add(cls(source, name), Known(v.shape, v.requires_grad, contiguous=v.contiguous))

    def run(self, run):
        return UNARY[self.name](run[self.source])

    reference = run


class PrivateView(Producer):
    """A view of what no variable holds."""

    source: Var
    name: str
    kind: str
    arguments: tuple

    weight = 1

    @classmethod
    def generate(cls, generator, source=None, name=None):
        source = source or generator.pick()
        v = generator.known[source]
        name = name or generator.rng.choice(["sin", "square", "clone", "neg", "exp"])
        kind, arguments, shape, contiguous = View.choose(generator.rng, v)
        return generator.add(cls(source, name, kind, arguments), Known(shape, v.requires_grad, contiguous=contiguous))

    def run(self, run):
        return take_view(UNARY[self.name](run[self.source]), self.kind, self.arguments)

    def reference(self, run):
        base = run.new_memory(UNARY[self.name](run[self.source]))
        return run.view_of(base, lambda t: take_view(t, self.kind, self.arguments))


class Binary(Producer):
    a: Var
    b: Var
    sign: str

    weight = 2

    @classmethod
    def generate(cls, generator):
        a = generator.pick()
        va = generator.known[a]
        b = generator.pick(lambda v: broadcasts(v.shape, va.shape))
        vb = generator.known[b]
        contiguous = va.contiguous and vb.contiguous and va.shape == vb.shape
        known = Known(va.shape, va.requires_grad or vb.requires_grad, contiguous=contiguous)
        return generator.add(cls(a, b, generator.rng.choice("+*")), known)

    def run(self, run):
        a, b = run[self.a], run[self.b]
        return a + b if self.sign == "+" else a * b

    reference = run


PLAIN_WRITES = {
    "mul_number": (lambda t, n: t.mul_(n), lambda t, n: t * n),
    "zero_": (lambda t, n: t.zero_(), lambda t, n: torch.zeros_like(t)),
    "sigmoid_": (lambda t, n: t.sigmoid_(), lambda t, n: t.sigmoid()),
    "sub_number": (lambda t, n: t.sub_(n), lambda t, n: t - n),
    "fill_": (lambda t, n: t.fill_(n), lambda t, n: torch.full_like(t, n)),
}


class PlainWrite(Step):
    """By torch's own methods."""

    target: Var
    name: str
    number: float
    no_grad: bool

    weight = 0.7

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        no_grad = rng.random() < 0.1
        target = generator.target(no_grad)
        if target is not None:
            generator.add(cls(target, rng.choice(list(PLAIN_WRITES)), rng.choice(NUMBERS), no_grad))

    def run(self, run):
        with torch.set_grad_enabled(not self.no_grad):
            PLAIN_WRITES[self.name][0](run[self.target], self.number)

    def reference(self, run):
        value = PLAIN_WRITES[self.name][1](run[self.target], self.number)
        run.assign(run.place(self.target), value, self.no_grad)


class Copy(Step):
    target: Var
    source: Var

    weight = 0.7

    @classmethod
    def generate(cls, generator):
        target = generator.target()
        if target is None:
            return
        shape = generator.known[target].shape
        source = generator.pick(lambda v: broadcasts(v.shape, shape))
        if source is not None:
            generator.add(cls(target, source))
            generator.written(target, [source])

    def run(self, run):
        # cloned: torch's copy of a row onto a column of the same matrix reads what it wrote
        run[self.target].copy_(run[self.source].clone())

    def reference(self, run):
        run.assign(run.place(self.target), run[self.source])


class SetSlice(Step):
    target: Var
    index: int
    source: Var | float

    weight = 0.5

    @classmethod
    def generate(cls, generator):
        target = generator.target()
        shape = () if target is None else generator.known[target].shape
        if not shape or shape[0] == 0:
            return
        index = generator.rng.randrange(shape[0])
        source = generator.pick(lambda v: broadcasts(v.shape, shape[1:]))
        generator.add(cls(target, index, 0.5 if source is None else source))
        generator.written(target, [source])

    def run(self, run):
        (source,) = run.operands([self.source])
        run[self.target][self.index] = source.clone() if isinstance(source, torch.Tensor) else source

    def reference(self, run):
        (source,) = run.operands([self.source])
        place = run.view(self.target, lambda t: t[self.index])
        run.assign(place, torch.as_tensor(source, dtype=run.dtype))


class Detach(Producer):
    source: Var

    weight = 0.5

    @classmethod
    def generate(cls, generator):
        source = generator.pick()
        v = generator.known[source]
        return generator.add(cls(source), Known(v.shape, contiguous=v.contiguous, memory=v.memory))

    def run(self, run):
        return run[self.source].detach()

    def reference(self, run):
        return run.detach(self.source)


class Leaf(machines.Leaf, Producer):
    known = Known
    reference = machines.Leaf.run

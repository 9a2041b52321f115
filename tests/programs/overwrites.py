"""Random programs of views, saves and differentiable writes, by torch, under guard in each mode, and out of place.

Where torch refuses, guard must name the write, and its copies must give the gradients of the program out of place; elsewhere
it must be silent. A backward outside of a guard that saw some of the steps must refuse what torch refuses.
"""

import random
from contextlib import nullcontext

import torch

from safe_inplace import guard

from . import engine
from .engine import Disagreement, Fuzz, Var, expect
from .guards import names_the_write, of_an_overwritten_value, run_under
from .machines import Functional, TensorProgram, TensorRun
from .tensors import agree, share_storage

SHAPE = (3, 4)
LENGTH = 9
UNARY = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "square": torch.square,
    "relu": torch.relu,
    "double": lambda x: x * 2,
    "softmax": lambda x: x.softmax(-1),
}
BINARY = {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "atan2": torch.atan2}
VIEWS = {
    "rows": lambda x: x[1:],
    "row": lambda x: x[0],
    "columns": lambda x: x[..., ::2],
    "transposed": lambda x: x.transpose(0, -1),
    "tail": lambda x: x[..., 1:],
    "diagonal": lambda x: x.diagonal(0, 0, -1) if x.dim() > 1 else x[:-1],
}
# torch's methods, and what they mean out of place
WRITES = {
    "mul_": lambda x, y: x * y,
    "add_": lambda x, y: x + y,
    "sub_": lambda x, y: x - y,
    "div_": lambda x, y: x / y,
    "copy_": lambda x, y: y.expand_as(x),
    "atan2_": torch.atan2,
}
WRITES_ALONE = {
    "tanh_": torch.tanh,
    "sigmoid_": torch.sigmoid,
    "sin_": torch.sin,
    "relu_": torch.relu,
    "square_": torch.square,
    "zero_": torch.zeros_like,
}


class Generator(engine.Generator):
    """What it knows of a variable is an empty tensor of its shape."""

    def start(self, name):
        return TensorProgram(name)

    def generate(self):
        rng = self.rng
        for _ in range(2):
            Leaf.generate(self)
        for _ in range(LENGTH):
            of = rng.choice(list(self.known))
            (kind,) = self.choose(Step)
            kind.generate(self, of)
        Backward.generate(self)
        return self.program

    def of_the_shape(self, of):
        return self.rng.choice([var for var, known in self.known.items() if known.shape == self.known[of].shape])


class Step(engine.Referenced):
    """The reference is a `Functional` run."""


class Producer(Step, engine.Producer):
    pass


class Leaf(Producer):
    seed: int

    @classmethod
    def generate(cls, generator):
        return generator.add(cls(generator.rng.randrange(1000)), torch.empty(SHAPE))

    def run(self, run):
        values = torch.rand(SHAPE, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        run.leaves[Var(len(run.variables))] = leaf = (values + 0.5).requires_grad_()
        return leaf * 1

    reference = run


class Unary(Producer):
    of: Var
    name: str

    weight = 4

    @classmethod
    def generate(cls, generator, of):
        return generator.add(cls(of, generator.rng.choice(list(UNARY))), torch.empty(generator.known[of].shape))

    def run(self, run):
        return UNARY[self.name](run[self.of])

    reference = run


class Binary(Producer):
    of: Var
    other: Var
    name: str

    weight = 3

    @classmethod
    def generate(cls, generator, of):
        step = cls(of, generator.of_the_shape(of), generator.rng.choice(list(BINARY)))
        return generator.add(step, torch.empty(generator.known[of].shape))

    def run(self, run):
        return BINARY[self.name](run[self.of], run[self.other])

    reference = run


class View(Producer):
    of: Var
    name: str

    weight = 2

    @classmethod
    def generate(cls, generator, of):
        known = generator.known[of]
        name = generator.rng.choice([n for n, view in VIEWS.items() if known.dim() > 0 and view(known).numel() > 1])
        return generator.add(cls(of, name), VIEWS[name](known))

    def run(self, run):
        return VIEWS[self.name](run[self.of])

    def reference(self, run):
        return run.view(self.of, VIEWS[self.name])


class Write(Step):
    of: Var
    name: str
    other: Var | float

    weight = 4

    @classmethod
    def generate(cls, generator, of):
        rng = generator.rng
        name = rng.choice(list(WRITES))
        generator.add(cls(of, name, generator.of_the_shape(of) if rng.random() < 0.8 else round(rng.uniform(0.5, 2.0), 2)))

    def read(self, run):
        (other,) = run.operands([self.other])
        return run[self.of], torch.as_tensor(other, dtype=run.dtype)

    def run(self, run):
        x, other = self.read(run)
        getattr(x, self.name)(other.clone() if torn(x, other) else other)

    def reference(self, run):
        run.assign(run.place(self.of), WRITES[self.name](*self.read(run)))


def torn(x, other):
    """Would the write read elements of `other` that it has overwritten already? torch refuses some such calls, and leaves
    the result of the others undefined: x[:, 1:].T.mul_(x[:, 1:])."""
    return share_storage(x, other) and (x.storage_offset(), x.stride()) != (other.storage_offset(), other.stride())


class WriteAlone(Step):
    of: Var
    name: str

    weight = 1

    @classmethod
    def generate(cls, generator, of):
        generator.add(cls(of, generator.rng.choice(list(WRITES_ALONE))))

    def run(self, run):
        getattr(run[self.of], self.name)()

    def reference(self, run):
        run.assign(run.place(self.of), WRITES_ALONE[self.name](run[self.of]))


class Backward(Step):
    """Of all there is."""

    @classmethod
    def generate(cls, generator):
        generator.add(cls())

    def run(self, run):
        loss = sum((run[Var(i)] * (i + 1)).sum() for i in range(len(run.variables)))
        run.gradients = torch.autograd.grad(loss, list(run.leaves.values()))

    reference = run


class InPlace(TensorRun):
    def __init__(self, program, around=lambda index: nullcontext()):
        """`around` opens what a step runs in; backward runs outside of it."""
        super().__init__(program)
        self.around = around

    def perform(self, step):
        with nullcontext() if isinstance(step, Backward) else self.around(self.index):
            return step.run(self)


def check(program, under=guard):
    """How the program ended; raises Disagreement where guard did not do what the program out of place says."""
    plain = InPlace(program).run()
    ended = check_whole(program, plain, under)
    check_in_part(program, plain, under)
    return ended


def check_whole(program, plain, under):
    """Forward and backward in one guard."""
    repaired, watched = run_under(under("copy"), InPlace(program))
    if plain.refused is not None and not of_an_overwritten_value(plain.refused):
        # Refused at the write for a reason of its own.
        expect(repaired.refused, f"copy lets pass what torch refuses: {plain.refused}")
        return "refused for another reason"
    expected = gradients_out_of_place(program)
    expect(repaired.refused is None, f"copy stops: {repaired.refused}")
    expect(agree(repaired.gradients, expected), "copy does not give the gradients of the program out of place")
    raised, strict = run_under(under(), InPlace(program))
    deferred, _ = run_under(under("defer"), InPlace(program))
    if plain.refused is not None:
        expect(names_the_write(raised.refused), f"raise missed it, or does not name it: {raised.refused}")
        expect(names_the_write(deferred.refused), f"defer missed it, or does not name it: {deferred.refused}")
        expect(watched.hazards_seen > 0, "copy saw no hazard")
        return "refused, repaired"
    expect(agree(plain.gradients, expected), "torch does not give the gradients of the program out of place")
    for mode, run in (("raise", raised), ("defer", deferred)):
        expect(run.refused is None, f"a false alarm of {mode}: {run.refused}")
        expect(agree(run.gradients, expected), f"{mode} changed what the program computes")
    expect(strict.hazards == [], f"a false alarm of raise: {strict.hazards}")
    return "finishes"


def gradients_out_of_place(program):
    run = Functional(program).run()
    if run.refused is not None:
        raise Disagreement(f"the program out of place is refused: {run.refused}")
    return run.gradients


def check_in_part(program, plain, under):
    """Backward outside of a guard that saw some of the steps."""
    choose = random.Random(program.name)
    watched = [choose.random() < 0.6 for _ in program.steps]
    for mode in ("warn", "copy"):
        run = InPlace(program, lambda index: under(mode) if watched[index] else nullcontext())
        some, _ = run_under(nullcontext(), run)
        what = f"in part, {mode}, {watched}"
        if plain.refused is None:
            expect(some.refused is None, f"{what}: {some.refused}")
            expect(agree(some.gradients, plain.gradients), f"{what}: changed what the program computes")
        elif mode == "warn" or not of_an_overwritten_value(plain.refused):
            same = of_an_overwritten_value(some.refused) == of_an_overwritten_value(plain.refused)
            expect(some.refused and same, f"{what}: {some.refused} instead of {plain.refused}")
        elif some.refused is None:
            # The steps it saw were those that mattered.
            expect(agree(some.gradients, gradients_out_of_place(program)), f"{what}: wrong gradients")


FUZZ = Fuzz("overwrites", __doc__.split("\n")[0], Step, lambda name: Generator(name).generate(), check, programs=20_000)

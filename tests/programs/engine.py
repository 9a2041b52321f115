"""What the fuzzes share: steps, making a program of them, running it, shrinking one that fails, and the command line.

A step is a class that says all about itself: how it is made at random, how it runs, and, where the fuzz has a reference that
computes otherwise, what it means there. A class that leaves one out cannot be instantiated, and a test asks that each be met.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import sys
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, dataclass_transform


@dataclass(frozen=True, order=True)
class Var:
    """A variable of a program: the steps that make one are counted. No number, so that none is taken for one."""

    index: int

    def __repr__(self) -> str:
        return f"v{self.index}"


@dataclass_transform(frozen_default=True)
class Step(ABC):
    """Subclasses are frozen dataclasses. Their fields are plain values, variables, and tuples of these."""

    weight: ClassVar[float] = 0.0  # how often it is chosen; 0: the generator asks for it where it wants one
    _defined: ClassVar[int]
    _count: ClassVar[Iterator[int]] = itertools.count()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._defined = next(Step._count)
        dataclass(frozen=True)(cls)

    @classmethod
    @abstractmethod
    def generate(cls, generator: Any, *given: Any) -> Var | None:
        """Adds one to the generator's program, or does nothing where there is nothing to do it with."""

    @abstractmethod
    def run(self, run: Any) -> Any: ...

    @classmethod
    def kinds(cls) -> list[type[Step]]:
        """What can be met in a program, in the order of definition."""
        below = {kind for sub in cls.__subclasses__() for kind in sub.kinds()}
        return sorted(below, key=lambda kind: kind._defined) or [cls]

    def renamed(self, rename: Callable[[Var], Var]) -> Step:
        def of(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(of, value))
            return rename(value) if isinstance(value, Var) else value

        return replace(self, **{f.name: of(getattr(self, f.name)) for f in fields(self)})

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(getattr(self, f.name)) for f in fields(self))})"


class Producer(Step):
    """A step that makes a variable of what `run` returns."""


class Referenced(Step):
    """A step of a fuzz whose reference computes otherwise."""

    @abstractmethod
    def reference(self, run: Any) -> Any:
        """The step in the run of the reference; `reference = run` where it is the same."""


@dataclass
class Program:
    name: str
    steps: list[Step] = field(default_factory=list)

    def heading(self) -> str:
        return self.name

    def __str__(self) -> str:
        lines = [f"# {self.heading()}"]
        made = 0
        for index, step in enumerate(self.steps):
            target = f"{Var(made)} = " if isinstance(step, Producer) else ""
            made += bool(target)
            lines.append(f"{index:3}: {target}{step}")
        return "\n".join(lines)

    def without(self, index: int) -> Program | None:
        """The program less one step, or None where a later step needs its variable."""
        step, before, after = self.steps[index], self.steps[:index], self.steps[index + 1 :]
        if not isinstance(step, Producer):
            return replace(self, steps=before + after)
        removed = Var(sum(isinstance(s, Producer) for s in before))

        def rename(var: Var) -> Var:
            if var == removed:
                raise LookupError
            return Var(var.index - (var > removed))

        try:
            return replace(self, steps=before + [s.renamed(rename) for s in after])
        except LookupError:
            return None


class Generator:
    """A program in the making, and what is known of its variables without running it."""

    latest = 0.4  # how often a step takes what was made last: that is what a program works with

    def __init__(self, name: str) -> None:
        self.rng = random.Random(name)
        self.known: dict[Var, Any] = {}
        self.program = self.start(str(name))

    def start(self, name: str) -> Program:
        return Program(name)

    def add(self, step: Step, known: Any = None) -> Var | None:
        self.program.steps.append(step)
        if not isinstance(step, Producer):
            return None
        var = Var(len(self.known))
        self.known[var] = known
        return var

    def choose(self, base: type[Step], count: int = 1) -> list[type[Any]]:
        kinds = base.kinds()
        return self.rng.choices(kinds, [kind.weight for kind in kinds], k=count)

    def candidates(self) -> Iterable[Var]:
        return self.known

    def pick(self, condition: Callable[[Any], object] = lambda known: True) -> Var | None:
        found = [var for var in self.candidates() if condition(self.known[var])]
        if not found:
            return None
        return found[-1] if self.rng.random() < self.latest else self.rng.choice(found)


@dataclass
class Refused:
    step: int
    error: RuntimeError

    def __str__(self) -> str:
        return f"step {self.step}, {type(self.error).__name__}: {str(self.error).partition(chr(10))[0]}"


class Run:
    """One way to run a program. `refused` is where it ended, if not by itself."""

    refused: Refused | None = None
    stop: int | None = None
    index = -1  # of the step that runs
    _alive: ClassVar[weakref.WeakSet[Run]] = weakref.WeakSet()

    def __init__(self, program: Program) -> None:
        Run._alive.add(self)
        self.program = program
        self.variables: list[Any] = []

    def __getitem__(self, var: Var) -> Any:
        return self.variables[var.index]

    def run(self, stop: int | None = None) -> Any:
        """Until the end, the refusal of a step, or before the step `stop`."""
        self.stop = stop
        for index in range(len(self.program.steps[:stop])):
            if self.step(index) is not None:
                break
        return self

    def step(self, index: int) -> Refused | None:
        self.index = index
        step = self.program.steps[index]
        try:
            made = self.perform(step)
        except RuntimeError as error:
            self.refused = Refused(index, error)
            return self.refused
        if (made is not None) != isinstance(step, Producer):
            raise TypeError(f"{step} made {made}")
        if made is not None:
            self.add(made)
        return None

    def perform(self, step: Step) -> Any:
        return step.run(self)

    def add(self, made: Any) -> None:
        self.variables.append(made)

    @staticmethod
    def release() -> None:
        """A run's tensors hold hooks, which hold the run: through C++, where no garbage collector finds the circle."""
        for run in list(Run._alive):
            vars(run).clear()
        Run._alive.clear()


class Disagreement(AssertionError):
    pass


def expect(truth: object, what: str) -> None:
    if not truth:
        raise Disagreement(what)


def shrink(program: Program, check: Callable[[Program], object], failure: type[Exception] = AssertionError) -> Program:
    """Leaves out steps, last first, as long as the program still fails in this way."""

    def fails(program: Program) -> bool:
        try:
            check(program)
        except Exception as error:
            return isinstance(error, failure)
        return False

    for index in reversed(range(len(program.steps))):
        smaller = program.without(index)
        if smaller is not None and fails(smaller):
            program = smaller
    return program


@dataclass(frozen=True)
class Fuzz:
    name: str
    description: str
    steps: type[Step]
    generate: Callable[[str], Any]
    check: Callable[..., str]  # how a program ended; raises Disagreement where it may not end so
    programs: int = 100_000

    def search(self, seed: object, indices: Iterable[int], *given: Any) -> Counter[str]:
        """Checks the programs of a seed; counts how they ended, raises at the first that fails, shrunk.

        `given` is what the check gets besides: something broken, to see it found.
        """
        ends: Counter[str] = Counter()
        for index in indices:
            program = self.generate(f"{seed}:{index}")
            try:
                ends[self.check(program, *given)] += 1
            except Exception as error:
                failure = AssertionError if isinstance(error, AssertionError) else type(error)
                small = shrink(program, lambda smaller: self.check(smaller, *given), failure)
                raise Disagreement(
                    f"seed {program.name!r}: {error}\n"
                    f"reproduce: python -m tests.programs {self.name} --seed {seed} --only {index}\n"
                    f"shrunk:\n{small}"
                ) from error
            finally:
                Run.release()
        return ends

    def main(self, arguments: list[str]) -> int:
        parser = argparse.ArgumentParser(prog=f"python -m tests.programs {self.name}", description=self.description)
        parser.add_argument("--programs", type=int, default=self.programs, help=f"how many ({self.programs})")
        parser.add_argument("--seed", default="0", help="seed of the whole series (0)")
        parser.add_argument("--start", type=int, default=0, help="first program of the series (0)")
        parser.add_argument("--only", type=int, help="print and check only this program")
        options = parser.parse_args(arguments)
        gc.freeze()  # guard looks for modules among all objects: not among those of the libraries, a hundred thousand times
        try:
            if options.only is not None:
                print(self.generate(f"{options.seed}:{options.only}"))
                print(dict(self.search(options.seed, [options.only])))
                return 0
            from tqdm import tqdm

            programs = range(options.start, options.start + options.programs)
            ends = self.search(options.seed, tqdm(programs, unit="program", smoothing=0.05))
        except Disagreement as error:
            print(error, file=sys.stderr)
            return 1
        for end, count in ends.most_common():
            print(f"{end}: {count}")
        return 0

"""Random functions, and the same with all that `advise` would change in them: what they return, what others hold, the gradients.

Each is watched on one of the ways through it, and the changed one is called on both.
"""

from __future__ import annotations

import builtins
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import safe_inplace
from safe_inplace._advise import watch
from safe_inplace._advise.advice import Advice, advice_from
from safe_inplace._advise.instrument import CALLEE, OPERAND, PROBE
from safe_inplace._advise.source import Source

from . import engine
from .engine import Fuzz, Program, Var, expect
from .expressions import render

SHAPE = (64, 128)  # the smallest that advise looks at
LENGTH = 10
DEPTH = 3
DTYPE = torch.float64

SUMS = [
    "{} + {}",
    "{} - {}",
    "{} * {}",
    "{} * {} + {}",
    "{} + {} * {}",
    "{} - {} * {}",
    "({} + {}) * {}",
    "{} * ({} + {})",
    "{} * 2",
    "2 * {} + 1",
    "1 + {}",
    "1 - {}",
]
OTHERS = [
    "{}.relu()",
    "{}.square()",
    "{}.clamp(-3, 3)",
    "{}.abs()",
    "{}.clone()",
    "{}.detach()",
    "seen_anew({})",
    "{}[...]",
    "{}.t().contiguous().t()",
    "{}.mean(0, keepdim=True).round()",
    "{}.mean().round()",
    "torch.broadcast_tensors({}, {})[0]",
    "last(kept, {})",
    "({} if flag else {})",
    "(lambda t: t + {})({})",
    "[t * {} for t in [{}]][0]",
    "next(t + {} for t in [{}])",
    "hold(kept, {})",
    "either({}, flag)",
]
HOLDERS = [
    "kept.append({})",
    "kept.append({}.detach())",
    "kept.append({}.detach().numpy())",
    "kept.append({}.untyped_storage())",
    "kept.append(weakref.ref({}))",
    "kept.append(lambda: {})",
    "kept.append({}.reshape(-1)[:3])",
    "kept.append({}.sum())",
    "kept.append(held({}))",
    "hold([], {}) if flag else hold(kept, {})",
    "hold(kept if flag else [], {})",
]


def last(kept: list[Any], tensor: torch.Tensor) -> torch.Tensor:
    return next((each for each in reversed(kept) if type(each) is torch.Tensor and each.shape == tensor.shape), tensor)


def hold(kept: list[Any], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor)
    return tensor


def either(tensor: torch.Tensor, flag: bool) -> torch.Tensor:
    return tensor if flag else tensor.clone()


def seen_anew(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(tensor.shape)


def held(tensor: torch.Tensor) -> Any:
    """By a generator that waits."""

    def generate(tensor: torch.Tensor) -> Any:
        yield
        yield tensor

    running = generate(tensor)
    next(running)
    return running


class Generator(engine.Generator):
    latest = 0.6  # mostly what was made last, so that much is not read again

    def generate(self) -> Program:
        for _ in range(self.rng.randint(3, LENGTH)):
            (kind,) = self.choose(Step)
            kind.generate(self)
        if not self.known:
            Assign.generate(self)
        Return.generate(self)
        return self.program

    def atom(self) -> Any:
        var = self.pick() if self.rng.random() < 0.75 else None
        return var if var is not None else self.rng.choice(["a", "b", "w", "c"])

    def value(self, depth: int = DEPTH) -> Any:
        """Of an assignment: bounded, so that nothing grows large."""
        source = self.expression(depth)
        return source if depth == 1 and self.rng.random() < 0.5 else (source, ".clamp(-9, 9)")

    def assignment(self, depth: int = DEPTH, var: Var | None = None) -> tuple[Any, ...]:
        return (var or self.pick(), " = ", self.value(depth))

    def expression(self, depth: int) -> Any:
        if depth == 0 or self.rng.random() < 0.25:
            return self.atom()
        templates = SUMS if self.rng.random() < 0.6 else OTHERS
        return ("(", self.fill(self.rng.choice(templates), depth - 1), ")")

    def fill(self, template: str, depth: int) -> tuple[Any, ...]:
        pieces = template.split("{}")
        source: list[Any] = [pieces[0]]
        for piece in pieces[1:]:
            source += [self.expression(depth), piece]
        return tuple(source)


class Step(engine.Step):
    """Lines of a function's body."""

    source: tuple

    def __str__(self) -> str:
        return render(self.source)

    def run(self, run: Any) -> Any:
        raise NotImplementedError("a step runs with the others, as a function")


class Producer(Step, engine.Producer):
    """Its source is an expression."""


class Assign(Producer):
    weight = 6

    @classmethod
    def generate(cls, generator):
        return generator.add(cls((generator.value(),)))


class Rebind(Step):
    weight = 3

    @classmethod
    def generate(cls, generator):
        if generator.known:
            generator.add(cls(generator.assignment()))


class Hold(Step):
    weight = 2.5

    @classmethod
    def generate(cls, generator):
        generator.add(cls(generator.fill(generator.rng.choice(HOLDERS), 0)))


class Branch(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        if generator.known:
            generator.add(cls(("if flag:\n    ", generator.assignment(2), "\nelse:\n    ", generator.assignment(2))))


class Loop(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        if generator.known:
            generator.add(cls(("for t in [a, b]:\n    ", generator.assignment(2), "\n    ", generator.assignment(1))))


class Caught(Step):
    """Half of the calls raise between the two."""

    weight = 1

    @classmethod
    def generate(cls, generator):
        if generator.known:
            var = generator.pick()
            stop, kind = generator.rng.choice([("1 / flag", "except ZeroDivisionError"), ("kept", "finally")])
            tried = ("try:\n    ", generator.assignment(2, var), f"\n    {stop}\n    ", generator.assignment(1, var))
            generator.add(cls((*tried, f"\n{kind}:\n    ", generator.assignment(2))))


class Discard(Step):
    weight = 0.7

    @classmethod
    def generate(cls, generator):
        generator.add(cls((generator.value(),)))


class Unrecorded(Step):
    weight = 0.7

    @classmethod
    def generate(cls, generator):
        if generator.known:
            generator.add(cls(("with torch.no_grad():\n    ", generator.assignment(2))))


class Return(Step):
    @classmethod
    def generate(cls, generator):
        generator.add(cls(("return [", generator.pick(), ", ", generator.expression(1), "]")))


def source_of(program: Program) -> str:
    lines = ["def function(a, b, w, c, kept, flag):"]
    made = 0
    for step in program.steps:
        text = f"{Var(made)} = {step}" if isinstance(step, Producer) else str(step)
        made += isinstance(step, Producer)
        lines += [f"    {line}" for line in text.split("\n")]
    return "\n".join([*lines, "    return []", ""])


NAMES = {each.__name__: each for each in (torch, weakref, safe_inplace, last, hold, held, either, seen_anew)}


def function_of(code: Any, names: dict[str, Any] = NAMES) -> Any:
    names = dict(names)
    exec(code, names)
    return names["function"]


def values(shape: tuple[int, ...], offset: int) -> torch.Tensor:
    """Whole numbers, and so is all that comes of them: once or twice, there is nothing to round, as long as nothing grows large.
    A last bit would decide on which side of a bound a gradient is one or none."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=DTYPE) * 0.7 + offset).mul(3).round().view(shape)


def outcome(function: Any, flag: bool) -> list[torch.Tensor]:
    """All that can be seen of a call."""
    a, b = (values(SHAPE, offset).requires_grad_(trained) for offset, trained in ((0, True), (100, False)))
    w = values((128,), 200).requires_grad_()
    c = values(SHAPE, 300)
    kept: list[Any] = []
    results = function(a, b, w, c, kept, flag)
    seen = [result.detach().clone() for result in results]
    roots = [result.clamp(-1e3, 1e3).sum() for result in results if result.requires_grad]
    if roots:
        gradients = torch.autograd.grad(sum(roots), [a, w], allow_unused=True)
        seen += [gradient for gradient in gradients if gradient is not None]
    for each in kept:
        found = each() if callable(each) else next(each) if hasattr(each, "send") else each
        if found is None:
            continue
        if isinstance(found, torch.UntypedStorage):
            found = torch.empty(0, dtype=DTYPE).set_(found)
        seen.append(torch.as_tensor(found).detach().clone())
    return [*seen, a.detach(), b, w.detach(), c]


def advice_of(text: str, call: Callable[[Any], Any], names: dict[str, Any] = NAMES) -> Advice:
    """What advise says of a function when it has been called."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(text)
        watch.forget()
        for name, function in ((PROBE, watch.probe), (CALLEE, watch.callee), (OPERAND, watch.operand)):
            setattr(builtins, name, function)
        tree = watch.watch(Source(path.read_bytes(), str(path)))
        call(function_of(compile(tree, str(path), "exec", dont_inherit=True), names))
        return advice_from(watch.found())


# What is not silent: a value that backward needs on another way, or another shape there.
LOUD = ("modified by an inplace operation", "doesn't match the broadcast shape", "refers to a single memory location")


def check(program: Program) -> str:
    text = source_of(program)
    plain = function_of(text)
    truth = {way: outcome(plain, way) for way in (True, False)}
    seen = len(text) % 2 == 0

    def watch_twice(watched: Any) -> None:
        for _ in range(2):
            compare(truth[seen], outcome(watched, seen), rtol=0)

    advice = advice_of(text, watch_twice)
    if not advice.changes:
        return "nothing is advised"
    (file,) = advice.files
    code = file.source.changed(file.chosen).decode()
    changed = function_of(code)
    try:
        compare(truth[seen], outcome(changed, seen), rtol=1e-9)
        try:
            other = outcome(changed, not seen)
        except RuntimeError as error:
            if any(words in str(error) for words in LOUD):
                return "on the other way it raises"
            raise
        compare(truth[not seen], other, rtol=1e-9)
    except Exception as error:
        raise engine.Disagreement(f"{error}\n{text}\n{code}") from error
    in_place = any(change.option.writes is not None for change in advice.changes)
    return "a variable is written" if in_place else "only out of place"


def compare(truth: list[torch.Tensor], seen: list[torch.Tensor], rtol: float) -> None:
    expect(len(truth) == len(seen), "more or fewer values are left")
    for one, other in zip(truth, seen, strict=True):
        expect(one.shape == other.shape and one.dtype == other.dtype, "another shape or dtype")
        scale = one.abs().nan_to_num(0, 0, 0).max().item() if one.numel() else 0.0
        expect(torch.allclose(one, other, rtol=rtol, atol=rtol * scale, equal_nan=True), "another value")


FUZZ = Fuzz(
    "advised",
    "Random functions, and the same with all that advise would change: values, gradients, and what others hold.",
    Step,
    lambda name: Generator(name).generate(),
    check,
    programs=20_000,
)

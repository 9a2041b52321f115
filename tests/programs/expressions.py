"""Random Python source around the ops out of place, with and without taking memory over: all that can be reached, bit for bit.

Each step is a statement or a definition; its nested expressions hand temporaries from op to op, and to holders of every kind.
After each step every value that a name, a container, a closure, a frame, a gradient, a view or an array leads to is compared, and
who shares memory with whom.
"""

from __future__ import annotations

import functools
import gc
import itertools
import types
import weakref
from collections import Counter
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import safe_inplace
from safe_inplace import _C

from ..op_table import OPS
from . import engine
from .engine import Fuzz, Program, Var, expect
from .tensors import values

SHAPE = (2, 3)
LENGTH = 8
DEPTH = 4
NAMES = {op.functional_name: op.arguments for op in OPS}
ARITY = {name: len(arguments) for name, arguments in NAMES.items()}

# {} is another expression. What gives a tensor of the same shape.
TORCH = [
    "({} * 2)",
    "({} + {})",
    "({} - 1)",
    "{}.sin()",
    "{}.exp()",
    "{}.sigmoid()",
    "{}.relu()",
    "{}.softmax(-1)",
    "torch.tanh({})",
    "torch.where({} > 0, {}, {})",
    "{}.clone()",
    "module({})",
    "module(({})[None])[0]",
    "({} / {}.norm())",
    "{}.double().float()",
]
# Views, aliases, and memory of another kind or form.
FORMS = [
    "{}.detach()",
    "{}.data",
    "{}.view(-1).view(2, 3)",
    "{}[:]",
    "{}[...]",
    "{}.t().contiguous().t()",
    "{}.t().t()",
    "torch.cat([{}, {}])[:2]",
    "torch.cat([{}, {}])[2:]",
    "{}[0].expand(2, 3)",
    "{}[:1].clone()",
    "{}.sum(0)",
    "{}.sum()",
    "{}.double()",
    "{}.bfloat16()",
    "torch.from_numpy({}.detach().numpy().copy())",
    "torch.from_numpy({}.detach().float().numpy())",
    "torch.from_dlpack({}.detach())",
    "torch.empty(0, dtype=({0}).dtype).set_({0}.detach())",
    "torch.ones(50).resize_(2, 3)",
    "torch.nn.Parameter({}.detach() * 1)",
    "{}.detach().clone().requires_grad_()",
]
# Who gets the tensor before it is handed on.
HOLDERS = [
    "keep({})",
    "keep_alias({})",
    "keep_view({})",
    "keep_numpy({})",
    "keep_storage({})",
    "keep_weakly({})",
    "keep_in_a_box({})",
    "keep_in_a_closure({})",
    "keep_in_a_generator({})",
    "keep_on_a_stack({})",
    "keep_in_a_partial({})",
    "keep_in_an_exception({})",
    "keep_in_an_attribute({})",
    "keep_its_gradient({})",
    "keep_marked({})",
    "keep_by_dlpack({})",
    "(w := {})",
    "last(kept, {})",
]
# {op}: an op of two operands.
CALLS = [
    "{op}(*({}, {}))",
    "{op}(*[{}, {}])",
    "{op}({}, *[{}])",
    "{op}(*keep_pair({}, {}))",
    "{op}(**{{'input': {}, 'other': {}}})",
    "{op}({}, **{{'other': {}}})",
    "{op}({}, 1.5)",
    "{op}({}, young({}))",
    "partial({op}, {})({})",
    "keep_partial({op}, {})({})",
    "next(map({op}, [{}], [{}]))",
    "next(map({op}, keep_all({}), keep_all({})))",
    "reduce({op}, [{}, {}, {}])",
    "list(accumulate([{}, {}, {}], {op}))[-1]",
    "MethodType({op}, {})({})",
    "keep_method({op}, {})({})",
    "{op}(MethodType(keep_partial({op}, {}), 1.5)(), {})",
    "{op}(MethodType(keep_method({op}, {}), 0.5)(), {})",
    "(lambda t: {op}(t, {}))({})",
    "(lambda t: {op}(t, t))({})",
    "(lambda t, u: {op}(t * 1, u))({}, {})",
    "(lambda *args: {op}(*args))({}, {})",
    "(lambda **named: {op}(named.pop('t'), named.pop('u')))(t={}, u={})",
    "{op}(w := {}, w)",
    "{op}(w, w := {})",
    "[{op}(t, {}) for t in [{}, {}]][-1]",
    "next({op}(t, {}) for t in ({},))",
    "{op}([{}].pop(), {})",
    "{op}(({} if len(kept) % 2 else {}), {})",
    "{op}(({} or {}) if False else {}, {})",
    "through({op}, {}, {})",
    "sent({op}, {}, {})",
    "awaited({op}, {}, {})",
    "in_a_function({op}, {}, {})",
    "checkpoint({op}, {}, {}, use_reentrant=False)",
    "checkpoint(lambda t: {op}(t * 2, {op}(t, 1)), {}, use_reentrant=False)",
    "Doubles.apply({op}, {})",
    "torch.ops.safe_inplace.{op}({}, {})",
    "[*map({op}, ({}, {}), ({}, {}))][1]",
    "caught({op}, {}, {})",
    "cached({op})({}, {})",
]
TEMPLATES = {"torch": TORCH, "form": FORMS, "holder": HOLDERS, "call": CALLS}
CONTEXTS = [
    "torch.no_grad()",
    "torch.inference_mode()",
    "torch.enable_grad()",
    "packing(lambda t: keep(t))",
    "packing(lambda t: keep(t.detach()))",
    "packing(lambda t: keep(t.clone()))",
    "packing(lambda t: (keep_weakly(t), t.clone())[1])",
    "FunctionMode()",
    "DispatchMode()",
    "guard('warn')",
    "nullcontext()",
]

State = Any


class Environment:
    """The names that a program finds, and what its helpers keep."""

    def __init__(self, counts: Counter[str]) -> None:
        self.kept: list[Any] = []
        self.box: dict[Any, Any] = {}
        self.noted: set[int] = set()
        self.own = object()
        self.marks = itertools.count()
        self.counts = counts
        module = torch.nn.Linear(3, 3)
        with torch.no_grad():
            module.weight.copy_(values((3, 3), 40))
            module.bias.copy_(values((3,), 60))
        module.register_forward_hook(self.hook)
        self.module = module

    def names(self) -> dict[str, Any]:
        given = {name: getattr(safe_inplace, name) for name in ARITY}
        helpers = {name: getattr(self, name) for name in dir(type(self)) if not name.startswith("_") and name != "names"}
        return (
            given
            | {f.__name__: f for f in (keep_nothing, through, sent, awaited, in_a_function, caught, cached)}
            | helpers
            | {
                "torch": torch,
                "partial": functools.partial,
                "reduce": functools.reduce,
                "accumulate": itertools.accumulate,
                "MethodType": types.MethodType,
                "checkpoint": checkpoint,
                "Doubles": Doubles,
                "nullcontext": keep_nothing,
                "guard": safe_inplace.guard,
                "module": self.module,
                "kept": self.kept,
                "box": self.box,
                "w": values(SHAPE, 80, torch.float32),
            }
        )

    # To tell programs that take memory over: the result has the memory of an argument, or of one that a call which raised let go.
    def note(self, tensor):
        self.noted.add(tensor.data_ptr())
        return tensor

    def told(self, tensor):
        self.counts["calls"] += 1
        self.counts["taken over"] += tensor.data_ptr() in self.noted
        self.noted.clear()
        return tensor

    def hook(self, module, args, output):
        if len(self.kept) % 3 == 0:
            self.kept.append(output)

    def keep(self, tensor):
        self.kept.append(tensor)
        return tensor

    def keep_alias(self, tensor):
        self.kept.append(tensor.detach())
        return tensor

    def keep_view(self, tensor):
        self.kept.append(tensor[..., :1])
        return tensor

    def keep_numpy(self, tensor):
        self.kept.append(tensor.detach().float().numpy())
        return tensor

    def keep_storage(self, tensor):
        self.kept.append(tensor.untyped_storage())
        return tensor

    def keep_weakly(self, tensor):
        self.kept.append(weakref.ref(tensor))
        return tensor

    def keep_in_a_box(self, tensor):
        self.box[len(self.box) % 4] = tensor
        return tensor

    def keep_in_a_closure(self, tensor):
        self.kept.append(lambda: tensor)
        return tensor

    def keep_in_a_generator(self, tensor):
        def generate(tensor):
            yield
            yield tensor

        self.kept.append(running := generate(tensor))
        next(running)
        return tensor

    def keep_on_a_stack(self, tensor):
        def generate(tensors):
            yield [tensors.pop(), (yield)]

        self.kept.append(running := generate([tensor]))
        next(running)
        return tensor

    def keep_in_a_partial(self, tensor):
        self.kept.append(functools.partial(print, tensor))
        return tensor

    def keep_in_an_exception(self, tensor):
        try:
            raise KeyError(self.box)
        except KeyError as error:
            self.kept.append(error.__traceback__)
        return tensor

    def keep_in_an_attribute(self, tensor):
        holder = tensor * 1
        holder.held = tensor
        self.kept.append(holder)
        return tensor

    def keep_its_gradient(self, tensor):
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: self.kept.append(grad))
        return tensor

    def keep_marked(self, tensor):
        tensor.mark = self.own, next(self.marks)
        return tensor

    def keep_by_dlpack(self, tensor):
        self.kept.append(torch.from_dlpack(tensor.detach()))
        return tensor

    def young(self, tensor):
        """Whatever the collector's lists show of those marked."""
        found = [t for t in gc.get_objects(0) if type(t) is torch.Tensor and getattr(t, "mark", (None,))[0] is self.own]
        self.kept.append(sorted(found, key=lambda t: t.mark[1]))
        return tensor

    def keep_pair(self, *pair):
        self.kept.append(pair)
        return pair

    def keep_all(self, *tensors):
        self.kept.append(list(tensors))
        return self.kept[-1]

    def keep_partial(self, function, tensor):
        self.kept.append(functools.partial(function, tensor))
        return self.kept[-1]

    def keep_method(self, function, tensor):
        self.kept.append(types.MethodType(function, tensor))
        return self.kept[-1]

    def last(self, kept, tensor):
        return next((t for t in reversed(kept) if type(t) is torch.Tensor and t.shape == tensor.shape), tensor)

    def closure(self, tensor, function):
        return lambda t: function(t, tensor)

    def generator(self, tensor, function):
        while True:
            tensor = function(tensor.detach() * 1, 0.5)
            yield tensor

    def packing(self, pack):
        return saved_tensors_hooks(pack, lambda packed: packed() if isinstance(packed, weakref.ref) else packed)

    def FunctionMode(self):
        environment = self

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if getattr(function, "__name__", None) in ARITY:
                    environment.kept.append(args[0])
                return function(*args, **(kwargs or {}))

        return Mode()

    def DispatchMode(self):
        environment = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if "safe_inplace" in str(function):
                    environment.kept.append(args[0])
                return function(*args, **(kwargs or {}))

        return Mode()


@contextmanager
def keep_nothing():
    yield


def through(function, *tensors):
    return function(*tensors)


def sent(function, a, b):
    def generate():
        yield function((yield), b)

    running = generate()
    next(running)
    return running.send(a)


def awaited(function, a, b):
    async def work():
        return function(a * 1, b)

    try:
        work().send(None)
    except StopIteration as stop:
        return stop.value


def in_a_function(function, a, b):
    c = a * 1
    d = c
    del c
    try:
        return function(d, function(b * 1, d))
    finally:
        d = None


def caught(function, a, b):
    try:
        return function(a * 1, function(b * 1, torch.ones(7)))
    except RuntimeError as error:
        return function(a * 1, float(len(str(error)) > 0))


def cached(function):
    return functools.lru_cache(function)


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, tensor):
        ctx.save_for_backward(result := function(tensor * 1, 2))
        return result * 1

    @staticmethod
    def backward(ctx, grad):
        return None, safe_inplace.mul(grad * 1, ctx.saved_tensors[0].cos())


def render(source: Any) -> str:
    return "".join(map(render, source)) if isinstance(source, tuple) else repr(source) if isinstance(source, Var) else source


class Generator(engine.Generator):
    """What it knows of a variable is of what kind it is."""

    def __init__(self, name: str) -> None:
        self.deleted: set[Var] = set()
        self.iterated = 0
        self.locals: list[str] = []
        super().__init__(name)

    def candidates(self):
        return [var for var in self.known if var not in self.deleted]

    def generate(self) -> Program:
        for _ in range(3):
            Leaf.generate(self)
        for _ in range(self.rng.randint(3, LENGTH)):
            (kind,) = self.choose(Step)
            kind.generate(self)
        Backward.generate(self)
        return self.program

    def fill(self, template: str, depth: int, **named: str) -> tuple[Any, ...]:
        """The template's source, an expression in each gap."""
        for key, value in named.items():
            template = template.replace("{" + key + "}", value)
        if "{0}" in template:
            again = self.expression(depth)
            pieces = template.split("{0}")
            return tuple(p for piece in pieces for p in (piece, again))[:-1]
        pieces = [piece.replace("{{", "{").replace("}}", "}") for piece in template.split("{}")]
        source: list[Any] = [pieces[0]]
        for piece in pieces[1:]:
            source += [self.expression(depth), piece]
        return tuple(source)

    def atom(self) -> Any:
        if self.locals and self.rng.random() < 0.5:
            return self.rng.choice(self.locals)
        return self.pick(lambda known: known == "tensor")

    def expression(self, depth: int) -> Any:
        rng = self.rng
        if depth <= 0:
            return self.atom()
        kind = rng.choices(["atom", "op", "call", "torch", "form", "holder", "used"], [2, 8, 3, 5, 1, 2, 1])[0]
        if kind == "atom":
            return self.atom()
        if kind == "op":
            return self.op(depth)
        if kind == "used":
            return self.used(depth)
        # Python has no names bound in what a comprehension iterates over.
        templates = [t for t in TEMPLATES[kind] if not (self.iterated and ":=" in t)]
        template = rng.choice(templates)
        self.iterated += " for t in " in template
        source = self.fill(template, depth - 1, op=rng.choice(["add", "mul"]))
        self.iterated -= " for t in " in template
        return source

    def op(self, depth: int) -> Any:
        rng = self.rng
        name = rng.choice(list(ARITY))
        told = rng.random() < 0.5
        by_name, operands = False, []
        for i in range(ARITY[name]):
            operand = rng.choice(["0.5", "2", "-1.0"]) if i and rng.random() < 0.15 else self.expression(depth - 1)
            if told and not isinstance(operand, (Var, str)):
                operand = ("note(", operand, ")")
            by_name = by_name or rng.random() < 0.1
            operands.append((NAMES[name][i], "=", operand) if by_name else operand)
        if name == "add" and rng.random() < 0.2:
            operands.append("alpha=2")
        if name == "addcmul" and rng.random() < 0.2:
            operands.append("value=0.5")
        source = (f"{name}(", *itertools.chain.from_iterable((operand, ", ") for operand in operands[:-1]), operands[-1], ")")
        return ("told(", source, ")") if told else source

    def used(self, depth: int) -> Any:
        """By a function or a generator of an earlier step."""
        var = self.pick(lambda known: known != "tensor")
        if var is None:
            return self.op(depth)
        if self.known[var] == "generator":
            return ("next(", var, ")")
        return (var, "(", self.expression(depth - 1), ")")


class Step(engine.Step):
    """A statement. `run` executes it among the names of the run."""

    source: tuple

    def __str__(self) -> str:
        return render(self.source)

    def run(self, run):
        run.execute(str(self))


class Producer(Step, engine.Producer):
    """Its source is an expression."""

    def run(self, run):
        run.execute(f"{Var(len(run.variables))} = {self}")
        return True


class Leaf(Producer):
    @classmethod
    def generate(cls, generator):
        offset = generator.rng.randrange(1000)
        trained = generator.rng.choice(["", ".requires_grad_()"])
        shape = generator.rng.choice([SHAPE, SHAPE, SHAPE, (3,)])
        return generator.add(cls((f"values({shape}, {offset}, torch.float32){trained}",)), "tensor")


class Assign(Producer):
    weight = 6

    @classmethod
    def generate(cls, generator):
        return generator.add(cls((generator.expression(DEPTH),)), "tensor")


class InAFunction(Producer):
    """Statements whose names are in a frame of their own."""

    weight = 4

    @classmethod
    def generate(cls, generator):
        rng = generator.rng
        source: list[Any] = ["def function(w=w):\n"]
        for name in "abcd"[: rng.randint(1, 4)]:
            source += [f"    {name} = ", generator.expression(DEPTH - 1), "\n"]
            generator.locals.append(name)
            if rng.random() < 0.3:
                source += [f"    {generator.locals.pop(rng.randrange(len(generator.locals)))} = None\n"]
        source += ["    return ", generator.expression(DEPTH - 1)]
        generator.locals.clear()
        return generator.add(cls(tuple(source)), "tensor")

    def run(self, run):
        run.execute(f"{self}\n{Var(len(run.variables))} = function()\ndel function")
        return True


class Closure(Producer):
    weight = 1

    @classmethod
    def generate(cls, generator):
        return generator.add(cls(("closure(", generator.expression(2), f", {generator.rng.choice(['add', 'mul'])})")), "function")


class Default(Producer):
    weight = 1

    @classmethod
    def generate(cls, generator):
        return generator.add(cls(("lambda t, u=", generator.expression(2), ": add(mul(t * 1, u), u)")), "function")


class Running(Producer):
    weight = 1

    @classmethod
    def generate(cls, generator):
        op = generator.rng.choice(["add", "mul"])
        return generator.add(cls(("generator(", generator.expression(2), f", {op})")), "generator")


class Rebind(Step):
    weight = 2

    @classmethod
    def generate(cls, generator):
        var = generator.pick(lambda known: known == "tensor")
        generator.add(cls((var, " = ", generator.expression(DEPTH))))


class Augment(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        var = generator.pick(lambda known: known == "tensor")
        generator.add(cls((var, generator.rng.choice([" += ", " *= "]), generator.expression(2))))


class Write(Step):
    """Whoever shares the memory sees it."""

    weight = 1

    @classmethod
    def generate(cls, generator):
        var = generator.pick(lambda known: known == "tensor")
        generator.add(cls((var, generator.rng.choice([".detach().add_(1)", ".data.mul_(2)", ".detach().zero_()"]))))


class Delete(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        if len(generator.candidates()) > 3:
            var = generator.pick()
            if generator.known[var] != "tensor" or sum(generator.known[v] == "tensor" for v in generator.candidates()) > 2:
                generator.deleted.add(var)
                generator.add(cls(("del ", var)))


class Keep(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        form = generator.rng.choice(["kept.append({})", "box[0] = {}", "kept[-1:] = [{}, {}]", "box.update(t={})"])
        generator.add(cls(generator.fill(form, 3)))


class Drop(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        forms = ["kept.clear()", "box.clear()", "del kept[::2]", "box.popitem() if box else None"]
        generator.add(cls((generator.rng.choice(forms),)))


class Loop(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        source = generator.fill("for t in ({}, {}):\n    kept.append(add(t, mul({}, t)))\n    t = None", 2)
        generator.add(cls(source))


class Repeat(Step):
    """Often enough for the interpreter to specialize it."""

    weight = 1

    @classmethod
    def generate(cls, generator):
        generator.add(cls(generator.fill("for _ in range(20):\n    w = add({}, {})", 2)))


class Try(Step):
    weight = 1

    @classmethod
    def generate(cls, generator):
        raising = "add({}, torch.ones(7))\nexcept RuntimeError as error:\n    kept.append(error)"
        rest = generator.rng.choice([raising, "add({}, {})\nfinally:\n    kept.append({})"])
        generator.add(cls(generator.fill(f"try:\n    w = {{}}\n    {rest}", 2)))


class With(Step):
    weight = 2

    @classmethod
    def generate(cls, generator):
        context = generator.rng.choice(CONTEXTS)
        generator.add(cls((f"with {context}:\n    w = ", generator.expression(3), "\n    w = w.clone()")))


class Gradients(Step):
    """Of what there is so far; the graph is kept, or freed."""

    weight = 1

    @classmethod
    def generate(cls, generator):
        var = generator.pick(lambda known: known == "tensor")
        form = generator.rng.choice(["backward({}, retain_graph=True)", "backward({})", "kept.extend(differentiate({}))"])
        before, _, after = form.partition("{}")
        generator.add(cls((before, var, after)))


class Backward(Step):
    """Of all there is."""

    @classmethod
    def generate(cls, generator):
        found = [var for var in generator.candidates() if generator.known[var] == "tensor"]
        generator.add(cls(("backward(", *itertools.chain.from_iterable((var, ", ") for var in found), ")")))


def backward(*tensors, retain_graph=False):
    losses = [(t.float() * (i + 1)).sum() for i, t in enumerate(tensors) if t.requires_grad]
    if losses:
        sum(losses).backward(retain_graph=retain_graph)


def differentiate(tensor):
    """By its leaves, and the sum of that once more."""
    leaves = leaves_of(tensor.grad_fn) if tensor.requires_grad else []
    if not leaves:
        return []
    first = torch.autograd.grad(tensor.float().sum(), leaves, create_graph=True, allow_unused=True)
    twice = [g for g in first if g is not None and g.requires_grad]
    second = torch.autograd.grad(sum(g.sum() for g in twice), leaves, allow_unused=True, retain_graph=True) if twice else ()
    return [g for g in (*first, *second) if g is not None]


def leaves_of(node):
    found, seen, todo = [], set(), [node]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not any(node.variable is leaf for leaf in found):
            found.append(node.variable)
        todo.extend(next_node for next_node, _ in reversed(node.next_functions))
    return found


compiled = functools.lru_cache(1000)(compile)


class Run(engine.Run):
    def __init__(self, program: Program, ops: dict[str, Any] | None = None) -> None:
        super().__init__(program)
        self.counts: Counter[str] = Counter()
        self.environment = Environment(self.counts)
        self.names = self.environment.names()
        self.names |= {f.__name__: f for f in (values, backward, differentiate)} | (ops or {})

    def execute(self, source: str) -> None:
        try:
            exec(compiled(source, "<program>", "exec"), self.names)
        except (ArithmeticError, AttributeError, LookupError, NameError, StopIteration, TypeError, ValueError) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    def state(self) -> list[tuple[str, State]]:
        roots = {name: value for name, value in self.names.items() if name[0] == "v" and name[1:].isdigit()}
        reached = Reached()
        for name in ("w", "kept", "box", *roots):
            reached.visit(name, self.names[name])
        for name, parameter in self.environment.module.named_parameters():
            reached.visit(name, parameter)
        return reached.found


def is_leaf(tensor):
    try:
        return tensor.is_leaf
    except RuntimeError as error:
        return str(error)  # torch refuses to say: a view made without gradients whose base was written with them


class Reached:
    """All that can be seen, each with the way to it."""

    def __init__(self) -> None:
        self.found: list[tuple[str, State]] = []
        self.seen: dict[int, int] = {}
        self.storages: dict[int, int] = {}

    def visit(self, path: str, value: Any) -> None:
        if getattr(value, "__name__", None) in ARITY:
            return  # an op, or what stands for it
        if id(value) in self.seen:
            self.found.append((path, ("again", self.seen[id(value)])))
            return
        self.seen[id(value)] = len(self.seen)
        if isinstance(value, torch.Tensor):
            self.found.append((path, self.of_tensor(value)))
            if is_leaf(value) is True and value.grad is not None:
                self.visit(f"{path}.grad", value.grad)
            self.visit_all(path, vars(value))
        elif isinstance(value, numpy.ndarray):
            self.found.append((path, (self.storage(value.ctypes.data), value.tobytes())))
        elif isinstance(value, torch.UntypedStorage):
            self.found.append((path, (self.storage(value.data_ptr()), bytes(value.tolist()))))
        elif isinstance(value, weakref.ref):
            target = value()
            self.found.append((path, target is None))
            if target is not None:
                self.visit(f"{path}()", target)
        elif isinstance(value, (list, tuple)):
            self.visit_all(path, dict(enumerate(value)))
        elif isinstance(value, dict):
            self.visit_all(path, value)
        elif isinstance(value, types.FunctionType):
            self.visit_all(path, dict(enumerate((*(value.__closure__ or ()), *(value.__defaults__ or ())))))
        elif isinstance(value, BaseException):
            self.found.append((path, str(value)))
            self.visit(f"{path}.traceback", value.__traceback__)
        elif isinstance(value, types.TracebackType):
            while value is not None:
                if value.tb_frame.f_code.co_filename in (__file__, "<program>"):
                    self.visit_all(path, {n: v for n, v in value.tb_frame.f_locals.items() if isinstance(v, torch.Tensor)})
                value = value.tb_next
        elif isinstance(value, (types.CellType, types.GeneratorType, functools.partial, types.MethodType)):
            self.visit_all(path, dict(enumerate(gc.get_referents(value))))

    def visit_all(self, path: str, values: dict[Any, Any]) -> None:
        for key, value in values.items():
            self.visit(f"{path}[{key!r}]", value)

    def of_tensor(self, tensor: torch.Tensor) -> State:
        start = tensor.data_ptr() - tensor.storage_offset() * tensor.element_size() if tensor.numel() else 0
        data = tensor.detach().resolve_conj().resolve_neg().reshape(-1).clone()
        return (
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            is_leaf(tensor),
            tensor.requires_grad,
            tensor.is_inference() or tensor._version,
            self.storage(start),
            data.view(torch.uint8).numpy().tobytes() if tensor.numel() else b"",
        )

    def storage(self, address: int) -> int:
        """Which of those met so far it is: the same in both runs, unlike its address."""
        return self.storages.setdefault(address, len(self.storages))


@functools.cache
def first_use() -> None:
    """What torch imports for a first call leaves frames behind, with all that lies in them."""
    checkpoint(lambda t: t * 1, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    with safe_inplace.guard("warn"):
        torch.ones(2).add_(1)


def trace(program: Program, look: bool, ops: dict[str, Any] | None = None) -> tuple[Run, list[list[tuple[str, State]]]]:
    first_use()
    before = _C.look_for_temporaries(look)
    collects = gc.isenabled()
    gc.disable()  # what dies when is the same in both
    try:
        run = Run(program, ops)
        states = []
        for index in range(len(program.steps)):
            refused = run.step(index)
            states.append(run.state())
            if refused is not None:
                break
        return run, states
    finally:
        _C.look_for_temporaries(before)
        if collects:
            gc.enable()


def check(program: Program, ops: dict[str, Any] | None = None) -> str:
    fresh, expected = trace(program, False)
    run, states = trace(program, True, ops)
    for index, (state, other) in enumerate(zip(states, expected, strict=False)):
        for (path, value), (other_path, other_value) in zip(state, other, strict=False):
            expect(path == other_path, f"step {index}: {path} is reached, {other_path} without")
            expect(value == other_value, f"step {index}: {path} is {value}, {other_value} without")
        expect(len(state) == len(other), f"step {index}: {len(state)} are reached, {len(other)} without")
    expect(str(run.refused) == str(fresh.refused), f"{run.refused} instead of {fresh.refused}")
    taken = "with" if run.counts["taken over"] else "without"
    return f"{'finishes' if run.refused is None else 'is refused'}, {taken} memory seen to be taken over"


def generate(name: str) -> Program:
    return Generator(name).generate()


FUZZ = Fuzz("expressions", __doc__.split("\n")[0], Step, generate, check, programs=50_000)

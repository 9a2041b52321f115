"""The differential test: random programs of views, saves and writes, by ours and by torch.

A program is run three ways:

* `Ours`, with safe_inplace's ops;
* `Torch`, with torch's own in-place methods (one after the other for the fused forms), or
  out of place and `copy_` where an operand of a fused form shares the input's memory;
* `Functional`, which never writes: memory is a value, a write makes the next value. It
  decides who is right where torch refuses and ours does not.

They must agree in every value and gradient, or raise at the same step.

    python -m tests.fuzz --programs 100000 --seed 0
    python -m tests.fuzz --seed 0 --only 1234        # print and run a single program
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from .op_table import BY_NAME, OPS

SHAPES = [(2, 3), (3,), (3, 3), (2, 2, 3), (), (1, 3), (4, 2), (2, 1, 2), (0, 3)]
SHAPE_WEIGHTS = [6, 3, 4, 3, 1, 1, 2, 1, 1]
NUMBERS = [0.5, -1.0, 2, 1.0, 0.0, -0.25]
UNARY = ["sin", "sigmoid", "tanh", "square", "clone", "neg", "exp"]
PLAIN_WRITES = ["mul_number", "zero_", "sigmoid_", "sub_number", "fill_"]

_pool = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.7


def values(shape, offset, dtype=torch.float64):
    count = 1
    for size in shape:
        count *= size
    return _pool[offset : offset + count].view(shape).to(dtype, copy=True)


@dataclass
class Variable:
    """What the generator knows about a variable without running anything."""

    shape: tuple
    memory: int
    requires_grad: bool = False
    leaf: bool = False
    contiguous: bool = True


# The steps that make a variable, and the places of the variables among a step's fields.
PRODUCERS = {"leaf", "unary", "binary", "view", "detach", "grad"}
REFERENCES = {
    "unary": (1,),
    "binary": (1, 2),
    "view": (1,),
    "detach": (1,),
    "grad": (1, 2),
    "write": (1, 3),
    "plain_write": (1,),
    "copy": (1, 2),
    "set_slice": (1, 3),
    "hook": (1,),
    "retain_grad": (1,),
    "backward": (1,),
    "grad_write": (1,),
}


@dataclass
class Program:
    producers: ClassVar = PRODUCERS
    references: ClassVar = REFERENCES

    seed: str
    dtype: torch.dtype
    steps: list = field(default_factory=list)
    nudge: float = 0.0  # relative, of the leaves' values

    def __str__(self):
        lines = [f"# {self.seed}, {self.dtype}"]
        count = 0
        for index, step in enumerate(self.steps):
            target = ""
            if step[0] in self.producers:
                target = f"v{count} = "
                count += 1
            arguments = ", ".join(map(repr, step[1:]))
            lines.append(f"{index:3}: {target}{step[0]}({arguments})")
        return "\n".join(lines)


def broadcasts(shape, target):
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))


def generate(seed) -> Program:
    """The program of a seed. Variables in its steps are indices in order of creation."""
    rng = random.Random(seed)
    dtype = torch.float32 if rng.random() < 0.1 else torch.float64
    program = Program(str(seed), dtype)
    steps = program.steps
    variables: list[Variable] = []

    def add(step, variable):
        steps.append(step)
        variables.append(variable)

    def fresh_memory():
        return len(variables)

    def leaf(shape, requires_grad):
        add(
            ("leaf", shape, rng.randrange(4000), requires_grad),
            Variable(shape, fresh_memory(), requires_grad, leaf=True),
        )

    def pick(condition=lambda v: True):
        found = [i for i, v in enumerate(variables) if condition(v)]
        if not found:
            return None
        # what was made last is what a program works with
        return found[-1] if rng.random() < 0.4 else rng.choice(found)

    def unary(source=None, name=None):
        source = pick() if source is None else source
        v = variables[source]
        name = name or rng.choice(UNARY)
        add(
            ("unary", source, name),
            Variable(v.shape, fresh_memory(), v.requires_grad, contiguous=v.contiguous),
        )

    def binary():
        a = pick()
        b = pick(lambda v: broadcasts(v.shape, variables[a].shape))
        va, vb = variables[a], variables[b]
        add(
            ("binary", a, b, rng.choice("+*")),
            Variable(
                va.shape,
                fresh_memory(),
                va.requires_grad or vb.requires_grad,
                contiguous=va.contiguous and vb.contiguous and va.shape == vb.shape,
            ),
        )

    def view():
        source = pick(lambda v: not v.leaf or not v.requires_grad or rng.random() < 0.2)
        if source is None:
            return
        v = variables[source]
        kinds = ["alias", "unsqueeze"]
        if v.shape:
            kinds += ["select", "narrow", "narrow", "select"] if 0 not in v.shape else ["narrow"]
        if len(v.shape) > 1:
            kinds += ["transpose", "unbind"] if 0 not in v.shape else ["transpose"]
        if len(v.shape) == 2 and v.shape[0] == v.shape[1]:
            kinds.append("diagonal")
        if v.contiguous:
            kinds.append("flatten")
        if rng.random() < 0.1:
            kinds = ["expand"]
        kind = rng.choice(kinds)
        shape, contiguous = list(v.shape), False
        arguments: tuple = ()
        if kind == "select" or kind == "unbind":
            dim = rng.randrange(len(shape))
            arguments = (dim, rng.randrange(shape[dim]))
            contiguous = v.contiguous and dim == 0
            del shape[dim]
        elif kind == "narrow":
            dim = rng.randrange(len(shape))
            start = rng.randrange(shape[dim] + 1) if shape[dim] else 0
            length = rng.randint(min(1, shape[dim] - start), shape[dim] - start)
            arguments = (dim, start, length)
            contiguous = v.contiguous and dim == 0
            shape[dim] = length
        elif kind == "transpose":
            arguments = tuple(rng.sample(range(len(shape)), 2))
            a, b = arguments
            shape[a], shape[b] = shape[b], shape[a]
        elif kind == "diagonal":
            shape = shape[:1]
        elif kind == "flatten":
            count = 1
            for size in shape:
                count *= size
            shape, contiguous = [count], True
        elif kind == "unsqueeze":
            dim = rng.randint(0, len(shape))
            arguments = (dim,)
            shape.insert(dim, 1)
            contiguous = v.contiguous
        elif kind == "expand":
            arguments = (2,)
            shape.insert(0, 2)
        elif kind == "alias":
            contiguous = v.contiguous
        add(
            ("view", source, kind, arguments, rng.random() < 0.04),
            Variable(tuple(shape), v.memory, v.requires_grad, contiguous=contiguous),
        )

    def detach():
        source = pick()
        v = variables[source]
        add(("detach", source), Variable(v.shape, v.memory, False, contiguous=v.contiguous))

    def written(target, operands, no_grad):
        """Everything that shares the memory may require grad now."""
        if no_grad or not any(variables[o].requires_grad for o in operands):
            return
        memory = variables[target].memory
        for v in variables:
            if v.memory == memory:
                v.leaf &= v.requires_grad
                v.requires_grad = True

    def target(no_grad):
        """A written leaf that requires grad is refused: now and then, to see it refused."""
        careless = rng.random() < 0.02
        return pick(lambda v: careless or no_grad or not (v.leaf and v.requires_grad))

    def write():
        no_grad = rng.random() < 0.08
        destination = target(no_grad)
        if destination is None:
            return
        if rng.random() < 0.4:
            # nothing has saved what was just made: most programs should get through their backward
            unary(destination, rng.choice(["clone", "neg"]))
            destination = len(variables) - 1
        op = rng.choice(OPS)
        operands = []
        for _ in op.operands:
            if rng.random() < 0.2:
                operands.append(float(rng.choice(NUMBERS)))
            elif rng.random() < 0.08:
                operands.append(destination)
            else:
                shape = variables[destination].shape
                careless = rng.random() < 0.01
                operands.append(pick(lambda v: careless or broadcasts(v.shape, shape)))
                if operands[-1] is None:
                    operands[-1] = 0.5
        parameter = rng.choice(NUMBERS) if op.parameter and rng.random() < 0.4 else None
        steps.append(("write", destination, op.name, tuple(operands), parameter, no_grad))
        written(destination, [o for o in operands if isinstance(o, int)], no_grad)

    def plain_write():
        no_grad = rng.random() < 0.1
        destination = target(no_grad)
        if destination is None:
            return
        steps.append(
            ("plain_write", destination, rng.choice(PLAIN_WRITES), rng.choice(NUMBERS), no_grad)
        )

    def copy():
        destination = target(False)
        if destination is None:
            return
        shape = variables[destination].shape
        source = pick(lambda v: broadcasts(v.shape, shape))
        if source is None:
            return
        steps.append(("copy", destination, source))
        written(destination, [source], False)

    def set_slice():
        destination = target(False)
        if destination is None or not variables[destination].shape:
            return
        v = variables[destination]
        if v.shape[0] == 0:
            return
        index = rng.randrange(v.shape[0])
        source = pick(lambda s: broadcasts(s.shape, v.shape[1:]))
        steps.append(("set_slice", destination, index, 0.5 if source is None else source))
        if source is not None:
            written(destination, [source], False)

    def differentiable():
        return pick(lambda v: v.requires_grad)

    def watch():
        source = differentiable()
        if source is not None:
            steps.append((rng.choice(["hook", "retain_grad"]), source))

    def backward():
        source = differentiable()
        if source is None:
            return
        kind = rng.choice(["sum", "weighted", "weighted", "sin", "given", "two"])
        steps.append(("backward", source, kind, rng.randrange(4000), rng.random() < 0.5))

    def grad():
        source = differentiable()
        wrt = pick(lambda v: v.leaf and v.requires_grad)
        if source is None or wrt is None:
            return
        create_graph = rng.random() < 0.5
        kind = rng.choice(["weighted", "sin", "given"])
        # a gradient's strides and its sharing of memory with others are torch's business
        add(
            ("grad", source, wrt, kind, rng.randrange(4000), create_graph, rng.random() < 0.7),
            Variable(variables[wrt].shape, fresh_memory(), create_graph, contiguous=False),
        )

    def grad_write():
        source = pick(lambda v: v.leaf and v.requires_grad)
        if source is not None:
            steps.append(("grad_write", source))

    shape = rng.choices(SHAPES, SHAPE_WEIGHTS)[0]
    leaf(shape, rng.random() < 0.85)
    leaf(shape[-1:], rng.random() < 0.7)
    if rng.random() < 0.5:
        leaf(rng.choice([(), (1,), shape]), rng.random() < 0.7)
    unary(0, rng.choice(["clone", "neg", "sin", "sigmoid"]))
    actions = [
        (write, 8),
        (view, 4),
        (unary, 2.5),
        (binary, 2),
        (plain_write, 0.7),
        (copy, 0.7),
        (set_slice, 0.5),
        (detach, 0.5),
        (watch, 0.5),
        (backward, 0.7),
        (grad, 0.5),
        (grad_write, 0.3),
    ]
    names, weights = zip(*actions, strict=True)
    for action in rng.choices(names, weights, k=rng.randint(3, 11)):
        action()
    if not any(step[0] == "write" for step in steps):
        write()
    backward()
    return program


def take_view(tensor, kind, arguments):
    if kind == "alias":
        return tensor[...]
    if kind == "select":
        return tensor.select(*arguments)
    if kind == "unbind":
        return tensor.unbind(arguments[0])[arguments[1]]
    if kind == "narrow":
        return tensor.narrow(*arguments)
    if kind == "transpose":
        return tensor.transpose(*arguments)
    if kind == "diagonal":
        return tensor.diagonal()
    if kind == "flatten":
        return tensor.view(-1)
    if kind == "unsqueeze":
        return tensor.unsqueeze(*arguments)
    if kind == "expand":
        return tensor.expand(*arguments, *tensor.shape)
    raise ValueError(kind)


def take_unary(tensor, name):
    if name == "square":
        return tensor * tensor
    if name == "exp":
        return tensor.tanh().exp()
    return getattr(tensor, name)()


class Refused(Exception):
    def __init__(self, step, error):
        self.step, self.error = step, error


class Run:
    """One way to run a program; `variables` are its tensors so far."""

    def __init__(self, program):
        self.program = program
        self.variables = []
        self.leaves = []
        self.seen = []

    def run(self, stop=None):
        """Until the end, the refusal of a step, or before the step `stop`."""
        self.stopped = stop
        for index in range(len(self.program.steps[:stop])):
            self.step(index)
        return self

    def step(self, index):
        name, *arguments = self.program.steps[index]
        try:
            getattr(self, "do_" + name)(*arguments)
        except RuntimeError as error:
            raise Refused(index, error) from error

    def read(self, index):
        return self.variables[index]

    def result(self):
        """Values of all variables, and gradients of the leaves."""
        grads = [t.grad if t.is_leaf else None for t in self.leaves]
        return [self.read(i) for i in range(len(self.variables))], grads, self.seen

    def do_leaf(self, shape, offset, requires_grad):
        tensor = values(shape, offset, self.program.dtype).mul_(1 + self.program.nudge).requires_grad_(requires_grad)
        self.leaves.append(tensor)
        self.add(tensor)

    def add(self, tensor):
        self.variables.append(tensor)

    def do_unary(self, source, name):
        self.add(take_unary(self.read(source), name))

    def do_binary(self, a, b, sign):
        a, b = self.read(a), self.read(b)
        self.add(a + b if sign == "+" else a * b)

    def do_view(self, source, kind, arguments, no_grad):
        with torch.no_grad() if no_grad else contextlib.nullcontext():
            self.variables.append(take_view(self.variables[source], kind, arguments))

    def do_detach(self, source):
        self.variables.append(self.variables[source].detach())

    def operand(self, operand):
        return self.read(operand) if isinstance(operand, int) else operand

    def do_write(self, target, name, operands, parameter, no_grad):
        op = BY_NAME[name]
        parameters = op.parameters(parameter)
        operands = [self.operand(o) for o in operands]
        if no_grad:
            with torch.no_grad():
                self.write(op, self.variables[target], operands, parameters)
        else:
            self.write(op, self.variables[target], operands, parameters)

    def do_plain_write(self, target, name, number, no_grad):
        tensor = self.variables[target]
        with torch.no_grad() if no_grad else contextlib.nullcontext():
            if name == "mul_number":
                tensor.mul_(number)
            elif name == "sub_number":
                tensor.sub_(number)
            elif name == "fill_":
                tensor.fill_(number)
            else:
                getattr(tensor, name)()

    def do_copy(self, target, source):
        # cloned: torch's copy of a row onto a column of the same matrix reads what it wrote
        self.variables[target].copy_(self.variables[source].clone())

    def do_set_slice(self, target, index, source):
        source = self.variables[source].clone() if isinstance(source, int) else source
        self.variables[target][index] = source

    def do_hook(self, source):
        def hook(grad):
            self.seen.append((grad, grad.detach().clone()))

        self.refreshed(source).register_hook(hook)

    def do_retain_grad(self, source):
        self.refreshed(source).retain_grad()

    def refreshed(self, source):
        """torch's `register_hook` crashes on a view whose base was written, if nobody has
        asked for its new `grad_fn` yet."""
        tensor = self.variables[source]
        assert tensor.grad_fn is not None or tensor.is_leaf
        return tensor

    def loss(self, tensor, kind, offset):
        if kind == "sum":
            return tensor.sum(), None
        if kind == "sin":
            return tensor.sin().sum(), None
        weight = values(tensor.shape, offset % 2000, tensor.dtype)
        if kind == "given":
            return tensor, weight
        if kind == "two":
            return (tensor * weight).sum() + (tensor * 0.5).sum(), None
        return (tensor * weight).sum(), None

    def do_backward(self, source, kind, offset, retain_graph):
        loss, given = self.loss(self.read(source), kind, offset)
        loss.backward(given, retain_graph=retain_graph)
        if given is not None:
            self.unchanged(given, offset)

    def do_grad(self, source, wrt, kind, offset, create_graph, retain_graph):
        loss, given = self.loss(self.read(source), kind, offset)
        (grad,) = torch.autograd.grad(
            loss,
            self.gradient_input(wrt),
            given,
            create_graph=create_graph,
            retain_graph=create_graph or retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        if given is not None:
            self.unchanged(given, offset)
        # torch may hand out the caller's own tensor, or a view of it
        self.add(grad * 1)

    def unchanged(self, given, offset):
        if not torch.equal(given, values(given.shape, offset % 2000, given.dtype)):
            raise AssertionError("the caller's gradient was written")

    def gradient_input(self, index):
        return self.variables[index]

    def do_grad_write(self, source):
        leaf = self.gradient_input(source)
        if leaf.grad is not None:
            with torch.no_grad():
                leaf.grad.mul_(0.5)


class Ours(Run):
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


class Torch(Run):
    extra_nodes = False  # hooks set before them see what ours has no node for

    def write(self, op, target, operands, parameters):
        # Not their addresses: empty ones have none.
        memory = target.untyped_storage()._cdata
        shared = [o for o in operands if isinstance(o, torch.Tensor) and o.untyped_storage()._cdata == memory]
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


def same_elements(a, b):
    """Element by element the same memory: what torch's kernels may read while they write.

    Overlaps that torch finds too hard to detect, as of a matrix and its diagonal, it lets
    through, and reads what it has just written.
    """
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def refuse_partial_overlap(target, operands):
    """Torch's own refusal, tried on memory that autograd does not watch."""
    data = target.data
    before = data.clone()
    for operand in operands:
        data.add_(operand.data)
    data.copy_(before)


class Unsupported(Exception):
    """The functional reference has no meaning for this step."""


class Functional(Run):
    """Nothing is written: each memory has a value per autograd family of its views.

    A family is the tensors that are differentiable views of one another; `detach` starts
    another one over the same memory. A write through a member makes the next value of its
    family; the other families, and all of them under `no_grad`, follow in value only.
    """

    def __init__(self, program):
        super().__init__(program)
        self.families = []  # [memory, value]
        self.next_memory = 0
        self.no_grad_views = set()

    def add(self, tensor):
        self.families.append([self.next_memory, tensor])
        self.next_memory += 1
        self.variables.append((len(self.families) - 1, ()))

    def read(self, index):
        family, chain = self.variables[index]
        return self.through(self.families[family][1], chain)

    @staticmethod
    def through(tensor, chain):
        for kind, arguments in chain:
            tensor = take_view(tensor, kind, arguments)
        return tensor

    def gradient_input(self, index):
        return self.leaf_of[index]

    def do_leaf(self, shape, offset, requires_grad):
        if not hasattr(self, "leaf_of"):
            self.leaf_of = {}
        super().do_leaf(shape, offset, requires_grad)
        self.leaf_of[len(self.variables) - 1] = self.leaves[-1]

    def do_view(self, source, kind, arguments, no_grad):
        if no_grad:
            # It requires grad when its base does, without a grad_fn until its base gets one.
            raise Unsupported("a view made under no_grad")
        family, chain = self.variables[source]
        self.variables.append((family, (*chain, (kind, arguments))))

    def do_detach(self, source):
        family, chain = self.variables[source]
        memory, value = self.families[family]
        self.families.append([memory, value.detach()])
        self.variables.append((len(self.families) - 1, chain))

    def assign(self, target, value, no_grad=False):
        family, chain = self.variables[target]
        if any(kind == "expand" for kind, _ in chain):
            raise Unsupported("torch's fill_ of an expanded view")
        memory, old = self.families[family]
        new = old.clone()
        view = self.through(new, [("select", c[1]) if c[0] == "unbind" else c for c in chain])
        if chain and not view.numel() and value.requires_grad:
            # A leaf that took part in it has a gradient of None in torch's second derivatives, in place, and one of 0 here.
            raise Unsupported("a write through an empty view")
        view.copy_(value)
        for index, (other, current) in enumerate(self.families):
            if other != memory:
                continue
            if index == family and not no_grad:
                self.families[index][1] = new
            else:
                # gradients pass through as if the write had not been; exact in value
                self.families[index][1] = _with_value(current, new)

    def do_write(self, target, name, operands, parameter, no_grad):
        op = BY_NAME[name]
        operands = [self.operand(o) for o in operands]
        value = op.out_of_place(self.read(target), *operands, **op.parameters(parameter))
        self.assign(target, value, no_grad)

    def do_plain_write(self, target, name, number, no_grad):
        tensor = self.read(target)
        value = {
            "mul_number": lambda: tensor * number,
            "sub_number": lambda: tensor - number,
            "fill_": lambda: torch.full_like(tensor, number),
            "zero_": lambda: torch.zeros_like(tensor),
            "sigmoid_": lambda: tensor.sigmoid(),
        }[name]()
        self.assign(target, value, no_grad)

    def do_copy(self, target, source):
        self.assign(target, self.read(source))

    def do_set_slice(self, target, index, source):
        family, chain = self.variables[target]
        self.variables.append((family, (*chain, ("select", (0, index)))))
        value = self.operand(source)
        self.assign(len(self.variables) - 1, torch.as_tensor(value, dtype=self.program.dtype))
        self.variables.pop()

    def do_hook(self, source):
        pass

    def do_retain_grad(self, source):
        pass

    def do_backward(self, source, kind, offset, retain_graph):
        # its graphs save more than torch's: what is still there is for torch to say
        super().do_backward(source, kind, offset, True)

    def do_grad(self, source, wrt, kind, offset, create_graph, retain_graph):
        super().do_grad(source, wrt, kind, offset, create_graph, True)


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


class Disagreement(AssertionError):
    pass


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


def largest(run) -> float:
    """The scale of a run's rounding errors: they are amplified with what it computes."""
    values, grads, _ = run.result()
    tensors = [t.detach() for t in (*values, *grads) if t is not None and t.numel()]
    return max(1.0, *(float(t.abs().max()) for t in tensors)) if tensors else 1.0


def retained_grad(tensor):
    try:
        return tensor.grad if tensor.retains_grad and not tensor.is_leaf else None
    except RuntimeError:
        return None  # torch refuses to say: an output of unbind whose base was written


def amplified(run) -> float:
    """What a rounding of the leaves becomes in a run: the sine of a large value, say, makes it larger than any bound on
    the values' own size tells."""
    program = run.program
    nudged = Program(program.seed, program.dtype, program.steps, nudge=4 * torch.finfo(program.dtype).eps)
    moved = type(run)(nudged).run(run.stopped).result()
    pairs = [(a, e) for got, want in zip(run.result()[:2], moved[:2], strict=True) for a, e in zip(got, want, strict=True)]
    return max(float((a.detach() - e.detach()).abs().max()) for a, e in pairs if a is not None and a.numel())


def compare(first, second, what, hooks=True):
    """Raises Disagreement where a value, a gradient or what a hook saw is not the same but for rounding."""
    rtol = 1e-3 if second.program.dtype == torch.float32 else 1e-8
    try:
        compare_within(rtol * largest(second), first, second, what, hooks)
    except Disagreement:
        compare_within(16 * amplified(second), first, second, what, hooks)


def compare_within(tolerance, first, second, what, hooks):
    values_a, grads_a, seen_a = first.result()
    values_b, grads_b, seen_b = second.result()
    for kind, ours, theirs in (("v", values_a, values_b), ("gradient of leaf ", grads_a, grads_b)):
        if len(ours) != len(theirs):
            raise Disagreement(f"{what}: {len(ours)} {kind} instead of {len(theirs)}")
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if not close(a, b, tolerance):
                raise Disagreement(f"{what}: {kind}{index} is\n{a}\ninstead of\n{b}")
            if hooks and kind == "v" and a.requires_grad != b.requires_grad:
                raise Disagreement(f"{what}: v{index}.requires_grad is {a.requires_grad}")
    # Of a gradient that a hook holds torch makes the leaf's, and adds to that in place, if a view lies in between.
    accumulated = {g.untyped_storage().data_ptr() for g in grads_a if g is not None}
    for held, copied in seen_a:
        written = not torch.equal(held.detach(), copied) and not copied.isnan().any()
        if written and held.untyped_storage().data_ptr() not in accumulated:
            raise Disagreement(f"{what}: a gradient that a hook holds was written")
    if hooks and not second.extra_nodes:
        if len(seen_a) != len(seen_b):
            raise Disagreement(f"{what}: hooks ran {len(seen_a)} times instead of {len(seen_b)}")
        for (_, a), (_, b) in zip(seen_a, seen_b, strict=True):
            if not close(a, b, tolerance):
                raise Disagreement(f"{what}: a hook saw\n{a}\ninstead of\n{b}")
        for index, (a, b) in enumerate(zip(first.variables, second.variables, strict=True)):
            a, b = retained_grad(a), retained_grad(b)
            if not close(a, b, tolerance):
                raise Disagreement(f"{what}: the retained gradient of v{index} is\n{a}\nnot\n{b}")


def attempt(run):
    try:
        run.run()
    except Refused as refused:
        return refused
    return None


def keeping_graphs(program) -> Program:
    """The same program, with `retain_graph` wherever it walks a graph."""
    steps = [(*s[:-1], True) if s[0] in ("backward", "grad") else s for s in program.steps]
    return Program(program.seed, program.dtype, steps)


def check(program, functions=None, functional=False) -> str:
    """How the program ended; raises Disagreement where it may not end so."""
    ours, theirs = Ours(program, functions), Torch(program)
    refused, refused_by_torch = attempt(ours), attempt(theirs)
    if refused_by_torch is None:
        if refused is not None and "backward through the graph a second time" in str(refused.error):
            kept = keeping_graphs(program)
            if kept.steps != program.steps and check(kept, functions) == "agree":
                return "a fused form's one node was freed where torch's two were half used"
        if refused is not None:
            raise Disagreement(f"torch finishes; ours refuses step {refused.step}: {refused.error}")
        compare(ours, theirs, "ours against torch")
        if functional:
            with contextlib.suppress(Unsupported):
                compare(theirs, Functional(program).run(), "torch against reference", False)
        return "agree"
    if refused is not None and refused.step == refused_by_torch.step:
        return "both refuse"
    if refused is not None and refused.step < refused_by_torch.step:
        raise Disagreement(
            f"ours refuses step {refused.step}, torch step {refused_by_torch.step}: {refused.error}"
        )
    stop = None if refused is None else refused.step
    try:
        reference = Functional(program).run(stop)
    except Unsupported:
        return "only torch refuses, no reference"
    except Refused as impossible:
        raise Disagreement(
            f"torch refuses step {refused_by_torch.step}: {refused_by_torch.error}; ours goes on; "
            f"the reference cannot do step {impossible.step}: {impossible.error}"
        ) from None
    if stop is not None:
        # what our own refused step left unfinished has no counterpart
        ours = Ours(program, functions).run(stop)
    compare(ours, reference, f"torch refuses step {refused_by_torch.step}; ours", False)
    return "only torch refuses"


def shrink(program, check) -> Program:
    """Leave out steps, last first, as long as the program still fails."""

    def fails(program):
        try:
            check(program)
        except AssertionError:
            return True
        return False

    index = len(program.steps) - 1
    while index >= 0:
        smaller = without(program, index)
        if smaller is not None and fails(smaller):
            program = smaller
        index -= 1
    return program


def without(program, index):
    """The program less one step, or None where a later step needs its variable."""
    removed = None
    if program.steps[index][0] in program.producers:
        removed = sum(step[0] in program.producers for step in program.steps[:index])

    def renumber(value):
        if isinstance(value, tuple):
            return tuple(map(renumber, value))
        if not isinstance(value, int) or isinstance(value, bool) or removed is None:
            return value
        if value == removed:
            raise LookupError
        return value - (value > removed)

    steps = list(program.steps[:index])
    try:
        for step in program.steps[index + 1 :]:
            places = program.references.get(step[0], ())
            steps.append(tuple(renumber(v) if i in places else v for i, v in enumerate(step)))
    except LookupError:
        return None
    return replace(program, steps=steps)


def search(module, seed, indices, generate, check):
    """Checks the programs of a seed; counts how they ended, raises at the first that fails, shrunk."""
    ends = Counter()
    for index in indices:
        program = generate(f"{seed}:{index}")
        try:
            ends[check(program, index)] += 1
        except Exception as error:
            small = shrink(program, lambda smaller: check(smaller, index))
            raise Disagreement(
                f"seed {program.seed!r}: {error}\n"
                f"reproduce: python -m {module} --seed {seed} --only {index}\n"
                f"shrunk:\n{small}"
            ) from error
    return ends


def fuzz(seed, indices, functions=None):
    def check_one(program, index):
        return check(program, functions, functional=index % 20 == 0)

    return search("tests.fuzz", seed, indices, generate, check_one)


def command_line(module, description, generate, fuzz, arguments=None):
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--programs", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the whole series (0)")
    parser.add_argument("--start", type=int, default=0, help="first program of the series (0)")
    parser.add_argument("--only", type=int, help="print and check only this program")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only is not None:
        print(generate(f"{options.seed}:{options.only}"))
        print(dict(fuzz(options.seed, [options.only])))
        return 0
    from tqdm import tqdm

    programs = range(options.start, options.start + options.programs)
    try:
        ends = fuzz(options.seed, tqdm(programs, unit="program", smoothing=0.05))
    except Disagreement as error:
        print(error, file=sys.stderr)
        return 1
    for end, count in ends.most_common():
        print(f"{end}: {count}")
    return 0


def main(arguments=None):
    return command_line("tests.fuzz", __doc__.split("\n")[0], generate, fuzz, arguments)


if __name__ == "__main__":
    sys.exit(main())

"""The differential test of backward: random programs of hooks, held gradients and accumulation, by ours and by torch.

A program is run four ways, a step at a time:

* `Ours`, with safe_inplace's ops;
* `Torch`, with torch's own in-place methods, one after the other for the fused forms, in the same dtype;
* `Ideal`, with ops that hand on nothing but fresh memory, in the same dtype;
* `Reference`, the same in float64 (complex128), where no leaf takes over memory and whoever keeps a gradient keeps a copy.

After every step of backward all that a user can see (values, `.grad`, retained and returned gradients, what hooks and Functions
kept, the gradients that were given) is in ours what it is in the reference. A leaf's `.grad` shares memory only with
what the ideal ops let it share with, and nothing else shares memory that torch keeps apart.

Torch's own nodes can give one memory to two leaves. Where a program goes wrong with the ideal ops as well, nobody's op
could have helped it, and it ends there.

    python -m tests.fuzz_backward --programs 100000 --seed 0
    python -m tests.fuzz_backward --seed 0 --only 1234        # print and run a single program
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from . import fuzz
from .fuzz import Disagreement, Refused, broadcasts
from .op_table import BY_NAME, OPS

SHAPES = [(2, 3), (4,), (2, 2), (1, 3), (2, 1, 2), ()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
DTYPE_WEIGHTS = [12, 3, 2, 2, 1]
UNARY = ["clone", "clone", "clone", "neg", "once", "double"]
OP_WEIGHTS = {"add_": 3, "mul_add_": 2, "addcmul_": 2}
PASSING = ["same", "view", "view", "stash", "stash_same", "stash_detached", "buffer", "expand", "saved", "kept"]
HOOKS = ["see", "see", "view", "flat", "detach", "same", "new", "view_back", "fixed", "fixed_view", "previous"]
LOSSES = ["given", "given", "given", "given", "sum", "thrice", "weighted", "twice"]
GIVEN = ["own", "own", "expanded", "row", "slice", "transposed", "tracked"]


# After these all is compared.
ACTIONS = {"backward", "grad", "batched", "grad_zero", "grad_none", "grad_scale", "grad_assign", "update"}


@dataclass
class Program(fuzz.Program):
    producers: ClassVar = {
        "leaf", "unary", "binary", "view", "passing", "fork", "cat", "sum_expand", "checkpoint", "given", "grad",
    }  # fmt: skip
    references: ClassVar = {
        "unary": (1,),
        "binary": (1, 2),
        "view": (1,),
        "passing": (1,),
        "fork": (1, 2),
        "cat": (1, 2),
        "sum_expand": (1,),
        "checkpoint": (1, 2),
        "op": (1, 3),
        "hook": (1,),
        "node_hook": (1,),
        "retain_grad": (1,),
        "post_accumulate": (1,),
        "multi_hook": (1,),
        "backward": (1, 3, 6),
        "grad": (1, 2, 3),
        "batched": (1, 2),
        "grad_zero": (1,),
        "grad_none": (1,),
        "grad_scale": (1,),
        "grad_assign": (1, 2),
        "grad_hold": (1,),
        "update": (1,),
    }


@dataclass
class Variable:
    shape: tuple
    requires_grad: bool = False
    leaf: bool = False
    writable: bool = True
    viewed: int | None = None  # what it is a view of


class Generator:
    """Makes the program of a seed. Variables in its steps are indices in order of creation."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        (dtype,) = self.rng.choices(DTYPES, DTYPE_WEIGHTS)
        self.program = Program(str(seed), dtype)
        self.variables: list[Variable] = []
        self.recent: list[int] = []  # what the program works with, last used last

    def program_of_seed(self):
        rng = self.rng
        shape = rng.choice(SHAPES)
        for size in (shape, shape, shape[-1:], rng.choice([(), shape, (1,)])):
            self.leaf(size, rng.random() < 0.8)
        for _ in range(rng.randint(0, 2)):
            self.given(shape)
        if rng.random() < 0.3:
            self.watch_leaf()
        for _ in range(rng.randint(1, 2)):
            # a block again is a loop's next step: the same choices, over variables of its own
            outside, state = list(self.recent), rng.getstate()
            for _ in range(rng.choice([1, 1, 2, 3])):
                rng.setstate(state)
                self.recent = self.still_leaves(outside)
                self.block()
            self.recent = self.still_leaves(outside)
        return self.program

    def still_leaves(self, indices):
        """Less the frozen ones that were written: they belong to a graph that is gone."""
        return [i for i in indices if self.variables[i].leaf or not self.variables[i].requires_grad]

    def block(self):
        rng = self.rng
        if not self.recent:
            self.leaf((2, 3), True)
        for _ in range(rng.randint(0, 3)):
            (action,) = rng.choices([self.forward, self.op, self.watch], [4, 5, 1.5])
            action()
        self.op()
        if rng.random() < 0.6:
            rng.choice([self.passing, self.view, self.forward])()
        if rng.random() < 0.3:
            self.watch()
        count = rng.choice([1, 1, 1, 2, 3])
        for number in range(count):
            retain = rng.random() < (0.97 if number < count - 1 else 0.1)
            (action,) = rng.choices([self.backward, self.grad, self.batched], [6, 2, 0.3])
            action(retain)
            if rng.random() < 0.4:
                self.between()

    def add(self, step, variable):
        self.program.steps.append(step)
        self.variables.append(variable)
        self.recent.append(len(self.variables) - 1)
        return self.recent[-1]

    def pick(self, condition=lambda v: True):
        found = [i for i in self.recent if condition(self.variables[i])]
        if not found:
            return None
        return found[-1] if self.rng.random() < 0.5 else self.rng.choice(found)

    def differentiable(self):
        return self.pick(lambda v: v.requires_grad and not v.leaf)

    def trained(self):
        return self.pick(lambda v: v.requires_grad and v.leaf)

    def leaf(self, shape, requires_grad):
        step = ("leaf", shape, self.rng.randrange(4000), requires_grad)
        return self.add(step, Variable(shape, requires_grad, leaf=True))

    def given(self, shape):
        kind = self.rng.choice(GIVEN)
        return self.add(("given", shape, kind, self.rng.randrange(4000)), Variable(shape, writable=False))

    # Forward

    def forward(self):
        makers = [self.unary, self.view, self.passing, self.binary, self.fork, self.cat, self.sum_expand, self.checkpoint]
        (make,) = self.rng.choices(makers, [2, 3, 3, 2, 0.7, 0.5, 0.5, 0.3])
        make()

    def source(self):
        found = self.pick(lambda v: v.writable) if self.rng.random() < 0.97 else None
        return self.pick() if found is None else found

    def unary(self, source=None):
        source = self.source() if source is None else source
        v = self.variables[source]
        return self.add(("unary", source, self.rng.choice(UNARY)), Variable(v.shape, v.requires_grad))

    def passing(self, source=None):
        source = self.source() if source is None else source
        v = self.variables[source]
        view = self.rng.random() < 0.3
        step = ("passing", source, self.rng.choice(PASSING), view)
        return self.add(step, Variable(v.shape, v.requires_grad, writable=not view))

    def view(self):
        rng = self.rng
        source = self.source()
        v = self.variables[source]
        shape = list(v.shape)
        kinds = ["alias", "unsqueeze", "flatten"]
        if shape:
            kinds += ["select", "narrow", "unbind", "chunk"]
        if len(shape) > 1:
            kinds += ["transpose", "transpose"]
        if rng.random() < 0.1:
            kinds = ["expand"]
        kind = rng.choice(kinds)
        arguments: tuple = ()
        if kind in ("select", "unbind"):
            dim = rng.randrange(len(shape))
            arguments = (dim, rng.randrange(shape[dim]))
            del shape[dim]
        elif kind == "narrow":
            dim = rng.randrange(len(shape))
            start = rng.randrange(shape[dim])
            arguments = (dim, start, rng.randint(1, shape[dim] - start))
            shape[dim] = arguments[2]
        elif kind == "chunk":
            dim = rng.randrange(len(shape))
            arguments = (dim,)
            shape[dim] = (shape[dim] + 1) // 2
        elif kind == "transpose":
            arguments = tuple(rng.sample(range(len(shape)), 2))
            a, b = arguments
            shape[a], shape[b] = shape[b], shape[a]
        elif kind == "flatten":
            count = 1
            for size in shape:
                count *= size
            shape = [count]
        elif kind == "unsqueeze":
            arguments = (rng.randint(0, len(shape)),)
            shape.insert(arguments[0], 1)
        elif kind == "expand":
            arguments = (2,)
            shape.insert(0, 2)
        # torch refuses to write most of them: outputs of several, elements seen twice, views of leaves
        writable = v.writable and kind not in ("unbind", "chunk", "expand") and not (v.leaf and v.requires_grad)
        viewed = source if v.viewed is None else v.viewed
        step = ("view", source, kind, arguments, False)
        self.add(step, Variable(tuple(shape), v.requires_grad, writable=writable, viewed=viewed))

    def binary(self):
        a = self.source()
        b = self.pick(lambda v: broadcasts(v.shape, self.variables[a].shape))
        va, vb = self.variables[a], self.variables[b]
        self.add(("binary", a, b, self.rng.choice("++*")), Variable(va.shape, va.requires_grad or vb.requires_grad))

    def pair(self):
        a = self.source()
        b = self.pick(lambda v: v.shape == self.variables[a].shape)
        return a, b, self.variables[a].requires_grad or self.variables[b].requires_grad

    def fork(self):
        a, b, requires_grad = self.pair()
        self.add(("fork", a, b), Variable(self.variables[a].shape, requires_grad))

    def cat(self):
        a, b, requires_grad = self.pair()
        shape = self.variables[a].shape
        if shape:
            self.add(("cat", a, b), Variable((2 * shape[0], *shape[1:]), requires_grad))

    def sum_expand(self):
        source = self.source()
        v = self.variables[source]
        self.add(("sum_expand", source), Variable(v.shape, v.requires_grad, writable=False))

    def checkpoint(self):
        source = self.differentiable()
        if source is None:
            return
        shape = self.variables[source].shape
        operand = self.pick(lambda v: broadcasts(v.shape, shape))
        op = self.rng.choice(OPS)
        self.add(("checkpoint", source, operand, op.name, self.rng.random() < 0.3), Variable(shape, True))

    def op(self):
        rng = self.rng
        careless = rng.random() < 0.02
        target = self.pick(lambda v: careless or (v.writable and not (v.leaf and v.requires_grad)))
        if target is None or rng.random() < 0.5:
            leaf = self.trained() if rng.random() < 0.5 else None
            target = rng.choice([self.unary, self.unary, self.passing])(target if leaf is None else leaf)
            if not self.variables[target].writable:
                target = self.unary(target)
        shape = self.variables[target].shape
        (op,) = rng.choices(OPS, [OP_WEIGHTS.get(op.name, 1) for op in OPS])
        operands: list = []
        for _ in op.operands:
            if rng.random() < 0.2:
                operands.append(float(rng.choice(fuzz.NUMBERS)))
            elif rng.random() < 0.06:
                operands.append(target)
            elif operands and isinstance(operands[0], int) and rng.random() < 0.15:
                operands.append(operands[0])
            else:
                leaf, full = rng.random() < 0.8, rng.random() < 0.7
                operand = self.pick(
                    lambda v: broadcasts(v.shape, shape) and v.leaf >= leaf and (v.shape == shape or not full)
                )
                operands.append(0.5 if operand is None else operand)
        parameter = rng.choice(fuzz.NUMBERS) if op.parameter and rng.random() < 0.3 else None
        packing = rng.choice(["identity", "copy", "keep"]) if rng.random() < 0.12 else None
        self.program.steps.append(("op", target, op.name, tuple(operands), parameter, packing))
        if any(isinstance(o, int) and self.variables[o].requires_grad for o in operands):
            self.variables[target].requires_grad = True
            self.variables[target].leaf = False
        self.recent.remove(target)
        self.recent.append(target)

    # Hooks

    def watch(self):
        steps = self.program.steps
        rng = self.rng
        kind = rng.choice(["hook", "hook", "hook", "node_hook", "retain_grad", "multi_hook"])
        source = self.differentiable()
        if source is None:
            return
        if kind == "hook":
            self.hook(source)
        elif kind == "node_hook":
            steps.append(("node_hook", source, rng.choice(["pre", "pre_view", "pre_new", "post"])))
        elif kind == "retain_grad":
            steps.append(("retain_grad", source))
        else:
            other = self.pick(lambda v: v.requires_grad)
            steps.append(("multi_hook", tuple({source, other})))
            self.leave(other)
        self.leave(source)

    def hook(self, source):
        kind = self.rng.choice(HOOKS)
        if self.variables[source].leaf and kind in ("view", "flat", "detach"):
            # A leaf takes over a gradient of which its hook has kept an alias, whoever made it: not an op's to prevent.
            kind = "see"
        self.program.steps.append(("hook", source, kind, self.rng.randrange(4000)))

    def leave(self, hooked):
        """A view that is written after it was hooked has another node; that of before is passed by the ideal ops alone."""
        viewed = self.variables[hooked].viewed
        for v in self.variables:
            if viewed is not None and v.viewed == viewed:
                v.writable = False

    def watch_leaf(self):
        leaf = self.trained()
        if leaf is None:
            return
        if self.rng.random() < 0.5:
            self.hook(leaf)
        else:
            self.program.steps.append(("post_accumulate", leaf, self.rng.choice(["hold", "scale", "take"])))

    # Backward

    def gradient(self, source):
        shape = self.variables[source].shape
        if self.rng.random() < 0.5:
            found = self.pick(lambda v: v.shape == shape and not v.writable and not v.requires_grad)
            if found is not None:
                return found
        if self.rng.random() < 0.1:
            found = self.pick(lambda v: v.shape == shape)
            if found is not None:
                return found
        return self.given(shape)

    def backward(self, retain):
        rng = self.rng
        source = self.differentiable()
        if source is None:
            return
        loss = rng.choice(LOSSES)
        given = self.gradient(source)
        if rng.random() < 0.04:
            loss = "of_grad"
            shape = self.variables[source].shape
            given = self.pick(lambda v: v.leaf and v.requires_grad and v.shape == shape) or given
        inputs = None
        if rng.random() < 0.15:
            inputs = (self.pick(lambda v: v.requires_grad), self.trained())
            inputs = tuple(sorted({i for i in inputs if i is not None}))
        create = rng.random() < 0.08
        if rng.random() < 0.3:
            # the same graph once before
            before = given if rng.random() < 0.5 else self.gradient(source)
            self.program.steps.append(("backward", source, loss, before, True, False, inputs))
        self.program.steps.append(("backward", source, loss, given, retain, create, inputs))

    def inputs(self):
        chosen = {self.trained(), self.trained(), self.pick(lambda v: v.requires_grad)}
        return tuple(sorted(i for i in chosen if i is not None))

    def grad(self, retain):
        source, inputs = self.differentiable(), self.inputs()
        if source is None or not inputs:
            return
        create = self.rng.random() < 0.5
        given = self.gradient(source)
        step = ("grad", source, inputs, given, retain, create)
        first = self.add(step, Variable(self.variables[inputs[0]].shape, create, writable=False))
        if create and self.rng.random() < 0.7:
            second = self.gradient(first)
            self.program.steps.append(("backward", first, self.rng.choice(LOSSES), second, retain, False, None))

    def batched(self, retain):
        source, inputs = self.differentiable(), self.inputs()
        if source is not None and inputs:
            self.program.steps.append(("batched", source, inputs, self.rng.randrange(4000)))

    def between(self):
        rng = self.rng
        leaf = self.trained()
        if leaf is None:
            return
        kind = rng.choice(["grad_zero", "grad_none", "grad_scale", "grad_assign", "grad_hold", "update", "watch_leaf"])
        if kind == "watch_leaf":
            self.watch_leaf()
        elif kind == "grad_assign":
            shape = self.variables[leaf].shape
            other = self.pick(lambda v: v.leaf and v.requires_grad and v.shape == shape)
            self.program.steps.append((kind, leaf, other))
        else:
            self.program.steps.append((kind, leaf))


def generate(seed) -> Program:
    return Generator(seed).program_of_seed()


def values(shape, offset, dtype):
    """Rounded to `dtype`."""
    if dtype.is_complex:
        return torch.complex(*(fuzz.values(shape, o) for o in (offset, offset + 17))).to(dtype)
    return fuzz.values(shape, offset, dtype)


class Passing(torch.autograd.Function):
    """An identity of many minds about its gradient."""

    @staticmethod
    def forward(ctx, x, run, label, kind, view):
        ctx.run, ctx.label, ctx.kind = run, label, kind
        if kind == "saved":
            ctx.save_for_backward(x)
        return x.view_as(x) if view else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.run.pass_on(ctx, grad), None, None, None, None


class Fork(torch.autograd.Function):
    """A sum that returns the gradient that it gets twice."""

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


@dataclass
class Stash:
    """A gradient that somebody keeps. `value`: what it was, where nobody may change it."""

    tensor: torch.Tensor
    value: torch.Tensor | None
    compared: bool = True


class Run(fuzz.Run):
    """One way to run a program."""

    def __init__(self, program):
        super().__init__(program)
        self.dtype = program.dtype
        self.trained = set()  # leaves that require grad
        self.stashes: dict[tuple, Stash] = {}
        self.returned = {}
        self.calls = Counter()
        self.previous = {}
        self.vectorized = False
        self.grads_were_given = False

    def step(self, index):
        self.index = index
        super().step(index)

    # What the user's code does with a gradient that it sees, keeps and gives away.

    def stash(self, label, tensor, alias=False, compared=True):
        label = (*label, self.calls[label])
        self.calls[label[:-1]] += 1
        self.stashes[label] = Stash(tensor, None if alias else tensor.detach().clone(), compared)

    def give(self, tensor):
        return tensor

    def pass_on(self, ctx, grad):
        label, kind = ctx.label, ctx.kind
        if self.vectorized or kind == "same":
            return grad
        if kind == "view":
            return grad.view_as(grad)
        if kind == "expand":
            return grad.sum().expand(grad.shape)
        if kind == "buffer":
            buffer = torch.cat([grad.reshape(-1), grad.reshape(-1)])
            self.stash(label, buffer)
            return self.give(buffer[grad.numel() :].view(grad.shape))
        if kind == "kept":
            kept = self.previous.setdefault(label, grad.clone())
            self.stash(label, kept)
            return self.give(kept)
        if kind == "saved":
            (saved,) = ctx.saved_tensors
            return grad * 1 if saved.dim() == 0 else grad
        self.stash(label, grad.detach() if kind == "stash_detached" else grad)
        return grad.view_as(grad) if kind == "stash" else grad

    def hook(self, label, kind, offset, grad):
        if self.vectorized or kind == "same":
            return grad
        if kind == "new":
            return grad * 2
        if kind == "view_back":
            return grad.view_as(grad)
        if kind.startswith("fixed"):
            if label not in self.previous:
                self.previous[label] = values(grad.shape, offset, self.program.dtype).to(grad.dtype)
                self.stash(label, self.previous[label])
            fixed = self.previous[label]
            return self.give(fixed.view_as(fixed) if kind == "fixed_view" else fixed)
        seen = {"view": lambda: grad[...], "flat": lambda: grad.reshape(-1), "detach": grad.detach}.get(kind, lambda: grad)()
        self.stash(label, seen)
        if kind == "previous":
            previous, self.previous[label] = self.previous.get(label), self.stashes[(*label, self.calls[label] - 1)].tensor
            return None if previous is None else self.give(previous)
        return None

    # Steps

    def add(self, tensor):
        self.variables.append(tensor)

    def do_leaf(self, shape, offset, requires_grad):
        value = values(shape, offset, self.program.dtype).to(self.dtype).mul_(1 + self.program.nudge)
        self.add(value.requires_grad_(requires_grad))
        if requires_grad:
            self.trained.add(len(self.variables) - 1)

    def do_given(self, shape, kind, offset):
        def fresh(shape):
            return values(shape, offset, self.program.dtype).to(self.dtype)

        if kind == "expanded":
            tensor = fresh(()).expand(shape)
        elif kind == "row" and shape:
            tensor = fresh(shape[-1:]).expand(shape)
        elif kind == "slice":
            tensor = fresh((3, *shape))[1].detach()
        elif kind == "transposed":
            tensor = fresh(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
        else:
            tensor = fresh(shape)
        self.add(tensor)
        if kind == "tracked":
            tensor.requires_grad_()
            self.trained.add(len(self.variables) - 1)

    def do_unary(self, source, name):
        tensor = self.read(source)
        number = {"once": 1, "double": 2.0}.get(name)
        self.add(getattr(tensor, name)() if number is None else tensor * number)

    def do_view(self, source, kind, arguments, no_grad):
        if kind == "flatten":
            self.add(self.read(source).reshape(-1))
        elif kind == "chunk":
            self.add(self.read(source).chunk(2, *arguments)[0])
        else:
            super().do_view(source, kind, arguments, no_grad)

    def do_passing(self, source, kind, view):
        self.add(Passing.apply(self.read(source), self, ("passing", self.index), kind, view))

    def do_fork(self, a, b):
        self.add(Fork.apply(self.read(a), self.read(b)))

    def do_cat(self, a, b):
        self.add(torch.cat([self.read(a), self.read(b)]))

    def do_sum_expand(self, source):
        tensor = self.read(source)
        self.add(tensor.sum().expand(tensor.shape))

    def do_checkpoint(self, source, operand, name, reentrant):
        op = BY_NAME[name]

        def body(x, y):
            x = x * 1
            self.write(op, x, [y] * len(op.operands), {})
            return x * 1

        arguments = self.read(source), self.read(operand)
        self.add(checkpoint(body, *arguments, use_reentrant=reentrant, preserve_rng_state=False))

    def do_op(self, target, name, operands, parameter, packing):
        label = ("packed", self.index)

        def pack(tensor):
            visible = {v.untyped_storage()._cdata for v in self.variables}
            if packing == "keep" and tensor.untyped_storage()._cdata not in visible:
                self.stash(label, tensor, compared=False)
            tensor = tensor.clone() if packing == "copy" else tensor
            return tensor, tensor._version

        def unpack(packed):
            tensor, version = packed
            if tensor._version != version:
                raise RuntimeError("modified by an inplace operation")  # where torch asks no more
            return tensor

        op = BY_NAME[name]
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        with contextlib.nullcontext() if packing is None else hooks:
            self.write(op, self.read(target), [self.operand(o) for o in operands], op.parameters(parameter))

    def do_hook(self, source, kind, offset):
        label = ("hook", self.index)
        self.refreshed(source).register_hook(lambda grad: self.hook(label, kind, offset, grad))

    def do_retain_grad(self, source):
        self.refreshed(source).retain_grad()

    def do_node_hook(self, source, kind):
        label = ("node_hook", self.index)
        node = self.refreshed(source).grad_fn

        def pre(grads):
            if self.vectorized or grads[0] is None:
                return None
            self.stash(label, grads[0])
            replaced = {"pre_view": lambda g: g.view_as(g), "pre_new": lambda g: g * 2}.get(kind)
            return None if replaced is None else (replaced(grads[0]), *grads[1:])

        def post(grad_inputs, grad_outputs):
            for grad in (*grad_inputs, *grad_outputs):
                if grad is not None and not self.vectorized:
                    self.stash(label, grad, compared=False)

        if node is not None:
            node.register_hook(post) if kind == "post" else node.register_prehook(pre)

    def do_multi_hook(self, sources):
        label = ("multi_hook", self.index)

        def hook(grads):
            for position, grad in enumerate(grads):
                if grad is not None and not self.vectorized:
                    self.stash((*label, position), grad)

        tensors = [self.refreshed(s) for s in sources]
        torch.autograd.graph.register_multi_grad_hook([t for t in tensors if t.requires_grad], hook)

    def do_post_accumulate(self, leaf, kind):
        label = ("post_accumulate", self.index)

        def hook(parameter):
            if parameter.grad is None:
                return  # taken by another hook
            if kind == "scale":
                with torch.no_grad():
                    parameter.grad.mul_(0.5)
                return
            self.stash(label, parameter.grad, alias=True)
            if kind == "take":
                parameter.grad = None

        self.read(leaf).register_post_accumulate_grad_hook(hook)

    def do_backward(self, source, loss, given, retain_graph, create_graph, inputs):
        tensor, given = self.read(source), self.read(given)
        if not tensor.requires_grad:
            return
        if loss == "of_grad":
            given = given.detach() if not given.is_leaf or given.grad is None else given.grad
            if accumulates_into(tensor, given):
                given = given.detach().clone()
            self.grads_were_given = True
        if loss in ("given", "of_grad"):
            gradient = self.give(given)
        else:
            if loss == "twice":
                tensor = tensor.view_as(tensor) + tensor
            elif loss != "sum":
                tensor = tensor * (3.0 if loss == "thrice" else given.detach())
            tensor = tensor.sum()
            gradient = torch.ones_like(tensor)
        inputs = None if inputs is None else [self.read(i) for i in inputs]
        with warnings.catch_warnings():
            # of a parameter and its gradient's graph that keep one another
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
            tensor.backward(gradient, retain_graph=retain_graph or create_graph, create_graph=create_graph, inputs=inputs)

    def do_grad(self, source, inputs, given, retain_graph, create_graph):
        if not self.read(source).requires_grad:
            return self.add(torch.zeros_like(self.read(inputs[0])))
        grads = torch.autograd.grad(
            self.read(source),
            [self.read(i) for i in inputs],
            self.give(self.read(given)),
            retain_graph=retain_graph or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        self.returned |= {(self.index, p): g for p, g in enumerate(grads) if g is not None}
        self.add(torch.zeros_like(self.read(inputs[0])) if grads[0] is None else grads[0])

    def do_batched(self, source, inputs, offset):
        tensor = self.read(source)
        if not tensor.requires_grad or any(v.retains_grad and not v.is_leaf for v in self.variables):
            return  # torch would leave a tensor of vmap's where a gradient is retained
        self.vectorized = True
        try:
            grads = torch.autograd.grad(
                tensor,
                [self.read(i) for i in inputs],
                values((2, *tensor.shape), offset, self.program.dtype).to(tensor.dtype),
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        finally:
            self.vectorized = False
        self.returned |= {(self.index, p): g for p, g in enumerate(grads) if g is not None}

    def do_grad_zero(self, leaf):
        grad = self.read(leaf).grad
        if grad is not None:
            with torch.no_grad():
                grad.zero_()

    def do_grad_none(self, leaf):
        self.read(leaf).grad = None

    def do_grad_scale(self, leaf):
        grad = self.read(leaf).grad
        if grad is not None:
            with torch.no_grad():
                grad.mul_(0.5)

    def do_grad_assign(self, leaf, other):
        self.read(leaf).grad = self.read(other).grad

    def do_grad_hold(self, leaf):
        if self.read(leaf).grad is not None:
            self.stash(("grad_hold", self.index), self.read(leaf).grad, alias=True)

    def do_update(self, leaf):
        leaf = self.read(leaf)
        if leaf.grad is not None:
            with torch.no_grad():
                leaf.add_(leaf.grad, alpha=-0.25)

    # What a user can see

    def visible(self):
        """The tensors by their names, and whether the other runs must have the same."""
        tensors = {}
        for index, tensor in enumerate(self.variables):
            tensors["v", index] = tensor
            if index in self.trained:
                if tensor.grad is not None:
                    tensors["grad", index] = tensor.grad
            elif (retained := fuzz.retained_grad(tensor)) is not None:
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


def accumulates_into(tensor, grad):
    """Whether the backward of the tensor writes the gradient: torch's nodes would read what was added to it."""
    seen, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        of_checkpoint = "Checkpoint" in type(node).__name__  # its nodes are not there yet
        if of_checkpoint or (variable is not None and variable.grad is not None and share_storage(variable.grad, grad)):
            return True
        nodes.extend(next_node for next_node, _ in node.next_functions)
    return False


def share_storage(a, b):
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def same(a, b):
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def bytes_of(tensor):
    """Where a small tensor's elements begin; tensors that share a storage have elements of one size here."""
    places = {tensor.storage_offset()}
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = {place + i * stride for place in places for i in range(size)}
    return places


class Ours(Run):
    def __init__(self, program, functions=None):
        super().__init__(program)
        self.functions = functions or {op.name: op.function for op in OPS}

    write = fuzz.Ours.write


class Torch(Run):
    write = fuzz.Torch.write


class Fresh(torch.autograd.Function):
    """The value and the gradient, in memory of their own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


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
        return torch.zeros_like(grad), grad.clone()


def write_ideally(op, target, operands, parameters):
    fresh = [Fresh.apply(t) if isinstance(t, torch.Tensor) else t for t in (target, *operands)]
    Replace.apply(target, op.out_of_place(*fresh, **parameters))


class Ideal(Run):
    write = staticmethod(write_ideally)


class Reference(Ideal):
    def __init__(self, program):
        super().__init__(program)
        self.dtype = torch.complex128 if program.dtype.is_complex else torch.float64

    def do_leaf(self, shape, offset, requires_grad):
        super().do_leaf(shape, offset, requires_grad)
        if requires_grad:
            self.variables[-1].register_hook(lambda grad: grad.clone())

    def stash(self, label, tensor, alias=False, compared=True):
        super().stash(label, tensor if alias else tensor.clone(), alias, compared)

    def give(self, tensor):
        return tensor.clone()


class Expected:
    """What the reference shows after a step."""

    def __init__(self, reference):
        self.program, self.index = reference.program, reference.index
        self.tensors = {label: tensor.detach() for label, tensor in reference.visible().items()}
        self.values = flat(self.tensors.values())
        finite = self.values.abs()[self.values.isfinite()]
        self.scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
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


def largest(tensor):
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def judge(ours, ideal, expected, torchs):
    expected.compare(ours)
    label = ours.overwritten()
    if label is not None:
        raise Disagreement(f"after step {ours.index}: what {label} kept was written")
    pairs = ours.shared() - ideal.shared()
    if pairs:
        known = torchs.visible().keys() if torchs else set()
        allowed = torchs.shared() if torchs else set()
    for pair in pairs:
        of_leaf = any(label[0] == "grad" for label in pair)
        if of_leaf or (pair <= known and pair not in allowed):
            raise Disagreement(f"after step {ours.index}: {sorted(map(str, pair))} share memory")


def attempt(run, index):
    try:
        run.step(index)
    except Refused as refused:
        return refused.error
    return None


def is_right(ideal, expected):
    try:
        expected.compare(ideal)
    except Disagreement:
        return False
    return ideal.overwritten() is None


def check(program, functions=None) -> str:
    """How the program ended; raises Disagreement where it may not end so."""
    ours, ideal, reference, torchs = Ours(program, functions), Ideal(program), Reference(program), Torch(program)
    for index in range(len(program.steps)):
        refused = attempt(ours, index)
        impossible = [attempt(run, index) for run in (ideal, reference)]
        refused_by_torch = attempt(torchs, index) if torchs else None
        if refused is not None:
            if impossible == [None, None] and torchs and refused_by_torch is None:
                raise Disagreement(f"torch finishes; ours refuses step {index}: {refused}")
            return "refused"
        if impossible != [None, None]:
            return "no reference"
        if refused_by_torch is not None:
            torchs = None
        if program.steps[index][0] not in ACTIONS and index + 1 < len(program.steps):
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


def fuzz_backward(seed, indices, functions=None):
    return fuzz.search("tests.fuzz_backward", seed, indices, generate, lambda program, _: check(program, functions))


def main(arguments=None):
    return fuzz.command_line("tests.fuzz_backward", __doc__.split("\n")[0], generate, fuzz_backward, arguments)


if __name__ == "__main__":
    sys.exit(main())

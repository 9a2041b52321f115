"""Random programs of views, saves and differentiable writes, run by torch in place and by an interpreter that never
writes: there a base is a value that is replaced, and a view is the positions in it."""

import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

SHAPE = (3, 4)
REFUSED = "modified by an inplace operation"
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


@dataclass(frozen=True)
class Step:
    kind: str  # unary, binary, view, write, write alone
    name: str
    of: int
    other: int | float = 0


def generate(seed: int, length: int = 9) -> list[Step]:
    """Steps refer to values by their place in the list of values; shapes are followed on empty tensors."""
    rng = random.Random(seed)
    shapes = [torch.empty(SHAPE), torch.empty(SHAPE)]
    steps = []

    def same_shape(i):
        others = [j for j, shape in enumerate(shapes) if shape.shape == shapes[i].shape]
        return rng.choice(others) if rng.random() < 0.8 else round(rng.uniform(0.5, 2.0), 2)

    for _ in range(length):
        i = rng.randrange(len(shapes))
        kind = rng.choices(["unary", "binary", "view", "write", "write alone"], [4, 3, 2, 4, 1])[0]
        if kind == "unary":
            steps.append(Step(kind, rng.choice(list(UNARY)), i))
            shapes.append(torch.empty(shapes[i].shape))
        elif kind == "binary":
            j = rng.choice([j for j, shape in enumerate(shapes) if shape.shape == shapes[i].shape])
            steps.append(Step(kind, rng.choice(list(BINARY)), i, j))
            shapes.append(torch.empty(shapes[i].shape))
        elif kind == "view":
            name = rng.choice([n for n, view in VIEWS.items() if shapes[i].dim() > 0 and view(shapes[i]).numel() > 1])
            steps.append(Step(kind, name, i))
            shapes.append(VIEWS[name](shapes[i]))
        elif kind == "write":
            steps.append(Step(kind, rng.choice(list(WRITES)), i, same_shape(i)))
        else:
            steps.append(Step(kind, rng.choice(list(WRITES_ALONE)), i))
    return steps


def agree(a: Iterable[torch.Tensor], b: Iterable[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12, equal_nan=True) for x, y in zip(a, b, strict=True))


def leaves(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(SHAPE, generator=generator, dtype=torch.float64) + 0.5).requires_grad_() for _ in range(2)]


def _loss(values: list[torch.Tensor]) -> torch.Tensor:
    return sum((value * (i + 1)).sum() for i, value in enumerate(values))


def _torn(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Would the write read elements of `other` that it has overwritten already? torch refuses some such calls, and leaves
    the result of the others undefined: x[:, 1:].T.mul_(x[:, 1:])."""
    same_memory = x.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    return same_memory and (x.storage_offset(), x.stride()) != (other.storage_offset(), other.stride())


def _do(step: Step, values: list[torch.Tensor]) -> None:
    x = values[step.of]
    if step.kind == "unary":
        values.append(UNARY[step.name](x))
    elif step.kind == "binary":
        values.append(BINARY[step.name](x, values[step.other]))
    elif step.kind == "view":
        values.append(VIEWS[step.name](x))
    elif step.kind == "write":
        other = values[step.other] if isinstance(step.other, int) else torch.tensor(step.other, dtype=x.dtype)
        if _torn(x, other):
            other = other.clone()
        getattr(x, step.name)(other)
    else:
        getattr(x, step.name)()


def in_place(
    steps: list[Step], seed: int, around: Callable[[int], AbstractContextManager] = lambda index: nullcontext()
) -> tuple[torch.Tensor, ...]:
    """`around` opens what a step runs in; backward runs outside of it."""
    inputs = leaves(seed)
    values = [leaf * 1 for leaf in inputs]
    for index, step in enumerate(steps):
        with around(index):
            _do(step, values)
    return torch.autograd.grad(_loss(values), inputs)


class _Pure:
    def __init__(self) -> None:
        self.bases: list[torch.Tensor] = []
        self.values: list[tuple[int, torch.Tensor]] = []  # a base, and the positions in it

    def new(self, tensor: torch.Tensor) -> None:
        self.bases.append(tensor.reshape(-1))
        self.values.append((len(self.bases) - 1, torch.arange(tensor.numel()).view(tensor.shape)))

    def read(self, i: int) -> torch.Tensor:
        base, positions = self.values[i]
        return self.bases[base][positions]

    def write(self, i: int, tensor: torch.Tensor) -> None:
        base, positions = self.values[i]
        self.bases[base] = self.bases[base].index_put((positions,), tensor)


def out_of_place(steps: list[Step], seed: int) -> tuple[torch.Tensor, ...]:
    inputs = leaves(seed)
    pure = _Pure()
    for leaf in inputs:
        pure.new(leaf * 1)
    for step in steps:
        x = pure.read(step.of)
        if step.kind == "unary":
            pure.new(UNARY[step.name](x))
        elif step.kind == "binary":
            pure.new(BINARY[step.name](x, pure.read(step.other)))
        elif step.kind == "view":
            base, positions = pure.values[step.of]
            pure.values.append((base, VIEWS[step.name](positions)))
        elif step.kind == "write":
            other = pure.read(step.other) if isinstance(step.other, int) else torch.tensor(step.other, dtype=x.dtype)
            pure.write(step.of, WRITES[step.name](x, other))
        else:
            pure.write(step.of, WRITES_ALONE[step.name](x))
    return torch.autograd.grad(_loss([pure.read(i) for i in range(len(pure.values))]), inputs)

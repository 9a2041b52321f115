"""What is measured: ops x layouts x dtypes x sizes x modes. The ops are the rows of tests/op_table.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tests.op_table import BY_NAME, OPS, Op

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

# 64 bytes are 16 float32 elements: the cost of a call and nothing else.
CALL = 64

Shape = tuple[int, ...]


def rows(numel: int) -> Shape:
    columns = min(512, 1 << (numel.bit_length() // 2))
    return numel // columns, columns


def images(numel: int) -> Shape:
    side = min(32, 1 << ((numel.bit_length() - 1) // 4))
    channels = min(256, numel // side**2)
    return numel // (channels * side**2), channels, side, side


def small_images(numel: int) -> Shape:
    side = min(8, 1 << ((numel.bit_length() - 1) // 4))
    channels = min(512, numel // side**2)
    return numel // (channels * side**2), channels, side, side


def tokens(numel: int) -> Shape:
    batched, columns = rows(numel)
    length = min(256, max(1, batched // 4))
    return batched // length, length, columns


def same(shape: Shape) -> Shape:
    return shape


def vector(shape: Shape) -> Shape:
    return shape[-1:]


def channel(shape: Shape) -> Shape:
    return shape[1], 1, 1


def sample_token(shape: Shape) -> Shape:
    return shape[0], 1, shape[2]


def sample_channel(shape: Shape) -> Shape:
    return *shape[:2], 1, 1


@dataclass(frozen=True)
class Layout:
    """The input's shape for a number of elements, and each operand's shape for that; None is a Python number."""

    name: str
    shape: Callable[[int], Shape]
    operands: tuple[Callable[[Shape], Shape] | None, ...]
    memory_format: torch.memory_format = torch.contiguous_format
    # Of the gradient and of operands as large as the input, where it is another one.
    beside: torch.memory_format | None = None

    def operand(self, index: int, shape: Shape) -> Shape | None:
        of = self.operands[index % len(self.operands)]
        return of and of(shape)

    @property
    def has_tensors(self) -> bool:
        return self.operands != (None,)


LAYOUTS = {
    layout.name: layout
    for layout in [
        Layout("full", rows, (same,)),
        Layout("last_dim_vector", rows, (vector,)),
        Layout("per_channel_nchw", images, (channel,)),
        Layout("per_channel_nhwc", images, (channel,), torch.channels_last),
        Layout("per_sample_tokens", tokens, (sample_token,)),
        Layout("per_sample_channels", images, (sample_channel,)),
        Layout("scalar", rows, (None,)),
        Layout("vector_and_full", rows, (vector, same)),
        Layout("full_and_vector", rows, (same, vector)),
        Layout("nhwc_beside_nchw", images, (channel, same), torch.channels_last, beside=torch.contiguous_format),
        Layout("nchw_beside_nhwc", images, (channel, same), beside=torch.channels_last),
        Layout("small_nhwc_beside_nchw", small_images, (channel, same), torch.channels_last, beside=torch.contiguous_format),
        Layout("small_nchw_beside_nhwc", small_images, (channel, same), beside=torch.channels_last),
    ]
}
MEETING = [name for name, layout in LAYOUTS.items() if layout.beside is not None]


@dataclass(frozen=True)
class Mode:
    """What is timed, whether operands are trained, and who holds the gradient that backward is given."""

    timed: str
    trainable: bool = False
    holder: str | None = None

    @property
    def name(self) -> str:
        if not self.backward:
            return self.timed
        return f"{self.timed}, {'trainable' if self.trainable else 'frozen'}, held by {self.holder}"

    @property
    def backward(self) -> bool:
        return "backward" in self.timed

    @property
    def grad(self) -> bool:
        return self.timed != "forward"


FORWARD = Mode("forward")
RECORDED = Mode("recorded")
TRAINING = [
    Mode(timed, trainable, holder)
    for timed in ("forward+backward", "backward")
    for trainable in (False, True)
    for holder in ("caller", "engine")
]
MODES = {mode.name: mode for mode in (FORWARD, RECORDED, *TRAINING)}


@dataclass(frozen=True)
class Case:
    op: Op
    layout: Layout
    dtype: torch.dtype
    size: int
    mode: Mode
    compiled: bool = True

    @property
    def key(self) -> tuple:
        return self.op.name, self.layout.name, self.dtype, self.size, self.mode.name

    @property
    def shape(self) -> Shape:
        return self.layout.shape(self.size // self.dtype.itemsize)

    def operand_shapes(self) -> list[Shape | None]:
        return [self.layout.operand(i, self.shape) for i in range(len(self.op.operands))]

    def makes_sense(self) -> bool:
        if len(self.layout.operands) > len(self.op.operands):
            return False
        if self.mode.trainable and not self.layout.has_tensors:
            return False
        # Backward of nothing: neither the input's gradient nor an operand's is more than the gradient itself.
        return self.mode.timed != "backward" or self.mode.trainable or bool(self.op.saves.get("input"))

    def numel(self) -> dict[str, int]:
        """Elements of the input and of each operand; a number has none."""
        shapes = zip(self.op.operands, self.operand_shapes(), strict=True)
        return {"input": math.prod(self.shape)} | {n: 0 if s is None else math.prod(s) for n, s in shapes}

    def wanted(self) -> list[str]:
        """Whose gradient is asked for."""
        return [n for n, count in self.numel().items() if n == "input" or (self.mode.trainable and count)]

    def needed(self) -> set[str]:
        """The values that these gradients are computed from, by the op table."""
        return {value for name in self.wanted() for value in self.op.saves.get(name, ())}

    def saved(self) -> int:
        """Bytes that backward needs: of operands, or of a value that the op itself destroys, as large as the input."""
        numel = self.numel()
        return sum(numel.get(value, numel["input"]) for value in self.needed()) * self.dtype.itemsize

    def bytes(self) -> int:
        """The least that has to cross the memory bus: each value read once and each result written once.

        Derived from the op table alone. The gradient that an op hands on unchanged costs nothing, a number costs
        nothing, and a value that backward needs costs a write where the op itself destroys it.
        """
        numel = self.numel()
        whole = numel["input"]
        total = 0
        if self.mode.timed != "backward":
            total += whole + sum(numel.values())
        if self.mode.timed == "forward+backward":
            total += sum(whole for value in self.needed() if value not in self.op.operands)
        if self.mode.backward:
            computed = [n for n in self.wanted() if self.op.saves.get(n) or numel[n] != whole]
            total += whole * bool(computed) + sum(numel[name] for name in computed)
            total += self.saved() // self.dtype.itemsize
        return total * self.dtype.itemsize


def product(ops: Iterable, layouts: Iterable, dtypes: Iterable, sizes: Iterable, modes: Iterable, **more) -> Iterator:
    for op, layout, dtype, size, mode in itertools.product(ops, layouts, dtypes, sizes, modes):
        case = Case(BY_NAME[op] if isinstance(op, str) else op, LAYOUTS[layout], dtype, size, mode, **more)
        if case.makes_sense():
            yield case


def last_cache() -> int:
    """Bytes of this CPU's largest cache by what Linux says; 0 where it says nothing."""
    sizes = (path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return max((int(size.removesuffix("K")) * KiB for size in sizes), default=0)


@cache
def past_cache(device: torch.device) -> int:
    """Bytes of an input that does not stay in the last cache, were it there alone: half as much again, and a power of two.

    A GPU's targets are stated for a size.
    """
    wanted = max(64 * MiB, last_cache() * 3 // 2 if device.type == "cpu" else 0)
    return 1 << (wanted - 1).bit_length()


# The step whose forward and backward have a target: 65536 x 512 float32.
TRAINING_STEP = 128 * MiB


def unique(cases: Iterable[Case]) -> list[Case]:
    """In the order in which they are first named, each as it is named last."""
    return list({case.key: case for case in cases}.values())


def target_cases(device: torch.device) -> list[Case]:
    """The cases that the targets are stated for."""
    float32, halves = torch.float32, [torch.float16, torch.bfloat16]
    training = [m for m in TRAINING if m.timed == "forward+backward" and m.trainable]
    return unique(
        [
            *product(OPS, ["full", "scalar"], [float32], [CALL], [RECORDED], compiled=False),
            *product(OPS, LAYOUTS, [float32], [past_cache(device)], [FORWARD], compiled=device.type == "cuda"),
            *product(["mul_add_"], ["last_dim_vector"], [float32], [TRAINING_STEP], training),
            *product(OPS, ["full", "last_dim_vector"], [float32], [16 * MiB], TRAINING[4:], compiled=False),
            *product(OPS, LAYOUTS, halves, [past_cache(device)], [FORWARD], compiled=False),
            *product(["mul_add_"], MEETING, [float32, torch.bfloat16], [16 * MiB], training, compiled=False),
        ]
    )


def default_cases(device: torch.device) -> list[Case]:
    large = past_cache(device)
    sizes = [CALL, 4 * KiB, 256 * KiB, 4 * MiB, 16 * MiB, large]
    timed = [m for m in TRAINING if m.timed == "forward+backward"]
    reduced = LAYOUTS if device.type == "cuda" else ["full", "per_sample_tokens"]
    return unique(
        [
            *target_cases(device),
            *product(OPS, ["full", "last_dim_vector"], [torch.float32], sizes, [FORWARD], compiled=False),
            *product(OPS, ["full", "last_dim_vector"], [torch.float32], [large], [FORWARD]),
            *product(OPS, reduced, [torch.float32], [large], timed[-1:], compiled=False),
            *product(OPS, ["last_dim_vector"], [torch.float32], [large], timed),
        ]
    )


def full_cases(device: torch.device) -> list[Case]:
    """Every size and dtype forward, every mode at three sizes. All of it with all the rest would take days on a CPU."""
    small = [CALL, 4 * KiB, 64 * KiB, 256 * KiB, MiB, 4 * MiB, 16 * MiB, 64 * MiB]
    sizes = sorted({*small, 128 * MiB, 256 * MiB, past_cache(device), GiB})
    others = [torch.float16, torch.bfloat16, torch.float64]
    trained = [64 * KiB, 4 * MiB, past_cache(device)]
    return unique(
        [
            *target_cases(device),
            *product(OPS, LAYOUTS, [torch.float32], [CALL], [RECORDED], compiled=False),
            *product(OPS, LAYOUTS, others, sizes, [FORWARD], compiled=False),
            *product(OPS, LAYOUTS, [torch.float32], sizes, [FORWARD]),
            *product(OPS, LAYOUTS, [torch.bfloat16], trained, TRAINING, compiled=False),
            *product(OPS, LAYOUTS, [torch.float32], trained, TRAINING),
        ]
    )

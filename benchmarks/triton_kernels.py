"""A plain, good Triton kernel for the forward of each op. Its formula is what the op's reference does to terms."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import triton

from tests.op_table import Op

from .cases import Case

BLOCK = 1024

SOURCE = """
import triton
import triton.language as tl

@triton.jit
def kernel(input_pointer, numel, {parameters}, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    input = tl.load(input_pointer + index, mask=inside).to(COMPUTE)
{loads}
    result = {formula}
    tl.store(input_pointer + index, result.to(input_pointer.dtype.element_ty), mask=inside)
"""

LOAD = """\
    {name}_index = index // {name}_OUTER * {name}_STEP + index // {name}_INNER % {name}_COUNT
    {name} = tl.load({name}_pointer + {name}_index, mask=inside).to(COMPUTE)"""


@dataclass(frozen=True)
class Term:
    """Stands for a tensor while the op's reference runs, and remembers what was done to it as Triton source."""

    source: str

    def __add__(self, other):
        return Term(f"({self} + {other})")

    def __mul__(self, other):
        return Term(f"({self} * {other})")

    def __radd__(self, other):
        return Term(f"({other} + {self})")

    def __rmul__(self, other):
        return Term(f"({other} * {self})")

    def __str__(self) -> str:
        return self.source

    @classmethod
    def __torch_function__(cls, function, types, arguments, keywords=None):
        left, right = arguments
        if function is torch.add:
            return left + (keywords or {}).get("alpha", 1) * right
        if function is torch.mul:
            return left * right
        return NotImplemented


def expression(op: Op) -> str:
    return str(op.reference(*map(Term, op.arguments)))


@cache
def module(op_name: str, formula: str, operands: tuple[str, ...], tensors: tuple[bool, ...]) -> ModuleType:
    parameters, loads = [], []
    for name, tensor in zip(operands, tensors, strict=True):
        if tensor:
            axes = ", ".join(f"{name}_{axis}: tl.constexpr" for axis in ("OUTER", "STEP", "INNER", "COUNT"))
            parameters.append(f"{name}_pointer, {axes}")
            loads.append(LOAD.format(name=name))
        else:
            parameters.append(name)
    source = SOURCE.format(parameters=", ".join(parameters), loads="\n".join(loads), formula=formula)
    # Triton reads a kernel's source back from its file.
    path = Path(tempfile.mkdtemp(prefix="safe_inplace_triton_"), f"{op_name}kernel.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def axes(case: Case, operand: torch.Tensor) -> tuple[int, int, int, int]:
    """How an index into the input's memory becomes one into the operand's: outer, step, inner, count."""
    shape = list(case.shape)
    kept = [1] * (len(shape) - operand.dim()) + list(operand.shape)
    if case.layout.memory_format is torch.channels_last:
        shape, kept = ([v[0], v[2], v[3], v[1]] for v in (shape, kept))
    dims = list(range(len(shape)))
    varies = [d for d in dims if kept[d] > 1]
    if not varies:
        return 1 << 62, 0, 1, 1
    below = [1] * (len(shape) + 1)
    for d in reversed(dims):
        below[d] = below[d + 1] * shape[d]
    # The innermost run of dimensions that the operand has, and what it has outside of that.
    last = varies[-1]
    first = last
    while first - 1 in varies:
        first -= 1
    count = below[first] // below[last + 1]
    outside = [d for d in varies if d < first]
    if not outside:
        return 1 << 62, 0, below[last + 1], count
    if outside != list(range(len(outside))):
        raise NotImplementedError(f"{case.layout.name}: an operand of three runs of dimensions")
    return below[outside[-1] + 1], count, below[last + 1], count


def elementwise(case: Case, input: torch.Tensor, *operands: torch.Tensor | float) -> torch.Tensor:
    tensors = tuple(isinstance(v, torch.Tensor) for v in operands)
    arguments = []
    for value, tensor in zip(operands, tensors, strict=True):
        arguments += [value, *axes(case, value)] if tensor else [value]
    kernel = module(case.op.name, expression(case.op), case.op.operands, tensors).kernel
    compute = triton.language.float64 if case.dtype is torch.float64 else triton.language.float32
    blocks = triton.cdiv(input.numel(), BLOCK)
    kernel[(blocks,)](input, input.numel(), *arguments, BLOCK=BLOCK, COMPUTE=compute)
    return input

"""The ops under test, stated once.

A row knows the op's formula as out-of-place torch, and which values backward needs for
the gradient of which operand. Every other test file is written against these rows. Nothing
here is read from the C++ core: `test_op_table.py` holds the rows to their own formulas, and
the core to the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import safe_inplace

NUMBER_TYPES = (bool, int, float, complex)


@dataclass(frozen=True)
class Op:
    name: str
    operands: tuple[str, ...]
    parameter: str | None
    reference: Callable[..., Any]
    # operand that needs a gradient -> what its gradient is computed from
    saves: dict[str, tuple[str, ...]]
    # torch's own single in-place method, where there is one
    torch_method: str | None
    # node name in `grad_fn`
    node: str
    # the two-step in-place form that people write today
    two_step: Callable[..., Any]

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return getattr(safe_inplace, self.name)

    @property
    def functional_name(self) -> str:
        return self.name.removesuffix("_")

    @property
    def functional(self) -> Callable[..., torch.Tensor]:
        """The op out of place."""
        return getattr(safe_inplace, self.functional_name)

    @property
    def functional_node(self) -> str:
        return self.node.replace("Inplace", "")

    @property
    def packet(self):
        return getattr(torch.ops.safe_inplace, self.name)

    @property
    def functional_packet(self):
        return getattr(torch.ops.safe_inplace, self.functional_name)

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("input", *self.operands)

    def out_of_place(self, input, *operands, **parameter):
        """The op as plain torch, with torch's own promotion, in the input's dtype."""
        result = self.reference(input, *operands, **parameter)
        return result.to(input.dtype)

    def exact(self, input, *operands, **parameter):
        """The op in float64 (complex128), not yet rounded to the input's dtype."""
        return self.reference(*(widen(v) for v in (input, *operands)), **parameter)

    def magnitude(self, input, *operands, **parameter):
        """What the rounding errors of the steps are proportional to: no cancellation."""
        operands = (abs(widen(v)) for v in (input, *operands))
        return self.reference(*operands, **{k: abs(v) for k, v in parameter.items()})

    def overload(self, *operands) -> str:
        kinds = ["Scalar" if isinstance(v, NUMBER_TYPES) else "Tensor" for v in operands]
        return "default" if set(kinds) == {"Tensor"} else "_".join(kinds)

    def kinds(self):
        """Every choice of tensor or number for the operands."""
        return itertools.product(("Tensor", "Scalar"), repeat=len(self.operands))

    def parameters(self, value=None) -> dict[str, Any]:
        return {} if self.parameter is None or value is None else {self.parameter: value}

    def saved_values(self, requires_grad: set[str], *values, **parameter) -> list[torch.Tensor]:
        """The tensors that the table allows to be saved, each once."""
        named = dict(zip(self.arguments, values, strict=True))
        needed = [n for operand in requires_grad for n in self.saves.get(operand, ())]
        saved = []
        for name in dict.fromkeys(needed):
            value = named["input"] + named["other"] if name == "input + other" else named[name]
            if isinstance(value, torch.Tensor):
                saved.append(value.detach().clone())
        return saved


def widen(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


OPS = [
    Op(
        name="add_",
        operands=("other",),
        parameter="alpha",
        reference=lambda input, other, alpha=1: torch.add(input, other, alpha=alpha),
        saves={},
        torch_method="add_",
        node="AddInplaceBackward",
        two_step=lambda input, other, alpha=1: input.add_(other, alpha=alpha),
    ),
    Op(
        name="mul_",
        operands=("other",),
        parameter=None,
        reference=lambda input, other: torch.mul(input, other),
        saves={"input": ("other",), "other": ("input",)},
        torch_method="mul_",
        node="MulInplaceBackward",
        two_step=lambda input, other: input.mul_(other),
    ),
    Op(
        name="add_mul_",
        operands=("other", "scale"),
        parameter=None,
        reference=lambda input, other, scale: (input + other) * scale,
        saves={"input": ("scale",), "other": ("scale",), "scale": ("input + other",)},
        torch_method=None,
        node="AddMulInplaceBackward",
        two_step=lambda input, other, scale: input.add_(other).mul_(scale),
    ),
    Op(
        name="mul_add_",
        operands=("scale", "shift"),
        parameter=None,
        reference=lambda input, scale, shift: input * scale + shift,
        saves={"input": ("scale",), "scale": ("input",)},
        torch_method=None,
        node="MulAddInplaceBackward",
        two_step=lambda input, scale, shift: input.mul_(scale).add_(shift),
    ),
    Op(
        name="addcmul_",
        operands=("tensor1", "tensor2"),
        parameter="value",
        reference=lambda input, tensor1, tensor2, value=1: input + value * tensor1 * tensor2,
        saves={"tensor1": ("tensor2",), "tensor2": ("tensor1",)},
        torch_method="addcmul_",
        node="AddcmulInplaceBackward",
        two_step=lambda input, tensor1, tensor2, value=1: (
            input.addcmul_(tensor1, tensor2, value=value)
            if isinstance(tensor1, torch.Tensor) and isinstance(tensor2, torch.Tensor)
            else input.add_(value * tensor1 * tensor2)
        ),
    ),
]

BY_NAME = {op.name: op for op in OPS}
FUSED = [op for op in OPS if op.name not in ("add_", "mul_")]
EXACT = [op for op in OPS if op.name in ("add_", "mul_")]

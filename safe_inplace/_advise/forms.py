"""The forms of a sum or product in source, and which of our ops compute the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Of each op, which operands backward needs the value of, and the gradients of which operands need it.
_NEEDED: dict[str, dict[int, tuple[int, ...]]] = {
    "add": {},
    "mul": {0: (1,), 1: (0,)},
    "mul_add": {0: (1,), 1: (0,)},
    "addcmul": {1: (2,), 2: (1,)},
    "add_mul": {2: (0, 1)},
}


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()


def _minus(number: str) -> str:
    return number[1:].lstrip() if number.startswith("-") else f"-{number}"


@dataclass(frozen=True)
class Option:
    """An op that may stand for an expression, with the expression's operands in the op's order."""

    op: str
    order: tuple[int, ...]
    keyword: str = ""
    negated: int | None = None  # the operand that is given with a minus

    @property
    def writes(self) -> int | None:
        """The operand that it writes in place."""
        return self.order[0] if self.op.endswith("_") else None

    def code(self, operands: Sequence[str]) -> str:
        codes = [_minus(operands[i]) if i == self.negated else operands[i] for i in self.order]
        return f"safe_inplace.{self.op}({', '.join(codes)}{self.keyword})"

    def needs(self, operand: int, values: Sequence[Any]) -> bool:
        """Whether backward will need the value of that operand."""
        place = self.order.index(operand)
        return any(_wants_gradient(values[self.order[i]]) for i in _NEEDED[self.op.rstrip("_")].get(place, ()))

    def keeps(self, values: Sequence[Any]) -> int:
        """How many values of the size of the result are made for backward alone."""
        old_input = self.writes is not None and self.needs(self.writes, values)
        the_sum = self.op.startswith("add_mul") and _wants_gradient(values[self.order[2]])
        return int(old_input) + int(the_sum)


@dataclass(frozen=True)
class Form:
    """One operator, or two of which the second takes the result of the first. Its name is what it computes."""

    name: str
    first: Callable[..., Any] | None  # of the operands
    last: Callable[..., Any]  # of the result of the first, if there is one, and the operands
    options: tuple[Option, ...]  # that leave the operands in their order
    moved: tuple[Option, ...] = ()  # that do not

    def plain(self, *operands: Any) -> Any:
        return self.last(*operands) if self.first is None else self.last(self.first(*operands), *operands)


def _either(op: str, *orders: tuple[int, ...], keyword: str = "", negated: int | None = None) -> tuple[Option, ...]:
    """Out of place and in place, with the operands in each of these orders."""
    return tuple(Option(form, order, keyword, negated) for order in orders for form in (op, f"{op}_"))


SUM = Form("a + b", None, lambda a, b: a + b, _either("add", (0, 1)), moved=_either("add", (1, 0)))
DIFFERENCE = Form("a - b", None, lambda a, b: a - b, _either("add", (0, 1), keyword=", alpha=-1"))
MINUS_NUMBER = Form("a - b", None, lambda a, b: a - b, _either("add", (0, 1), negated=1))
PRODUCT = Form("a * b", None, lambda a, b: a * b, _either("mul", (0, 1)), moved=_either("mul", (1, 0)))
PRODUCT_PLUS = Form(
    "a * b + c",
    lambda a, b, c: a * b,
    lambda product, a, b, c: product + c,
    _either("mul_add", (0, 1, 2)),
    moved=(*_either("mul_add", (1, 0, 2)), Option("addcmul_", (2, 0, 1))),
)
PRODUCT_MINUS_NUMBER = Form(
    "a * b - c",
    PRODUCT_PLUS.first,
    lambda product, a, b, c: product - c,
    _either("mul_add", (0, 1, 2), negated=2),
    moved=_either("mul_add", (1, 0, 2), negated=2),
)
PLUS_PRODUCT = Form(
    "a + b * c",
    lambda a, b, c: b * c,
    lambda product, a, b, c: a + product,
    _either("addcmul", (0, 1, 2)),
    moved=(*_either("mul_add", (1, 2, 0)), Option("mul_add_", (2, 1, 0))),
)
MINUS_PRODUCT = Form(
    "a - b * c",
    PLUS_PRODUCT.first,
    lambda product, a, b, c: a - product,
    _either("addcmul", (0, 1, 2), keyword=", value=-1"),
)
SUM_TIMES = Form(
    "(a + b) * c",
    lambda a, b, c: a + b,
    lambda total, a, b, c: total * c,
    _either("add_mul", (0, 1, 2)),
    moved=_either("add_mul", (1, 0, 2)),
)
TIMES_SUM = Form(
    "a * (b + c)",
    lambda a, b, c: b + c,
    lambda total, a, b, c: a * total,
    (),
    moved=_either("add_mul", (1, 2, 0), (2, 1, 0)),
)

"""The sums and products of a syntax tree, and what may stand for each."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from . import forms
from .flow import Position
from .forms import Form, Option

# Patterns are no expressions, and the text of a string is not the code in it.
_LEFT_OUT: tuple[type[ast.AST], ...] = (ast.JoinedStr, ast.pattern)
if sys.version_info >= (3, 14):
    _LEFT_OUT += (ast.TemplateStr,)


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float, complex))


def _is_zero(node: ast.expr) -> bool:
    return _is_number(node) and ast.literal_eval(node) == 0


def _may_move(node: ast.expr) -> bool:
    """Evaluated earlier or later it is the same: a name, an attribute of one, a number."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) or _is_number(node)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and not _is_number(node))


@dataclass
class Site:
    """One sum or product, or two in one expression."""

    index: int
    node: ast.BinOp
    form: Form
    operands: list[ast.expr]
    function: str = "<module>"
    # Operands that are variables and may be written, and what of the source's `shown`, by number, that depends on.
    writable: dict[int, list[int]] = field(default_factory=dict)
    in_parentheses: bool = False  # that an op in its place has no need of

    @cached_property
    def names(self) -> frozenset[int]:
        """Operands that are variables."""
        return frozenset(i for i, operand in enumerate(self.operands) if isinstance(operand, ast.Name))

    @property
    def position(self) -> Position:
        return position_of(self.node)

    @cached_property
    def options(self) -> list[Option]:
        options = list(self.form.options)
        if all(map(_may_move, self.operands)) or (len(self.operands) == 2 and any(map(_is_number, self.operands))):
            options += self.form.moved
        return [option for option in options if option.writes is None or option.writes in self.writable]


def position_of(node: ast.expr) -> Position:
    return node.lineno, node.end_lineno or 0, node.col_offset, node.end_col_offset or 0


def _match(node: ast.AST) -> tuple[Form, list[ast.expr]] | None:
    """The form of a sum, difference or product, and its operands. Where one op computes it, the operand behind the first
    operator is evaluated before that."""
    match node:
        case ast.BinOp(ast.BinOp(a, ast.Mult(), b), ast.Add(), c) if _may_move(c):
            return forms.PRODUCT_PLUS, [a, b, c]
        case ast.BinOp(a, ast.Add(), ast.BinOp(b, ast.Mult(), c)):
            return forms.PLUS_PRODUCT, [a, b, c]
        case ast.BinOp(a, ast.Add(), b):
            return forms.SUM, [a, b]
        case ast.BinOp(_, ast.Sub(), b) if _is_zero(b):
            return None  # -0.0 stays what it is, and would not with a zero added
        case ast.BinOp(a, ast.Sub(), ast.BinOp(b, ast.Mult(), c)):
            return forms.MINUS_PRODUCT, [a, b, c]
        case ast.BinOp(ast.BinOp(a, ast.Mult(), b), ast.Sub(), c) if _is_number(c):
            return forms.PRODUCT_MINUS_NUMBER, [a, b, c]
        case ast.BinOp(a, ast.Sub(), b):
            return (forms.MINUS_NUMBER if _is_number(b) else forms.DIFFERENCE), [a, b]
        case ast.BinOp(ast.BinOp(a, ast.Add(), b), ast.Mult(), c) if _may_move(c):
            return forms.SUM_TIMES, [a, b, c]
        case ast.BinOp(a, ast.Mult(), ast.BinOp(b, ast.Add(), c)) if all(map(_may_move, (a, b, c))):
            return forms.TIMES_SUM, [a, b, c]
        case ast.BinOp(a, ast.Mult(), b):
            return forms.PRODUCT, [a, b]
    return None


def found_in(node: ast.AST) -> tuple[ast.BinOp, Form, list[ast.expr]] | None:
    """Of texts, or of numbers alone, nothing."""
    found = _match(node)
    if not isinstance(node, ast.BinOp) or found is None or any(map(_is_text, found[1])) or all(map(_is_number, found[1])):
        return None
    return node, *found


def _of_functions(scope: ast.AST) -> Iterator[ast.AST]:
    """What runs in the functions of a class, and not in the class: there a name may be whatever the namespace makes of it."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from node.body
        elif isinstance(node, ast.Lambda):
            yield node.body
        else:
            yield from _of_functions(node)


def find_sites(tree: ast.Module, keeps_its_text: Callable[[ast.expr, list[ast.expr]], bool]) -> Iterator[Site]:
    """In the order of the text. `keeps_its_text` says whether nothing is lost of an expression if its operands alone are kept."""
    waiting: list[ast.AST] = [tree]
    enclosed: set[int] = set()
    left_out: set[int] = set()
    index = 0
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            enclosed.add(id(node.value))
        if isinstance(node, _LEFT_OUT):
            continue
        left_out |= {id(getattr(node, each, None)) for each in ("annotation", "returns")}
        if id(node) in left_out:
            continue
        inside: Iterable[ast.AST] = ast.iter_child_nodes(node)
        found = found_in(node)
        if isinstance(node, ast.ClassDef):
            inside = _of_functions(node)
        elif found is not None and _may_be_a_call(found[0]) and keeps_its_text(found[0], found[2]):
            binary, form, operands = found
            yield Site(index, binary, form, operands, in_parentheses=id(binary) in enclosed)
            index += 1
            inside = operands
        waiting += reversed(list(inside))


def _may_be_a_call(node: ast.BinOp) -> bool:
    return not any(isinstance(each, (ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Starred)) for each in ast.walk(node))

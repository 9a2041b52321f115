"""A statement that writes in place, written out of place: the code that guard's reports suggest.

A suggestion is code that runs where the statement stood, or there is none. What a name stands for (a tensor, a list of
them, a module full of functions) is looked up in the frame that is writing, as the text alone does not say it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.MatMult: "@",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
}
_UNKNOWN = object()


@dataclass(frozen=True)
class Rewritten:
    code: str | None = None  # the statement out of place
    clone: str | None = None  # what to clone() in front of it, where it assigns to a part of a tensor
    parameter: bool = False  # it updates a parameter: out of place it would update nothing


def _statement(source: str) -> ast.stmt | None:
    for text in (source, f"{source} pass"):  # the head of a block
        try:
            body = ast.parse(text).body
        except SyntaxError:  # a line of a longer statement
            continue
        return body[0] if len(body) == 1 else None
    return None


def _value(node: ast.expr, frame: FrameType | None) -> Any:
    """What the expression stands for, as far as that can be read without running any of the user's code."""
    if frame is None:
        return _UNKNOWN
    if isinstance(node, ast.Name):
        for names in (frame.f_locals, frame.f_globals):
            if node.id in names:
                return names[node.id]
        return _UNKNOWN
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)
        if owner is _UNKNOWN or isinstance(owner, torch.Tensor):
            return _UNKNOWN
        attributes = getattr(owner, "__dict__", None)
        tables = (attributes, *(attributes or {}).values()) if isinstance(owner, torch.nn.Module) else (attributes,)
        for table in tables:
            if isinstance(table, Mapping) and node.attr in table:
                return table[node.attr]
    return _UNKNOWN


def _seen_through(node: ast.expr) -> ast.expr:
    """x, of x.data and x.detach()."""
    while True:
        if isinstance(node, ast.Attribute) and node.attr == "data":
            node = node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "detach"
            and not node.args
        ):
            node = node.func.value
        else:
            return node


def _is_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_name(node.value))


def _is_parameter(value: Any) -> bool:
    # A view is not asked: torch may refuse to say whether it is a leaf.
    return isinstance(value, torch.Tensor) and not value._is_view() and value.is_leaf and value.requires_grad


class _Text:
    """A source line, cut by the byte offsets that ast counts in."""

    def __init__(self, source: str) -> None:
        self.raw = source.encode()

    def of(self, node: ast.AST) -> str:
        return self.raw[node.col_offset : node.end_col_offset].decode()  # type: ignore[attr-defined]

    def replaced(self, whole: ast.AST, part: ast.AST, new: str) -> str:
        begin, end = whole.col_offset, whole.end_col_offset  # type: ignore[attr-defined]
        head = self.raw[begin : part.col_offset]  # type: ignore[attr-defined]
        tail = self.raw[part.end_col_offset : end]  # type: ignore[attr-defined]
        return head.decode() + new + tail.decode()


def _augmented(statement: ast.AugAssign, text: _Text, frame: FrameType | None) -> Rewritten:
    target = statement.target
    if _is_parameter(_value(_seen_through(target), frame)):
        return Rewritten(parameter=True)
    if isinstance(target, ast.Subscript) and not isinstance(_value(target.value, frame), (list, dict)):
        return Rewritten(clone=text.of(target.value) if _is_name(target.value) else None)
    right = text.of(statement.value)
    if not isinstance(statement.value, (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript)):
        right = f"({right})"
    left = text.of(target)
    return Rewritten(f"{left} = {text.of(_seen_through(target))} {_OPERATORS[type(statement.op)]} {right}")


def _called(statement: ast.stmt, call: ast.Call, text: _Text, frame: FrameType | None) -> Rewritten:
    """`call` is x.op_(...), or namespace.op_(x, ...)."""
    assert isinstance(call.func, ast.Attribute)
    inplace, owner = call.func.attr, _seen_through(call.func.value)
    found = _value(owner, frame)
    is_tensor = isinstance(found, torch.Tensor) or (found is _UNKNOWN and not _is_name(owner))
    if found is _UNKNOWN and not is_tensor:
        return Rewritten()
    written = owner if is_tensor else call.args[0] if call.args else None
    if written is None or isinstance(written, ast.Starred):
        return Rewritten()
    if _is_parameter(_value(_seen_through(written), frame)):
        return Rewritten(parameter=True)
    pure = inplace[:-1]
    arguments = [*call.args, *(keyword for keyword in call.keywords)]
    if is_tensor:
        inside = ", ".join(map(text.of, arguments))
        has_form = hasattr(torch.Tensor, pure)
        new = f"{text.of(owner)}.{pure}({inside})" if has_form else f"{text.of(owner)}.clone().{inplace}({inside})"
    else:
        has_form = hasattr(found, pure)
        first = text.of(written) if has_form else f"{text.of(written)}.clone()"
        inside = ", ".join([first, *map(text.of, arguments[1:])])
        new = f"{text.of(owner)}.{pure if has_form else inplace}({inside})"
    code = text.replaced(statement, call, new)
    if isinstance(statement, ast.Expr):
        target = _seen_through(written)
        if not _is_name(target):
            return Rewritten()
        code = f"{text.of(target)} = {code}"
    return Rewritten(code)


def out_of_place(source: str, columns: tuple[int, int] | None, op: str, frame: FrameType | None) -> Rewritten:
    """`op` is the operator that writes, without namespace and overload; `columns` the part of `source` that ran it."""
    statement = _statement(source)
    if statement is None or isinstance(statement, (ast.For, ast.While, ast.If, ast.With, ast.FunctionDef, ast.ClassDef)):
        return Rewritten()
    text = _Text(source)
    if isinstance(statement, ast.AugAssign):
        return _augmented(statement, text, frame)
    if isinstance(statement, ast.Assign) and op in ("copy_", "fill_", "index_put_", "masked_fill_", "zero_", "_index_put_impl_"):
        parts = [target for target in statement.targets if isinstance(target, ast.Subscript)]
        if parts:
            return Rewritten(clone=text.of(parts[0].value) if _is_name(parts[0].value) else None)
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    for call in calls:
        for keyword in call.keywords:
            if keyword.arg == "inplace" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True:
                return Rewritten(text.replaced(statement, keyword.value, "False"))
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == op]
    if len(named) > 1 and columns is not None:
        ran = source[slice(*columns)]
        named = [call for call in named if text.of(call) == ran]
    if len(named) == 1 and op.endswith("_") and not op.endswith("__"):
        return _called(statement, named[0], text, frame)
    return Rewritten()

"""The structure of a function: what it computes, whatever its author called things.

Two functions have the same structure where their source differs in nothing but the names of arguments and locals, annotations,
docstrings, decorators, comments and layout. Copies of a block in other models have it; a changed block has not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef

# What says nothing about what is computed, or is there in some versions of Python only.
_SILENT = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns", "decorator_list"}

# By the file too: code of the same lines of two files is equal.
_known: dict[tuple[types.CodeType, str], str | None] = {}


def innermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the decorators of a function are around."""
    return inspect.unwrap(function)


def structure_of(function: Callable[..., Any]) -> str | None:
    """The structure as a short hash; None where there is no source, or not the source of this function."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    key = (code, code.co_filename)
    if key not in _known:
        _known[key] = _read(function)
    return _known[key]


def _read(function: Callable[..., Any]) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    node = tree.body[0] if tree.body else None
    # A file that has changed since it was imported shows another function at the same lines.
    if not isinstance(node, Function) or node.name != function.__code__.co_name:
        return None
    return structure_of_source(node)


def structure_of_source(node: Function) -> str:
    names: dict[str, str] = {}
    for name in _locals(node):
        names.setdefault(name, f"v{len(names)}")
    return hashlib.sha256(_written(node.args, names).encode() + _body(node, names).encode()).hexdigest()[:12]


def _locals(node: ast.AST) -> Iterator[str]:
    """Arguments and whatever is assigned, in the order of the source; of functions and comprehensions inside as well."""
    if isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        yield node.id
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    for child in ast.iter_child_nodes(node):
        yield from _locals(child)


def _body(node: Function, names: dict[str, str]) -> str:
    body = node.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        body = body[1:]
    return "".join(_written(statement, names) for statement in body)


def _written(node: Any, names: dict[str, str]) -> str:
    if isinstance(node, list):
        return f"[{','.join(_written(item, names) for item in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign) and node.simple:
        if node.value is None:
            return ""
        node = ast.Assign(targets=[node.target], value=node.value)
    if isinstance(node, Function):
        inside = _body(node, names)
        return f"def {names.get(node.name, node.name)}({_written(node.args, names)}){inside}"
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.arg):
        return names[node.arg]
    fields = (
        f"{name}={_written(value, names)}"
        for name, value in ast.iter_fields(node)
        if name not in _SILENT and value is not None and value != []
    )
    return f"{type(node).__name__}({','.join(fields)})"

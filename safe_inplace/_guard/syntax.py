"""The syntax tree of a statement: found by the instruction that runs, read, and changed."""

from __future__ import annotations

import ast
import functools
import linecache
import sys
from collections.abc import Iterator
from itertools import islice
from types import CodeType
from typing import Any


@functools.lru_cache(maxsize=8)
def tree_of(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):  # not the source of a Python program
        return None


def path_to(code: CodeType | None, instruction: int) -> list[ast.AST]:
    """The syntax tree from the module down to the node that the instruction belongs to; nothing where that is not known."""
    if code is None:
        return []
    position = next(islice(code.co_positions(), max(instruction, 0) // 2, None), (None,) * 4)
    line, end_line, column, end_column = position
    tree = tree_of("".join(linecache.getlines(code.co_filename)))
    if tree is None or line is None or end_line is None or column is None or end_column is None:
        return []
    end = (end_line, end_column)
    path: list[ast.AST] = [tree]
    while True:
        inside = [child for child in ast.iter_child_nodes(path[-1]) if _begin(child) < end <= _end(child)]
        if not inside:
            break
        path.append(inside[0])
    while len(path) > 1:
        node = path[-1]
        if _end(node) == end and isinstance(node, (ast.AugAssign, ast.Subscript, ast.Call)):
            # A method called over several lines is placed at its name.
            moved = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and line == node.func.end_lineno
            if _begin(node) == (line, column) or (moved and line != node.lineno):
                return path
        path.pop()
    return []


def _begin(node: ast.AST) -> tuple[int, int]:
    return (node.lineno, node.col_offset) if hasattr(node, "col_offset") else (sys.maxsize, 0)  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return (node.end_lineno, node.end_col_offset) if hasattr(node, "end_col_offset") else (0, 0)  # type: ignore[attr-defined]


def seen_through(node: ast.expr) -> ast.expr:
    """x, of x.data, x.detach() and x[0]."""
    while True:
        if isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr == "data"):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("detach", "view"):
            node = node.func.value
        else:
            return node


def dump(node: ast.AST) -> str:
    return ast.dump(node).replace("Store()", "Load()")


def reads(node: ast.AST, name: str) -> list[ast.AST]:
    return [found for found in ast.walk(node) if isinstance(found, ast.expr) and dump(found) == name]


def calls(node: ast.AST) -> bool:
    return any(isinstance(found, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr)) for found in ast.walk(node))


def written_by(node: ast.AST) -> Iterator[ast.expr]:
    """The expression that stands for what a node writes."""
    if isinstance(node, ast.AugAssign):
        yield node.target.value if isinstance(node.target, ast.Subscript) else node.target
    elif isinstance(node, ast.Subscript):
        yield node.value
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute):
            yield node.func.value.value if isinstance(node.func.value, ast.Subscript) else node.func.value
        if node.args:
            yield node.args[0]


def replaced(tree: Any, old: ast.AST, new: ast.AST) -> Any:
    """A copy of the tree: the tree itself is kept for the next report."""
    if tree is old:
        return new
    if isinstance(tree, list):
        return [replaced(item, old, new) for item in tree]
    if not isinstance(tree, ast.AST):
        return tree
    return type(tree)(**{name: replaced(value, old, new) for name, value in ast.iter_fields(tree)})


def loaded(node: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(node), mode="eval").body


def stored(node: ast.expr) -> ast.expr:
    (statement,) = ast.parse(f"{ast.unparse(node)} = 0").body
    return statement.targets[0]  # type: ignore[attr-defined]


def method_call(owner: ast.expr, name: str, arguments: list[ast.expr]) -> ast.Call:
    return ast.Call(ast.Attribute(owner, name, ast.Load()), arguments, [])


def text_of(statement: ast.stmt) -> str:
    return ast.unparse(ast.fix_missing_locations(statement))

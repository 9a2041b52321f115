"""What an expression stands for in a frame that runs, found without running any code of the user's."""

from __future__ import annotations

import ast
import inspect
import sys
from types import FrameType
from typing import Any

import torch

UNKNOWN = object()


def _references_of_a_handle() -> int:
    """From some version on, a handle in C++ beside the Python object's own holds a reference to that object."""
    tensor = torch.zeros(1)
    before = sys.getrefcount(tensor)
    view = tensor.view(1)
    more = sys.getrefcount(tensor) - before
    del view
    return more


HANDLE = _references_of_a_handle()


def variables_of(frame: FrameType) -> dict[str, Any]:
    """The frame's variables: a function's are copied. Before Python 3.13 asking for them leaves another copy in the frame, which
    would keep them alive for as long as it runs."""
    found = frame.f_locals
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return found
    variables = dict(found)
    if sys.version_info < (3, 13) and sys.getrefcount(found) <= 3:  # the frame, this name, the call: nobody else has seen it
        found.clear()
    return variables


def value_in(node: ast.expr, variables: dict[str, Any], names: dict[str, Any]) -> Any:
    """What the expression stands for, as far as that can be read without running any of the user's code."""
    if isinstance(node, ast.Name):
        return variables.get(node.id, names.get(node.id, UNKNOWN))
    if isinstance(node, ast.Attribute):
        owner = value_in(node.value, variables, names)
        if owner is UNKNOWN or isinstance(owner, torch.Tensor) or is_data_descriptor(type(owner), node.attr):
            return UNKNOWN
        attributes = getattr(owner, "__dict__", {})
        tables = [attributes]
        if isinstance(owner, torch.nn.Module):
            tables += [attributes.get(table, {}) for table in ("_parameters", "_buffers", "_modules")]
        return next((table[node.attr] for table in tables if node.attr in table), UNKNOWN)
    if isinstance(node, ast.Subscript):
        owner, key = value_in(node.value, variables, names), _key(node.slice, variables, names)
        if type(owner) is list and type(key) is int and -len(owner) <= key < len(owner):
            return owner[key]
        if type(owner) is dict and type(key) in (int, str) and key in owner:
            return owner[key]
    return UNKNOWN


def _key(node: ast.expr, variables: dict[str, Any], names: dict[str, Any]) -> Any:
    """A key that is the same when it is read twice."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return value_in(node, variables, names)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _key(node.operand, variables, names)
        return -inner if type(inner) is int else UNKNOWN
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        left, right = _key(node.left, variables, names), _key(node.right, variables, names)
        if type(left) is int and type(right) is int:
            return left + right if isinstance(node.op, ast.Add) else left - right
    return UNKNOWN


def is_data_descriptor(owner: type, name: str) -> bool:
    found = inspect.getattr_static(owner, name, None)
    return hasattr(type(found), "__set__") or hasattr(type(found), "__delete__")

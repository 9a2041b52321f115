"""Who is called, on whatever way the program takes: by the text of its file."""

from __future__ import annotations

import ast
import inspect
from collections import Counter, defaultdict
from collections.abc import Sequence

from torch import nn

from .flow import Flow
from .fresh import MODULES

_TRUSTED = ("torch", "safe_inplace")
# Those that may be told to write in place.
_MAY_WRITE = frozenset(name for name in MODULES if "inplace" in inspect.signature(getattr(nn, name)).parameters)
# By these a module is given another one without an assignment in the text.
_GIVE = ("setattr", "add_module", "register_module", "fuse_modules", "_modules")


class Callees:
    """Of one syntax tree, with the code that is made of it. `parents` holds the node around each, by identity."""

    def __init__(self, tree: ast.Module, flows: Sequence[Flow], parents: dict[int, ast.AST]) -> None:
        self._flows = flows
        self._parents = parents
        self._imports: Counter[str] = Counter()  # how often a name is imported, of torch and of this package alone
        self._stored: dict[str, list[ast.Attribute]] = defaultdict(list)  # attributes that the file assigns to, by their names
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._imports.update(each.asname or _top(each.name) for each in node.names if _top(each.name) in _TRUSTED)
            elif isinstance(node, ast.ImportFrom) and not node.level and _top(node.module or "") in _TRUSTED:
                self._imports.update(each.asname or each.name for each in node.names)
            elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                self._stored[node.attr].append(node)
        self._has_star = any(flow.imports_star for flow in flows)
        self._gives = any(flow.mentions(name) for flow in flows for name in _GIVE)

    def is_settled(self, function: ast.expr) -> bool:
        """Of torch, by an import that is the only one to bind its name; or a module that its class makes always of one kind.
        Anything else may be another one with other arguments of the program, such as an Identity in the place of a norm."""
        if isinstance(function, ast.Call):
            return self._makes_what_makes_new(function)
        if self._is_imported(function):
            return True
        return isinstance(function, ast.Attribute) and self._is_of_one_kind(function)

    def _is_imported(self, function: ast.expr) -> bool:
        parts = []
        while isinstance(function, ast.Attribute):
            parts.append(function.attr)
            function = function.value
        if not isinstance(function, ast.Name) or self._has_star:
            return False
        name = function.id
        local = any(flow.has_variable(name) for flow in self._flows)
        changed = any(_root(each) == name for part in parts for each in self._stored[part])
        return not local and not changed and 0 < self._imports[name] == sum(flow.binds(name) for flow in self._flows)

    def _is_of_one_kind(self, attribute: ast.Attribute) -> bool:
        """An attribute of `self`, in a class of torch's alone, to which the whole file assigns nothing else."""
        around = self._class_around(attribute)
        if around is None or self._gives or not all(map(self._is_imported, around.bases)):
            return False
        if not (isinstance(attribute.value, ast.Name) and attribute.value.id == "self"):
            return False
        stored = self._stored[attribute.attr]
        statements = [self._parents[id(each)] for each in stored]
        values = [each.value if isinstance(each, (ast.Assign, ast.AnnAssign)) else None for each in statements]
        here = any(self._class_around(each) is around for each in stored)
        return here and all(map(self._makes_what_makes_new, values))

    def _class_around(self, node: ast.AST) -> ast.ClassDef | None:
        around: ast.AST | None = node
        while not (around is None or isinstance(around, ast.ClassDef)):
            around = self._parents.get(id(around))
        return around

    def _makes_what_makes_new(self, value: ast.expr | None) -> bool:
        if isinstance(value, ast.IfExp):
            return self._makes_what_makes_new(value.body) and self._makes_what_makes_new(value.orelse)
        if not isinstance(value, ast.Call) or not self._is_imported(value.func):
            return False
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        if name == "Sequential":
            return bool(value.args) and self._makes_what_makes_new(value.args[0]) and self._makes_what_makes_new(value.args[-1])
        told = name in _MAY_WRITE and bool(value.args or value.keywords)
        return name in MODULES and not told


def _top(module: str) -> str:
    return module.partition(".")[0]


def _root(attribute: ast.Attribute) -> str | None:
    """The name before the first dot, of `name.attribute`; None where that is no name."""
    value: ast.expr = attribute.value
    while isinstance(value, ast.Attribute):
        value = value.value
    return value.id if isinstance(value, ast.Name) else None

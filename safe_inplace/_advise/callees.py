"""Who is called, on whatever way the program takes: by the text of its file."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Sequence

from .flow import Flow
from .fresh import MODULES


class Callees:
    """Of one syntax tree, with the code that is made of it. `parents` holds the node around each, by identity."""

    def __init__(self, tree: ast.Module, flows: Sequence[Flow], parents: dict[int, ast.AST]) -> None:
        self._flows = flows
        self._parents = parents
        self._imports = Counter(
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        )

    def is_settled(self, function: ast.expr) -> bool:
        """Of a library, by an import that is the only one to bind its name; or a module that its class makes always of one kind.
        Anything else may be another one with other arguments of the program, such as an Identity in the place of a norm."""
        if isinstance(function, ast.Call):
            return self._makes_what_makes_new(function)
        if self._is_imported(function):
            return True
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            made = list(self._assigned(function))
            return bool(made) and all(map(self._makes_what_makes_new, made))
        return False

    def _is_imported(self, function: ast.expr) -> bool:
        while isinstance(function, ast.Attribute):
            function = function.value
        if not isinstance(function, ast.Name):
            return False
        name = function.id
        local = any(flow.has_variable(name) for flow in self._flows)
        return not local and 0 < self._imports[name] == sum(flow.binds(name) for flow in self._flows)

    def _assigned(self, attribute: ast.Attribute) -> Iterator[ast.expr | None]:
        """To attributes of that name in the class around it. None is what the text does not show."""
        around: ast.AST | None = attribute
        while not (around is None or isinstance(around, ast.ClassDef)):
            around = self._parents.get(id(around))
        for node in ast.walk(around) if around is not None else ():
            if isinstance(node, ast.Attribute) and node.attr == attribute.attr and not isinstance(node.ctx, ast.Load):
                statement = self._parents[id(node)]
                yield statement.value if isinstance(statement, (ast.Assign, ast.AnnAssign)) else None

    def _makes_what_makes_new(self, value: ast.expr | None) -> bool:
        if isinstance(value, ast.IfExp):
            return self._makes_what_makes_new(value.body) and self._makes_what_makes_new(value.orelse)
        if not isinstance(value, ast.Call) or not self._is_imported(value.func):
            return False
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        if name == "Sequential":
            return bool(value.args) and self._makes_what_makes_new(value.args[0]) and self._makes_what_makes_new(value.args[-1])
        return name in MODULES and all(keyword.arg not in (None, "inplace") for keyword in value.keywords)

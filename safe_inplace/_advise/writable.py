"""Which variables may be written: nobody reads them again, and what they hold was made for them."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from .find import Site, position_of
from .flow import Flow, Position


def _calls_of(value: ast.expr) -> list[ast.Call] | None:
    """The calls of which one makes the value, none where an operator does; None where it may be what was there before."""
    if isinstance(value, ast.BinOp) or (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub)):
        return []
    if isinstance(value, ast.IfExp):
        both = [_calls_of(value.body), _calls_of(value.orelse)]
        return None if None in both else [call for calls in both if calls is not None for call in calls]
    if isinstance(value, ast.Call) and not any(isinstance(argument, ast.Starred) for argument in value.args):
        if any(keyword.arg in (None, "out", "inplace") for keyword in value.keywords):
            return None
        return None if isinstance(value.func, ast.Name) and value.func.id == "super" else [value]
    return None


class Writable:
    """Of one syntax tree, with the code that is made of it."""

    def __init__(self, tree: ast.Module, flows: Sequence[Flow]) -> None:
        self._flows = flows
        self._values: dict[Position, ast.expr] = {}  # of `name = value`, by where the name stands
        self._augmented: set[Position] = set()  # where the names of `name += value` stand
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self._values[position_of(node.targets[0])] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self._values[position_of(node.target)] = node.value
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                self._augmented.add(position_of(node.target))
        # The compiler writes a `finally` twice.
        self._places: dict[Position, list[tuple[Flow, int]]] = {}
        for flow in flows:
            for position, index in flow.operators():
                self._places.setdefault(position, []).append((flow, index))

    def function_of(self, site: Site) -> str:
        places = self._places.get(site.position)
        return places[0][0].code.co_qualname if places else "<module>"

    def operands_of(self, site: Site) -> dict[int, list[ast.Call]]:
        """Those that may be written, and the calls that have made what they hold, as far as no operator has."""
        names = [operand.id if isinstance(operand, ast.Name) else None for operand in site.operands]
        found = {}
        for i, name in enumerate(names):
            places = self._places.get(site.position)
            if name is None or names.count(name) > 1 or not places:
                continue
            calls = self._made_by(name, places) if all(flow.is_dead(name, at) for flow, at in places) else None
            if calls is not None:
                found[i] = calls
        return found

    def _made_by(self, name: str, places: list[tuple[Flow, int]]) -> list[ast.Call] | None:
        """None where the variable may hold something else than a new tensor."""
        inside = [flow for flow, _ in places]
        if any(flow.binds(name) for flow in self._flows if flow not in inside):
            return None  # another function may bind a module's variable
        calls: list[ast.Call] = []
        for flow, at in places:
            sources = flow.sources(name, at, self._augmented)
            if not sources:
                return None
            for source in sources:
                made = _calls_of(self._values[source]) if source in self._values else None
                if made is None:
                    return None
                calls += [call for call in made if call not in calls]
        return calls

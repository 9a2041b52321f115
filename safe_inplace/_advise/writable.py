"""Which variables may be written: nobody reads them again, and what they hold was made for them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from .find import Site, position_of
from .flow import Flow, Position

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
_IN_PLACE = (ast.Add, ast.Sub, ast.Mult, ast.Div)


@dataclass(frozen=True)
class Shown:
    """An expression that is shown while the program runs: what is called, or an operand. Of that it depends what is made."""

    node: ast.expr
    is_callee: bool


def _operands(value: ast.expr) -> list[Shown]:
    if isinstance(value, ast.BinOp) and isinstance(value.op, _ARITHMETIC):
        return _operands(value.left) + _operands(value.right)
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        return _operands(value.operand)
    return [] if isinstance(value, ast.Constant) else [Shown(value, is_callee=False)]


def _makers(value: ast.expr) -> list[Shown] | None:
    """What decides whether the value is a new tensor; None where it may be something that was there before."""
    if isinstance(value, (ast.BinOp, ast.UnaryOp)):
        shown = _operands(value)
        return None if Shown(value, is_callee=False) in shown else shown
    if isinstance(value, ast.IfExp):
        both = [_makers(value.body), _makers(value.orelse)]
        return None if None in both else [shown for makers in both if makers is not None for shown in makers]
    if isinstance(value, ast.Call) and not any(isinstance(argument, ast.Starred) for argument in value.args):
        if any(keyword.arg in (None, "out", "inplace") for keyword in value.keywords):
            return None
        return None if isinstance(value.func, ast.Name) and value.func.id == "super" else [Shown(value.func, is_callee=True)]
    return None


class Writable:
    """Of one syntax tree, with the code that is made of it."""

    def __init__(self, tree: ast.Module, flows: Sequence[Flow]) -> None:
        self._flows = flows
        self._values: dict[Position, ast.expr] = {}  # of `name = value`, by where the name stands
        self._augmented: dict[Position, ast.expr] = {}  # of `name += value`
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self._values[position_of(node.targets[0])] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self._values[position_of(node.target)] = node.value
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and isinstance(node.op, _IN_PLACE):
                self._augmented[position_of(node.target)] = node.value
        # The compiler writes a `finally` twice.
        self._places: dict[Position, list[tuple[Flow, int]]] = {}
        for flow in flows:
            for position, index in flow.operators():
                self._places.setdefault(position, []).append((flow, index))

    def function_of(self, site: Site) -> str:
        places = self._places.get(site.position)
        return places[0][0].code.co_qualname if places else "<module>"

    def operands_of(self, site: Site) -> dict[int, list[Shown]]:
        """Those that may be written, and what decides whether all that they may hold was made for them."""
        names = [operand.id if isinstance(operand, ast.Name) else None for operand in site.operands]
        found = {}
        for i, name in enumerate(names):
            places = self._places.get(site.position)
            if name is None or names.count(name) > 1 or not places:
                continue
            makers = self._made_by(name, places) if all(flow.is_dead(name, at) for flow, at in places) else None
            if makers is not None:
                found[i] = makers
        return found

    def _made_by(self, name: str, places: list[tuple[Flow, int]]) -> list[Shown] | None:
        inside = [flow for flow, _ in places]
        if any(flow.is_module for flow in inside) and any(
            flow.binds(name) or flow.may_bind_anything for flow in self._flows if flow not in inside
        ):
            return None  # a function may bind a module's variable
        shown: list[Shown] = []
        for flow, at in places:
            sources = flow.sources(name, at, self._augmented)
            if not sources or sources <= self._augmented.keys():
                return None
            for source in sources:
                if source in self._augmented:
                    makers: list[Shown] | None = _operands(self._augmented[source])
                else:
                    makers = _makers(self._values[source]) if source in self._values else None
                if makers is None:
                    return None
                shown += [each for each in makers if each not in shown]
        return shown

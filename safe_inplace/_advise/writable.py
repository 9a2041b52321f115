"""Which variables may be written: nobody reads them again, and what they hold was made for them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Sequence

from .callees import Callees
from .find import Site, position_of
from .flow import Flow, Position
from .readers import IN_PLACE, Readers, Shown, called, operands


def _makers(value: ast.expr) -> list[Shown] | None:
    """What decides whether the value is a new tensor; None where it may be something that was there before."""
    if isinstance(value, (ast.BinOp, ast.UnaryOp)):
        shown = operands(value)
        return None if Shown(value, is_callee=False) in shown else shown
    if isinstance(value, ast.IfExp):
        both = [_makers(value.body), _makers(value.orelse)]
        return None if None in both else [shown for makers in both if makers is not None for shown in makers]
    if isinstance(value, ast.Call) and not any(isinstance(argument, ast.Starred) for argument in value.args):
        return called(value)
    return None


class Writable:
    """Of one syntax tree, with the code that is made of it."""

    def __init__(self, tree: ast.Module, flows: Sequence[Flow]) -> None:
        self._flows = flows
        parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._callees = Callees(tree, flows, parents)
        self._readers = Readers(parents)
        self._names: dict[str, list[ast.Name]] = defaultdict(list)
        self._values: dict[Position, ast.expr] = {}  # of `name = value`, by where the name stands
        self._augmented: dict[Position, ast.expr] = {}  # of `name += value`
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                self._names[node.id].append(node)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self._values[position_of(node.targets[0])] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self._values[position_of(node.target)] = node.value
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and isinstance(node.op, IN_PLACE):
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
            if not all(flow.is_dead(name, at) for flow, at in places):
                continue
            makers, readers = self._made_by(name, places), self._read_by(name, places, site, site.operands[i])
            if makers is not None and readers is not None:
                found[i] = list(dict.fromkeys(makers + readers))
        return found

    def is_settled(self, shown: Shown) -> bool:
        return not shown.is_callee or self._callees.is_settled(shown.node)

    def _read_by(self, name: str, places: Sequence[tuple[Flow, int]], site: Site, operand: ast.expr) -> list[Shown] | None:
        """What decides that nobody keeps what the variable holds; None where somebody may."""
        found: list[Shown] = []
        for flow, at in places:
            for position, is_exact in flow.reads(name, at, self._augmented):
                readers = [
                    [] if node is operand else self._readers.of(node, site.node)
                    for node in self._names[name]
                    if position is not None and (position_of(node) == position if is_exact else node.lineno == position[0])
                ]
                if not readers or None in readers:
                    return None
                found += [shown for each in readers if each is not None for shown in each]
        return found

    def _made_by(self, name: str, places: list[tuple[Flow, int]]) -> list[Shown] | None:
        inside = [flow for flow, _ in places]
        if any(flow.is_module for flow in inside) and any(
            flow.mentions(name) or flow.may_bind_anything for flow in self._flows if flow not in inside
        ):
            return None  # a function may bind a module's variable, or keep it
        shown: list[Shown] = []
        for flow, at in places:
            sources = flow.sources(name, at, self._augmented)
            if not sources or sources <= self._augmented.keys():
                return None
            for source in sources:
                if source in self._augmented:
                    makers: list[Shown] | None = operands(self._augmented[source])
                else:
                    makers = _makers(self._values[source]) if source in self._values else None
                if makers is None:
                    return None
                shown += [each for each in makers if each not in shown]
        return shown

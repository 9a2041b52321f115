"""A syntax tree in which what watches the program is called."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from .source import Source

# By this name, among the built-in ones, the program that is watched calls what watches it.
PROBE = "_safe_inplace_probe"
# And by this one it shows what it is about to call, where a variable gets what that returns.
CALLEE = "_safe_inplace_callee"


@dataclass
class _Instrument(ast.NodeTransformer):
    sites: dict[int, int]  # numbers, by the nodes
    calls: dict[int, int]
    operands: dict[int, list[ast.expr]]

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if id(node) not in self.sites:
            self.generic_visit(node)
            return node
        operands = [self.visit(operand) for operand in self.operands[id(node)]]
        return _call(node, PROBE, self.sites[id(node)], operands)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if id(node) in self.calls:
            node.func = _call(node.func, CALLEE, self.calls[id(node)], [node.func])
        return node


def _call(place: ast.expr, name: str, number: int, arguments: list[ast.expr]) -> ast.Call:
    call = ast.Call(ast.Name(name, ast.Load()), [ast.Constant(number), *arguments], [])
    return ast.fix_missing_locations(ast.copy_location(call, place))


def instrumented(source: Source, sites: list[int], calls: list[int]) -> ast.Module:
    """The tree with a call of the probe in the place of each site, and with each callee shown, by these numbers of theirs.
    Takes the source's tree."""
    tree = _Instrument(
        {id(site.node): number for site, number in zip(source.sites, sites, strict=True)},
        {id(call): number for call, number in zip(source.calls, calls, strict=True)},
        {id(site.node): site.operands for site in source.sites},
    ).visit(source.tree)
    assert isinstance(tree, ast.Module)
    return tree

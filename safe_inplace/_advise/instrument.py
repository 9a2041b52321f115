"""A syntax tree in which what watches the program is called."""

from __future__ import annotations

import ast

from .source import Source

# By this name, among the built-in ones, the program that is watched calls what watches it.
PROBE = "_safe_inplace_probe"
# And by these it shows what it is about to call, or to compute with, where a variable gets what comes of it.
CALLEE = "_safe_inplace_callee"
OPERAND = "_safe_inplace_operand"


class _Instrument(ast.NodeTransformer):
    def __init__(self, source: Source, sites: list[int], shown: list[int]) -> None:
        self._sites = {id(site.node): (site, number) for site, number in zip(source.sites, sites, strict=True)}
        self._shown = {id(each.node): (each, number) for each, number in zip(source.shown, shown, strict=True)}

    def visit(self, node: ast.AST) -> ast.AST:
        site, number = self._sites.get(id(node), (None, 0))
        if site is None:
            new = super().visit(node)
        else:
            # The name is for processes that know no site of this one: _child/sitecustomize.py.
            new = _call(site.node, PROBE, number, [ast.Constant(site.form.name), *map(self.visit, site.operands)])
        shown, number = self._shown.get(id(node), (None, 0))
        return new if shown is None else _call(shown.node, CALLEE if shown.is_callee else OPERAND, number, [new])


def _call(place: ast.expr, name: str, number: int, arguments: list[ast.AST]) -> ast.Call:
    call = ast.Call(ast.Name(name, ast.Load()), [ast.Constant(number), *arguments], [])  # type: ignore[list-item]
    return ast.fix_missing_locations(ast.copy_location(call, place))


def instrumented(source: Source, sites: list[int], shown: list[int]) -> ast.Module:
    """The tree in which each site, and all that is shown, goes through a call, by these numbers. Takes the source's tree."""
    tree = _Instrument(source, sites, shown).visit(source.tree)
    assert isinstance(tree, ast.Module)
    return tree

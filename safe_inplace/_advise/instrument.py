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
    def __init__(self, source: Source, first_site: int, first_shown: int) -> None:
        self._sites = {id(site.node): (site, number) for number, site in enumerate(source.sites, first_site)}
        self._shown = {id(each.node): (each, number) for number, each in enumerate(source.shown, first_shown)}

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


def instrumented(source: Source, first_site: int, first_shown: int) -> ast.Module:
    """The tree in which each site, and all that is shown, goes through a call, by numbers that begin with these. Takes the
    source's tree."""
    tree = _Instrument(source, first_site, first_shown).visit(source.tree)
    assert isinstance(tree, ast.Module)
    return tree

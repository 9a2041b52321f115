"""The sums and products of a source file: where they stand, what may stand for them, and the file with these in their place."""

from __future__ import annotations

import ast
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from . import forms
from .flow import Flow, Position, codes_in
from .forms import Form, Option

# By this name, among the built-in ones, the program that is watched calls what watches it.
PROBE = "_safe_inplace_probe"
# And by this one it shows what it is about to call, where a variable gets what that returns.
CALLEE = "_safe_inplace_callee"

_NAME = "safe_inplace"
_BETWEEN = re.compile(rb"[\s()+*-]*")
_GLUED = re.compile(rb"[\w\x80-\xff]")
# Patterns are no expressions, and the text of a string is not the code in it.
_LEFT_OUT: tuple[type[ast.AST], ...] = (ast.JoinedStr, ast.pattern)
if sys.version_info >= (3, 14):
    _LEFT_OUT += (ast.TemplateStr,)


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        node = node.operand
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float, complex))


def _may_move(node: ast.expr) -> bool:
    """Evaluated earlier or later it is the same: a name, an attribute of one, a number."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) or _is_number(node)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and not _is_number(node))


@dataclass
class Site:
    """One sum or product, or two in one expression."""

    index: int
    node: ast.BinOp
    form: Form
    operands: list[ast.expr]
    function: str = "<module>"
    names: frozenset[int] = frozenset()  # operands that are variables
    # Those of them that nobody reads any more, and the calls, by number, that have made what they hold.
    writable: dict[int, list[int]] = field(default_factory=dict)
    in_parentheses: bool = False  # that an op in its place has no need of

    @property
    def position(self) -> Position:
        return position_of(self.node)

    @cached_property
    def options(self) -> list[Option]:
        options = list(self.form.options)
        if all(map(_may_move, self.operands)) or (len(self.operands) == 2 and any(map(_is_number, self.operands))):
            options += self.form.moved
        return [option for option in options if option.writes is None or option.writes in self.writable]


def position_of(node: ast.expr) -> Position:
    return node.lineno, node.end_lineno or 0, node.col_offset, node.end_col_offset or 0


def _match(node: ast.AST) -> tuple[Form, list[ast.expr]] | None:
    """The form of a sum, difference or product, and its operands. Where one op computes it, the operand behind the first
    operator is evaluated before that."""
    match node:
        case ast.BinOp(ast.BinOp(a, ast.Mult(), b), ast.Add(), c) if _may_move(c):
            return forms.PRODUCT_PLUS, [a, b, c]
        case ast.BinOp(a, ast.Add(), ast.BinOp(b, ast.Mult(), c)):
            return forms.PLUS_PRODUCT, [a, b, c]
        case ast.BinOp(a, ast.Add(), b):
            return forms.SUM, [a, b]
        case ast.BinOp(a, ast.Sub(), ast.BinOp(b, ast.Mult(), c)):
            return forms.MINUS_PRODUCT, [a, b, c]
        case ast.BinOp(ast.BinOp(a, ast.Mult(), b), ast.Sub(), c) if _is_number(c):
            return forms.PRODUCT_MINUS_NUMBER, [a, b, c]
        case ast.BinOp(a, ast.Sub(), b):
            return (forms.MINUS_NUMBER if _is_number(b) else forms.DIFFERENCE), [a, b]
        case ast.BinOp(ast.BinOp(a, ast.Add(), b), ast.Mult(), c) if _may_move(c):
            return forms.SUM_TIMES, [a, b, c]
        case ast.BinOp(a, ast.Mult(), ast.BinOp(b, ast.Add(), c)) if all(map(_may_move, (a, b, c))):
            return forms.TIMES_SUM, [a, b, c]
        case ast.BinOp(a, ast.Mult(), b):
            return forms.PRODUCT, [a, b]
    return None


def _found_in(node: ast.AST) -> tuple[ast.BinOp, Form, list[ast.expr]] | None:
    """Of texts, or of numbers alone, nothing."""
    found = _match(node)
    if not isinstance(node, ast.BinOp) or found is None or any(map(_is_text, found[1])) or all(map(_is_number, found[1])):
        return None
    return node, *found


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


class Source:
    """A file's text, and its sites."""

    def __init__(self, text: bytes, filename: str) -> None:
        self.filename = filename
        self.text = text
        self.tree: ast.Module = ast.parse(text, filename)
        self._lines = [0]
        for line in text.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._flows = [Flow(code) for code in codes_in(compile(self.tree, filename, "exec", dont_inherit=True))]
        may_be_changed = self._is_plain() and not self._binds_our_name() and self._place_of_import() is not None
        self.sites = list(self._find()) if may_be_changed else []
        self.left_alone = not may_be_changed and any(map(_found_in, ast.walk(self.tree)))
        self.calls: list[ast.Call] = []
        self._find_writable()

    def _is_plain(self) -> bool:
        """The columns that the interpreter counts are the file's own bytes."""
        encoding, _ = tokenize.detect_encoding(io.BytesIO(self.text).readline)
        return encoding == "utf-8" and b"\f" not in self.text and b"\r" not in self.text

    def _binds_our_name(self) -> bool:
        """Other than by importing this package."""
        imports = sum(
            alias.asname is None and alias.name.partition(".")[0] == _NAME
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        )
        return any(flow.has_variable(_NAME) for flow in self._flows) or imports != sum(flow.binds(_NAME) for flow in self._flows)

    def _find(self) -> Iterator[Site]:
        waiting: list[ast.AST] = [self.tree]
        enclosed: set[int] = set()
        left_out: set[int] = set()
        index = 0
        while waiting:
            node = waiting.pop()
            if isinstance(node, (ast.Attribute, ast.Subscript)):
                enclosed.add(id(node.value))
            if isinstance(node, _LEFT_OUT):
                continue
            left_out |= {id(getattr(node, each, None)) for each in ("annotation", "returns")}
            if id(node) in left_out:
                continue
            inside: Iterable[ast.AST] = ast.iter_child_nodes(node)
            found = _found_in(node)
            if found is not None and self._keeps_its_text(found[0], found[2]):
                binary, form, operands = found
                names = frozenset(i for i, operand in enumerate(operands) if isinstance(operand, ast.Name))
                yield Site(index, binary, form, operands, names=names, in_parentheses=id(binary) in enclosed)
                index += 1
                inside = operands
            waiting += reversed(list(inside))

    def _keeps_its_text(self, node: ast.BinOp, operands: list[ast.expr]) -> bool:
        if any(isinstance(each, (ast.NamedExpr, ast.Yield, ast.YieldFrom, ast.Starred)) for each in ast.walk(node)):
            return False
        # Comments, and lines that go on after a backslash, would be lost.
        at, end = self._extent(node)
        for operand in sorted(operands, key=lambda operand: self._extent(operand)):
            begin, behind = self._extent(operand)
            if not _BETWEEN.fullmatch(self.text[at:begin]):
                return False
            at = behind
        return _BETWEEN.fullmatch(self.text[at:end]) is not None

    def _find_writable(self) -> None:
        places: dict[Position, list[tuple[Flow, int]]] = {}
        for flow in self._flows:
            for position, index in flow.operators():
                places.setdefault(position, []).append((flow, index))
        values, augmented = self._assigned()
        for site in self.sites:
            # The compiler writes a `finally` twice.
            found = places.get(site.position, [])
            if found:
                site.function = found[0][0].code.co_qualname
            names = [operand.id if isinstance(operand, ast.Name) else None for operand in site.operands]
            for i, name in enumerate(names):
                if name is None or names.count(name) > 1 or not found:
                    continue
                if not all(flow.is_dead(name, at) for flow, at in found):
                    continue
                calls = self._made_by(name, found, values, augmented)
                if calls is not None:
                    self.calls += [call for call in calls if call not in self.calls]
                    site.writable[i] = list(map(self.calls.index, calls))

    def _assigned(self) -> tuple[dict[Position, ast.expr], set[Position]]:
        """The values of `name = value`, by where the name stands, and where the names of `name += value` stand."""
        values: dict[Position, ast.expr] = {}
        augmented = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                values[position_of(node.targets[0])] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                values[position_of(node.target)] = node.value
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                augmented.add(position_of(node.target))
        return values, augmented

    def _made_by(
        self, name: str, places: list[tuple[Flow, int]], values: dict[Position, ast.expr], augmented: set[Position]
    ) -> list[ast.Call] | None:
        """The calls that have made what the variable holds there; None where that may be something else than a new tensor."""
        if any(flow.binds(name) for flow in self._flows if flow not in [each for each, _ in places]):
            return None  # another function may bind a module's variable
        calls: list[ast.Call] = []
        for flow, at in places:
            sources = flow.sources(name, at, augmented)
            if sources is None or not sources or not all(source in values for source in sources):
                return None
            for source in sources:
                made = _calls_of(values[source])
                if made is None:
                    return None
                calls += [call for call in made if call not in calls]
        return calls

    # -- the text

    def _extent(self, node: ast.expr) -> tuple[int, int]:
        line, end_line, column, end_column = position_of(node)
        return self._lines[line - 1] + column, self._lines[end_line - 1] + end_column

    def _replaced(self, site: Site) -> tuple[int, int]:
        begin, end = self._extent(site.node)
        if site.in_parentheses and self.text[begin - 1 : begin] == b"(" and self.text[end : end + 1] == b")":
            return begin - 1, end + 1
        return begin, end

    def text_of(self, node: ast.expr) -> str:
        begin, end = self._extent(node)
        return self.text[begin:end].decode()

    def changed(self, chosen: dict[int, Option]) -> bytes:
        """The text with an option in the place of each site that is chosen."""
        return self._render(0, len(self.text), self._by_place(chosen))

    def code(self, site: Site, chosen: dict[int, Option]) -> str:
        return self._render(*self._replaced(site), self._by_place(chosen)).decode()

    def lines_of(self, sites: Sequence[Site], chosen: dict[int, Option]) -> tuple[list[str], list[str]]:
        """The lines of some sites, as they are and changed, without what all have in front."""
        begin = self._lines[min(site.position[0] for site in sites) - 1]
        end = self._lines[max(site.position[1] for site in sites)]
        texts = (self.text[begin:end], self._render(begin, end, self._by_place(chosen)))
        old, new = (textwrap.dedent(text.decode()).rstrip().splitlines() for text in texts)
        return old, new

    def _by_place(self, chosen: dict[int, Option]) -> list[tuple[int, int, Site, Option]]:
        places = [(*self._replaced(site), site, chosen[site.index]) for site in self.sites if site.index in chosen]
        return sorted(places, key=lambda place: (place[0], -place[1]))

    def _render(self, begin: int, end: int, places: list[tuple[int, int, Site, Option]]) -> bytes:
        inside = [place for place in places if begin <= place[0] and place[1] <= end]
        pieces = []
        at = begin
        for first, last, site, option in inside:
            if first < at:
                continue  # within the one before
            rest = [place for place in inside if place[2] is not site]
            operands = [self._render(*self._extent(operand), rest).decode() for operand in site.operands]
            glued = _GLUED.match(self.text[first - 1 : first]) is not None and first > 0
            pieces += [self.text[at:first], b" " * glued, option.code(operands).encode()]
            at = last
        return b"".join([*pieces, self.text[at:end]])

    def _place_of_import(self) -> int | None:
        """Where the line of an import may begin: behind the docstring and what comes from the future, in front of all else."""
        behind = 0
        for statement in self.tree.body:
            first_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and behind == 0
            if not first_text and not (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
                first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
                return self._lines[first - 1] if first > behind else None
            behind = statement.end_lineno or 0
        return None

    def final(self, chosen: dict[int, Option]) -> bytes:
        """The changed text as a file: with `import safe_inplace`, if it is not there."""
        text = self.changed(chosen)
        first = min((self.sites[index].position[0] for index in chosen), default=0)
        for node in self.tree.body:
            names = [name.name for name in node.names if name.asname is None] if isinstance(node, ast.Import) else []
            if _NAME in names and node.lineno < first:
                return text
        at = self._place_of_import()
        assert at is not None, "no site is found in such a file"
        return text[:at] + f"import {_NAME}\n".encode() + text[at:]


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

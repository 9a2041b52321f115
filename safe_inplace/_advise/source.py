"""A source file: its text, its sums and products, and the text with our ops in their place."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import textwrap
import tokenize
from collections.abc import Sequence

from .find import Site, find_sites, found_in, position_of
from .flow import Flow, Position, codes_in
from .forms import Option
from .readers import Shown
from .writable import Writable

_NAME = "safe_inplace"
_BETWEEN = re.compile(rb"[\s()+*-]*")
_GLUED = re.compile(rb"[\w\x80-\xff]")


class Source:
    def __init__(self, text: bytes, filename: str) -> None:
        self.filename = filename
        self.text = text
        self.tree: ast.Module = ast.parse(text, filename)
        self._lines = [0]
        for line in text.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._flows = [Flow(code) for code in codes_in(compile(self.tree, filename, "exec", dont_inherit=True))]
        may_be_changed = self._is_plain() and not self._binds_our_name() and self._place_of_import() is not None
        self.sites = list(find_sites(self.tree, self._keeps_its_text)) if may_be_changed else []
        self.left_alone = not may_be_changed and any(map(found_in, ast.walk(self.tree)))
        numbers: dict[Shown, int] = {}
        writable = Writable(self.tree, self._flows)
        for site in self.sites:
            site.function = writable.function_of(site)
            for operand, shown in writable.operands_of(site).items():
                site.writable[operand] = [numbers.setdefault(each, len(numbers)) for each in shown]
        self.shown = list(numbers)  # what decides whether a site may be written
        self.settled = list(map(writable.is_settled, self.shown))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text).hexdigest()

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

    def _keeps_its_text(self, node: ast.expr, operands: list[ast.expr]) -> bool:
        """Comments, and lines that go on after a backslash, would be lost."""
        at, end = self._extent(node)
        for operand in sorted(operands, key=lambda operand: self._extent(operand)):
            begin, behind = self._extent(operand)
            if not _BETWEEN.fullmatch(self.text[at:begin]):
                return False
            at = behind
        return _BETWEEN.fullmatch(self.text[at:end]) is not None

    def _extent(self, node: ast.expr) -> tuple[int, int]:
        line, end_line, column, end_column = position_of(node)
        return self._lines[line - 1] + column, self._lines[end_line - 1] + end_column

    def _replaced(self, site: Site) -> tuple[int, int]:
        begin, end = self._extent(site.node)
        if site.in_parentheses and self.text[begin - 1 : begin] == b"(" and self.text[end : end + 1] == b")":
            return begin - 1, end + 1
        return begin, end

    def replaced_text(self, site: Site) -> str:
        """What `code` takes the place of."""
        begin, end = self._replaced(site)
        return self.text[begin:end].decode()

    def place_of(self, site: Site) -> Position:
        """Of that, in characters."""
        line, end_line, _, _ = site.position
        begin, end = self._replaced(site)
        column, end_column = (
            len(self.text[self._lines[number - 1] : at].decode()) for number, at in ((line, begin), (end_line, end))
        )
        return line, end_line, column, end_column

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

    def _import_of_torch(self, before: int) -> int | None:
        """Where its line begins, in front of that line: what the program does before it, such as setting variables of the
        environment, torch may depend on."""
        behind = 0
        for statement in self.tree.body:
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            else:
                names = [statement.module or ""] if isinstance(statement, ast.ImportFrom) and not statement.level else []
            if any(name.partition(".")[0] == "torch" for name in names):
                return self._lines[statement.lineno - 1] if behind < statement.lineno <= before else None
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
        at = self._import_of_torch(first) or self._place_of_import()
        assert at is not None, "no site is found in such a file"
        return text[:at] + f"import {_NAME}\n".encode() + text[at:]

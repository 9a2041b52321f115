"""Where a variable's value comes from, and whether anybody reads it again: by the bytecode of its function."""

from __future__ import annotations

import dis
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from types import CodeType

Position = tuple[int, int, int, int]  # line, end line, column, end column

_OF_A_FUNCTION = re.compile(r"(LOAD|STORE|DELETE)_FAST")
_OF_A_MODULE = re.compile(r"(LOAD|STORE|DELETE)_(NAME|GLOBAL)")
_ENDS = frozenset(["RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE"])
_ALWAYS = frozenset(["JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"])
_BIND = frozenset(["STORE_NAME", "STORE_GLOBAL", "DELETE_NAME", "DELETE_GLOBAL"])
_NOTHING = frozenset(["CACHE", "NOP", "NOT_TAKEN"])
# What shows a function's variables to others.
_SHOW = frozenset(["locals", "vars", "eval", "exec", "_getframe", "currentframe"])
_GLOBALS = frozenset(["globals", "exec", "eval", "vars", "locals", "setattr", "__dict__"])
_OPTIMIZED = 0x1
_IMPORT_STAR = 2  # of CALL_INTRINSIC_1


def codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


class Flow:
    """One code object, and where each of its instructions goes on."""

    def __init__(self, code: CodeType) -> None:
        self.code = code
        self._instructions = list(dis.get_instructions(code))
        self._index = {each.offset: i for i, each in enumerate(self._instructions)}
        # dis has had the table under this name since there is one.
        handlers = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined]
        self._handlers = [(each.start, each.end, self._index[each.target]) for each in handlers]

    def has_variable(self, name: str) -> bool:
        return name in (*self.code.co_varnames, *self.code.co_cellvars, *self.code.co_freevars)

    def binds(self, name: str) -> int:
        """How often, in a module, a class, or as a global variable."""
        return sum(each.opname in _BIND and each.argval == name for each in self._instructions)

    def mentions(self, name: str) -> bool:
        """As a variable of the module, a class, or as an attribute of something."""
        return name in self.code.co_names

    @cached_property
    def imports_star(self) -> bool:
        return any(
            each.opname == "IMPORT_STAR" or (each.opname == "CALL_INTRINSIC_1" and each.arg == _IMPORT_STAR)
            for each in self._instructions
        )

    @cached_property
    def may_bind_anything(self) -> bool:
        """Global variables, without naming them."""
        return self.imports_star or bool(_GLOBALS & {*self.code.co_names})

    def operators(self) -> Iterator[tuple[Position, int]]:
        for index, each in enumerate(self._instructions):
            position = self._position(index)
            if each.opname == "BINARY_OP" and position is not None:
                yield position, index

    def is_dead(self, name: str, index: int) -> bool:
        """Whether nothing reads the variable after that instruction and before it is bound anew, whichever way the code goes."""
        if not self._is_known(name):
            return False
        if not self.code.co_flags & _OPTIMIZED:
            # Any function may read a module's variables: only `x = x + y` is sure.
            after = next(each for each in self._instructions[index + 1 :] if each.opname not in _NOTHING)
            return after.opname in ("STORE_NAME", "STORE_GLOBAL") and after.argval == name
        seen: set[int] = set()
        waiting = list(self._after[index])
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            access = self._access(name, at)
            if access == "LOAD":
                return False
            if access is None:
                waiting += self._after[at]
        return True

    def sources(self, name: str, index: int, kept_through: Collection[Position]) -> set[Position] | None:
        """The places that have bound the value which the variable has at that instruction; None where it may come from elsewhere.
        What is bound at `kept_through` is what the variable was before: `x += y`."""
        if not self._is_known(name):
            return None
        found, passed = self._backward(name, index, kept_through)
        # In a module a name that may be unbound has come from elsewhere.
        if None in found or (0 in passed and (self.is_module or name in self._arguments())):
            return None
        return {position for position in found if position is not None}

    def reads(self, name: str, index: int, kept_through: Collection[Position]) -> Iterator[tuple[Position | None, bool]]:
        """Where the value that the variable has at that instruction is read before, on whatever way; and whether it is read just
        there. An instruction that is for two variables has the place of one of them; both are in one line."""
        for at in self._backward(name, index, kept_through)[1]:
            if "LOAD" in self._accesses(name, at):
                yield self._position(at), not isinstance(self._instructions[at].argval, tuple)

    def _backward(self, name: str, index: int, kept_through: Collection[Position]) -> tuple[set[Position | None], set[int]]:
        """Where the variable was bound, and all instructions from that to `index`, on whatever way."""
        found: set[Position | None] = set()
        passed: set[int] = set()
        waiting = [index]
        while waiting:
            at = waiting.pop()
            if at in passed:
                continue
            passed.add(at)
            if self._access(name, at) == "STORE":
                position = self._position(at)
                found.add(position)
                if position not in kept_through:
                    continue
            waiting += self._before[at]
        return found, passed

    @property
    def is_module(self) -> bool:
        return self.code.co_name == "<module>" and not self.code.co_flags & _OPTIMIZED

    def _is_known(self, name: str) -> bool:
        """By nobody but this code."""
        code = self.code
        if code.co_flags & _OPTIMIZED:
            return name in code.co_varnames and name not in code.co_cellvars and not _SHOW & {*code.co_names}
        # In a class `x = x + y` reads the module's x.
        return self.is_module and not self.may_bind_anything

    def _arguments(self) -> tuple[str, ...]:
        code = self.code
        return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bin(code.co_flags & 0xC).count("1")]

    def _position(self, index: int) -> Position | None:
        at = self._instructions[index].positions
        if at is None or at.lineno is None or at.end_lineno is None or at.col_offset is None or at.end_col_offset is None:
            return None
        return at.lineno, at.end_lineno, at.col_offset, at.end_col_offset

    def _access(self, name: str, index: int) -> str | None:
        """The first thing that an instruction does to the variable."""
        return next(iter(self._accesses(name, index)), None)

    def _accesses(self, name: str, index: int) -> list[str]:
        """What an instruction does to the variable. Some do two things, to two variables or to one."""
        each = self._instructions[index]
        if not self.code.co_flags & _OPTIMIZED:
            found = _OF_A_MODULE.match(each.opname)
            return [found[1]] if found and each.argval == name else []
        kinds: list[str] = _OF_A_FUNCTION.findall(each.opname)
        if each.opcode not in dis.haslocal or not kinds:  # or one that makes a cell of it
            return []
        names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
        return [kind for kind, own in zip(kinds, names, strict=True) if own == name]

    @cached_property
    def _after(self) -> list[list[int]]:
        return [self._following(index) for index in range(len(self._instructions))]

    @cached_property
    def _before(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self._instructions]
        for index, following in enumerate(self._after):
            for each in following:
                before[each].append(index)
        return before

    def _following(self, index: int) -> list[int]:
        each = self._instructions[index]
        found = [target for start, end, target in self._handlers if start <= each.offset < end]
        if each.opcode in dis.hasjrel or each.opcode in dis.hasjabs:
            found.append(self._index[each.argval])
        if each.opname not in _ENDS and each.opname not in _ALWAYS and index + 1 < len(self._instructions):
            found.append(index + 1)
        return found

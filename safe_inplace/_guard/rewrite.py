"""A statement that writes in place, written out of place: the code that guard's reports suggest.

A suggestion is right where it is pasted, or there is none. Out of place the name is bound to a new tensor: that is the same
program only where nothing else knows the old one. So the tensor is looked at while the write is about to happen: the name
holds its only reference, and no other tensor shares its memory but what the graph keeps.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, MethodDescriptorType
from typing import Any

import torch

from .. import _C
from .lookup import HANDLE, UNKNOWN, value_in, variables_of
from .syntax import calls, dump, loaded, method_call, path_to, reads, replaced, seen_through, stored, text_of, written_by

_METHODS: dict[type[ast.operator], str] = {
    ast.Add: "add_",
    ast.Sub: "sub_",
    ast.Mult: "mul_",
    ast.Div: "div_",
    ast.FloorDiv: "floor_divide_",
    ast.Mod: "remainder_",
    ast.Pow: "pow_",
}
_COMPARE = frozenset(["eq", "ne", "gt", "ge", "lt", "le", "logical_and", "logical_or", "logical_xor", "logical_not"])
# autocast computes them in the dtype of their operands, and neither do they save their result.
_ARITHMETIC = frozenset(["add", "sub", "mul", "div"])
_TRIES = (ast.Try, ast.TryStar)
_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Module)
# What runs another time, another place or not as code: an assignment in there binds another name, or is none.
_APART: tuple[type[ast.AST], ...] = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.JoinedStr)
if sys.version_info >= (3, 14):
    _APART += (ast.TemplateStr,)
_FUNCTIONAL = torch.nn.functional.__file__
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True)
class Rewritten:
    code: str | None = None  # the statement out of place
    clone: str | None = None  # what to clone() in front of it, where it assigns to a part of a tensor
    parameter: bool = False  # it updates a parameter: out of place it would update nothing
    leaf: bool = False  # torch itself will refuse: a leaf that requires grad, with grad mode on


def _is_parameter(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value._is_view() and value.is_leaf and value.requires_grad


def _bound_to_be_watched(method: str) -> int:
    """How many references come of it that CPython 3.11 binds a method of C to its tensor for a tracer or a profiler."""
    watched = sys.version_info < (3, 12) and not (sys.gettrace() is None and sys.getprofile() is None)
    return int(watched and isinstance(inspect.getattr_static(torch.Tensor, method), MethodDescriptorType))


def _of_a_leaf(tensor: torch.Tensor) -> bool:
    base = tensor._base if tensor._is_view() else tensor
    return base is not None and base.is_leaf and base.requires_grad


class _Write:
    """One write: the frame that makes it, its syntax, and what the operator was called with."""

    def __init__(self, frame: FrameType, path: list[ast.AST], op: str) -> None:
        self.frame, self.path, self.op = frame, path, op
        self.node = path[-1]
        at = max(i for i, node in enumerate(path) if isinstance(node, ast.stmt))
        self.statement, self.inner = path[at], path[at + 1 :]
        self.above = path[:at]
        self.variables, self.globals = variables_of(frame), frame.f_globals
        self.at_module_level = self.variables is self.globals
        arguments = _C.guard_arguments()
        self.known = bool(arguments)
        written = [tensor for tensor, is_written in arguments if is_written]
        self.written = [id(tensor) for tensor in written]
        self.keeps_dtype = bool(written) and all(
            type(tensor) in (torch.Tensor, torch.nn.Parameter)
            and torch.result_type(written[0], tensor) == written[0].dtype
            and (written[0].is_floating_point() or written[0].is_complex())
            for tensor, _ in arguments
        )

    def value(self, node: ast.expr) -> Any:
        return value_in(node, self.variables, self.globals)

    def between(self) -> list[FrameType]:
        """The Python frames between the writing one and the operator."""
        frames: list[FrameType] = []
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith(_HERE):
            frame = frame.f_back
        while frame is not None and frame is not self.frame:
            frames.append(frame)
            frame = frame.f_back
        return frames

    # -- may the name be bound to something else?

    def may_rebind(self, slot: ast.expr, held: int, views: int = 0) -> bool:
        """The tensor that `slot` names is known by that name alone. `held` references lie on the stacks of the running calls,
        which from Python 3.14 on borrow some of them; `views` of it were made for this write."""
        if not self._is_a_place_of_its_own(slot):
            return False
        kept = [self.value(slot)]
        if type(kept[0]) is not torch.Tensor or torch._C._functorch.is_functorch_wrapped_tensor(kept[0]):
            return False
        # Below no_grad autograd does not see the write: out of place it would not see the value either.
        if torch.is_inference_mode_enabled() or (kept[0].requires_grad and not torch.is_grad_enabled()):
            return False
        if kept[0]._is_view() or kept[0].__dict__ or kept[0]._backward_hooks or kept[0].retains_grad:
            return False
        if kept[0].layout != torch.strided or weakref.getweakrefcount(kept[0]):
            return False
        if (id(kept[0]) in self.written) == bool(views) or _C.guard_holders(kept[0]) != 1 + views:
            return False
        copied = isinstance(slot, ast.Name) and not self.at_module_level
        # The slot and its copy, the stacks, `kept` and this call.
        expected = 1 + copied + held + 2 + (HANDLE if kept[0]._use_count() > 1 else 0)  # type: ignore[attr-defined]
        borrowed = _C.guard_borrowed(kept[0])
        return borrowed >= 0 and sys.getrefcount(kept[0]) + borrowed == expected and self._is_fresh(slot)

    def _is_a_place_of_its_own(self, slot: ast.expr) -> bool:
        code = self.frame.f_code
        if isinstance(slot, ast.Name):
            if self.at_module_level:
                return True
            return bool(code.co_flags & inspect.CO_OPTIMIZED) and slot.id in (*code.co_varnames, *code.co_cellvars)
        if isinstance(slot, ast.Attribute):
            owner = self.value(slot.value)
            return type(owner).__setattr__ in (object.__setattr__, torch.nn.Module.__setattr__)
        return isinstance(slot, ast.Subscript)

    def _is_fresh(self, slot: ast.expr) -> bool:
        """No other run of the statement finds in the slot what something else has come to know since."""
        name = dump(slot)
        code = self.frame.f_code
        arguments = code.co_argcount + code.co_kwonlyargcount + len([f for f in (4, 8) if code.co_flags & f])
        argument = isinstance(slot, ast.Name) and slot.id in code.co_varnames[:arguments]
        child: ast.AST = self.statement
        for parent in reversed(self.above):
            blocks = [block for _, block in ast.iter_fields(parent) if isinstance(block, list) and child in block]
            if any(
                isinstance(node, ast.Assign) and any(dump(target) == name for target in node.targets)
                for block in blocks
                for node in block[: block.index(child)]
            ):
                return True
            if isinstance(parent, _LOOPS):
                if isinstance(parent, (ast.For, ast.AsyncFor)) and reads(parent.target, name):
                    return True
                if not self._stays_inside(parent, slot, name):
                    return False
            if isinstance(parent, _SCOPES):
                return not argument
            child = parent
        return not argument

    def _stays_inside(self, loop: ast.AST, slot: ast.expr, name: str) -> bool:
        code = self.frame.f_code
        if not isinstance(slot, ast.Name) or slot.id in code.co_cellvars:
            return False
        if isinstance(self.statement, ast.Expr) and self.statement.value is not self.node:
            return False
        if not isinstance(self.statement, (ast.Expr, ast.AugAssign)) and not isinstance(self.node, ast.Subscript):
            return False
        if self.at_module_level and any(
            reads(node, name) for node in ast.walk(self.path[0]) if isinstance(node, (ast.FunctionDef, ast.Lambda))
        ):
            return False
        harmless = {id(node) for node in written_by(self.node)}
        for parent in ast.walk(loop):
            for child in ast.iter_child_nodes(parent):
                inner = child.value if isinstance(child, ast.Subscript) else child
                if isinstance(parent, (ast.BinOp, ast.UnaryOp, ast.Compare)):
                    harmless.add(id(inner))
        return all(id(node) in harmless for node in reads(loop, name))

    # -- the forms

    def _written_by_name(self) -> Iterator[ast.expr]:
        """What the statement writes, or may write."""
        node = self.node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and self.value(node.func) is UNKNOWN:
            yield node.func.value
            return
        if isinstance(node, ast.Call):
            yield from node.args[:1]
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "out")
        else:
            yield from written_by(node)

    def out_of_place(self) -> Rewritten:
        if any(_is_parameter(self.value(seen_through(written))) for written in self._written_by_name()):
            return Rewritten(parameter=True)
        if not self.known or any(isinstance(node, _APART) for node in self.inner):
            return Rewritten()
        if isinstance(self.statement, ast.AugAssign) and self.node is self.statement:
            return self._augmented(self.statement)
        if isinstance(self.node, ast.Subscript):
            if isinstance(self.statement, ast.Assign) and self.statement.targets == [self.node]:
                return self._part(self.node, self.statement.value, held=1)
        elif isinstance(self.node, ast.Call) and isinstance(self.statement, (ast.Expr, ast.Assign, ast.AnnAssign, ast.Return)):
            return self._called(self.node)
        return Rewritten()

    def _augmented(self, statement: ast.AugAssign) -> Rewritten:
        target = statement.target
        method = _METHODS.get(type(statement.op))
        if method is None or self.between():
            return Rewritten()
        load = loaded(target)
        if isinstance(target, ast.Subscript) and type(self.value(target.value)) not in (list, dict):
            return self._part(target, statement.value, held=1, augmented=statement.op)
        if not self.may_rebind(load, held=1):
            return Rewritten()
        if self._pure(method) is not None:
            value: ast.expr = ast.BinOp(load, statement.op, statement.value)
        else:
            value = method_call(method_call(load, "clone", []), method, [statement.value])
        return Rewritten(text_of(ast.Assign([target], value)))

    def _part(self, target: ast.Subscript, value: ast.expr, held: int, augmented: ast.operator | None = None) -> Rewritten:
        """An assignment to a part of the tensor."""
        if self.between() or not isinstance(target.value, ast.expr):
            return Rewritten()
        slot = loaded(target.value)
        kept = self.value(slot)
        whole = isinstance(kept, torch.Tensor) and id(kept) in self.written
        del kept
        if not self.may_rebind(slot, held, views=0 if whole else 1):
            return Rewritten()
        name = dump(slot)
        if not calls(value) and not calls(target.slice) and not reads(value, name) and not reads(target.slice, name):
            return Rewritten(clone=ast.unparse(slot))
        # The value and the index first, of what there was: what they save is not what is written.
        new, index = self._unused_names("new", "index")
        steps = []
        at: ast.expr = target
        if calls(target.slice) or reads(target.slice, name):
            if augmented is not None or any(isinstance(node, ast.Slice) for node in ast.walk(target.slice)):
                return Rewritten()
            at = ast.Subscript(target.value, ast.Name(index, ast.Load()), ast.Store())
            steps = [ast.Assign([ast.Name(index, ast.Store())], target.slice)]
        if augmented is not None:
            value = ast.BinOp(loaded(target), augmented, value)
        if steps == [] or calls(value) or reads(value, name):
            steps.insert(0, ast.Assign([ast.Name(new, ast.Store())], value))
            value = ast.Name(new, ast.Load())
        steps += [ast.Assign([target.value], method_call(slot, "clone", [])), ast.Assign([at], value)]
        return Rewritten("; ".join(map(text_of, steps)))

    def _unused_names(self, *wanted: str) -> list[str]:
        code = self.frame.f_code
        used = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
        return [next(name for name in (want, *(f"{want}{i}" for i in range(1000))) if name not in used) for want in wanted]

    def _pure(self, method: str) -> str | None:
        """The name of the same without the write, where its result has the dtype that the written tensor has."""
        space, _, rest = self.op.partition("::")
        name, _, overload = rest.partition(".")
        pure = name[:-1]
        if space != "aten" or name != method or pure in _COMPARE or not self.keeps_dtype:
            return None
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))) and pure not in _ARITHMETIC:
            return None
        packets = [getattr(torch.ops.aten, each, None) for each in (name, pure)]
        schemas = [getattr(packet, overload or "default", None) for packet in packets]
        if None in schemas:
            return None
        one, other = (
            [(each.name, str(each.type)) for each in schema._schema.arguments]  # type: ignore[union-attr]
            for schema in schemas
        )
        return pure if one == other else None

    def _called(self, call: ast.Call) -> Rewritten:
        """x.op_(...), torch.op_(x, ...), F.op(x, inplace=True)."""
        between = self.between()
        switch = [i for i, keyword in enumerate(call.keywords) if keyword.arg == "inplace"]
        function = self.value(call.func)
        if between:
            # F.relu(x, inplace=True): x is its variable, on its stack and in the arguments of what it calls.
            known = len(between) == 1 and between[0].f_code.co_filename == _FUNCTIONAL == getattr(
                getattr(function, "__code__", None), "co_filename", None
            )
            if not known or len(switch) != 1 or not call.args or not self._autocast_leaves(self.op):
                return Rewritten()
            on = call.keywords[switch[0]].value
            if not (isinstance(on, ast.Constant) and on.value is True) or not self.may_rebind(call.args[0], held=3):
                return Rewritten()
            keywords = list(call.keywords)
            keywords[switch[0]] = ast.keyword("inplace", ast.Constant(False))
            return self._placed(call, call.args[0], ast.Call(call.func, call.args, keywords), saves_result=True)
        if switch or any(isinstance(argument, ast.Starred) for argument in call.args):
            return Rewritten()
        if function is UNKNOWN and isinstance(call.func, ast.Attribute):
            slot, method = call.func.value, call.func.attr
            if not method.endswith("_") or method.endswith("__") or not hasattr(torch.Tensor, method):
                return Rewritten()
            if isinstance(slot, ast.Subscript) and self.value(slot) is UNKNOWN:
                return self._part_called(slot, call)
            if not self.may_rebind(slot, held=1 + _bound_to_be_watched(method)):
                return Rewritten()
            pure = self._pure(method) if hasattr(torch.Tensor, method[:-1]) else None
            owner = slot if pure else method_call(slot, "clone", [])
            new = ast.Call(ast.Attribute(owner, pure or method, ast.Load()), call.args, call.keywords)
            return self._placed(call, slot, new, saves_result=(pure or method.rstrip("_")) not in _ARITHMETIC)
        return self._function(call, function)

    def _autocast_leaves(self, op: str) -> bool:
        return op == "aten::relu_" or not any(map(torch.is_autocast_enabled, ("cpu", "cuda")))

    def _part_called(self, part: ast.Subscript, call: ast.Call) -> Rewritten:
        """h[0].op_(...)"""
        name = dump(part.value)
        inside = [part.slice, *call.args, *(keyword.value for keyword in call.keywords)]
        if not isinstance(self.statement, ast.Expr) or any(calls(node) or reads(node, name) for node in inside):
            return Rewritten()
        if self.statement.value is not call or not self.may_rebind(part.value, held=0, views=1):
            return Rewritten()
        return Rewritten(clone=ast.unparse(part.value))

    def _function(self, call: ast.Call, function: Any) -> Rewritten:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        ours = sys.modules["safe_inplace"]
        spaces = [space for space in (ours, torch, torch.nn.functional) if getattr(space, name, UNKNOWN) is function]
        if not spaces or not call.args or not name.endswith("_") or name.endswith("__"):
            return Rewritten()
        first = call.args[0]
        if not self.may_rebind(first, held=1 if spaces[0] is ours else 2):
            return Rewritten()
        pure = self._pure(name) if isinstance(call.func, ast.Attribute) and len(call.args) < 5 else None
        pure = pure if pure is not None and hasattr(spaces[0], pure) else None
        called = call.func
        if pure is not None and isinstance(call.func, ast.Attribute):
            called = ast.Attribute(call.func.value, pure, ast.Load())
        new_first = first if pure else method_call(first, "clone", [])
        new = ast.Call(called, [new_first, *call.args[1:]], call.keywords)
        return self._placed(call, first, new, saves_result=name.rstrip("_") not in _ARITHMETIC)

    def _placed(self, call: ast.Call, slot: ast.expr, new: ast.expr, saves_result: bool) -> Rewritten:
        """`new` in the statement, where `call` stood, and its value bound to `slot`."""
        old, statement = self._chain(call)
        if old is not call and saves_result:
            new = method_call(new, "clone", [])  # the next of the chain writes to it
        new = replaced(old, call, new)
        name = dump(slot)
        whole = getattr(statement, "value", None) is old
        store = stored(slot)
        others = [node for node in reads(statement, name) if node is not slot]
        if isinstance(statement, ast.Expr) and whole:
            return Rewritten(text_of(ast.Assign([store], new)))
        if isinstance(statement, ast.Assign):
            if any(reads(target, name) for target in statement.targets):
                # The statement binds the name itself, and reads it nowhere else.
                targets = [node for target in statement.targets for node in ast.walk(target)]
                if all(node in targets and isinstance(getattr(node, "ctx", None), ast.Store) for node in others):
                    return Rewritten(text_of(replaced(statement, old, new)))
            elif whole:
                return Rewritten(text_of(ast.Assign([store, *statement.targets], new)))
        code = self.frame.f_code
        local = isinstance(slot, ast.Name) and slot.id not in code.co_cellvars
        if isinstance(statement, ast.Return) and whole and local and not any(isinstance(n, _TRIES) for n in self.above):
            return Rewritten(text_of(ast.Return(new)))
        if not isinstance(slot, ast.Name):
            return Rewritten()
        return Rewritten(text_of(replaced(statement, old, ast.NamedExpr(store, new))))  # type: ignore[arg-type]

    def _chain(self, call: ast.Call) -> tuple[ast.expr, ast.stmt]:
        """x.op_() with the methods called on it that return x again, and the statement."""
        chain: ast.expr = call
        nodes = self.inner[: self.inner.index(call)]
        while len(nodes) >= 2 and isinstance(nodes[-1], ast.Attribute) and isinstance(nodes[-2], ast.Call):
            method = nodes[-1].attr
            if nodes[-2].func is not nodes[-1] or not method.endswith("_") or method.endswith("__"):
                break
            chain = nodes[-2]
            nodes = nodes[:-2]
        assert isinstance(self.statement, ast.stmt)
        return chain, self.statement


def out_of_place(code: CodeType | None, instruction: int, op: str, frame: FrameType | None) -> Rewritten:
    """The statement at an instruction of `code`, which runs in `frame` and is about to write with the operator `op`."""
    if torch.is_grad_enabled() and any(is_written and _of_a_leaf(tensor) for tensor, is_written in _C.guard_arguments()):
        return Rewritten(parameter=True, leaf=True)
    path = path_to(code, instruction)
    if frame is None or not any(isinstance(node, ast.stmt) for node in path):
        return Rewritten()
    return _Write(frame, path, op).out_of_place()

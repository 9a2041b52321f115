"""Who reads a variable, and whether he may keep what it holds, or a part or a view of it: by the syntax tree."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from .fresh import METHODS

_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
IN_PLACE = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_COMPARED = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def _named(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Of a tensor: what tells of it and holds nothing of it, and what may be the tensor itself or a view.
_TELL = _named("device dtype is_cpu is_cuda is_leaf is_sparse itemsize layout nbytes ndim requires_grad shape")
_ARE_VIEWS = _named("H T data mH mT")
_METHODS_THAT_TELL = METHODS | _named(
    """
    all allclose amax amin any argmax argmin argsort backward data_ptr dim element_size eq equal ge get_device gt
    is_complex is_contiguous is_floating_point isfinite isinf isnan item le lt max median min ndimension ne nelement nonzero
    norm numel size sort storage_offset stride tolist topk
    """
)
_METHODS_OF_VIEWS = {f"{name}_" for name in METHODS} | _named(
    """
    bfloat16 bool contiguous cpu cuda detach diagonal double expand expand_as flatten float half int long movedim narrow permute
    reshape reshape_as select squeeze swapaxes swapdims t to transpose type type_as unflatten unfold unsqueeze view view_as
    """
)


@dataclass(frozen=True)
class Shown:
    """An expression that is shown while the program runs: what is called, or an operand. Of that it depends what is made, or
    kept."""

    node: ast.expr
    is_callee: bool


def operands(value: ast.expr) -> list[Shown]:
    """Of arithmetic, all that may have operators of its own."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, _ARITHMETIC):
        return operands(value.left) + operands(value.right)
    if isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.USub):
        return operands(value.operand)
    return [] if isinstance(value, ast.Constant) else [Shown(value, is_callee=False)]


def called(call: ast.Call) -> list[Shown] | None:
    """Who decides what comes of a call; None where it may be what was given."""
    if any(keyword.arg in (None, "out", "inplace") for keyword in call.keywords):
        return None
    return None if isinstance(call.func, ast.Name) and call.func.id == "super" else [Shown(call.func, is_callee=True)]


class Readers:
    """Of one syntax tree. `parents` holds the node around each, by identity."""

    def __init__(self, parents: dict[int, ast.AST]) -> None:
        self._parents = parents

    def of(self, node: ast.expr, site: ast.expr) -> list[Shown] | None:
        """What decides that nobody who reads `node`, a plain tensor or a view of one, has it any more when the site comes; None
        where somebody may."""
        waiting: ast.AST = site
        around = {id(site)}
        while not isinstance(waiting, ast.stmt):
            waiting = self._parents[id(waiting)]
            around.add(id(waiting))
        return self._of(node, around)

    def _of(self, node: ast.expr, around: set[int]) -> list[Shown] | None:
        parent = self._parents[id(node)]
        if id(parent) in around:
            return None  # it waits for the site
        match parent:
            case ast.BinOp(op=op) if isinstance(op, _ARITHMETIC):
                return [shown for shown in operands(parent) if shown.node is not node]
            case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()) | ast.Expr():
                return []
            case ast.Compare(left, ops, others):
                if all(isinstance(op, (ast.Is, ast.IsNot)) for op in ops):
                    return []
                compared = [shown for value in (left, *others) if value is not node for shown in operands(value)]
                return compared if all(isinstance(op, _COMPARED) for op in ops) else None
            case ast.If(test=test) | ast.While(test=test) | ast.Assert(test=test) if test is node:
                return []
            case ast.IfExp(test=test):
                return [] if test is node else self._of(parent, around)
            case ast.Subscript(value, ctx=ast.Load()) if value is node:
                return self._of(parent, around)
            case ast.AugAssign(target, op) if target is node and isinstance(op, IN_PLACE):
                return []
            case ast.Attribute(attr=name, ctx=ast.Load()):
                return self._of_attribute(parent, name, around)
            case ast.Call() if parent.func is not node:
                return called(parent)
            case ast.keyword(arg=str()):
                call = self._parents[id(parent)]
                return called(call) if isinstance(call, ast.Call) and id(call) not in around else None
        return None

    def _of_attribute(self, attribute: ast.Attribute, name: str, around: set[int]) -> list[Shown] | None:
        call = self._parents[id(attribute)]
        if not (isinstance(call, ast.Call) and call.func is attribute):
            return [] if name in _TELL else self._of(attribute, around) if name in _ARE_VIEWS else None
        if called(call) is None or id(call) in around:
            return None
        return [] if name in _METHODS_THAT_TELL else self._of(call, around) if name in _METHODS_OF_VIEWS else None

"""The ops, in place (the names that end in an underscore) and out of place.

Each function here is the formula of an op, and that is what a compiler traces. Its name stands for the entry point in `_C`, to
which eager calls go with no Python in between.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import SAC_IGNORED_OPS

from . import _C, _dynamo

__all__ = ["add", "add_", "add_mul", "add_mul_", "addcmul", "addcmul_", "mul", "mul_", "mul_add", "mul_add_"]

Number = int | float | complex | bool
Operand = Tensor | Number
F = TypeVar("F", bound=Callable[..., Tensor])
T = TypeVar("T", Tensor, Operand)

# What compilers trace in the place of each op. The tests hold them to the core's table.
FORMULAS: dict[str, Callable[..., Tensor]] = {}


def _op(formula: F) -> F:
    """The entry point of the op, with the name, the documentation and, for compilers, the body of `formula`."""
    entry_point = _C.make_entry_point(formula.__name__, formula.__doc__, __name__)
    _dynamo.trace_as(entry_point, formula)
    FORMULAS[formula.__name__] = formula
    if formula.__name__.endswith("_"):
        _never_cache(formula.__name__)
    return entry_point


def _never_cache(name: str) -> None:
    # Selective checkpointing gives the result of a saved op again and does not call it; an op that returns nothing would
    # not write. It is computed anew, whatever a policy says.
    packet = getattr(torch.ops.safe_inplace, name)
    SAC_IGNORED_OPS.update(getattr(packet, overload) for overload in packet.overloads())


def _math_dtype(input: Tensor) -> torch.dtype:
    return torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype


def _beside_math(input: Tensor, operand: Tensor) -> Tensor:
    return operand.to(torch.promote_types(operand.dtype, _math_dtype(input)))


def _is_one(alpha: Number) -> bool:
    """Then nothing is to be scaled: torch 2.11, compiling, multiplies even so, and cannot where `other` is 2**63."""
    return type(alpha) is int and alpha == 1


def _old(input: Tensor) -> Tensor:
    """A copy of what will be overwritten, in the dtype that the fused formulas compute in."""
    return input.to(_math_dtype(input), copy=True)


def _beside(input: Tensor, operand: T) -> T:
    return operand.clone() if operand is input else operand


def _category(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 0 if dtype is torch.bool else 1


def _write(input: Tensor, result: Tensor) -> Tensor:
    # What torch.can_cast says, which Dynamo does not trace; copy_ refuses the rest.
    if _category(result.dtype) > _category(input.dtype):
        raise RuntimeError(f"result type {result.dtype} can't be cast to the desired output type {input.dtype}")
    return input.copy_(result)


@_op
def add_(input: Tensor, other: Operand, *, alpha: Number = 1) -> Tensor:
    r"""Adds to ``input`` in place: ``input + alpha * other``. Bit for bit what ``input.add_(other, alpha=alpha)`` writes.

    Args:
        input: the tensor to write, of any shape, dtype and device. A leaf that requires a gradient is refused.
        other: a tensor that broadcasts to ``input``'s shape, or a number. Dtypes are promoted by torch's rules; the
            result must be castable to ``input``'s dtype.
        alpha: the multiplier of ``other``: a number, or a 0-dim tensor without a gradient, whose value is read.

    Returns:
        ``input``, its version counter one higher.

    Saved for backward: nothing.

    Raises:
        RuntimeError: before anything is written, where ``input.add_`` raises it: a shape that does not broadcast to
            ``input``'s, a dtype that cannot be cast, memory that overlaps itself or an operand in part, a leaf that
            requires a gradient.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> x = torch.tensor([1.0, 2.0])
        >>> safe_inplace.add_(x, torch.tensor([10.0, 20.0]), alpha=0.5)
        tensor([ 6., 12.])
    """
    return input.add_(other) if _is_one(alpha) else input.add_(other, alpha=alpha)


@_op
def mul_(input: Tensor, other: Operand) -> Tensor:
    r"""Multiplies ``input`` in place: ``input * other``. Bit for bit what ``input.mul_(other)`` writes.

    Args:
        input: the tensor to write, of any shape, dtype and device. A leaf that requires a gradient is refused.
        other: a tensor that broadcasts to ``input``'s shape, or a number. It may be ``input`` itself.

    Returns:
        ``input``, its version counter one higher.

    Saved for backward: ``other``, if ``input`` needs a gradient; the old ``input``, if ``other`` does. The kernel that
    writes the product writes that copy too.

    Raises:
        RuntimeError: before anything is written, where ``input.mul_`` raises it.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> x = torch.tensor([1.0, 2.0])
        >>> safe_inplace.mul_(x, x)
        tensor([1., 4.])
    """
    return input.mul_(other)


@_op
def add_mul_(input: Tensor, other: Operand, scale: Operand) -> Tensor:
    r"""Adds, then scales, in place and in one pass: ``(input + other) * scale``.

    The arithmetic is done in float32 for float16 and bfloat16, and rounded to ``input``'s dtype once.

    Args:
        input: the tensor to write, of any shape, dtype and device. A leaf that requires a gradient is refused.
        other: a tensor that broadcasts to ``input``'s shape, or a number.
        scale: a tensor that broadcasts to ``input``'s shape, or a number.

    Returns:
        ``input``, its version counter one higher.

    Saved for backward: ``scale``, if ``input`` or ``other`` needs a gradient; ``input + other``, if ``scale`` does.

    Raises:
        RuntimeError: before anything is written, where torch's own in-place methods raise it.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> scores, bias = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> safe_inplace.add_mul_(scores, bias, 0.5)
        tensor([2., 3.])
    """
    return _write(input, (_old(input) + _beside(input, other)) * _beside(input, scale))


@_op
def mul_add_(input: Tensor, scale: Operand, shift: Operand) -> Tensor:
    r"""Scales and shifts in place and in one pass: ``input * scale + shift`` (modulation, affine).

    The arithmetic is done in float32 for float16 and bfloat16, and rounded to ``input``'s dtype once.

    Args:
        input: the tensor to write, of any shape, dtype and device. A leaf that requires a gradient is refused.
        scale: a tensor that broadcasts to ``input``'s shape, or a number.
        shift: a tensor that broadcasts to ``input``'s shape, or a number.

    Returns:
        ``input``, its version counter one higher.

    Saved for backward: ``scale``, if ``input`` needs a gradient; the old ``input``, if ``scale`` does. The kernel that
    writes the result writes that copy too. ``shift`` needs nothing.

    Raises:
        RuntimeError: before anything is written, where torch's own in-place methods raise it.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> safe_inplace.mul_add_(x, torch.tensor([2.0, 10.0]), 1)
        tensor([[ 3., 21.],
                [ 7., 41.]])
    """
    return _write(input, _old(input) * _beside(input, scale) + _beside(input, shift))


@_op
def addcmul_(input: Tensor, tensor1: Operand, tensor2: Operand, *, value: Number = 1) -> Tensor:
    r"""Adds a product in place: ``input + value * tensor1 * tensor2`` (residual with LayerScale or a gate).

    The arithmetic is done in float32 for float16 and bfloat16, and rounded to ``input``'s dtype once.

    Args:
        input: the tensor to write, of any shape, dtype and device. A leaf that requires a gradient is refused.
        tensor1: a tensor that broadcasts to ``input``'s shape, or a number.
        tensor2: a tensor that broadcasts to ``input``'s shape, or a number.
        value: the multiplier of the product: a number, or a 0-dim tensor without a gradient, whose value is read.

    Returns:
        ``input``, its version counter one higher.

    Saved for backward: ``tensor2``, if ``tensor1`` needs a gradient; ``tensor1``, if ``tensor2`` does. ``input`` needs
    nothing.

    Raises:
        RuntimeError: before anything is written, where ``input.addcmul_`` raises it.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> x, branch, gamma = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([0.5, 2.0])
        >>> safe_inplace.addcmul_(x, branch, gamma)
        tensor([2., 7.])
    """
    if isinstance(tensor1, Tensor) and isinstance(tensor2, Tensor):
        exact = not input.is_floating_point() and not input.is_complex()
        if exact or tensor1.dtype == tensor2.dtype == input.dtype:
            return input.addcmul_(_beside(input, tensor1), _beside(input, tensor2), value=value)
        # It would round a 0-dim operand to the input's dtype first, and as Dynamo writes it the product to the operands'.
        product: Operand = _beside_math(input, tensor1) * _beside_math(input, tensor2)
    else:
        tensor, number = (tensor1, tensor2) if isinstance(tensor1, Tensor) else (tensor2, tensor1)
        product = (_old(tensor) if isinstance(tensor, Tensor) else tensor) * number
    # torch's add has no use for a boolean alpha.
    return _write(input, torch.add(_old(input), product, alpha=int(value) if isinstance(value, bool) else value))


@_op
def add(input: Tensor, other: Operand, *, alpha: Number = 1) -> Tensor:
    r"""Adds: ``input + alpha * other``. Bit for bit what ``torch.add(input, other, alpha=alpha)`` returns.

    Args:
        input: a tensor of any shape, dtype and device.
        other: a tensor that broadcasts with ``input``, or a number.
        alpha: the multiplier of ``other``: a number, or a 0-dim tensor without a gradient, whose value is read.

    Returns:
        A tensor of the broadcast shape and the promoted dtype, laid out as torch lays it out. Its memory is that of an operand
        where nobody can see that one any more (a temporary of the calling expression), and new otherwise; no operand that
        anybody can see changes.

    Saved for backward: nothing.

    Raises:
        RuntimeError: shapes that do not broadcast, or what else ``torch.add`` refuses.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> safe_inplace.add(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), alpha=0.5)
        tensor([ 6., 12.])
    """
    return torch.add(input, other) if _is_one(alpha) else torch.add(input, other, alpha=alpha)


@_op
def mul(input: Tensor, other: Operand) -> Tensor:
    r"""Multiplies: ``input * other``. Bit for bit what ``torch.mul(input, other)`` returns.

    Args:
        input: a tensor of any shape, dtype and device.
        other: a tensor that broadcasts with ``input``, or a number.

    Returns:
        A tensor of the broadcast shape and the promoted dtype, as :func:`add` returns it.

    Saved for backward: ``other``, if ``input`` needs a gradient; ``input``, if ``other`` does. Both as they are, without a copy.

    Raises:
        RuntimeError: shapes that do not broadcast, or what else ``torch.mul`` refuses.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> safe_inplace.mul(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 4.0]))
        tensor([[3., 4.],
                [6., 8.]])
    """
    return torch.mul(input, other)


@_op
def add_mul(input: Tensor, other: Operand, scale: Operand) -> Tensor:
    r"""Adds, then scales, in one pass: ``(input + other) * scale``.

    The arithmetic is done in float32 for float16 and bfloat16, and rounded to the result's dtype once.

    Args:
        input: a tensor of any shape, dtype and device.
        other: a tensor that broadcasts with the others, or a number.
        scale: a tensor that broadcasts with the others, or a number.

    Returns:
        A tensor of the broadcast shape and the promoted dtype, as :func:`add` returns it.

    Saved for backward: ``scale``, if ``input`` or ``other`` needs a gradient; ``input + other``, if ``scale`` does: the kernel
    that writes the result writes it too.

    Raises:
        RuntimeError: shapes that do not broadcast, or what else torch's own operators refuse.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> safe_inplace.add_mul(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), 0.5)
        tensor([2., 3.])
    """
    return (input + other) * scale


@_op
def mul_add(input: Tensor, scale: Operand, shift: Operand) -> Tensor:
    r"""Scales and shifts in one pass: ``input * scale + shift`` (modulation, affine, a scaled residual).

    The arithmetic is done in float32 for float16 and bfloat16, and rounded to the result's dtype once.

    Args:
        input: a tensor of any shape, dtype and device.
        scale: a tensor that broadcasts with the others, or a number.
        shift: a tensor that broadcasts with the others, or a number.

    Returns:
        A tensor of the broadcast shape and the promoted dtype, as :func:`add` returns it.

    Saved for backward: ``scale``, if ``input`` needs a gradient; ``input``, if ``scale`` does. Both as they are, without a copy.

    Raises:
        RuntimeError: shapes that do not broadcast, or what else torch's own operators refuse.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> branch, gamma, residual = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 10.0]), torch.tensor([5.0, 5.0])
        >>> safe_inplace.mul_add(branch, gamma, residual)
        tensor([ 7., 25.])
    """
    return input * scale + shift


@_op
def addcmul(input: Tensor, tensor1: Operand, tensor2: Operand, *, value: Number = 1) -> Tensor:
    r"""Adds a product in one pass: ``input + value * tensor1 * tensor2`` (residual with LayerScale or a gate).

    The arithmetic is done in float32 for float16 and bfloat16, and rounded to the result's dtype once.

    Args:
        input: a tensor of any shape, dtype and device.
        tensor1: a tensor that broadcasts with the others, or a number.
        tensor2: a tensor that broadcasts with the others, or a number.
        value: the multiplier of the product: a number, or a 0-dim tensor without a gradient, whose value is read.

    Returns:
        A tensor of the broadcast shape and the promoted dtype, as :func:`add` returns it.

    Saved for backward: ``tensor2``, if ``tensor1`` needs a gradient; ``tensor1``, if ``tensor2`` does. Both as they are,
    without a copy. ``input`` needs nothing.

    Raises:
        RuntimeError: shapes that do not broadcast, or what else torch's own operators refuse.
        TypeError: an argument is neither a tensor nor a number that torch takes.

    Example:
        >>> import torch, safe_inplace
        >>> x, branch, gamma = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.tensor([0.5, 2.0])
        >>> safe_inplace.addcmul(x, branch, gamma)
        tensor([2., 7.])
    """
    product = tensor1 * tensor2
    # torch's add has no use for a boolean alpha.
    return torch.add(input, product, alpha=int(value) if isinstance(value, bool) else value)


def _call_override(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    public: Callable[..., Any] = globals()[name]
    relevant = (*args, *kwargs.values())
    return torch.overrides.handle_torch_function(public, relevant, *args, **kwargs)


_C.set_override_handler(_call_override)

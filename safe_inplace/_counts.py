"""Which way the ops went where the result does not show it."""

from . import _C
from ._dynamo import keep_out_of

__all__ = ["counts", "reset_counts"]

keep_out_of(__name__)


def counts() -> dict[str, int]:
    """How often the ops, in all threads of this process, went one way or the other since the start or ``reset_counts()``.

    A write to a view that autograd records is counted under ``"view.own"`` if the view was made a tensor of its own; else
    torch's ``CopySlices`` carries its gradient, with three copies in backward, and the name says why:

    ==========================  =========================================================================================
    ``"view.base held"``        Python, another view of the base or a node that saved it has it
    ``"view.memory held"``      an alias (``detach()``, ``.data``), a node that saved its result, the storage object
    ``"view.part of base"``     the view does not cover its base
    ``"view.another kind"``     a view as real or complex numbers, or one that forward mode made
    ``"view.hooks"``            a hook on the view, on its base or on its ``grad_fn``
    ``"view.gradient"``         ``retain_grad()``, a ``grad`` or a ``grad_dtype`` on the view
    ``"view.left to torch"``    no kernel for these arguments: torch's own method writes
    ==========================  =========================================================================================

    A result out of place that one of our kernels computes is counted under ``"result.taken over"`` if it was written over a
    temporary of the calling expression; else its memory is new, and the name says why:

    ==============================  =====================================================================================
    ``"result.no temporary"``       every operand has a name, is somebody's item, or came in another way than a plain call
    ``"result.another layout"``     a temporary of another shape, dtype or order of dimensions than the result
    ``"result.memory held"``        somebody else sees the temporary's memory: backward, a view, an alias, a hook
    ==============================  =====================================================================================

    What is left to torch from the start (subclasses, transforms, tracing, forward mode) is not counted.

    Example:
        >>> import torch, safe_inplace
        >>> safe_inplace.reset_counts()
        >>> a = torch.ones(6, requires_grad=True)
        >>> x = (a * 2).view(2, 3)
        >>> _ = safe_inplace.mul_(x, 3)
        >>> base = a * 2
        >>> _ = safe_inplace.mul_(base.view(2, 3), 3)
        >>> {name: times for name, times in safe_inplace.counts().items() if times}
        {'view.own': 1, 'view.base held': 1}
        >>> safe_inplace.reset_counts()
        >>> y = safe_inplace.add(torch.ones(3) * 2, 1)
        >>> {name: times for name, times in safe_inplace.counts().items() if times}
        {'result.taken over': 1}
    """
    return _C.counts()


def reset_counts() -> None:
    """Sets all ``counts()`` to zero.

    Example:
        >>> import safe_inplace
        >>> safe_inplace.reset_counts()
        >>> sum(safe_inplace.counts().values())
        0
    """
    _C.reset_counts()

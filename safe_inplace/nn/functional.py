"""What the modules compute.

A branch may be given as a tensor, or as a function without arguments that computes it. Where backward does not need the branch
(inference, a gate that is not trained), the memory of what the function returned is taken over for the result: nobody else has
it. A tensor that was handed in has a name where it came from, so its memory is left alone.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import ops

__all__ = ["gated_residual", "grn", "modulate", "scaled_residual"]

Branch = Tensor | Callable[[], Tensor]
Draws = Literal["bernoulli", "rand"]


def _made(branch: Branch) -> list[Tensor]:
    # A Proxy is a tensor while torch.fx traces, and can be called, too.
    if isinstance(branch, (Tensor, Proxy)):
        return [branch]  # type: ignore[list-item]
    if not callable(branch):
        raise TypeError(
            f"the branch is a {type(branch).__name__}; it must be a tensor, or a function without arguments that computes one"
        )
    # A list: what is popped from it in an argument is a temporary of the expression, and nobody else's.
    return [branch()]


def require_drop_path(drop_path: float, draws: str) -> None:
    """Raises ValueError where branches could not be dropped so."""
    if draws not in ("bernoulli", "rand"):
        raise ValueError(f"draws is {draws!r}; it must be 'bernoulli' or 'rand'")
    if not 0 <= drop_path <= 1:
        raise ValueError(f"drop_path is {drop_path}; it must be a probability, from 0 to 1")


def _keep_mask(branch: Tensor, gamma: Tensor | float | None, keep: float, draws: Draws) -> Tensor:
    """A number for each sample of what is dropped, their product: a scale may have more samples than the branch."""
    product = torch.broadcast_shapes(branch.shape, gamma.shape) if isinstance(gamma, Tensor) else branch.shape
    shape, dtype = (product[0],) + (1,) * (len(product) - 1), _dtype_of_product(branch, gamma)
    if draws == "bernoulli":
        return branch.new_empty(shape, dtype=dtype).bernoulli_(keep)
    return torch.floor(torch.rand(shape, dtype=dtype, device=branch.device) + keep)


def _dtype_of_product(branch: Tensor, gamma: Tensor | float | None) -> torch.dtype:
    if gamma is None:
        return branch.dtype
    if torch.compiler.is_compiling():
        # result_type returns what no graph holds: a product of nothing has the dtype, too.
        like = gamma.new_empty((0,) * min(gamma.ndim, 1)) if isinstance(gamma, Tensor) else gamma
        return (branch.new_empty(0) * like).dtype
    return torch.result_type(branch, gamma)


def scaled_residual(
    x: Tensor,
    branch: Branch,
    gamma: Tensor | float | None = None,
    drop_path: float = 0.0,
    training: bool = False,
    *,
    draws: Draws = "bernoulli",
    scale_by_keep: bool = True,
    branch_first: bool = False,
) -> Tensor:
    r"""A residual with LayerScale and stochastic depth, in one pass: ``x + drop_path(gamma * branch)``.

    Args:
        x: the residual stream, of any shape, the batch first.
        branch: what is added, of ``x``'s shape, or a function that computes it.
        gamma: the scale of each channel, a tensor that broadcasts to ``branch``, or a number; None is no scale.
        drop_path: the probability that a sample's branch is dropped; nothing is drawn where it is 0 or without ``training``.
        training: whether branches are dropped.
        draws: how the random numbers are drawn, so that a seed gives the same training: ``"bernoulli"`` as in timm, ``"rand"``
            as in transformers. One number for each sample, in the dtype of ``gamma * branch``.
        scale_by_keep: whether what is kept is divided by the probability to be kept.
        branch_first: compute ``drop_path(gamma * branch) + x``. The values are the same; where ``x`` and ``branch`` order their
            dimensions differently in memory, the result follows the first.

    Returns:
        A tensor of the broadcast shape and the promoted dtype.

    Raises:
        TypeError: ``branch`` is neither a tensor nor a function.
        ValueError: where branches are dropped, ``drop_path`` is no probability or ``draws`` is unknown.

    Saved for backward: ``gamma``, and ``branch`` if ``gamma`` needs a gradient.

    Example:
        >>> import torch
        >>> from safe_inplace.nn.functional import scaled_residual
        >>> x, branch, gamma = torch.ones(2, 3), torch.full((2, 3), 2.0), torch.tensor([0.1, 1.0, 10.0])
        >>> scaled_residual(x, branch, gamma)
        tensor([[ 1.2000,  3.0000, 21.0000],
                [ 1.2000,  3.0000, 21.0000]])
        >>> scaled_residual(x, lambda: branch * 2)
        tensor([[5., 5., 5.],
                [5., 5., 5.]])
    """
    made = _made(branch)
    if not (drop_path and training):
        if gamma is None:
            return ops.add(made.pop(), x) if branch_first else ops.add(x, made.pop())
        return ops.mul_add(made.pop(), gamma, x) if branch_first else ops.addcmul(x, made.pop(), gamma)
    require_drop_path(drop_path, draws)
    keep = 1 - drop_path
    factor = _keep_mask(made[0], gamma, keep, draws)
    if gamma is not None:
        factor = factor * gamma
    scale = 1.0
    if scale_by_keep:
        # timm keeps nothing of nothing, transformers divides by zero.
        scale = 1 / keep if keep else 1.0 if draws == "bernoulli" else float("inf")
    if branch_first:
        return ops.mul_add(made.pop(), factor * scale, x)
    if isinstance(scale, Tensor):
        return ops.addcmul(x, made.pop(), factor * scale)
    return ops.addcmul(x, made.pop(), factor, value=scale)


def gated_residual(x: Tensor, branch: Branch, gate: Tensor, *, branch_first: bool = False) -> Tensor:
    r"""A residual behind a gate, in one pass: ``x + gate * branch`` (DiT and its kin).

    Args:
        x: the residual stream, of any shape.
        branch: what is added, of ``x``'s shape, or a function that computes it.
        gate: a tensor that broadcasts to ``branch``: ``(batch, 1, channels)`` where each sample has its own.
        branch_first: as in :func:`scaled_residual`.

    Returns:
        A tensor of the broadcast shape and the promoted dtype.

    Raises:
        TypeError: ``branch`` is neither a tensor nor a function, or ``gate`` is None.

    Saved for backward: ``gate`` if ``branch`` needs a gradient; ``branch`` if ``gate`` does.

    Example:
        >>> import torch
        >>> from safe_inplace.nn.functional import gated_residual
        >>> gated_residual(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([[0.0], [1.0]]))
        tensor([[1., 1.],
                [2., 2.]])
    """
    if gate is None:
        raise TypeError("gate is None; it must be a tensor that broadcasts to the branch")
    return scaled_residual(x, branch, gate, branch_first=branch_first)


def modulate(h: Branch, scale: Tensor, shift: Tensor) -> Tensor:
    r"""Adaptive normalization's second half, in one pass: ``h * (1 + scale) + shift`` (AdaLN, FiLM).

    Args:
        h: what was normalized, of any shape, or a function that computes it.
        scale: a tensor that broadcasts to ``h``: ``(batch, 1, channels)`` where each sample has its own.
        shift: a tensor that broadcasts to ``h``.

    Returns:
        A tensor of the broadcast shape and the promoted dtype.

    Saved for backward: ``1 + scale`` if ``h`` needs a gradient; ``h`` if ``scale`` does.

    Example:
        >>> import torch
        >>> from safe_inplace.nn.functional import modulate
        >>> modulate(torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 10.0]))
        tensor([[ 2., 13.]])
    """
    made = _made(h)
    return ops.mul_add(made.pop(), 1 + scale, shift)


def grn(
    h: Branch,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    spatial_dims: Sequence[int] = (1, 2),
    channel_dim: int = -1,
) -> Tensor:
    r"""Global response normalization (ConvNeXt V2): ``weight * (h * n) + bias + h``, computed as ``h * (weight * n + 1) + bias``.

    ``n`` is the norm of each channel over the positions, divided by the mean of these norms over the channels (plus ``eps``).
    ``h`` is read twice and the result written once; each step of the formula as it stands would be a pass of its own.

    Args:
        h: activations with two dimensions of positions and one of channels, or a function that computes them.
        weight: the scale, broadcasting to ``h``: ``(channels,)`` where the channels are last.
        bias: the shift, as ``weight``.
        eps: what the mean of the norms is kept from zero by.
        spatial_dims: the dimensions of positions.
        channel_dim: the dimension of channels.

    Returns:
        A tensor of ``h``'s shape and the promoted dtype.

    Saved for backward: ``h``, the norms, and small factors.

    Example:
        >>> import torch
        >>> from safe_inplace.nn.functional import grn
        >>> h = torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)
        >>> grn(h, torch.tensor([1.0]), torch.tensor([0.5])).flatten()
        tensor([6.5000, 8.5000])
    """
    made = _made(h)
    norms = torch.linalg.vector_norm(made[0], ord=2, dim=tuple(spatial_dims), keepdim=True)
    factor = weight * (norms / (norms.mean(dim=channel_dim, keepdim=True) + eps)) + 1
    return ops.mul_add(made.pop(), factor, bias)

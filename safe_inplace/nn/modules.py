"""The modules: a parameter or two around each functional form."""

from __future__ import annotations  # torch.fx writes annotations down, and knows no `Callable[[], Tensor]`

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .functional import Branch, Draws, gated_residual, grn, modulate, require_drop_path, scaled_residual

__all__ = ["GRN", "GatedResidual", "Modulate", "ScaledResidual"]


class _Renamed(nn.Module):
    """Takes its parameters from a state dict under the names, and in the shapes, of the modules that it stands for."""

    _spellings: ClassVar[dict[str, tuple[str, ...]]] = {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, others in self._spellings.items():
            for other in others:
                if prefix + name not in state_dict and prefix + other in state_dict:
                    state_dict[prefix + name] = state_dict.pop(prefix + other)
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if not isinstance(value, Tensor) or not isinstance(own, Tensor):
                continue
            if value.ndim != own.ndim and value.squeeze().shape == own.squeeze().shape:
                state_dict[prefix + name] = value.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ScaledResidual(_Renamed):
    r"""LayerScale, stochastic depth and the residual: ``x + drop_path(gamma * branch)``, in one pass.

    Stands for timm's ``LayerScale``, ``LayerScale2d`` (``channel_dim=1``) and ``DropPath``, and those of transformers: their
    ``gamma`` or ``lambda1`` loads, and with the same seed the same samples are dropped.

    Args:
        dim: the number of channels.
        init: the value that ``gamma`` starts with.
        drop_path: the probability that a sample's branch is dropped in training.
        draws: ``"bernoulli"`` draws timm's random numbers, ``"rand"`` those of transformers.
        channel_dim: the dimension of channels.

    Raises:
        ValueError: ``drop_path`` is no probability, or ``draws`` is unknown; in a call, ``x`` has no dimension ``channel_dim``.

    Call it with ``x`` and a branch of the same shape, a tensor or a function that computes it. The result has the promoted dtype
    of ``x``, ``branch`` and ``gamma``.

    Saved for backward: ``gamma``, and ``branch`` if ``gamma`` is trained.

    Example:
        >>> import torch
        >>> from safe_inplace.nn import ScaledResidual
        >>> residual, mlp = ScaledResidual(3, init=0.5), torch.nn.Identity()
        >>> x = torch.ones(2, 3)
        >>> residual(x, lambda: mlp(x * 4)).detach()
        tensor([[3., 3., 3.],
                [3., 3., 3.]])
        >>> residual.load_state_dict({"lambda1": torch.zeros(3)})
        <All keys matched successfully>
    """

    _spellings: ClassVar[dict[str, tuple[str, ...]]] = {"gamma": ("lambda1",)}

    def __init__(
        self, dim: int, init: float = 1e-5, drop_path: float = 0.0, draws: Draws = "bernoulli", channel_dim: int = -1
    ) -> None:
        super().__init__()
        require_drop_path(drop_path, draws)
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))
        self.drop_path, self.draws, self.channel_dim = drop_path, draws, channel_dim

    def forward(self, x: Tensor, branch: Branch) -> Tensor:
        gamma: Tensor | None = self.gamma
        if gamma is not None and self.channel_dim != -1:
            if not -x.ndim <= self.channel_dim < x.ndim:
                raise ValueError(f"channel_dim is {self.channel_dim}; x has {x.ndim} dimensions")
            shape = [1] * x.ndim
            shape[self.channel_dim] = -1
            gamma = gamma.view(shape)
        return scaled_residual(x, branch, gamma, self.drop_path, self.training, draws=self.draws)

    def extra_repr(self) -> str:
        dim = None if self.gamma is None else self.gamma.numel()
        return f"{dim}, drop_path={self.drop_path}, draws={self.draws!r}, channel_dim={self.channel_dim}"


class GatedResidual(nn.Module):
    r"""A residual behind a gate that comes with the input: ``x + gate * branch``, in one pass. Has no parameters.

    Call it with ``x``, a branch of the same shape (a tensor or a function that computes it) and a gate that broadcasts to it:
    ``(batch, 1, channels)`` for ``(batch, tokens, channels)``. The result has the promoted dtype. Saved for backward: ``gate``,
    and ``branch`` if ``gate`` needs a gradient.

    Example:
        >>> import torch
        >>> from safe_inplace.nn import GatedResidual
        >>> GatedResidual()(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.tensor([[[0.0, 2.0]]]))
        tensor([[[1., 3.],
                 [1., 3.]]])
    """

    def forward(self, x: Tensor, branch: Branch, gate: Tensor) -> Tensor:
        return gated_residual(x, branch, gate)


class Modulate(nn.Module):
    r"""A scale and a shift that come with the input: ``norm(h) * (1 + scale) + shift``, in one pass (AdaLN, FiLM).

    Args:
        norm: the normalization that is modulated, usually ``torch.nn.LayerNorm(dim, elementwise_affine=False)``; None takes ``h``
            as it comes. With it, the memory of what it returns becomes the result's where backward does not need it.

    Call it with ``h`` of any shape, and ``scale`` and ``shift`` that broadcast to it. The result has the promoted dtype.
    Saved for backward: ``1 + scale``, and what is scaled if ``scale`` needs a gradient.

    Example:
        >>> import torch
        >>> from safe_inplace.nn import Modulate
        >>> modulate = Modulate(torch.nn.LayerNorm(2, elementwise_affine=False, eps=0.0))
        >>> modulate(torch.tensor([[1.0, 3.0]]), torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([[-1.5000,  2.5000]])
    """

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        norm = self.norm
        return modulate(h if norm is None else lambda: norm(h), scale, shift)


class GRN(_Renamed):
    r"""Global response normalization of ConvNeXt V2: ``weight * (h * n) + bias + h``, the last step in one pass.

    Stands for timm's ``GlobalResponseNorm``, for ``ConvNextV2GRN`` of transformers and for the ``GRN`` of the paper's code:
    ``weight`` and ``bias``, or ``gamma`` and ``beta``, load in the shapes that they have there.

    Args:
        dim: the number of channels.
        eps: what the mean of the norms is kept from zero by.
        channels_last: whether ``h`` is ``(batch, height, width, channels)`` or ``(batch, channels, height, width)``.

    ``n`` is described in :func:`safe_inplace.nn.functional.grn`. The result has ``h``'s shape and the promoted dtype.
    Saved for backward: ``h``, the norms, and small factors.

    Example:
        >>> import torch
        >>> from safe_inplace.nn import GRN
        >>> GRN(1)(torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1)).flatten().detach()
        tensor([3., 4.])
    """

    _spellings: ClassVar[dict[str, tuple[str, ...]]] = {"weight": ("gamma",), "bias": ("beta",)}

    def __init__(self, dim: int, eps: float = 1e-6, channels_last: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps, self.channels_last = eps, channels_last

    def forward(self, h: Branch) -> Tensor:
        if self.channels_last:
            return grn(h, self.weight, self.bias, self.eps)
        weight, bias = self.weight.view(-1, 1, 1), self.bias.view(-1, 1, 1)
        return grn(h, weight, bias, self.eps, spatial_dims=(2, 3), channel_dim=1)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, channels_last={self.channels_last}"

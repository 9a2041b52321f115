"""Blocks of real models written twice: plainly with torch, and with the ops where a plain sum or product would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safe_inplace


class Plain:
    """As the models' authors write it."""

    @staticmethod
    def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return h * (1 + scale) + shift

    @staticmethod
    def residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return x + gate * branch

    @staticmethod
    def scores(scores: Tensor, scale: float, bias: Tensor) -> Tensor:
        return scores * scale + bias


class InPlace:
    """The same formulas. Each writes to a tensor that was just made and that no node saved."""

    @staticmethod
    def modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return safe_inplace.mul_add_(h, 1 + scale, shift)

    @staticmethod
    def residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return safe_inplace.mul_add_(branch, gate, x)

    @staticmethod
    def scores(scores: Tensor, scale: float, bias: Tensor) -> Tensor:
        return safe_inplace.mul_add_(scores, scale, bias)


Formulas = type[Plain] | type[InPlace]


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, pointwise MLP, LayerScale, residual; channels last throughout."""

    def __init__(self, width: int, formulas: Formulas) -> None:
        super().__init__()
        self.formulas = formulas
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.formulas.residual(x, self.mlp(self.norm(h)), self.gamma)


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated before and gated after by the condition."""

    def __init__(self, width: int, heads: int, formulas: Formulas) -> None:
        super().__init__()
        self.formulas, self.heads = formulas, heads
        self.condition = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        formulas = self.formulas
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(condition).unsqueeze(1).chunk(6, dim=-1)
        x = formulas.residual(x, self.attention(formulas.modulate(self.norm1(x), scale1, shift1)), gate1)
        return formulas.residual(x, self.mlp(formulas.modulate(self.norm2(x), scale2, shift2)), gate2)


class BiasedAttention(nn.Module):
    """Attention written out, its scores scaled and shifted by a learned bias of relative positions."""

    def __init__(self, width: int, heads: int, length: int, formulas: Formulas) -> None:
        super().__init__()
        self.formulas, self.heads = formulas, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(heads, length, length))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.formulas.scores(q @ k.transpose(-2, -1), q.shape[-1] ** -0.5, self.bias)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *condition)
        return x


@dataclass(frozen=True)
class Model:
    name: str
    build: Callable[[Formulas], nn.Module]
    inputs: tuple[tuple[int, ...], ...]

    def make(self, formulas: Formulas, device: torch.device) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The same weights and inputs for either way of writing it."""
        torch.manual_seed(0)
        module = self.build(formulas).to(device)
        return module, tuple(torch.randn(shape, device=device) for shape in self.inputs)


def models(batch: int, width: int, depth: int) -> list[Model]:
    heads, length, side = width // 64, 256, 28
    return [
        Model(
            "ConvNeXt-like blocks",
            lambda formulas: Stack([ConvNeXtBlock(width // 2, formulas) for _ in range(depth)]),
            ((batch, side, side, width // 2),),
        ),
        Model(
            "DiT-like blocks",
            lambda formulas: Stack([DiTBlock(width, heads, formulas) for _ in range(depth)]),
            ((batch, length, width), (batch, width)),
        ),
        Model(
            "attention with scaled, biased scores",
            lambda formulas: Stack([BiasedAttention(width, heads, 2 * length, formulas) for _ in range(depth)]),
            ((batch, 2 * length, width),),
        ),
    ]


def for_device(device: torch.device) -> list[Model]:
    return models(batch=4, width=256, depth=2) if device.type == "cpu" else models(batch=32, width=1024, depth=8)


def step(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward; gradients are replaced, as after `zero_grad(set_to_none=True)`."""
    for parameter in module.parameters():
        parameter.grad = None
    loss = module(*inputs).square().mean()
    loss.backward()
    return loss.detach()

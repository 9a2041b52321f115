"""The bug of docs/guard.md: a gate is applied in place to what the norm before it saved."""

import torch
from torch import Tensor, nn


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 0.5
        h = self.norm(x)
        x.mul_(self.gate(h).sigmoid())
        return x + h


if __name__ == "__main__":
    torch.manual_seed(0)
    Gated(64)(torch.randn(8, 128, 64, requires_grad=True)).sum().backward()

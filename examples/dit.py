"""A diffusion transformer, written by hand with `Modulate` and `GatedResidual`, that learns to draw scikit-learn's digits.

It learns the velocity of a straight way from noise to an image (flow matching), then walks that way for each digit. Beside it
trains the same model with the lines that are usually written in the modules' place.
"""

import torch
from torch import Tensor, nn

from examples.side_by_side import Run, parser, summary, train
from safe_inplace.nn import GatedResidual, Modulate


class PlainModulate(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(h) * (1 + scale) + shift


class PlainResidual(nn.Module):
    def forward(self, x: Tensor, branch, gate: Tensor) -> Tensor:
        return x + gate * branch()


class Block(nn.Module):
    def __init__(self, width: int, modulate: type[nn.Module], residual: type[nn.Module]) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.modulate1, self.modulate2 = (modulate(nn.LayerNorm(width, elementwise_affine=False)) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.residual = residual()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.condition(condition)[:, None].chunk(6, dim=-1)
        h = self.modulate1(x, scale1, shift1)
        # The branches are functions: what they return is nobody else's, and may be written over where backward allows.
        x = self.residual(x, lambda: self.attention(h, h, h, need_weights=False)[0], gate1)
        return self.residual(x, lambda: self.mlp(self.modulate2(x, scale2, shift2)), gate2)


class DiT(nn.Module):
    def __init__(self, modulate: type[nn.Module], residual: type[nn.Module], width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(10, width)
        self.blocks = nn.ModuleList(Block(width, modulate, residual) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))

    def forward(self, images: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(nn.functional.pixel_unshuffle(images, 2).flatten(2).mT) + self.position
        condition = self.time(time[:, None]) + self.label(labels)
        for block in self.blocks:
            x = block(x, condition)
        return nn.functional.pixel_shuffle(self.out(x).mT.unflatten(2, (4, 4)), 2)


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    noise, time = torch.randn_like(images), torch.rand(len(images))
    between = torch.lerp(noise, images, time[:, None, None, None])
    return (model(between, time, labels) - (images - noise)).square().mean()


@torch.no_grad()
def draw(model: nn.Module, labels: Tensor, steps: int = 20) -> Tensor:
    images = torch.randn(len(labels), 1, 8, 8)
    for step in range(steps):
        images += model(images, torch.full((len(labels),), step / steps), labels) / steps
    return images


def main(arguments: list[str] | None = None) -> list[Run]:
    options = parser(__doc__).parse_args(arguments)
    plain, ours = DiT(PlainModulate, PlainResidual), DiT(Modulate, GatedResidual)
    ours.load_state_dict(plain.state_dict())
    runs = [Run("plain", plain, loss), Run("safe_inplace", ours, loss)]
    train(runs, options)
    print(summary(runs, options))
    shades = draw(ours, torch.arange(10)).clamp(-1, 1).add(1).mul(2.49).long()[:, 0]
    for row in range(8):
        print("  ".join("".join(" .+#@"[shade] * 2 for shade in digit[row]) for digit in shades))
    return runs


if __name__ == "__main__":
    main()

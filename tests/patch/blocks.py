"""A library of one block, written as transformers writes its own, and a rule for it."""

import torch
from torch import nn

from safe_inplace._patch.leaves import LAYER_SCALE, OPTIONAL_DROP_PATH, residual
from safe_inplace._patch.rules import rule
from safe_inplace._patch.structure import innermost, structure_of


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.lambda1 = nn.Parameter(0.5 + torch.rand(dim))

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        return hidden_state * self.lambda1


class DropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        random_tensor = torch.rand(shape, dtype=hidden_states.dtype, device=hidden_states.device)
        random_tensor = torch.floor(random_tensor + keep_prob)
        return hidden_states.div(keep_prob) * random_tensor


def activation(value):
    return value.tanh()


class Block(nn.Module):
    def __init__(self, dim=8, drop=0.0):
        super().__init__()
        self.mlp, self.scale = nn.Linear(dim, dim), LayerScale(dim)
        self.drop_path = DropPath(drop) if drop else nn.Identity()

    def forward(self, x):
        branch = activation(self.mlp(x))
        return x + self.drop_path(self.scale(branch))


@rule(
    structure_of(Block.forward),
    name="block-of-the-tests",
    homes="tests.patch.blocks.Block",
    ops="addcmul",
    inlines={"scale": LAYER_SCALE, "drop_path": OPTIONAL_DROP_PATH},
    helpers={"activation": (structure_of(activation),)},
)
def block(self, x):
    return residual(self, x, lambda: activation(self.mlp(x)), "scale", "drop_path")


def model(drop=0.0):
    return nn.Sequential(Block(drop=drop), nn.ReLU(), Block(drop=drop))


__all__ = ["Block", "DropPath", "LayerScale", "innermost", "model"]

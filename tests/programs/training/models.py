"""What the training programs are made of: layers, optimizers, and the ways in which a write reaches a tensor."""

from collections.abc import Callable

import torch
from torch import nn

ROWS, WIDTH = 3, 4


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x):
        h = self.inner(x) * 1.5
        h += x
        return h


class ResidualOverwrites(Residual):
    def forward(self, x):
        h = self.inner(x)
        h += x + 0.125  # where x is all zeros, too, it changes something
        return h


class SigmoidInPlace(nn.Module):
    def forward(self, x):
        return x.sigmoid_()


class Gate(nn.Linear):
    def forward(self, x):
        return x * super().forward(x).sigmoid()


class Halves(nn.Linear):
    """Saves views of its input."""

    def forward(self, x):
        return torch.cat([x[:, :2] * x[:, 2:], super().forward(x)[:, ::2].tanh()], 1)


class Columns(nn.Module):
    """Writes one column after the other, beside and over what it has saved."""

    def forward(self, x):
        h = x * 1
        h[:, 0] = h[:, 1] * 2
        h[:, 2] = h[:, 3] * h[:, 3]
        return h


class Running(nn.Module):
    """A buffer that each forward in train mode moves, and saves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(WIDTH))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.1)
        return x * self.mean


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "linear without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "softmax": lambda: nn.Softmax(-1),
    "dropout": nn.Dropout,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky relu in place": lambda: nn.LeakyReLU(0.1, inplace=True),
    "sigmoid in place": lambda: SigmoidInPlace(),
    "residual": Residual,
    "residual that overwrites": ResidualOverwrites,
    "gate": lambda: Gate(WIDTH, WIDTH),
    "halves": lambda: Halves(WIDTH, WIDTH),
    "columns": Columns,
    "running": Running,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
}
WEIGHTS = [6, 3, 3, 3, 1, 3, 2, 2, 1, 1, 1, 2, 1, 1, 2, 1, 2, 2, 1, 2, 1, 1]

# Weight decay moves a parameter whose gradient is zero, too: a step that writes is a step that changes every byte.
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, momentum=0.9, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
    "foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
}

# How a write reaches a tensor: whether autograd sees it, and whether it raises the version.
WAYS: dict[str, Callable[[torch.Tensor], None]] = {
    "grad": lambda x: x.add_(0.125),
    "grad mul": lambda x: x.mul_(1.5).add_(0.25),
    "detach": lambda x: x.detach().add_(0.125),
    "data": lambda x: x.data.add_(0.125),
    "no_grad": torch.no_grad()(lambda x: x.add_(0.125)),
    "foreach": torch.no_grad()(lambda x: torch._foreach_add_([x], 0.125)),
    "out": torch.no_grad()(lambda x: torch.add(x, 0.125, out=x)),
}


def lerp(target: nn.Module, online: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)


def through_data(target: nn.Module, online: nn.Module) -> None:
    for mine, theirs in zip(target.parameters(), online.parameters(), strict=True):
        mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)


def foreach(target: nn.Module, online: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 0.1)


def whole_state(target: nn.Module, online: nn.Module) -> None:
    theirs = online.state_dict()
    for name, mine in target.state_dict().items():
        if mine.is_floating_point():
            mine.copy_(0.9 * mine + 0.1 * theirs[name] + 0.01)


AVERAGES = {"lerp": lerp, "data": through_data, "foreach": foreach, "state": whole_state}

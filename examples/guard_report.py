"""One careless write in the digits' network: what torch says of it, what the guard says, and what the guard repairs."""

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import safe_inplace
from examples.digits import Block, Digits, Network, out_of_place


class CarelessBlock(Block):
    """Normalises the stream first, as most networks do. GroupNorm then keeps x itself, and x may not be overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.space(self.norm(x).relu())
        x = self.ops.addcmul_(x, self.layer_scale, h)
        return x


def make_network(block: type[Block], ops) -> Network:
    torch.manual_seed(0)
    network = Network(ops, width=32, depth=0)
    network.blocks.extend(block(ops, width=32) for _ in range(2))
    return network


def gradients(network: Network, images: Tensor, labels: Tensor) -> list[Tensor]:
    F.cross_entropy(network(images), labels).backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    console = Console(highlight=False, soft_wrap=True)
    digits = Digits.load(seed=0, device=torch.device("cpu"))
    images, labels = digits.images[:64], digits.labels[:64]

    console.print("[bold]torch alone[/bold]\n")
    try:
        gradients(make_network(CarelessBlock, safe_inplace), images, labels)
    except RuntimeError as error:
        console.print(f"  {type(error).__name__}: {error}\n", markup=False)

    console.print("[bold]under guard()[/bold]\n")
    try:
        with safe_inplace.guard():
            gradients(make_network(CarelessBlock, safe_inplace), images, labels)
    except safe_inplace.HazardError as error:
        console.print(f"  {type(error).__name__}: {error}\n", markup=False)

    console.print("[bold]under guard('copy')[/bold]\n")
    with safe_inplace.guard("copy") as watched:
        found = gradients(make_network(CarelessBlock, safe_inplace), images, labels)
    expected = gradients(make_network(CarelessBlock, out_of_place), images, labels)
    distance = max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))
    console.print(
        f"  {watched.hazards_seen} writes, {watched.bytes_copied / 1024:.0f} KiB copied; "
        f"largest distance of a gradient from torch's out of place: {distance:.1e}\n"
    )

    console.print("[bold]the network of the demo under guard()[/bold]\n")
    with safe_inplace.guard() as watched:
        gradients(make_network(Block, safe_inplace), images, labels)
    console.print(f"  {watched.hazards_seen} hazards")


if __name__ == "__main__":
    main()

"""The fuzzes by their names: python -m tests.programs NAME --help."""

import argparse
import sys

import torch

from . import advised, expressions, guarded, overwrites
from .backward import check as backward
from .forward import check as forward
from .training import check as training

FUZZES = {module.FUZZ.name: module.FUZZ for module in (forward, backward, expressions, overwrites, guarded, training, advised)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description=__doc__)
    parser.add_argument("name", choices=FUZZES)
    options = parser.parse_args(arguments[:1])
    torch.set_num_threads(1)
    return FUZZES[options.name].main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

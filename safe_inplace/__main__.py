"""python -m safe_inplace env: what was built, for what, and what of it works here. run: a program under guard.
check-sources: which known blocks the installed libraries have."""

import argparse
import platform
import sys

import torch

from . import __version__
from ._build import PACKAGE, read_build
from ._patch import sources
from ._run import add_arguments


def cuda_in_words() -> str:
    build = read_build()
    if build.cuda is None:
        return "not in this build"
    words = f"built with CUDA {build.cuda} for {build.cuda_archs}; "
    if not torch.cuda.is_available():
        return words + "not usable, torch finds no device"
    devices = (
        f"{torch.cuda.get_device_name(index)} (sm_{''.join(map(str, torch.cuda.get_device_capability(index)))})"
        for index in range(torch.cuda.device_count())
    )
    return words + "usable on " + ", ".join(devices)


def env(_: argparse.Namespace) -> int:
    build = read_build()
    for name, value in (
        ("safe_inplace", f"{__version__} at {PACKAGE}"),
        ("built for", f"torch {build.torch}, Python {build.python}"),
        ("running on", f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"),
        ("CUDA", cuda_in_words()),
        ("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"),
    ):
        print(f"{name:<12}  {value}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m safe_inplace", description=sys.modules["safe_inplace"].__doc__)
    commands = parser.add_subparsers(title="commands", required=True)
    command = commands.add_parser("env", help="say what was built, for what, and what of it works here")
    command.set_defaults(run=env)
    add_arguments(commands.add_parser("run", help="run an unchanged program under guard"))
    sources.add_arguments(
        commands.add_parser("check-sources", help="say which blocks that patch() knows are in the installed libraries")
    )
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())

"""python -m safe_inplace env: what was built, for what, and what of it works here. run: a program under guard.
advise: which of its lines could be in place. check-sources: which known blocks the installed libraries have."""

import argparse
import os
import platform
import sys

import torch

from . import __version__, _run
from ._advise import command as _advise
from ._build import PACKAGE, read_build
from ._patch import sources


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
    arguments = sys.argv[1:] if arguments is None else arguments
    prog = "safe-inplace" if os.path.basename(sys.argv[0]) == "safe-inplace" else "python -m safe_inplace"
    if arguments[:1] == ["run"]:
        return _run.main(f"{prog} run", arguments[1:])
    if arguments[:1] == ["advise"]:
        return _advise.main(f"{prog} advise", arguments[1:])
    parser = argparse.ArgumentParser(prog=prog, description=sys.modules["safe_inplace"].__doc__)
    parser.add_argument("--version", action="version", version=f"safe_inplace {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    command = commands.add_parser("env", help="say what was built, for what, and what of it works here")
    command.set_defaults(run=env, error=command.error)
    commands.add_parser("run", help="run an unchanged program under guard")
    commands.add_parser("advise", help="say which lines of an unchanged program could be in place, and what that gains")
    command = commands.add_parser("check-sources", help="say which blocks that patch() knows are in the installed libraries")
    sources.add_arguments(command)
    command.set_defaults(error=command.error)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.error(f"unrecognized arguments: {' '.join(unknown)}")
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())

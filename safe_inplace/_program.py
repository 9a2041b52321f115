"""Runs a program in this process as `python script.py` and `python -m module` do."""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import io
import os
import pkgutil
import sys
import types
import zipfile
from collections.abc import Callable, Collection
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any, TextIO

Compile = Callable[[bytes, str], types.CodeType]


def _plain(text: bytes, filename: str) -> types.CodeType:
    return compile(text, filename, "exec", dont_inherit=True)


class NoProgram(Exception):
    """There is nothing to run. The text is the interpreter's, and so is the status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def parse(
    command: argparse.ArgumentParser, arguments: list[str], valued: Collection[str]
) -> tuple[argparse.Namespace, bool, list[str]]:
    """A command's own options, whether -m names the program, and the program with its arguments, whatever these look like. What
    follows an option of `valued` is its value."""
    own, is_module, program = _split(arguments, valued)
    options = command.parse_args(own)
    if not program:
        command.error("nothing to run: name a script, or a module with -m")
    return options, is_module, program


def _split(arguments: list[str], valued: Collection[str]) -> tuple[list[str], bool, list[str]]:
    end = 0
    while end < len(arguments) and arguments[end].startswith("-") and arguments[end] != "--":
        if arguments[end].startswith("-m"):
            name = arguments[end][2:]
            return arguments[:end], True, [name] * bool(name) + arguments[end + 1 :]
        end += 1 + (arguments[end] in valued)
    return arguments[:end], False, arguments[end + (arguments[end : end + 1] == ["--"]) :]


def opened(command: argparse.ArgumentParser, option: str, path: str) -> TextIO:
    """The file that an option names, before the program runs: for hours it would run for nothing."""
    try:
        return open(path, "w", encoding="utf-8", newline="")
    except OSError as error:
        command.error(f"{option} {path}: {error.strerror}")


def script(argv: list[str], compile: Compile = _plain) -> Callable[[], None]:
    """A script, or a folder or archive with a __main__.py; what is not a program raises before anything of it has run. `compile`
    makes code of the text of its file."""
    path = os.path.join(os.getcwd(), argv[0])
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        _begin(argv, path)
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None:
            raise NoProgram(f"can't find '__main__' module in {path!r}", 1)
        return _of_a_spec(spec, compile)
    try:
        with io.open_code(path) as file:
            text = file.read()  # once: a pipe cannot go back
        code = pkgutil.read_code(io.BytesIO(text))
        if code is None:
            code = compile(text, path)
    except OSError as error:
        raise NoProgram(f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}", 2) from None
    _begin(argv, os.path.dirname(os.path.realpath(path)))
    return _as_main(code, __file__=path, __loader__=SourceFileLoader("__main__", path), __cached__=None)


def module(argv: list[str], compile: Compile = _plain) -> Callable[[], None]:
    name = argv[0]
    _begin(["-m", *argv[1:]], os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        raise NoProgram(f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})", 1) from None
    if spec is None:
        raise NoProgram(f"No module named {name}", 1)
    sys.argv[0] = spec.origin or name
    return _of_a_spec(spec, compile)


def _begin(argv: list[str], folder: str) -> None:
    sys.argv[:] = argv
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _of_a_spec(spec: ModuleSpec, compile: Compile) -> Callable[[], None]:
    if compile is not _plain and type(spec.loader) is SourceFileLoader:
        code: types.CodeType | None = compile(spec.loader.get_data(spec.loader.path), spec.loader.path)
    else:
        code = getattr(spec.loader, "get_code", lambda _: None)(spec.name)
    if code is None:
        raise NoProgram(f"No code object available for {spec.name}", 1)
    return _as_main(
        code,
        __file__=spec.origin,
        __loader__=spec.loader,
        __cached__=spec.cached,
        __spec__=spec,
        __package__=spec.parent,
    )


def _as_main(code: types.CodeType, **names: Any) -> Callable[[], None]:
    """The module stays in sys.modules when the program is through: its threads, atexit functions and pickles look there."""
    main = types.ModuleType("__main__")
    if sys.version_info < (3, 14):  # later ones make them when somebody asks
        names["__annotations__"] = {}
    main.__dict__.update({"__builtins__": builtins, **names})

    def run() -> None:
        # By the second name multiprocessing, which torch has imported, pickles what its children know by it.
        if sys.modules.get("__mp_main__") is sys.modules["__main__"]:
            sys.modules["__mp_main__"] = main
        sys.modules["__main__"] = main
        exec(code, main.__dict__)

    return run

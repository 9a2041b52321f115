# Runs as each Python process begins that a guarded process started: safe_inplace._process puts this folder on PYTHONPATH.
# torch takes seconds to import and most processes never do: guard begins when something has imported it. Any interpreter may
# inherit the variable, so this file keeps to what all of them know, and nothing in it may stop one.
import os
import sys
from importlib.machinery import PathFinder

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Watcher(object):  # noqa: UP004
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else []
        for finder in behind:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_begin(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _begin()

        spec.loader.exec_module = execute_and_begin
        return spec


def _begin():
    # By its place, not by its name: the program may run where it would not be found.
    import importlib.util

    package = os.path.dirname(_HERE)
    name = os.path.basename(package)
    if name in sys.modules:
        return  # it imports torch, and begins by itself
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(package, "__init__.py"), submodule_search_locations=[package]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        # Built for another torch or another Python than this process has.
        del sys.modules[name]
        folder = os.environ.get("SAFE_INPLACE_GUARD_RECORDS", "")
        if os.path.isdir(folder):
            with open(os.path.join(folder, str(os.getpid()) + ".unguarded"), "w") as file:
                file.write(str(error))


def _shadowed():
    # The sitecustomize that would have run without this one.
    ours = sys.modules.pop("sitecustomize", None)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    try:
        if PathFinder.find_spec("sitecustomize") is not None:
            __import__("sitecustomize")
    finally:
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


def _watched(others):
    # Functions of a program that `advise` watches call these wherever they are sent: they compute, and leave a note.
    try:
        import builtins
    except ImportError:  # Python 2
        return

    def probe(number, form, *operands):
        with open(others, "a") as file:
            file.write(str(number) + "\n")
        return eval("lambda a, b, c=None: " + form)(*operands)

    builtins._safe_inplace_probe = probe
    builtins._safe_inplace_callee = builtins._safe_inplace_operand = lambda number, shown: shown


if os.environ.get("SAFE_INPLACE_ADVISE"):
    _watched(os.environ["SAFE_INPLACE_ADVISE"])
if os.environ.get("SAFE_INPLACE_GUARD"):
    sys.meta_path.insert(0, _Watcher())
_shadowed()

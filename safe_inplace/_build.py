"""What the extension was built for, and whether it may be loaded here."""

import importlib
import sys
import sysconfig
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

PACKAGE = Path(__file__).parent
REMEDY = "pip install --no-build-isolation --no-deps --force-reinstall . (in a source tree: python setup.py build_ext --inplace)"


@dataclass(frozen=True)
class Build:
    torch: str
    python: str
    cuda: str | None
    cuda_archs: str | None


def read_build() -> Build:
    try:
        note = importlib.import_module(f"{__package__}._build_info")
    except ModuleNotFoundError:
        raise ImportError(f"safe_inplace at {PACKAGE} has not been built. Build it with: {REMEDY}") from None
    return Build(note.torch, note.python, note.cuda, note.cuda_archs)


def require_matching_build() -> None:
    """Raises before the extension is loaded: under another torch the loader would complain of a missing C++ symbol, or
    worse, find it and call it with another layout of the same class."""
    build = read_build()
    if build.torch != torch.__version__:
        raise ImportError(
            f"safe_inplace was built for torch {build.torch}, but this is torch {torch.__version__}. "
            f"Install torch {build.torch}, or build safe_inplace for this one: {REMEDY}"
        )
    # A file that fits this interpreter may be left from another build, for another torch: the note speaks of the last one.
    built = any((PACKAGE / f"_C{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
    if build.python != sysconfig.get_python_version() or not built:
        raise ImportError(
            f"safe_inplace at {PACKAGE} was built for Python {build.python}, but this is Python "
            f"{sys.version_info.major}.{sys.version_info.minor}. Build it for this one: {REMEDY}"
        )

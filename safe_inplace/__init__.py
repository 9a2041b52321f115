"""In-place PyTorch ops that cannot corrupt a gradient, and a guard that names the write that would."""

__version__ = "0.1.0"

from ._build import require_matching_build

require_matching_build()

from . import nn  # noqa: E402
from ._counts import counts, reset_counts  # noqa: E402
from ._guard import Hazard, HazardError, HazardWarning, Site, guard  # noqa: E402
from ._patch import PatchError, Report, explain, patch, patched, restore  # noqa: E402
from ._process import start_from_environment  # noqa: E402
from .ops import add, add_, add_mul, add_mul_, addcmul, addcmul_, mul, mul_, mul_add, mul_add_  # noqa: E402

__all__ = [
    "Hazard",
    "HazardError",
    "HazardWarning",
    "PatchError",
    "Report",
    "Site",
    "add",
    "add_",
    "add_mul",
    "add_mul_",
    "addcmul",
    "addcmul_",
    "counts",
    "explain",
    "guard",
    "mul",
    "mul_",
    "mul_add",
    "mul_add_",
    "nn",
    "patch",
    "patched",
    "reset_counts",
    "restore",
]

start_from_environment()
del start_from_environment

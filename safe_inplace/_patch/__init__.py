"""The ops in models of others. Nothing of a model's library is imported here: a block is known by its source."""

from . import families
from .api import explain, patch, patched
from .report import PatchError, Report, restore

__all__ = ["PatchError", "Report", "explain", "families", "patch", "patched", "restore"]

"""The blocks that models write out by hand, in the ops out of place: modules, and their functional forms in ``nn.functional``."""

from . import functional
from .modules import GRN, GatedResidual, Modulate, ScaledResidual

__all__ = ["GRN", "GatedResidual", "Modulate", "ScaledResidual", "functional"]

"""guard: names every write to memory that autograd saved, at the line of the write, or makes it harmless.

The watching is done in C++ (csrc/guard). This package is called only when there is something to decide: it knows what a hazard
means, what to tell the user, and what to copy.
"""

from .api import guard
from .hazards import Hazard, HazardError, HazardWarning
from .sites import Site

__all__ = ["Hazard", "HazardError", "HazardWarning", "Site", "guard"]

"""How many programs of each fuzz the suite runs."""

import os

import pytest

SEED = os.environ.get("SAFE_INPLACE_PROGRAMS_SEED", "0")


def slices(fuzz, programs, parts):
    """Gives a test `indices`, a part at a time. SAFE_INPLACE_PROGRAMS_FORWARD, say, is another number of programs."""
    programs = int(os.environ.get(f"SAFE_INPLACE_PROGRAMS_{fuzz.name.upper()}", programs))
    parts = [range(part * programs // parts, (part + 1) * programs // parts) for part in range(parts)]
    return pytest.mark.parametrize("indices", parts, ids=lambda indices: f"{indices.start}-{indices.stop}")

"""The differential test: random programs by torch, under guard, and out of place.

SAFE_INPLACE_GUARD_PROGRAMS sets how many programs that torch refuses must be met (20000 for a full run).
"""

import os

import torch

from safe_inplace import HazardError, guard

from .programs import generate, in_place, out_of_place

WANTED = int(os.environ.get("SAFE_INPLACE_GUARD_PROGRAMS", "400"))
REFUSED = "modified by an inplace operation"


def outcome(steps, seed):
    try:
        return in_place(steps, seed)
    except RuntimeError as error:
        return error


def agree(a, b):
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12, equal_nan=True) for x, y in zip(a, b, strict=True))


def check(seed):
    """Whether torch refuses the program of this seed, where guard finds it and its copies repair it."""
    steps = generate(seed)
    plain = outcome(steps, seed)
    with guard() as strict:
        raised = outcome(steps, seed)
    with guard("copy") as watched:
        repaired = outcome(steps, seed)
    told = f"seed {seed}: {steps}\nplain {plain}\nraise {raised}\ncopy {repaired}"
    if isinstance(plain, RuntimeError) and REFUSED not in str(plain):
        # Refused at the write for a reason of its own.
        assert isinstance(repaired, RuntimeError), told
        return False
    expected = out_of_place(steps, seed)
    assert not isinstance(repaired, RuntimeError), told
    assert agree(repaired, expected), told
    if isinstance(plain, RuntimeError):
        assert isinstance(raised, HazardError), told
        assert raised.mutation is not None and raised.save is not None, told
        assert watched.hazards_seen > 0, told
        return True
    assert agree(plain, expected), told
    assert not isinstance(raised, RuntimeError) and strict.hazards == [] and agree(raised, expected), told
    return False


def test_copies_give_the_gradients_of_the_program_out_of_place():
    refused = seed = 0
    while refused < WANTED:
        refused += check(seed)
        seed += 1

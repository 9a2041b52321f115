"""The differential tests: random programs by torch, under guard, and out of place.

SAFE_INPLACE_GUARD_PROGRAMS sets how many programs that torch refuses must be met by each (20000 for a full run):

    SAFE_INPLACE_GUARD_PROGRAMS=20000 python -m tests.guard.test_programs
"""

import os
import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

from safe_inplace import HazardError, HazardWarning, guard
from tests import fuzz

from .programs import REFUSED, agree, generate, in_place, out_of_place

WANTED = int(os.environ.get("SAFE_INPLACE_GUARD_PROGRAMS", "400"))


def outcome(steps, seed, *around):
    try:
        return in_place(steps, seed, *around)
    except RuntimeError as error:
        return error


def check(seed):
    """Whether torch refuses the program of this seed, where guard finds it and its copies repair it."""
    steps = generate(seed)
    plain = outcome(steps, seed)
    with guard() as strict:
        raised = outcome(steps, seed)
    with guard("defer"):
        deferred = outcome(steps, seed)
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
        assert isinstance(deferred, HazardError) and deferred.mutation is not None and deferred.save is not None, told
        assert watched.hazards_seen > 0, told
        return True
    assert agree(plain, expected), told
    assert not isinstance(raised, RuntimeError) and strict.hazards == [] and agree(raised, expected), told
    assert not isinstance(deferred, RuntimeError) and agree(deferred, expected), told
    return False


@pytest.mark.filterwarnings("ignore::safe_inplace.HazardWarning")
def test_backward_outside_of_a_guard_that_saw_some_steps_refuses_what_torch_refuses():
    refused = 0
    for seed in range(WANTED):
        steps = generate(seed)
        plain = outcome(steps, seed)
        choose = random.Random(seed)
        watched = [choose.random() < 0.6 for _ in steps]
        for mode in ("warn", "copy"):
            some = outcome(steps, seed, lambda index: guard(mode) if watched[index] else nullcontext())
            told = f"seed {seed}, {mode}, {watched}: {steps}\nplain {plain}\nin part {some}"
            if not isinstance(plain, RuntimeError):
                assert not isinstance(some, RuntimeError) and agree(some, plain), told
            elif REFUSED not in str(plain) or mode == "warn":
                assert isinstance(some, RuntimeError), told
                assert (REFUSED in str(some)) == (REFUSED in str(plain)), told
            elif not isinstance(some, RuntimeError):
                # The steps it saw were those that mattered.
                assert agree(some, out_of_place(steps, seed)), told
            refused += isinstance(plain, RuntimeError)
    assert refused > WANTED


def refuses_an_overwritten_value(refused):
    return refused is not None and REFUSED in str(refused.error)


def under(mode, program):
    run = fuzz.Torch(program)
    with guard(mode) as watched:
        return run, fuzz.attempt(run), watched


def check_fuzz(name):
    """How a program of tests.fuzz ended: it has detached aliases, views, hooks, writes under no_grad, several backwards,
    kept graphs and second derivatives besides."""
    # A graph that backward freed ends a program for a reason that is none of guard's.
    program = fuzz.keeping_graphs(fuzz.generate(name))
    plain = fuzz.Torch(program)
    refused = fuzz.attempt(plain)
    _, warned, _ = under("warn", program)
    _, raised, _ = under("raise", program)
    _, deferred, _ = under("defer", program)
    repaired, left, watched = under("copy", program)
    told = f"{program}\nplain {refused and refused.error}\ncopy {left and left.error}"
    if refused is None:
        # A value that is overwritten and never asked for is a hazard all the same: "raise" may stop where torch does not.
        assert warned is None and left is None and deferred is None, told
        assert raised is None or isinstance(raised.error, HazardError), told
        fuzz.compare(repaired, plain, "copy against torch")
        return "finishes"
    assert warned is not None and warned.step == refused.step and raised is not None, told
    overwritten = refuses_an_overwritten_value(refused)
    if not overwritten and left is not None and left.step == refused.step:
        return "refused for another reason"
    # In backward torch also refuses what an unbind gave and a write to its base replaced: overwritten in other words.
    assert refuses_an_overwritten_value(warned), told
    assert isinstance(raised.error, HazardError) and raised.step <= refused.step, told
    assert isinstance(deferred.error, HazardError) and deferred.step == refused.step, told
    assert watched.hazards_seen > 0, told
    assert left is None or (left.step >= refused.step and not refuses_an_overwritten_value(left)), told
    stop = None if left is None else left.step
    try:
        expected = fuzz.Functional(program).run(stop)
    except fuzz.Unsupported:
        return "refused, and the reference has no meaning for a step"
    if stop is not None:
        with guard("copy"):
            repaired = fuzz.Torch(program).run(stop)
    fuzz.compare(repaired, expected, "copy against the program out of place", hooks=False)
    return "refused, repaired"


def run_fuzz(wanted):
    ends = Counter()
    while ends["refused, repaired"] < wanted:
        name = f"guard:{ends.total()}"
        try:
            ends[check_fuzz(name)] += 1
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return ends


def run_programs(wanted):
    refused = seed = 0
    while refused < wanted:
        refused += check(seed)
        seed += 1
    return refused, seed


def test_copies_give_the_gradients_of_the_program_out_of_place():
    run_programs(WANTED)


@pytest.mark.filterwarnings("ignore::safe_inplace.HazardWarning")
def test_programs_of_the_fuzz():
    run_fuzz(WANTED // 4)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", HazardWarning)
    torch.set_num_threads(1)
    print("{} of {} programs refused by torch, each repaired".format(*run_programs(WANTED)))
    print(f"of tests.fuzz: {dict(run_fuzz(WANTED))}")

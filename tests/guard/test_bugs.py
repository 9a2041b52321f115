"""Every bug of the collection: what torch does, where guard says it is, and that guard's copies repair it."""

import pytest
import torch

import safe_inplace

from .bugs import BUGS

bugs = pytest.mark.parametrize("bug", BUGS.values(), ids=list(BUGS))


def test_there_are_thirty_or_more_and_each_names_a_thread_of_its_own():
    assert len(BUGS) >= 30
    assert len({bug.thread for bug in BUGS.values()}) == len(BUGS)


@bugs
def test_plain_torch(bug):
    wrong, _ = bug.programs()
    if bug.plain == "raises":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            wrong()
        return
    got = wrong()
    _, right = bug.programs()
    assert not all(torch.allclose(a, b) for a, b in zip(got, right(), strict=True))


@bugs
def test_both_lines(bug):
    wrong, _ = bug.programs()
    with pytest.raises(safe_inplace.HazardError) as caught, safe_inplace.guard():
        wrong()
    error = caught.value
    assert (error.mutation.filename, error.mutation.lineno) == (bug.factory.__code__.co_filename, bug.line("WRITE"))
    assert (error.save.filename, error.save.lineno) == (bug.factory.__code__.co_filename, bug.line("SAVE"))
    assert error.mutation.source in str(error) and error.save.source in str(error)
    assert error.remedies


@bugs
def test_warn_names_them_too(bug):
    wrong, _ = bug.programs()
    with pytest.warns(safe_inplace.HazardWarning) as caught, safe_inplace.guard("warn"):
        if bug.plain == "raises":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                wrong()
        else:
            wrong()
    lines = [(w.message.mutation.lineno, w.message.save.lineno) for w in caught]
    assert (bug.line("WRITE"), bug.line("SAVE")) in lines
    assert len(lines) == len(set(lines))


@bugs
def test_copy_gives_the_gradients_of_the_program_out_of_place(bug):
    wrong, _ = bug.programs()
    with safe_inplace.guard("copy") as watched:
        got = wrong()
    _, right = bug.programs()
    for a, b in zip(got, right(), strict=True):
        torch.testing.assert_close(a, b)
    assert watched.hazards_seen >= 1


@bugs
def test_the_program_out_of_place_is_silent(bug, recwarn):
    _, right = bug.programs()
    with safe_inplace.guard("raise", verify=True) as watched:
        right()
    assert watched.hazards == [] and len(recwarn) == 0

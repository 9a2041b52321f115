"""What two runs of a program have in common, and what is said of it."""

import json
import math

import pytest
import torch

from safe_inplace._advise.check import Check, Run, difference
from safe_inplace._advise.facts import check_as_dict
from safe_inplace._advise.report import check_in_words

EPS = torch.finfo(torch.float32).eps


def steps(gradient=None, **more):
    torch.manual_seed(0)
    own = {"loss 0": torch.rand(()), "weight": torch.rand(64, 64), "bias": torch.zeros(64), **more}
    if gradient is not None:
        own["weight"] = gradient(own["weight"])
    return [list(own.items())]


def made(passes, times=(1.0, 2.0, 3.0), peak=100 << 20, error=None):
    result = {"ends": {"passes": list(times), "calls": []}, "peak": peak, "error": error}
    return Run(result, {"passes": passes, "calls": []})


@pytest.mark.parametrize(
    "gradient, right",
    [
        (lambda g: g, True),
        (lambda g: g * (1 + 3 * EPS), True),
        (lambda g: g + 1e-6, True),
        (lambda g: g * 1.001, False),
        (lambda g: torch.cat([g[:1] * 2, g[1:]]), False),
        (lambda g: g.fill_(math.nan), False),
        (lambda g: g.double(), False),
        (lambda g: g[1:], False),
    ],
)
def test_rounding_is_told_from_another_value(gradient, right):
    assert difference(steps(), steps(gradient), EPS).is_rounding is right


def test_what_is_nothing_but_rounding():
    """A gradient that ought to be zero, beside others."""
    assert difference(steps(bias=torch.full((64,), 1e-7)), steps(bias=torch.full((64,), -1e-7)), EPS).is_rounding
    assert not difference(steps(bias=torch.full((64,), 1e-2)), steps(bias=torch.full((64,), -1e-2)), EPS).is_rounding


@pytest.mark.parametrize("beside", [[1.0, -math.inf], [math.nan, 2.0], [-1e9] * 64, [torch.finfo(torch.float32).min]])
def test_what_else_is_there_hides_nothing(beside):
    one, other = steps(**{"output 0": torch.tensor(beside)}), steps(lambda g: g + 100, **{"output 0": torch.tensor(beside)})
    assert not difference(one, other, EPS).is_rounding
    changed = dict(one[0]) | {"output 0": -torch.tensor(beside)}
    assert not difference(one, [list(changed.items())], EPS).is_rounding or math.isnan(beside[0])


def test_what_is_not_finite_beside_rounding():
    one = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert difference(steps(weight=one), steps(weight=one * (1 + 3 * EPS)), EPS).is_rounding
    assert not difference(steps(weight=one), steps(weight=-one), EPS).is_rounding


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_verdict(dtype):
    one = torch.tensor([1, 0, 1], dtype=dtype)
    found = difference(steps(**{"output 0": one}), steps(**{"output 0": torch.zeros_like(one)}), EPS)
    assert found.of_norm == 1 and found.is_rounding and found.where == "output 0 of step 1 (whole numbers: no verdict)"


def test_the_coarsest_dtype_counts():
    one, other = steps(), steps(lambda g: g * 1.01)
    assert not difference(one, other, EPS).is_rounding
    assert difference(one, other, torch.finfo(torch.bfloat16).eps).is_rounding


def test_values_that_are_not_there():
    assert not difference(steps(), [], EPS).is_rounding
    assert not difference(steps(), steps(more=torch.ones(1)), EPS).is_rounding


def test_equal_is_equal():
    nan = steps(bias=torch.full((64,), math.nan))
    assert difference(nan, nan, EPS).of_norm == 0
    assert difference(steps(bias=torch.zeros(64)), steps(bias=-torch.zeros(64)), EPS).of_norm == 0


def test_what_is_said():
    plain = [made(steps()), made(steps(), (1.0, 2.2, 3.2))]
    changed = [made(steps(), (1.0, 1.5, 2.0), peak=90 << 20), made(steps(), (1.0, 1.6, 2.2))]
    check = Check(plain, changed, made(steps()), EPS)
    said = check_in_words(check)
    assert check.is_right
    assert "under guard: no hazard" in said and "values: the first 1 step equal bit for bit" in said
    assert "time of a step: 0.52 of the plain one (by pairs of runs: 0.50, 0.55)" in said
    assert "memory at the most: 90.0 MiB, plain 100.0 MiB" in said and "no gain" not in said


def test_no_gain_is_said():
    runs = [made(steps()), made(steps())]
    said = check_in_words(Check(runs, runs, made(steps()), EPS))
    assert "no gain in time is shown" in said and "no gain in memory is shown" in said


def test_a_program_that_does_not_repeat_itself():
    check = Check([made(steps()), made(steps(lambda g: g * 2))], [made(steps(lambda g: g * 3))] * 2, made(steps()), EPS)
    assert "does not repeat itself (weight of step 1 differs by 1.0e+00 of its norm); seed it" in check_in_words(check)
    assert check.is_right


def test_another_value_is_refuted_whichever_run_has_it():
    plain, wrong = [made(steps())] * 2, made(steps(lambda g: g * 2))
    for check in (Check(plain, plain, wrong, EPS), Check(plain, [plain[0], wrong], plain[0], EPS)):
        assert not check.is_right
        assert "values: MORE THAN ROUNDING; in the first 1 step weight of step 1 differs most" in check_in_words(check)


def test_a_hazard_is_refuted_but_for_the_programs_own():
    plain, stopped = [made(steps())] * 2, made([], error="HazardError: a write")
    assert not Check(plain, plain, stopped, EPS).is_right
    own = Check(plain, plain, stopped, EPS, "HazardError: a write")
    assert own.is_right
    assert "under guard: HazardError: a write; of the program as it is: HazardError: a write" in check_in_words(own)


def test_a_changed_program_that_raises():
    plain, raised = [made(steps())] * 2, made([], error="RuntimeError: a leaf")
    check = Check(plain, [plain[0], raised], plain[0], EPS)
    assert not check.is_right and "the changed program raises: RuntimeError: a leaf" in check_in_words(check)


def test_what_machines_are_told():
    plain = [made(steps()), made(steps())]
    for changed, verdict, of_norm in (
        (steps(), "equal", 0.0),
        (steps(lambda g: g * 2), "more than rounding", 1.0),
        ([], "more than rounding", None),
    ):
        told = check_as_dict(Check(plain, [made(changed)] * 2, made(steps()), EPS))
        assert told["values"] == verdict and told["apart"]["of_norm"] == of_norm
        assert told["right"] is (verdict == "equal") and told["plain_apart"] == {"where": "nothing", "of_norm": 0.0}
        json.dumps(told, allow_nan=False)


def test_nothing_to_compare():
    runs = [made([], times=())] * 2
    said = check_in_words(Check(runs, runs, made([], times=()), EPS))
    assert "values: none to compare" in said and "time of a step" not in said
    empty = [made([[], []])] * 2
    assert Check(empty, empty, empty[0], EPS).verdict == "none to compare"

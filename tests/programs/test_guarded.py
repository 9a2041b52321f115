"""The programs under guard in slices, and the proof that their judges see what they are there to see."""

import pytest
import torch

from safe_inplace import HazardError, guard

from . import guarded, overwrites
from .engine import Disagreement
from .slices import SEED, slices
from .training import check as training
from .training.steps import Backward, Buffer, Forward, Penalty, Program, Run, Write


@slices(overwrites.FUZZ, 540, 4)
def test_overwrites(indices):
    ends = overwrites.FUZZ.search(SEED, indices)
    assert ends["refused, repaired"] > len(indices) // 2
    assert ends["finishes"] > len(indices) // 20


@slices(guarded.FUZZ, 540, 4)
def test_programs_of_the_differential_test(indices):
    ends = guarded.FUZZ.search(SEED, indices)
    assert ends["refused, repaired"] > len(indices) // 10
    assert ends["finishes"] > len(indices) // 3


@slices(training.FUZZ, 80, 4)
def test_training(indices):
    ends = training.FUZZ.search("suite", indices)
    assert min(ends["clean"], ends["at the write"], ends["in backward"]) > len(indices) // 30


def test_statistics_that_nobody_reads_are_saved_again_as_they_are():
    """... by the backward of a batch norm that is differentiated, and torch refuses it once they are written."""
    layers = (("batch norm", "batch norm", "linear without bias"), ("tanh",), ("tanh",))
    steps = [Forward("trunk", 0, 0, True), Penalty("", 0, 0, True), Write("data", 1, 1, True), Buffer("grad", 0, 0, False)]
    program = Program("", [*steps, Backward("", 0, 0, False)], layers, ("momentum",))
    assert training.Judge(program).run().asked == {4: (4,)}
    assert training.check(program) == "in backward"


class Blind(guard):
    """Sees no write."""

    def _on_write(self, saved, op, place, update):
        return None


class Strict(guard):
    """Stops every write."""

    def _on_write(self, saved, op, place, update):
        if self.on_hazard == "raise":
            raise HazardError(self._findings.found(self._findings.note("overwritten", saved[0], op, place), saved[0]))
        return super()._on_write(saved, op, place, update)


class Careless(guard):
    """Forgets the writes that no version tells."""

    def __init__(self, on_hazard, verify=False):
        super().__init__(on_hazard)

    def _on_write(self, saved, op, place, update):
        forgets = "_fused" in op and self.on_hazard != "copy"
        return None if forgets else super()._on_write(saved, op, place, update)


class Late(guard):
    """Copies after the write."""

    def _on_write(self, saved, op, place, update):
        if self.on_hazard != "copy":
            return super()._on_write(saved, op, place, update)
        for entry in saved:
            entry.replace(entry.value + 0.125)
        return None


class Jumpy(guard):
    """Stops where a version has risen beside a saved value, though copy would let it pass."""

    def _on_version(self, saved, op, place):
        self._on_stale(saved)


class Stops(guard):
    """Stops where it is left, in the mode that only the check in part runs."""

    def __exit__(self, *error):
        super().__exit__(*error)
        if self.on_hazard == "warn":
            raise RuntimeError("stopped")


@pytest.mark.parametrize(
    ("module", "broken", "words", "index"),
    [
        (training, Blind, "copy does not give", 0),
        (training, Strict, "stops an update", 6),
        (training, Careless, "missed", 154),
        (training, Late, "copy does not give", 0),
        (training, Jumpy, "copy stops", 19),
        (overwrites, Blind, "copy does not give", 0),
        (overwrites, Late, "copy does not give", 0),
        (overwrites, Stops, "in part, warn", 0),
        (guarded, Blind, "copy against the program out of place", 0),
        (guarded, Late, "copy saw no hazard", 0),
    ],
)
def test_a_broken_guard_is_seen(module, broken, words, index):
    # Not by `search`, which would go on to shrink what was found.
    with pytest.raises(Disagreement, match=words):
        for number in range(index, index + 60):
            module.FUZZ.check(module.FUZZ.generate(f"suite:{number}"), broken)


def test_a_guard_that_writes_is_seen():
    class Writes(guard):
        def __exit__(self, *error):
            super().__exit__(*error)
            for p in module.parameters():
                p.data.add_(1.0)

    made = Run.__init__

    def remember(run, program):
        nonlocal module
        made(run, program)
        module = run.trunk

    module = torch.nn.Module()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Disagreement, match="changed what the program computes"):
        patch.setattr(Run, "__init__", remember)
        training.FUZZ.search("suite", range(20), Writes)

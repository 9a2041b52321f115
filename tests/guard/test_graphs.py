"""The fuzz of training programs in slices, and the proof that its judge sees what it is there to see."""

import os

import pytest
import torch

from safe_inplace import HazardError, guard

from . import graphs

PROGRAMS = int(os.environ.get("SAFE_INPLACE_GRAPHS_PROGRAMS", 120))
SLICES = 4


@pytest.mark.parametrize("part", range(SLICES))
def test_programs(part):
    indices = range(part * PROGRAMS // SLICES, (part + 1) * PROGRAMS // SLICES)
    ends = graphs.fuzz("suite", indices)
    assert ends.total() == len(indices)
    assert min(ends["clean"], ends["at the write"], ends["in backward"]) > len(indices) // 30


def test_generator_is_reproducible():
    names = [f"suite:{index}" for index in range(50)]
    assert [str(graphs.generate(name)) for name in names] == [str(graphs.generate(name)) for name in names]
    assert len({graphs.generate(name).steps for name in names}) == 50


class Blind(guard):
    """Sees no write."""

    def _on_write(self, saved, op, place, update):
        return None


class Strict(guard):
    """Stops every write."""

    def _on_write(self, saved, op, place, update):
        if self.on_hazard == "raise":
            raise HazardError(self._found(self._note("overwritten", saved[0], op, place), saved[0]))
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

    def _on_version(self, saved, op, place, update):
        return [self._on_stale(entry) for entry in saved]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (Blind, "copy does not give"),
        (Strict, "stops an update"),
        (Careless, "missed"),
        (Late, "copy does not give"),
        (Jumpy, "copy stops"),
    ],
)
def test_a_broken_guard_is_seen(broken, words):
    with pytest.raises(graphs.Wrong, match=words):
        graphs.fuzz("suite", (*range(60), 154), broken)


def test_a_guard_that_writes_is_seen():
    class Writes(guard):
        def __exit__(self, *error):
            super().__exit__(*error)
            for p in module.parameters():
                p.data.add_(1.0)

    made = graphs.Run.__init__

    def remember(run, program):
        nonlocal module
        made(run, program)
        module = run.trunk

    module = torch.nn.Module()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(graphs.Wrong, match="changed what the program computes"):
        patch.setattr(graphs.Run, "__init__", remember)
        graphs.fuzz("suite", range(20), Writes)

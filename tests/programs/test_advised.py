"""The changed functions in slices, and the proof that their judge sees what it is there to see."""

import pytest

from safe_inplace import _C
from safe_inplace._advise import evidence
from safe_inplace._advise.flow import Flow
from safe_inplace._advise.readers import Readers

from .advised import FUZZ
from .engine import Disagreement
from .slices import SEED, slices


@slices(FUZZ, 400, 2)
def test_programs(indices):
    ends = FUZZ.search(SEED, indices)
    assert ends["a variable is written"] > len(indices) // 20


READERS = (Readers, "of", lambda readers, node, site: [])
BROKEN = {
    # Without the readers: what they may keep is refused for them.
    "whoever holds the tensor": [
        (evidence, "_places", lambda values, index: evidence._OF_A_TEMPORARY + isinstance(values, tuple)),
        READERS,
    ],
    "whoever holds the memory": [(_C, "may_take_over", lambda tensor: not (tensor.is_leaf and tensor.requires_grad)), READERS],
    "what is read again": [(Flow, "is_dead", lambda flow, name, index: True)],
    "who may keep it on another way": [READERS],
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_the_fuzz_finds(broken, monkeypatch):
    for each in broken:
        monkeypatch.setattr(*each)
    with pytest.raises(Disagreement, match=r"reproduce: python -m tests\.programs advised"):
        FUZZ.search("broken", range(400))

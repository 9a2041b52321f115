"""The expressions in slices, and the proof that their judge sees what it is there to see."""

import sys

import pytest
import torch

import safe_inplace

from .engine import Disagreement
from .expressions import ARITY, FUZZ
from .slices import SEED, slices


@slices(FUZZ, 300, 3)
def test_programs(indices):
    ends = FUZZ.search(SEED, indices)
    assert ends["finishes, with memory seen to be taken over"] > len(indices) // 3
    assert sum(count for end, count in ends.items() if end.startswith("is refused")) < len(indices) // 2


def taking(takes):
    """The ops, but the input's memory gets the result where `takes` says so of the input and of how many refer to it."""

    def op(name):
        function = getattr(safe_inplace, name)

        def taking(input, *operands, **named):
            references = sys.getrefcount(input)
            result = function(input, *operands, **named)
            fits = type(input) is torch.Tensor and (input.dtype, input.shape) == (result.dtype, result.shape)
            if fits and takes(input, references):
                with torch.no_grad():
                    input.data.copy_(result)
            return result

        taking.__name__ = name
        return taking

    return {name: op(name) for name in ARITY}


def of_a_temporary():
    """The caller's stack has one more where frames are evaluated by another than the interpreter, as once Dynamo has run."""
    return (lambda input: sys.getrefcount(input))(torch.ones(()))


def only_python_counts(input, references):
    return references == of_a_temporary()


def what_a_name_holds(input, references):
    return references == of_a_temporary() + 1 and not input.requires_grad


def what_anybody_holds(input, references):
    return references > of_a_temporary()


@pytest.mark.parametrize("takes", [only_python_counts, what_a_name_holds, what_anybody_holds])
def test_the_fuzz_finds(takes):
    with pytest.raises(Disagreement, match=r"reproduce: python -m tests\.programs expressions"):
        FUZZ.search("broken", range(300), taking(takes))


def test_the_fuzz_finds_no_fault_in_functions_that_take_nothing():
    assert FUZZ.search("broken", range(100), taking(lambda *_: False)).total() == 100

"""The examples in the public docstrings run and print what they say."""

import doctest
import inspect

import pytest

import safe_inplace
from safe_inplace import ops

from .op_table import OPS


def test_examples_run():
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for name in safe_inplace.__all__:
        for example in finder.find(getattr(safe_inplace, name), name, globs={}):
            runner.run(example)
    assert runner.tries and not runner.failures


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_docstrings_say_what_they_must(op):
    text = inspect.getdoc(op.function)
    for part in ("Args:", "Returns:", "Saved for backward:", "Raises:", "Example:"):
        assert part in text, f"{op.name} has no {part!r}"
    for argument in (*op.arguments, *([op.parameter] if op.parameter else [])):
        assert f"{argument}:" in text
    assert op.function in {getattr(ops, n) for n in ops.__all__}

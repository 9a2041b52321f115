"""The examples in the public docstrings run and print what they say."""

import doctest
import inspect
import re

import pytest

import safe_inplace
from safe_inplace import ops

from .op_table import OPS


def test_examples_run():
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    public = {name: getattr(safe_inplace, name) for name in safe_inplace.__all__}
    public |= {f"nn.{name}": getattr(safe_inplace.nn, name) for name in safe_inplace.nn.__all__}
    functional = safe_inplace.nn.functional
    public |= {f"nn.functional.{name}": getattr(functional, name) for name in functional.__all__}
    for name, thing in public.items():
        for example in finder.find(thing, name, globs={}):
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


@pytest.mark.parametrize("name", [*safe_inplace.nn.__all__, *safe_inplace.nn.functional.__all__])
def test_forms_say_what_they_must(name):
    forms = safe_inplace.nn if hasattr(safe_inplace.nn, name) else safe_inplace.nn.functional
    if name != "functional":
        text = inspect.getdoc(getattr(forms, name))
        assert "Saved for backward:" in text and "Example:" in text and "promoted dtype" in text
        assert re.search(r"``.* [+*] .*``", text), "no formula"

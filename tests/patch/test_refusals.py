"""What is not known for sure is left alone, and the report says where and why."""

import functools
import inspect
import itertools
import linecache
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from safe_inplace import PatchError, explain, patch, patched
from safe_inplace._patch.rules import RULES
from safe_inplace._patch.structure import structure_of

from . import blocks
from .blocks import Block, LayerScale

NUMBERS = itertools.count()
SOURCE = inspect.getsource(sys.modules[Block.__module__])


def library(source, monkeypatch, readable=True):
    """Another version of the library: a module of that name, with this source."""
    source = source[: source.index("@rule(")]
    name = f"tests/patch/another_{next(NUMBERS)}.py"
    if readable:
        monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(True), name))
    module = types.ModuleType("tests.patch.another")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def changed(old, new):
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


FORWARD = """\
    def forward(self, x):
        branch = activation(self.mlp(x))
        return x + self.drop_path(self.scale(branch))
"""

# From Python 3.14 on annotations are evaluated when somebody asks for them, without being told to.
LATER = "" if sys.version_info >= (3, 14) else "from __future__ import annotations\n"

# Of each other version: its source, whether it is a copy that is known, or what the report says.
VERSIONS = {
    "as it is": (SOURCE, True),
    "a local renamed": (changed(FORWARD, FORWARD.replace("branch", "hidden")), True),
    "annotated and documented": (
        changed(FORWARD, FORWARD.replace("(self, x):", '(self, x: torch.Tensor) -> torch.Tensor:\n        """Adds."""')),
        True,
    ),
    "annotated with what only type checkers know": (
        LATER + changed(FORWARD, FORWARD.replace("x):", "x: Missing) -> Missing:")),
        True,
    ),
    "a layer scale with another name for its argument": (SOURCE.replace("hidden_state", "y"), True),
    "the class renamed": (SOURCE.replace("Block", "Copy"), True),
    "an argument renamed": (
        changed(FORWARD, FORWARD.replace("x", "features")),
        "it has an argument 'features' where the rule has 'x'",
    ),
    "an argument added": (
        changed(FORWARD, FORWARD.replace("(self, x)", "(self, x, mask)")),
        "its forward is not one that is known",
    ),
    "another sum": (changed("return x + self", "return 2 * x + self"), "its forward is not one that is known"),
    "another product": (
        changed("* self.lambda1", "* (1 + self.lambda1)"),
        "scale is a LayerScale, which has a forward that is not known",
    ),
    "another draw": (changed("torch.floor(", "torch.ceil("), "drop_path is a DropPath, which has a forward that is not known"),
    "another helper": (changed("value.tanh()", "value.sin()"), "it calls a function activation that is not known"),
    "a helper from elsewhere": (
        changed("def activation(value)", "activation = torch.sin\n\n\ndef unused(value)"),
        "it calls a function activation that is not known",
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_of_a_block(version, monkeypatch):
    source, expected = VERSIONS[version]
    module = library(source, monkeypatch)
    block = getattr(module, "Copy" if "renamed" in version and hasattr(module, "Copy") else "Block")(drop=0.5)
    report = patch(block)
    x, name = torch.randn(4, 8), "features" if "argument renamed" in version else "x"
    if expected is True:
        assert report.refused == [] and len(report.replaced) == 1
        block(**{name: x})
        assert report.counts()["forward.replaced"] == 1
    else:
        assert report.replaced == [] and report.refused[0][1].startswith(expected)
        assert type(block) is module.Block
        with pytest.raises(PatchError, match="Block: "):
            patch(block, strict=True)


def test_source_that_cannot_be_read(monkeypatch):
    block = library(SOURCE, monkeypatch, readable=False).Block()
    ((path, reason),) = patch(nn.Sequential(block)).refused
    assert path == "0" and reason == "its source cannot be read"


def test_a_source_file_that_has_changed_since_the_import(monkeypatch):
    module = library(SOURCE, monkeypatch)
    name = module.Block.forward.__code__.co_filename
    lines = ["\n", "\n", *SOURCE.splitlines(True)]
    monkeypatch.setitem(linecache.cache, name, (1, None, lines, name))
    assert patch(module.Block()).replaced == []


class TestForwards:
    def test_replaced_on_the_instance(self):
        model = blocks.model()
        model[0].forward = functools.partial(Block.forward, model[0])
        report = patch(model)
        assert report.replaced == [("2", "block-of-the-tests")]
        assert report.refused == [("0", "the forward of this instance was replaced by tests.patch.blocks.Block.forward")]

    def test_replaced_on_the_class(self, monkeypatch):
        def liger_forward(self, x):
            return x

        monkeypatch.setattr(Block, "forward", liger_forward)
        ((_, reason),) = patch(Block()).refused
        assert reason.startswith("the forward of Block was replaced by tests.patch.test_refusals.") and "liger_forward" in reason

    def test_replaced_by_a_copy_of_itself_is_no_matter(self, monkeypatch):
        monkeypatch.setattr(Block, "forward", types.FunctionType(Block.forward.__code__, blocks.__dict__, "forward"))
        assert len(patch(Block(), strict=True).replaced) == 1

    def test_overridden_in_a_subclass(self):
        class Mine(Block):
            def forward(self, x):
                return super().forward(x) + 1

        assert patch(Mine()).refused == [("", "a subclass of Block with a forward of its own")]

    def test_a_subclass_without_its_own_is_known(self):
        class Mine(Block):
            pass

        block = Mine()
        assert len(patch(block, strict=True).replaced) == 1 and isinstance(block, Mine)

    def test_a_class_that_hears_of_its_subclasses(self):
        class Final(Block):
            def __init_subclass__(cls):
                raise TypeError("Final is final")

        ((_, reason),) = patch(Final()).refused
        assert reason.startswith("its class does something of its own with each subclass (")


def test_a_metaclass_of_its_own():
    """It may keep a list of the classes there are, which explain() must not make longer."""

    class Registers(type(nn.Module)):
        known = []  # noqa: RUF012

        def __new__(mcs, name, bases, namespace, **kwargs):
            made = super().__new__(mcs, name, bases, namespace, **kwargs)
            if any(one.__name__ == name for one in mcs.known):
                raise ValueError(f"{name} is registered already")
            mcs.known.append(made)
            return made

    class Registered(Block, metaclass=Registers):
        pass

    report = patch(nn.Sequential(Registered(), Block()))
    assert report.replaced == [("1", "block-of-the-tests")] and Registers.known == [Registered]
    assert report.refused == [("0", f"its class is made by a metaclass of its own ({Registers.__qualname__})")]


def test_a_forward_that_is_closed_over_something(monkeypatch):
    """What it calls is not what its module has under that name."""
    inside = "def make(activation):\n" + "".join(f"    {line}\n" for line in SOURCE[SOURCE.index("class Block") :].splitlines())
    source = SOURCE[: SOURCE.index("class Block")] + inside[: inside.index("    @rule(")] + "    return Block\n\n@rule("
    block = library(source, monkeypatch).make(torch.relu)()
    expected = block(torch.ones(2, 8))
    report = patch(block)
    assert report.replaced == [] and report.refused == [("", "it has a forward that is closed over activation")]
    assert torch.equal(block(torch.ones(2, 8)), expected)


class Scaled(Block):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))


class Doubled(nn.Module):
    def forward(self, value):
        return value * 2


def test_parametrized_before():
    block = parametrize.register_parametrization(Scaled(), "gain", Doubled())
    assert patch(block).refused == [("", "its parameters are parametrized")]
    parametrize.remove_parametrizations(block, "gain")
    assert type(block) is Scaled and len(patch(block).replaced) == 1


@pytest.mark.parametrize("first", ["the patch", "the parametrization"])
def test_parametrized_after(first):
    block = Scaled()
    report = patch(block, strict=True)
    parametrize.register_parametrization(block, "gain", Doubled())
    block(torch.randn(2, 8))
    assert report.counts()["forward.replaced"] == 1
    if first == "the patch":
        report.restore()
    parametrize.remove_parametrizations(block, "gain")
    report.restore()
    assert type(block) is Scaled and torch.equal(block.gain, torch.full((8,), 2.0))


def test_parametrized_submodules_are_read_as_they_are():
    model, x = blocks.model(), torch.randn(2, 8)
    parametrize.register_parametrization(model[0].scale, "lambda1", Doubled())
    expected = model(x)
    report = patch(model, strict=True)
    torch.testing.assert_close(model(x), expected)
    assert report.counts()["forward.replaced"] == 2


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.delta = base, nn.Parameter(torch.zeros(8))

    def forward(self, value):
        return self.base(value) + self.delta * value


class Quantised(torch.Tensor):
    """A tensor whose numbers stand for others."""


def with_integers(model):
    model[0].scale.lambda1 = nn.Parameter(torch.ones(8, dtype=torch.int8), requires_grad=False)


def with_subclass(model):
    model[0].scale.lambda1 = nn.Parameter(torch.ones(8).as_subclass(Quantised))


def with_adapter(model):
    model[0].scale = Lora(model[0].scale)


def with_hook(model):
    model[0].drop_path.register_forward_hook(lambda *_: None)


def with_nothing(model):
    model[0].scale = None


SUBMODULES = {
    "scale is a Lora, which has a forward that is not known": with_adapter,
    "a hook on drop_path": with_hook,
    "no submodule scale": with_nothing,
    "scale.lambda1 is quantised: numbers of torch.int8": with_integers,
    "scale.lambda1 is a Quantised, which may be quantised": with_subclass,
}


@pytest.mark.parametrize("expected", SUBMODULES)
def test_submodules(expected):
    model = blocks.model()
    SUBMODULES[expected](model)
    assert str(explain(model)).splitlines()[-1].strip().startswith("0, Block: " + expected)
    report = patch(model)
    ((path, reason),) = report.refused
    assert path == "0" and reason.startswith(expected)
    assert type(model[0]) is Block
    with pytest.raises(PatchError, match=expected):
        patch(model, strict=True)


def test_a_block_that_looks_like_one_that_is_known():
    class Stranger(nn.Module):
        def __init__(self):
            super().__init__()
            self.ls1 = LayerScale(8)

        def forward(self, x):
            return x - self.ls1(x)

    ((_, reason),) = patch(Stranger()).refused
    structure = structure_of(Stranger.forward)
    assert reason == f"it has ls1, but its forward is not one that is known (structure {structure})"


def test_models_without_anything_are_quiet():
    assert patch(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.TransformerEncoderLayer(4, 2))).refused == []
    assert patch(nn.Sequential(LayerScale(2))).refused == []


def test_patterns_that_fit_nothing_are_told_from_models_without_anything():
    model = blocks.model()
    assert str(explain(model, only=["*.scael"])) == "none of the 2 known blocks in this model fits only=['*.scael']"
    with pytest.raises(PatchError, match="none of the 2 known blocks"):
        patch(model, only="*.scael", strict=True)
    assert str(explain(nn.Linear(2, 2), only="*")) == "no known blocks in this model"


@pytest.mark.parametrize("call", [patch, explain, lambda model: patched(model).__enter__()])
def test_what_is_no_model_is_refused(call):
    with pytest.raises(TypeError, match="model is a NoneType; it must be"):
        call(None)
    with pytest.raises(TypeError, match="model is the class Linear"):
        call(nn.Linear)


def test_structures_belong_to_one_rule():
    structures = [structure for rule in RULES for structure in rule.structures]
    assert len(structures) == len(set(structures))

"""What changes a patched block while it runs, or behind the back of a rule: the values are those of the plain lines."""

import copy
import functools
import inspect

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from safe_inplace import explain, patch, patched, restore
from safe_inplace._patch.leaves import TIMM_LAYER_SCALE
from safe_inplace._patch.replace import patch_of

from ..checks import assert_bit_equal
from .blocks import Block, DropPath, LayerScale


@pytest.fixture
def x():
    return torch.randn(16, 8)


def outputs(block, x):
    torch.manual_seed(1)
    return block(x)


def assert_as_plain(block, x):
    """The block is patched; what it computes is what a copy with its own classes computes."""
    assert patch_of(type(block)) is not None
    plain = copy.deepcopy(block)
    restore(plain)
    assert patch_of(type(plain)) is None
    torch.testing.assert_close(outputs(block, x), outputs(plain, x))


class Third(nn.Module):
    def forward(self, hidden):
        return hidden / 3


class Half(DropPath):
    def forward(self, hidden_states):
        return hidden_states * 0.5


# What a hook on the branch's linear layer does to the block, once it is called.
MEANWHILE = {
    "a probability": lambda block: setattr(block.drop_path, "drop_prob", 0.5),
    "a mode": lambda block: block.drop_path.eval(),
    "a submodule": lambda block: setattr(block, "scale", Third()),
    "another submodule": lambda block: setattr(block, "drop_path", Half()),
    "a parameter": lambda block: setattr(block.scale, "lambda1", nn.Parameter(torch.full((8,), 3.0))),
    "a hook": lambda block: block.scale.register_forward_hook(lambda module, args, result: result * 2),
    "the class": lambda block: restore(block),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_what_changes_while_the_branch_runs(what, x):
    block = Block(drop=0.25).train()
    plain = copy.deepcopy(block)
    patch(block, strict=True)
    for each in (block, plain):
        each.mlp.register_forward_hook(lambda *_, each=each: MEANWHILE[what](each) and None)
    torch.testing.assert_close(outputs(block, x), outputs(plain, x))


class NoDrop(nn.Module):
    def forward(self, x):
        return x


class DropsAsIdentity(nn.Identity):
    """The library's lines, in a subclass of Identity."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    forward = DropPath.forward


class CallsInside(LayerScale):
    def _call_impl(self, *args, **kwargs):
        return super()._call_impl(*args, **kwargs) * 2


class Elsewhere(Block):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.other = Half()

    @property
    def drop_path(self):
        return self.other

    @drop_path.setter
    def drop_path(self, value):
        pass


def without_a_drop(block):
    block.drop_path = NoDrop()


def with_a_drop_that_is_an_identity(block):
    block.drop_path = DropsAsIdentity(0.5)


def hidden_by_an_attribute(block):
    object.__setattr__(block, "drop_path", Half())


def called_inside(block):
    block.scale.__class__ = CallsInside


def called_inside_on_the_instance(block):
    block.scale._call_impl = lambda *args: 2 * type(block.scale)._call_impl(block.scale, *args)


UNLIKE = (without_a_drop, with_a_drop_that_is_an_identity, hidden_by_an_attribute, called_inside, called_inside_on_the_instance)


@pytest.mark.parametrize("change", UNLIKE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_submodule_that_is_not_what_it_looks_like(change, when, x):
    block = Block(drop=0.25).train()
    if when == "before":
        change(block)
    expected_of = copy.deepcopy(block)
    patch(block)
    if when == "after":
        change(block)
        change(expected_of)
    torch.testing.assert_close(outputs(block, x), outputs(expected_of, x))


def test_a_property_in_the_place_of_a_submodule(x):
    block = Elsewhere(drop=0.25)
    block._modules["drop_path"] = DropPath(0.25)
    expected = block(x)
    patch(block)
    assert_bit_equal(block(x), expected)


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_a_tool_that_watches_the_calls_of_all_modules(name, x, monkeypatch):
    block = Block()
    report = patch(block, strict=True)
    seen, original = [], getattr(nn.Module, name)

    def watched(self, *args, **kwargs):
        seen.append(type(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, name, watched)
    block(x)
    assert LayerScale in seen and nn.Identity in seen
    assert "forward.plain: scale has a forward of its own" in report.counts()


def twice(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs) * 2

    return wrapper


class TestForwardOfTheClass:
    def test_that_comes_later_has_its_own_decorators(self, x):
        class Loud(Block):
            forward = twice(Block.forward)

        block = Loud()
        plain = copy.deepcopy(block)
        patch(block, strict=True)
        Loud.forward = twice(Loud.forward)
        assert_bit_equal(block(x), plain(x))

    def test_that_comes_without_the_old_decorators(self, x):
        class Frozen(Block):
            forward = torch.no_grad()(Block.forward)

        block = Frozen()
        patch(block, strict=True)
        assert not block(x).requires_grad
        Frozen.forward = inspect.unwrap(Frozen.forward)
        assert block(x).requires_grad


class TestClassesOnTop:
    def timed(self, block):
        base = type(block)

        class Timed(base):
            calls = 0

            def forward(self, *args):
                self.count()
                return super().forward(*args)

            @classmethod
            def count(cls):
                __class__.calls += 1

            @property
            def training_twice(self):
                return super().train() is super().eval()

        block.__class__ = Timed

    def test_they_lose_the_patch_below_and_nothing_else(self, x):
        block = Block()
        expected = block(x)
        report = patch(block, strict=True)
        self.timed(block)
        torch.testing.assert_close(block(x), expected)
        assert report.counts()["forward.replaced"] == 1
        report.restore()
        assert patch_of(type(block)) is None
        assert_bit_equal(block(x), expected)
        assert type(block).calls == 2 and block.training_twice
        assert report.counts()["forward.replaced"] == 1

    def test_a_decorator_on_top_stays_as_often_as_it_was(self, x):
        block = Block()
        expected = 2 * block(x)
        report = patch(block, strict=True)
        block.__class__ = type("Loud", (type(block),), {"forward": twice(type(block).forward)})
        torch.testing.assert_close(block(x), expected)
        report.restore()
        assert_bit_equal(block(x), expected)


def test_a_base_that_keeps_a_list_of_subclasses_hears_of_none(x):
    class Base(nn.Module):
        known = []  # noqa: RUF012

        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)
            Base.known.append(cls)
            cls.forward = twice(cls.forward)

    class Mine(Block, Base):
        pass

    block = Mine()
    expected = block(x)
    assert explain(block).replaced == [] and patch(block).replaced == []
    assert Base.known == [Mine] and type(block) is Mine
    assert_bit_equal(block(x), expected)


def test_scripted_modules_are_passed_over():
    model = nn.Sequential(Block(), torch.jit.script(nn.Linear(8, 8)))
    assert len(patch(model).replaced) == 1


def test_a_scripted_submodule_that_the_rule_would_compute(x):
    block = Block()
    expected = block(x)
    report = patch(block)
    block.scale = torch.jit.script(block.scale)
    torch.testing.assert_close(block(x), expected)
    assert "forward.replaced" not in report.counts()


@pytest.mark.parametrize("p", [torch.tensor(0.5), torch.tensor([0.5]), nn.Parameter(torch.tensor(0.25))], ids=repr)
def test_a_probability_in_a_tensor(p, x):
    block = Block(drop=0.5).train()
    block.drop_path.drop_prob = p
    patch(block, strict=True)
    assert_as_plain(block, x)


class TimmScale(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.gamma, self.inplace = nn.Parameter(torch.ones(8)), inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


def test_a_scale_that_writes_in_place_is_called():
    """What it returns has the dtype and the shape of the branch."""
    assert TIMM_LAYER_SCALE.obstacle(TimmScale.forward) is None
    assert TIMM_LAYER_SCALE.wants(TimmScale(False)) is None
    assert TIMM_LAYER_SCALE.wants(TimmScale(True)) == "writes in place"


VALUES = {
    "a scale of each sample": lambda block: setattr(block.scale, "lambda1", nn.Parameter(torch.arange(32.0).view(4, 1, 8))),
    "a scale of more dimensions": lambda block: setattr(block.scale, "lambda1", nn.Parameter(torch.ones(2, 1, 1, 8))),
    "no scale": lambda block: setattr(block.scale, "lambda1", None),
    "a scale that is gone": lambda block: delattr(block.scale, "lambda1"),
    "a probability that is gone": lambda block: delattr(block.drop_path, "drop_prob"),
    "no probability": lambda block: setattr(block.drop_path, "drop_prob", None),
    "a negative probability": lambda block: setattr(block.drop_path, "drop_prob", -0.25),
}


@pytest.mark.parametrize("change", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_values_that_a_submodule_may_have(change, when):
    """The result, the error and the random numbers are those of the plain lines."""

    def ended(block):
        torch.manual_seed(1)
        try:
            return block(torch.ones(1, 3, 8)), torch.get_rng_state()
        except (TypeError, AttributeError) as error:
            return str(error), torch.get_rng_state()

    block = Block(drop=0.25).train()
    plain = copy.deepcopy(block)
    if when == "before":
        change(block)
    patch(block)
    if when == "after":
        change(block)
    change(plain)
    (expected, state), (ours, our_state) = ended(plain), ended(block)
    assert torch.equal(our_state, state)
    assert ours == expected if isinstance(expected, str) else ours.dtype == expected.dtype
    if not isinstance(expected, str):
        torch.testing.assert_close(ours, expected)


class TestCheckpoints:
    """Where what was saved is computed again, by then perhaps by the plain lines."""

    def gradients(self, block, forward, x):
        run = lambda: checkpoint(block, x, use_reentrant=False).square().sum()  # noqa: E731
        loss = forward(block, run)
        block.zero_grad()
        loss.backward()
        return [parameter.grad for parameter in block.parameters()]

    @staticmethod
    def under_patched(block, run):
        with patched(block, strict=True):
            return run()

    @staticmethod
    def patched_in_backward(block, run):
        loss = run()
        patch(block, strict=True)
        return loss

    @staticmethod
    def watched(block, run):
        patch(block, strict=True)
        with FlopCounterMode(display=False):  # a hook on all modules, which is gone in backward
            return run()

    @pytest.mark.parametrize("forward", [under_patched, patched_in_backward, watched], ids=lambda of: of.__name__)
    def test_what_comes_between(self, forward, x):
        block = Block()
        expected = self.gradients(block, lambda block, run: run(), x)
        for ours, theirs in zip(self.gradients(block, forward, x), expected, strict=True):
            assert_bit_equal(ours, theirs)

    def test_the_plain_forward_runs_and_is_counted(self, x):
        block = Block()
        report = patch(block, strict=True)
        checkpoint(block, x.requires_grad_(), use_reentrant=False).sum().backward()
        assert report.counts()["forward.plain: a checkpoint that computes again what is saved"] == 2
        checkpoint(block, x, use_reentrant=True).sum().backward()
        assert report.counts()["forward.replaced"] == 2


class TestInstalledLibraries:
    def test_a_learned_scale_of_one_keeps_its_gradient(self):
        transformers = pytest.importorskip("transformers")
        from transformers.models.t5.modeling_t5 import T5Attention

        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50, dropout_rate=0.0)
        for shape in ((), (2, 1, 1)):
            attention, x, found = T5Attention(config, layer_idx=0), torch.randn(3, 5, 16), []
            attention.scaling = nn.Parameter(torch.ones(shape))
            for change in (lambda module: None, patch):
                change(attention)
                attention.zero_grad()
                attention(x)[0].square().sum().backward()
                found.append(attention.scaling.grad.clone())
            torch.testing.assert_close(*found)

    def test_the_second_patch_leaves_what_the_first_computes(self):
        transformers = pytest.importorskip("transformers")
        from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

        layer = ConvNextV2Layer(transformers.ConvNextV2Config(), 16)
        patch(layer, strict=True)
        again = patch(layer)
        assert again.replaced == [] and again.refused == [("", "replaced already")]
        assert patch_of(type(layer.grn)) is None

    @pytest.mark.parametrize("shape", [(4, 16), (5, 1, 16), (2, 1, 1, 16), ()], ids=str)
    def test_a_layer_scale_of_any_shape(self, shape):
        transformers = pytest.importorskip("transformers")
        from transformers.models.convnext.modeling_convnext import ConvNextLayer

        layer, x = ConvNextLayer(transformers.ConvNextConfig(), 16), torch.randn(2, 16, 5, 4)
        layer.layer_scale_parameter = nn.Parameter(torch.randn(shape))
        expected = layer(x)
        patch(layer, strict=True)
        torch.testing.assert_close(layer(x), expected)


"""What a patched model goes through: copies, pickles, wrappers, hooks that come later, and the way back."""

import copy
import functools
import gc
import inspect
import io
import pickle
import sys
import threading
import typing
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import safe_inplace
from safe_inplace import PatchError, explain, patch, patched, restore
from safe_inplace._patch.replace import patch_of

from ..checks import assert_bit_equal
from . import blocks
from .blocks import Block, LayerScale


@pytest.fixture
def model():
    return blocks.model()


@pytest.fixture
def x():
    return torch.randn(3, 8)


def is_patched(model):
    return [patch_of(type(module)) is not None for module in (model[0], model[2])] == [True, True]


def replaced_in(report, function):
    """How often the rule's forward ran in a call."""
    before = report.counts().get("forward.replaced", 0)
    function()
    return report.counts().get("forward.replaced", 0) - before


class TestReport:
    def test_text(self, model):
        model[2].scale.register_forward_hook(lambda *_: None)
        expected = """\
1 of 2 known blocks {}replaced
     1 x Block <- addcmul
{}not {}replaced:
  2, Block: a hook on scale"""
        assert str(explain(model)) == expected.format("would be ", "would ", "be ")
        report = patch(model)
        assert str(report) == repr(report) == expected.format("", "", "")
        assert report.replaced == [("0", "block-of-the-tests")]
        assert report.refused == [("2", "a hook on scale")]

    def test_explain_changes_nothing(self, model):
        before = [type(module) for module in model.modules()]
        explain(model)
        assert [type(module) for module in model.modules()] == before

    def test_many_reasons_are_cut_and_alike_ones_are_one_line(self):
        model = nn.Sequential(*[Block() for _ in range(30)])
        for number, block in enumerate(model):
            if number < 3:
                block.scale.register_forward_hook(lambda *_: None)
            else:
                block.forward = functools.partial(block.forward, **{f"x{number}": None})
        text = str(patch(model))
        assert "  0 and 2 more, Block: a hook on scale" in text
        assert text.count("the forward of this instance was replaced") == 1

    def test_nothing_known(self):
        assert str(patch(nn.Linear(2, 2))) == "no known blocks in this model"

    @pytest.mark.parametrize(
        "only, taken",
        [(["0"], ["0"]), ("2", ["2"]), (["Block"], ["0", "2"]), (["block-of-*"], ["0", "2"]), (["dinov2"], []), ([], [])],
    )
    def test_only(self, model, only, taken):
        assert [path for path, _ in patch(model, only).replaced] == taken

    def test_strict(self, model):
        assert len(patch(model, strict=True).replaced) == 2
        restore(model)
        model[2].scale.register_forward_hook(lambda *_: None)
        with pytest.raises(PatchError, match="2, Block: a hook on scale"):
            patch(model, strict=True)
        assert type(model[0]) is Block
        with pytest.raises(PatchError, match="no known blocks"):
            patch(nn.Linear(2, 2), strict=True)
        patch(model, ["0"], strict=True)

    def test_a_second_call_says_that_the_first_was_there(self, model):
        patch(model, ["0"])
        report = patch(model)
        assert report.replaced == [("2", "block-of-the-tests")] and report.refused == [("0", "replaced already")]
        report.restore()
        assert patch_of(type(model[0])) is not None and type(model[2]) is Block

    def test_counts(self, model, x):
        report = patch(model)
        assert report.counts() == {}
        with torch.no_grad():
            model(x)
        assert report.counts() == {"forward.replaced": 2, "result.taken over": 2}
        model[0].scale.register_forward_hook(lambda *_: None)
        with torch.no_grad():
            model(x)
        assert report.counts()["forward.plain: a hook on scale"] == 1
        assert patch(blocks.model()).counts() == {}

    def test_the_report_keeps_no_model_alive(self):
        model = blocks.model()
        report, reference = patch(model), weakref.ref(model[0])
        del model
        gc.collect()
        assert reference() is None
        report.restore()


class TestOnlyThisModel:
    def test_classes_and_other_instances_stay(self, x):
        forward, other, model = Block.forward, blocks.model(), blocks.model()
        patch(model)
        assert Block.forward is forward and type(other[0]) is Block and isinstance(model[0], Block)
        assert "forward" not in model[0].__dict__

    def test_a_patched_class_goes_by_the_name_of_its_class(self, model):
        text = repr(model)
        patch(model)
        assert repr(model) == text and type(model[0]).__qualname__ == "Block" and type(model[0]).__module__ == Block.__module__

    def test_a_class_is_made_once_for_all_models(self):
        first, second = blocks.model(), blocks.model()
        patch(first), patch(second)
        assert type(first[0]) is type(second[2]) is not Block

    def test_with_block(self, model, x):
        expected = model(x)
        with patched(model) as report:
            assert is_patched(model) and len(report.replaced) == 2
        assert type(model[0]) is Block
        with pytest.raises(ZeroDivisionError), patched(model):
            raise ZeroDivisionError
        assert type(model[0]) is Block
        assert_bit_equal(model(x), expected)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_the_oldest_pickle(model):
    return pickle.loads(pickle.dumps(model, protocol=0))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Reduced(Block):
    def __reduce__(self):
        return self.__class__, (8,), self.__dict__


class WithArguments(Block):
    def __new__(cls, dim):
        return super().__new__(cls)

    def __getnewargs__(self):
        return (8,)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, through_pickle, through_the_oldest_pickle, through_torch_save])
    def test_a_copy_is_patched_and_runs_with_its_own_parameters(self, model, x, copied):
        report = patch(model)
        expected = model(x)
        block = copied(model[0])
        assert type(block) is type(model[0])
        assert replaced_in(report, lambda: assert_bit_equal(block(x), model[0](x))) == 2
        # A shallow copy shares the dict of submodules.
        block._modules = dict(block._modules)
        block.scale = LayerScale(8)
        block.mlp = nn.Linear(8, 8)
        torch.testing.assert_close(block(x), x + blocks.activation(block.mlp(x)) * block.scale.lambda1)
        assert_bit_equal(model(x), expected)
        restore(block)
        assert type(block) is Block and is_patched(model)

    def test_a_pickle_of_a_block_that_is_another_now_is_plain(self, model, monkeypatch):
        patch(model)
        data = pickle.dumps(model)

        def forward(self, x):
            return self.scale(x)

        monkeypatch.setattr(Block, "forward", forward)
        loaded = pickle.loads(data)
        assert type(loaded[0]) is Block

    def test_a_pickle_of_a_class_that_allows_no_patch_where_it_is_read_is_plain(self, model, monkeypatch):
        patch(model)
        data = pickle.dumps(model)
        monkeypatch.setattr("safe_inplace._patch.replace._classes", {})  # of another process
        monkeypatch.setattr(Block, "__init_subclass__", classmethod(lambda cls: None))
        loaded = pickle.loads(data)
        assert type(loaded[0]) is Block

    @pytest.mark.parametrize("kind", ["reduce", "arguments"])
    def test_a_pickle_in_a_way_of_the_class(self, kind):
        block = {"reduce": Reduced, "arguments": WithArguments}[kind](8)
        x = torch.randn(2, 8)
        expected = block(x)
        patch(block, strict=True)
        again = pickle.loads(pickle.dumps(block))
        assert type(again) is (Reduced if kind == "reduce" else type(block))
        torch.testing.assert_close(again(x), expected)

    def test_state_dict(self, model):
        before = model.state_dict()
        patch(model)
        assert model.state_dict().keys() == before.keys()
        assert blocks.model().load_state_dict(model.state_dict())
        model.load_state_dict(blocks.model().state_dict())

    def test_data_parallel_replicas_use_their_own_parameters(self, model, x):
        patch(model)
        replica = model[0]._replicate_for_data_parallel()
        replica._modules = {name: copy.deepcopy(child) for name, child in model[0]._modules.items()}
        with torch.no_grad():
            replica._modules["scale"].lambda1.zero_()
        assert_bit_equal(replica(x), x)

    def test_functional_call(self, model, x):
        patch(model)
        zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        assert_bit_equal(torch.func.functional_call(model[0], {k[2:]: v for k, v in zeros.items() if k[0] == "0"}, x), x)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model, x):
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
class TestDistributed:
    def test_ddp(self, group, model, x):
        expected = step(copy.deepcopy(model), x)
        report = patch(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert replaced_in(report, lambda: torch.testing.assert_close(step(wrapped, x), expected)) == 2

    @pytest.mark.parametrize("order", ["patch first", "shard first"])
    def test_fsdp2(self, group, model, x, order):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule

        mesh = init_device_mesh("cpu", (1,))
        expected = step(copy.deepcopy(model), x)

        def shard():
            for block in (model[0], model[2], model):
                fully_shard(block, mesh=mesh)

        if order == "shard first":
            shard()
        report = patch(model, strict=True)
        if order == "patch first":
            shard()
        assert isinstance(model[0], FSDPModule) and isinstance(model[0], Block)

        def check():
            for ours, theirs in zip(step(model, x), expected, strict=True):
                torch.testing.assert_close(ours.full_tensor(), theirs)
            model.zero_grad()

        assert replaced_in(report, check) == 2
        report.restore()
        assert isinstance(model[0], FSDPModule) and isinstance(model[0], Block) and not is_patched(model)
        assert replaced_in(report, check) == 0

    def test_sharding_an_inlined_submodule_makes_the_plain_forward_run(self, group, model, x):
        from torch.distributed.device_mesh import init_device_mesh

        expected = step(copy.deepcopy(model), x)
        report = patch(model)
        for block in (model[0], model[2]):
            fully_shard(block.scale, mesh=init_device_mesh("cpu", (1,)))
        ours = step(model, x)
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine.full_tensor() if hasattr(mine, "full_tensor") else mine, theirs)
        assert report.counts()["forward.plain: a hook on scale"] == 2


def with_hook(register):
    def change(model):
        getattr(model[0].scale, register)(lambda *_: None)

    return change


def with_global_hook(model):
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


def with_module(model):
    model[0].scale = nn.Sequential(model[0].scale)


def with_forward(model):
    scale = model[0].scale
    plain = scale.forward
    scale.forward = lambda hidden: plain(hidden)


def with_compiled(model):
    model[0].scale.compile(backend="eager")


def without(model):
    model[0].scale = None
    model[0].scale = nn.Identity()


class Louder(LayerScale):
    def forward(self, hidden_state):
        return hidden_state * self.lambda1 * 2


def with_class(model):
    model[0].scale.__class__ = Louder


class CallsOtherwise(LayerScale):
    def __call__(self, hidden_state):
        return 3 * super().__call__(hidden_state)


def with_call(model):
    model[0].scale.__class__ = CallsOtherwise


LATER = {
    "a hook on scale": with_hook("register_forward_hook"),
    "a hook on scale, before": with_hook("register_forward_pre_hook"),
    "a hook on scale, in backward": with_hook("register_full_backward_hook"),
    "a hook on scale, before backward": with_hook("register_full_backward_pre_hook"),
    "a hook on all modules": with_global_hook,
    "scale has a forward of its own": with_forward,
    "scale has a forward of its own, compiled": with_compiled,
    "scale has a forward of its own, called otherwise": with_call,
    "scale is a Sequential, which has a forward that is not known": with_module,
    "scale is a Louder, which has a forward that is not known": with_class,
    "scale is a Identity, which has a forward that is not known": without,
}


class TestWhatComesLater:
    @pytest.mark.parametrize("reason", LATER)
    def test_the_plain_forward_runs(self, model, x, reason, fresh_dynamo):
        report = patch(model)
        plain = copy.deepcopy(model)
        restore(plain)
        handles = [LATER[reason](model), LATER[reason](plain)]
        try:
            assert_bit_equal(model[0](x), plain[0](x))
            counts = report.counts()
        finally:
            for handle in handles:
                if handle is not None:
                    handle.remove()
        (said,) = [name for name in counts if name.startswith("forward.plain: ")]
        assert said.startswith("forward.plain: " + reason.split(",")[0])
        assert "forward.replaced" not in counts

    def test_a_function_that_the_library_calls(self, model, x, monkeypatch):
        report = patch(model)
        monkeypatch.setattr(blocks, "activation", lambda value: value * 100)
        expected = x + model[0].mlp(x) * 100 * model[0].scale.lambda1
        torch.testing.assert_close(model[0](x), expected)
        assert "forward.plain: a function that Block calls was replaced" in report.counts()

    def test_the_forward_of_the_class(self, model, x, monkeypatch, fresh_dynamo):
        report = patch(model)
        monkeypatch.setattr(Block, "forward", lambda self, x: x * 100)
        assert_bit_equal(model[0](x), x * 100)
        assert_bit_equal(torch.compile(model[0], backend="eager")(x), x * 100)
        assert "forward.plain: the forward of Block was replaced" in report.counts()

    def test_the_forward_of_the_instance(self, model, x):
        report = patch(model)
        model[0].forward = lambda x: x * 7
        assert_bit_equal(model[0](x), x * 7)
        assert report.counts() == {}

    def test_who_kept_the_bound_forward_gets_the_plain_one_after_restoring(self, model, x):
        """As offloading does, or a recorder of hidden states: it puts back what it found, as an attribute of the instance."""
        expected = [block(x) for block in (model[0], model[2])]
        report = patch(model)
        for block in (model[0], model[2]):
            block.forward = block.forward
        assert replaced_in(report, lambda: model(x)) == 2
        report.restore()
        for block, value in zip((model[0], model[2]), expected, strict=True):
            assert replaced_in(report, lambda block=block: assert_bit_equal(block(x), value)) == 0

    def test_a_removed_hook_is_forgotten(self, model, x):
        report = patch(model)
        model[0].scale.register_forward_hook(lambda *_: None).remove()
        assert replaced_in(report, lambda: model[0](x)) == 1


def decorated(with_what):
    """A decorator as libraries write them; it counts its calls in a dict of its own."""

    def decorate(function):
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            with_what["calls"] = with_what.get("calls", 0) + 1
            if "features" in kwargs:
                kwargs["x"] = kwargs.pop("features")
            return function(self, *args, **kwargs)

        return wrapper

    return decorate


class TestDecorators:
    def test_they_stay_around_the_forward(self, x):
        calls = {}

        class Decorated(Block):
            forward = decorated(calls)(decorated(calls)(Block.forward))

        block = Decorated()
        expected = block(features=x)
        report = patch(block, strict=True)
        calls.clear()
        assert replaced_in(report, lambda: torch.testing.assert_close(block(features=x), expected)) == 1
        assert calls["calls"] == 2
        report.restore()
        assert type(block) is Decorated

    def test_one_that_keeps_the_forward_elsewhere_is_refused(self):
        class Keeper:
            def __init__(self, function):
                self.function, self.__wrapped__ = function, function

            def __get__(self, instance, owner=None):
                return self if instance is None else functools.partial(self.function, instance)

        class Decorated(Block):
            forward = Keeper(Block.forward)

        assert patch(Decorated()).refused == [("", "a decorator of its forward keeps it where nothing else can be put")]


def test_signature_and_documentation_are_those_of_the_forward(model):
    signature = inspect.signature(model[0].forward)
    patch(model)
    assert inspect.signature(model[0].forward) == signature


def test_annotations_are_those_of_the_forward():
    from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer

    layer = Dinov2Layer(Dinov2Config(hidden_size=8, num_attention_heads=2))
    expected = typing.get_type_hints(layer.forward)
    patch(layer, strict=True)
    assert typing.get_type_hints(layer.forward) == expected != {}


def test_draws_are_those_of_the_model(x):
    model = blocks.model(drop=0.5)
    torch.manual_seed(1)
    expected = model(x)
    patch(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)


def test_lora_on_what_is_called_and_not_inlined_is_no_matter(model, x):
    class Lora(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(8, 2), nn.Linear(2, 8)

        def forward(self, value):
            return self.base(value) + self.up(self.down(value))

    report = patch(model)
    model[0].mlp = Lora(model[0].mlp)
    expected = x + blocks.activation(model[0].mlp(x)) * model[0].scale.lambda1
    assert replaced_in(report, lambda: torch.testing.assert_close(model[0](x), expected)) == 1


def test_threads(model, x):
    report, results = patch(model), []
    threads = [threading.Thread(target=lambda: results.append(model(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, results[0]) for result in results) and len(results) == 4
    assert report.counts()["forward.replaced"] > 0


def test_threads_that_patch_the_same_model():
    model = nn.Sequential(*(Block() for _ in range(20)))
    x, failed = torch.randn(3, 8), []

    def infer():
        try:
            for _ in range(30):
                with patched(model), torch.no_grad():
                    model(x)
        except Exception as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=infer) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert failed == [] and {type(block) for block in model} == {Block}


def test_what_was_compiled_for_a_patched_block_serves_the_next_time(x, fresh_dynamo):
    block, compilations = Block(), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for _ in range(3):
        with patched(block, strict=True):
            compiled(x)
        gc.collect()
    assert len(compilations) == 1


def test_under_a_tracer_the_plain_formula_runs(model, x):
    expected = model.eval()(x)
    report = patch(model)
    drawn = torch.fx.symbolic_trace(model)
    assert_bit_equal(drawn(x), expected)
    called = [node.target for node in drawn.graph.nodes if node.op == "call_module"]
    assert "0.drop_path" in called and "2.drop_path" in called
    assert_bit_equal(torch.jit.script(model)(x), expected)
    assert report.counts() == {}
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), model(x))
    names = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not any(name.startswith("safe_inplace") for name in names)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
    assert report.counts()["forward.replaced"] == 4
    assert safe_inplace.counts()

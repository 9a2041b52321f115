"""Each family, patched and not: the same outputs and gradients to rounding, in every way to run it."""

import contextlib
import copy
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import safe_inplace
from safe_inplace._patch.replace import patch_of
from safe_inplace.nn import functional

from ..checks import assert_bit_equal
from .models import FAMILIES, loss_of

# As torch's own lines round: a product, then a sum.
TORCH_STEPS = types.SimpleNamespace(
    add=torch.add,
    mul_add=lambda input, scale, shift: input * scale + shift,
    addcmul=lambda input, tensor1, tensor2, value=1: input + value * (tensor1 * tensor2),
)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def plain(family):
    return family.make()


@pytest.fixture
def model(plain):
    return copy.deepcopy(plain)


def run(model, inputs, autocast=None, net=None):
    """The outputs, the gradients, and where the random numbers have come to."""
    net = net or model
    net.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext():
        outputs = model(**inputs)
    loss_of(outputs).backward()
    values = dict(outputs.items()) if isinstance(outputs, dict) else {"output": outputs}
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}
    tensors |= {f"grad of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return tensors, torch.get_rng_state()


def assert_same(ours, theirs, relative):
    """Every output and gradient, to a rounding of the largest of its elements."""
    (ours, our_state), (theirs, their_state) = ours, theirs
    assert list(ours) == list(theirs) and torch.equal(our_state, their_state)
    theirs = {name: value for name, value in theirs.items() if value.numel()}
    scale = max(value.abs().max().item() for name, value in theirs.items() if name.startswith("grad"))
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].stride() == value.stride(), name
        size = scale if name.startswith("grad") else value.abs().max().item()
        torch.testing.assert_close(ours[name], value, rtol=relative, atol=relative * size, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["float64", "float32", "autocast", "bfloat16"])
def test_outputs_and_gradients(plain, model, family, train, kind):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    autocast = torch.bfloat16 if kind == "autocast" else None
    plain = copy.deepcopy(plain).to(dtype).train(train)
    model = model.to(dtype).train(train)
    inputs = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in family.inputs().items()
    }
    report = safe_inplace.patch(model, strict=True)
    expected = run(plain, inputs, autocast)
    # A rounding of bfloat16, where every product of matrices rounds to it, can turn at every layer.
    relative = {"float64": 1e-13, "float32": 1e-5, "autocast": 2e-2, "bfloat16": 4e-2}[kind]
    assert_same(run(model, inputs, autocast), expected, relative)
    assert report.counts()["forward.replaced"] == sum(family.replaced.values())


def test_what_is_replaced(model, family):
    report = safe_inplace.patch(model, strict=True)
    assert report.refused == []
    assert {rule: sum(name == rule for _, name in report.replaced) for rule in family.replaced} == family.replaced
    assert len(report.replaced) == sum(family.replaced.values())


def test_memory_is_taken_over_in_inference(model, family):
    report = safe_inplace.patch(model)
    with torch.no_grad():
        model.eval()(**family.inputs())
    counts = report.counts()
    # Not that of what a module was called with: GRN by itself.
    assert counts["result.taken over"] >= sum(n for rule, n in family.replaced.items() if not rule.endswith("-grn"))
    assert "result.memory held" not in counts


def test_ten_steps_of_training_and_guard_is_silent(plain, model, family):
    inputs, losses = family.inputs(), []
    safe_inplace.patch(model)
    for net, opened in ((copy.deepcopy(plain), contextlib.nullcontext()), (model, safe_inplace.guard("raise", verify=True))):
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        torch.manual_seed(7)
        losses.append([])
        with opened:
            for _ in range(10):
                optimizer.zero_grad()
                loss = loss_of(net(**inputs))
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    assert len(set(losses[0])) == 10
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)


def test_checkpointed(plain, model, family):
    inputs, expected = family.inputs(), None
    # What enables it may leave hooks.
    plain = copy.deepcopy(plain)
    report = safe_inplace.patch(model)
    if getattr(plain, "supports_gradient_checkpointing", False):
        for net in (plain, model):
            # The name since transformers 5.20, and before.
            name = "activation" if hasattr(net, "activation_checkpointing_enable") else "gradient"
            getattr(net, f"{name}_checkpointing_enable")({"use_reentrant": False})
        expected, ours = run(plain.train(), inputs), run(model.train(), inputs)
    else:
        expected, ours = (
            run(lambda net=net, **inputs: checkpoint(net, use_reentrant=False, **inputs), inputs, net=net.train())
            for net in (plain, model)
        )
    assert_same(ours, expected, 1e-5)
    counts = report.counts()
    assert counts["forward.plain: a checkpoint that computes again what is saved"] >= 2 * sum(family.replaced.values())


def test_compiled_without_a_break(plain, model, family, fresh_dynamo):
    """Compiled as it is, a model may already compute otherwise than eager: BEiT on torch 2.11 does."""
    inputs = family.inputs()
    report = safe_inplace.patch(model.eval())
    with torch.no_grad():
        expected, compiled = (torch.compile(net, backend="eager", fullgraph=True)(**inputs) for net in (plain.eval(), model))
    assert_bit_equal(compiled[0], expected[0])
    assert report.counts() == {}


class Returns(torch.nn.Module):
    """An attention that returns another number of values; one value on its own where that is 0."""

    def __init__(self, attention, count):
        super().__init__()
        self.attention, self.count = attention, count

    def forward(self, *args, **kwargs):
        values = self.attention(*args, **kwargs)
        values = values if isinstance(values, tuple) else (values,)
        return (values * 4)[: self.count] if self.count else values[0]


def unpacks(family):
    return bool({"dinov2", "dinov3", "beit", "swin", "sd3", "flux"} & set(family.replaced))


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if unpacks(family)])
def test_what_an_attention_returns_is_unpacked_as_in_the_plain_lines(name, count):
    """Also where that is an error."""

    def ended(model):
        torch.manual_seed(3)
        try:
            with torch.no_grad():
                return None, model(**inputs)
        except (TypeError, ValueError, IndexError, RuntimeError, NameError) as error:
            return type(error), None

    family = FAMILIES[name]
    plain, inputs = family.make().eval(), family.inputs()
    blocks = [path for path, _ in safe_inplace.explain(plain).replaced]
    for block in map(plain.get_submodule, blocks):
        for attention in ("attention", "attn"):
            if hasattr(block, attention):
                setattr(block, attention, Returns(getattr(block, attention), count))
    model = copy.deepcopy(plain)
    assert len(safe_inplace.patch(model).replaced) == len(blocks)
    (error, expected), (ours_error, ours) = ended(plain), ended(model)
    assert ours_error is error
    if error is None:
        expected, ours = (values if isinstance(values, tuple) else tuple(values.values()) for values in (expected, ours))
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif("flux" not in FAMILIES, reason="no diffusers")
def test_a_norm_that_makes_another_number_of_parts_is_the_error_that_it_is():
    from diffusers.models.normalization import AdaLayerNormZero

    norm = AdaLayerNormZero(8)
    norm.linear = torch.nn.Linear(8, 4)
    for change in (lambda norm: norm, lambda norm: safe_inplace.patch(norm, strict=True)):
        change(norm)
        with pytest.raises(ValueError, match="not enough values to unpack"):
            norm(torch.ones(1, 4, 8), emb=torch.ones(1, 8))


def seen(model, path, inputs):
    """What a hook on a submodule keeps, and what that was when the hook ran."""
    kept = []

    def keep(module, args, output):
        outputs = output if isinstance(output, tuple) else (output,)
        kept.extend((value, value.clone()) for value in outputs if isinstance(value, torch.Tensor))

    handle = model.get_submodule(path).register_forward_hook(keep)
    torch.manual_seed(2)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return kept


def paths_of(model):
    """Every submodule in and around the first block of each kind."""
    report = safe_inplace.explain(model)
    firsts = {name: path for path, name in reversed(report.replaced)}
    inside = [path for path, _ in model.named_modules() if any(path.startswith(first) for first in firsts.values())]
    return [path for path, _ in model.named_children()] + inside


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_hook_sees_what_it_sees_unpatched(plain, model, family, train, monkeypatch):
    """Bit for bit, where the ops round as torch's lines do: all that differs is the rounding of the replaced lines."""
    inputs = family.inputs()
    plain.train(train), model.train(train)
    report = safe_inplace.patch(model)
    steps = family.same_steps and not train
    for path in paths_of(plain):
        expected = seen(plain, path, inputs)
        kept = seen(model, path, inputs)
        assert len(kept) == len(expected), path
        for (value, then), (theirs, _) in zip(kept, expected, strict=True):
            assert_bit_equal(value, then)
            torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-5)
        if steps:
            with monkeypatch.context() as patches:
                patches.setattr(functional, "ops", TORCH_STEPS)
                for (value, _), (theirs, _) in zip(seen(model, path, inputs), expected, strict=True):
                    assert_bit_equal(value, theirs)
    hooked = {reason for reason in report.counts() if reason.startswith("forward.plain: a hook on")}
    inlined = {name for module in model.modules() if (patch := patch_of(type(module))) for name in patch.rule.inlines}
    assert hooked == {f"forward.plain: a hook on {name}" for name in inlined}


def results():
    """How many results the ops have made."""
    return sum(times for name, times in safe_inplace.counts().items() if name.startswith("result."))


def all_that_hooks_see(model, paths, inputs):
    """Of each call of these submodules, in their order: the path, what came out, and how many results of the ops came before."""
    calls, before = [], results()

    def keep(path):
        def hook(module, args, output):
            outputs = output if isinstance(output, tuple) else (output,)
            values = [value.detach().clone() for value in outputs if isinstance(value, torch.Tensor)]
            calls.append((path, values, results() - before))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    torch.manual_seed(2)
    model(**inputs)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_hooks_see_equal_bits_up_to_the_first_result_of_an_op(plain, model, family, train):
    inputs = family.inputs()
    plain.train(train), model.train(train)
    report = safe_inplace.patch(model)
    rules = {path: patch.rule for path, module in model.named_modules() if (patch := patch_of(type(module)))}
    inlined = [f"{path}.{name}".removeprefix(".") for path, rule in rules.items() for name in rule.inlines]
    # A sum is rounded as torch's; the product of a dropped path goes into it.
    sums = not train and all(rule.ops == "add, add" for rule in rules.values())
    paths = [path for path, _ in model.named_modules() if not any(f"{path}.".startswith(f"{name}.") for name in inlined)]
    expected = sorted(all_that_hooks_see(plain, paths, inputs), key=lambda call: call[0])
    calls = sorted(all_that_hooks_see(model, paths, inputs), key=lambda call: call[0])
    assert report.counts()["forward.replaced"] == sum(family.replaced.values())
    assert [path for path, _, _ in calls] == [path for path, _, _ in expected]
    compared = 0
    for (_, values, made), (_, theirs, _) in zip(calls, expected, strict=True):
        assert len(values) == len(theirs)
        for value, other in zip(values, theirs, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
            if made == 0 or sums:
                assert_bit_equal(value, other)
                compared += 1
    assert compared > 1


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_hook_on_all_modules_sees_equal_bits_everywhere(plain, model, family, train):
    inputs = family.inputs()
    report = safe_inplace.patch(model)
    seen = []
    for net in (plain.train(train), model.train(train)):
        values = []

        def keep(module, args, output, values=values):
            outputs = output if isinstance(output, tuple) else (output,)
            values.extend(value.detach().clone() for value in outputs if isinstance(value, torch.Tensor))

        handle = torch.nn.modules.module.register_module_forward_hook(keep)
        torch.manual_seed(2)
        net(**inputs)
        handle.remove()
        seen.append(values)
    assert len(seen[0]) == len(seen[1]) > len(list(model.children()))
    for value, other in zip(seen[1], seen[0], strict=True):
        assert_bit_equal(value, other)
    assert report.counts() == {"forward.plain: a hook on all modules": sum(family.replaced.values())}


def test_restoring_leaves_the_model_as_it_was(plain, model, family):
    inputs = family.inputs()
    model.eval(), plain.eval()
    handle = next(model.children()).register_forward_hook(lambda *_: None)

    def state():
        return [(path, type(m), dict(m.__dict__), dict(m._forward_hooks)) for path, m in model.named_modules()]

    before, expected = state(), run(plain, inputs)[0]
    report = safe_inplace.patch(model)
    assert any(kind is not type(m) for (_, kind, *_), m in zip(before, model.modules(), strict=True))
    run(model, inputs)
    model.zero_grad()
    report.restore()
    after = state()
    assert [entry[:2] + entry[3:] for entry in after] == [entry[:2] + entry[3:] for entry in before]
    assert [entry[2].keys() for entry in after] == [entry[2].keys() for entry in before]
    handle.remove()
    for name, value in run(model, inputs)[0].items():
        assert_bit_equal(value, expected[name])

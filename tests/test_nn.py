"""The modules and their functional forms, against the lines that models write out."""

import copy
import importlib.util
import itertools
import types

import pytest
import torch
from torch import nn

import safe_inplace
from safe_inplace.nn import GRN, GatedResidual, Modulate, ScaledResidual, functional

from .checks import assert_bit_equal

# There is a timm where there is a torchvision: not for every torch.
HAS_TIMM = bool(importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"))


def transformers_drop_path(p):
    from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath

    return Dinov2DropPath(p)


def timm_drop_path(p, scale_by_keep=True):
    """As timm writes it: it is not installed with every torch."""

    def drop(x):
        if p == 0.0:
            return x
        keep_prob = 1 - p
        random_tensor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and scale_by_keep:
            random_tensor.div_(keep_prob)
        return x * random_tensor

    return drop


def grn_reference(h, weight, bias, eps=1e-6, dims=(1, 2), channel=-1):
    norms = torch.linalg.vector_norm(h, dim=dims, keepdim=True)
    return weight * (h * (norms / (norms.mean(dim=channel, keepdim=True) + eps))) + bias + h


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def check(ours, theirs, inputs, **tolerances):
    """Values and gradients, from the same seed; the random numbers that are drawn leave the generator in the same state."""
    results = []
    for function in (ours, theirs):
        torch.manual_seed(3)
        own = [value.detach().clone().requires_grad_() for value in inputs]
        output = function(*own)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape))
        results.append((output, [value.grad for value in own], torch.get_rng_state()))
    (output, grads, state), (expected, expected_grads, expected_state) = results
    assert output.dtype == expected.dtype and output.stride() == expected.stride()
    torch.testing.assert_close(output, expected, **tolerances)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, **tolerances)
    assert torch.equal(state, expected_state)


DROPS = {
    ("rand", True): transformers_drop_path,
    ("bernoulli", True): timm_drop_path,
    ("bernoulli", False): lambda p: timm_drop_path(p, scale_by_keep=False),
}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("draws, scale_by_keep", DROPS)
@pytest.mark.parametrize("gamma", ["vector", "number", None])
@pytest.mark.parametrize("branch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scaled_residual(p, draws, scale_by_keep, gamma, branch_first, dtype):
    drop_path = DROPS[draws, scale_by_keep](p)
    inputs = leaves((6, 4, 5), (6, 4, 5), *([(5,)] if gamma == "vector" else []), dtype=dtype)

    def ours(x, branch, *vector):
        scale = vector[0] if vector else 0.5 if gamma == "number" else None
        how = {"draws": draws, "scale_by_keep": scale_by_keep, "branch_first": branch_first}
        return functional.scaled_residual(x, lambda: branch * 1, scale, p, True, **how)

    def theirs(x, branch, *vector):
        scaled = branch if gamma is None else branch * (vector[0] if vector else 0.5)
        return drop_path(scaled) + x if branch_first else x + drop_path(scaled)

    # The plain lines round a few times to the dtype, in sums of a gradient too.
    check(ours, theirs, inputs, **({"rtol": 4e-2, "atol": 4e-2} if dtype is torch.bfloat16 else {}))


def test_samples_are_dropped_by_whole_samples_and_not_in_eval():
    x, branch = torch.zeros(64, 3), torch.ones(64, 3)
    layer = ScaledResidual(3, init=1.0, drop_path=0.5)
    rows = layer(x, branch)
    assert set(rows.unique().tolist()) == {0.0, 2.0} and (rows == rows[:, :1]).all()
    assert_bit_equal(layer.eval()(x, branch), branch)
    state = torch.get_rng_state()
    layer(x, branch)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("draws, scale_by_keep", DROPS)
def test_everything_dropped(draws, scale_by_keep):
    """Where the models make NaN of it, so do the forms."""
    x, branch = torch.randn(3, 4), torch.randn(3, 4)
    expected = DROPS[draws, scale_by_keep](1.0)(branch) + x
    ours = functional.scaled_residual(x, branch, None, 1.0, True, draws=draws, scale_by_keep=scale_by_keep)
    torch.testing.assert_close(ours, expected, equal_nan=True)


def test_results_are_laid_out_as_the_lines_lay_them_out():
    x, branch = torch.randn(2, 3, 4), torch.randn(2, 4, 3).transpose(1, 2)
    gamma = torch.randn(4)
    assert functional.scaled_residual(x, branch, gamma).stride() == (x + branch * gamma).stride()
    first = functional.scaled_residual(x, branch, gamma, branch_first=True)
    assert first.stride() == (branch * gamma + x).stride() != x.stride()


@pytest.mark.parametrize("branch_first", [False, True])
def test_gated_residual(branch_first):
    check(
        lambda x, branch, gate: functional.gated_residual(x, branch, gate, branch_first=branch_first),
        lambda x, branch, gate: x + gate * branch,
        leaves((2, 4, 5), (2, 4, 5), (2, 1, 5)),
    )
    check(GatedResidual(), lambda x, branch, gate: x + gate * branch, leaves((2, 4, 5), (2, 4, 5), (2, 1, 5)))


def test_modulate():
    norm = nn.LayerNorm(5, elementwise_affine=False)
    inputs = leaves((2, 4, 5), (2, 1, 5), (2, 1, 5))
    check(functional.modulate, lambda h, scale, shift: h * (1 + scale) + shift, inputs)
    check(Modulate(norm), lambda h, scale, shift: norm(h) * (1 + scale) + shift, inputs)
    check(Modulate(), lambda h, scale, shift: h * (1 + scale) + shift, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grn(dtype):
    check(functional.grn, grn_reference, leaves((2, 3, 4, 5), (5,), (5,), dtype=dtype))
    module = GRN(5, eps=1e-3, channels_last=False).to(dtype)
    nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    check(
        module,
        lambda h: grn_reference(h, module.weight.view(-1, 1, 1), module.bias.view(-1, 1, 1), 1e-3, (2, 3), 1),
        leaves((2, 5, 3, 4), dtype=dtype),
    )


@pytest.mark.parametrize("train", [True, False])
def test_under_autocast_the_stream_keeps_its_dtype(train):
    linear, layer, x = nn.Linear(8, 8), ScaledResidual(8, init=0.5, drop_path=0.3, draws="rand").train(train), torch.randn(4, 8)
    drop_path = transformers_drop_path(0.3).train(train)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        ours = layer(x, lambda: linear(x))
        torch.manual_seed(1)
        expected = x + drop_path(linear(x) * layer.gamma)
    assert ours.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours, expected)


def blocks():
    linear, norm = nn.Linear(16, 16), nn.LayerNorm(16, elementwise_affine=False)
    x, gamma, per_sample = torch.randn(4, 3, 3, 16), torch.randn(16), torch.randn(4, 1, 1, 16)
    return {
        "residual": lambda: functional.scaled_residual(x, lambda: linear(x)),
        "layer scale": lambda: functional.scaled_residual(x, lambda: linear(x), gamma),
        "layer scale, branch first": lambda: functional.scaled_residual(x, lambda: linear(x), gamma, branch_first=True),
        "drop path": lambda: functional.scaled_residual(x, lambda: linear(x), gamma, 0.5, True),
        "gate": lambda: functional.gated_residual(x, lambda: linear(x), per_sample),
        "modulate": lambda: functional.modulate(lambda: norm(x), per_sample, per_sample),
        "modulate, with the norm": lambda: Modulate(norm)(x, per_sample, per_sample),
    }


@pytest.mark.parametrize("name", blocks())
def test_memory_of_a_branch_that_nobody_needs_is_taken_over(name):
    """Inference and training with factors that are not trained; the twin: a branch that the caller has."""
    block = blocks()[name]
    for training in (torch.no_grad(), torch.enable_grad()):
        with training:
            safe_inplace.reset_counts()
            block()
        # layer_norm(x) does not record without parameters or inputs that require gradients.
        assert {k: v for k, v in safe_inplace.counts().items() if v} == {"result.taken over": 1}
    x = torch.randn(4, 16)
    branch = x * 2
    before = branch.clone()
    with torch.no_grad():
        safe_inplace.reset_counts()
        functional.scaled_residual(x, branch, torch.randn(16))
        assert safe_inplace.counts()["result.taken over"] == 0
        functional.scaled_residual(x, lambda: branch, torch.randn(16))
        assert safe_inplace.counts()["result.taken over"] == 0
    assert_bit_equal(branch, before)


def test_grn_takes_memory_over_in_inference():
    h = torch.randn(2, 3, 3, 8)
    with torch.no_grad():
        safe_inplace.reset_counts()
        result = functional.grn(lambda: h * 2, torch.randn(8), torch.randn(8))
        assert safe_inplace.counts()["result.taken over"] == 1 and result.shape == h.shape


def test_a_trained_gamma_saves_the_branch_as_it_is():
    x, gamma = torch.randn(4, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        branch = x * 2
        functional.scaled_residual(x, branch, gamma)
    assert sorted(saved) == sorted([branch.data_ptr(), gamma.data_ptr()])


def test_state_dicts_of_what_they_stand_for():
    gamma, channels = torch.randn(6), torch.randn(1, 1, 1, 6)
    for name in ("gamma", "lambda1"):
        layer = ScaledResidual(6)
        assert layer.load_state_dict({name: gamma})
        assert_bit_equal(layer.gamma.detach(), gamma)
    for names, shape in itertools.product((("weight", "bias"), ("gamma", "beta")), ((6,), (1, 1, 1, 6))):
        layer = GRN(6)
        layer.load_state_dict({names[0]: channels.reshape(shape), names[1]: 2 * channels.reshape(shape)})
        assert_bit_equal(layer.weight.detach(), channels.flatten())
        assert_bit_equal(layer.bias.detach(), 2 * channels.flatten())
    with pytest.raises(RuntimeError, match="size mismatch"):
        ScaledResidual(6).load_state_dict({"gamma": torch.randn(7)})
    with pytest.raises(RuntimeError, match="Missing key"):
        GRN(6).load_state_dict({"weight": torch.randn(6)})


def test_state_dicts_of_transformers():
    from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2GRN
    from transformers.models.dinov2.modeling_dinov2 import Dinov2LayerScale

    theirs = Dinov2LayerScale(types.SimpleNamespace(layerscale_value=0.3, hidden_size=6))
    layer = ScaledResidual(6)
    layer.load_state_dict(theirs.state_dict())
    h = torch.randn(2, 6)
    torch.testing.assert_close(layer(torch.zeros(2, 6), h), theirs(h))
    theirs, layer = ConvNextV2GRN(6), GRN(6)
    nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
    state = theirs.state_dict()
    layer.load_state_dict(state)
    assert state["weight"].shape == (1, 1, 1, 6), "the caller's state dict has changed"
    h = torch.randn(2, 3, 3, 6)
    torch.testing.assert_close(layer(h), theirs(h))


@pytest.mark.skipif(not HAS_TIMM, reason="no timm for this torch")
def test_state_dicts_and_random_numbers_of_timm():
    from timm.layers import DropPath
    from timm.layers.grn import GlobalResponseNorm
    from timm.layers.layer_scale import LayerScale, LayerScale2d

    for scale, shape, dim in ((LayerScale(6, 0.3), (8, 2, 6), -1), (LayerScale2d(6, 0.3), (8, 6, 2, 2), 1)):
        layer = ScaledResidual(6, drop_path=0.5, channel_dim=dim)
        layer.load_state_dict(scale.state_dict())
        x, branch = torch.randn(shape), torch.randn(shape)
        torch.manual_seed(1)
        expected = x + DropPath(0.5)(scale(branch))
        torch.manual_seed(1)
        torch.testing.assert_close(layer(x, branch), expected)
    for channels_last, shape in ((True, (2, 3, 3, 6)), (False, (2, 6, 3, 3))):
        theirs, layer = GlobalResponseNorm(6, channels_last=channels_last), GRN(6, channels_last=channels_last)
        nn.init.normal_(theirs.weight), nn.init.normal_(theirs.bias)
        layer.load_state_dict(theirs.state_dict())
        h = torch.randn(shape)
        torch.testing.assert_close(layer(h), theirs(h))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.modulate = nn.Linear(8, 8), Modulate(nn.LayerNorm(8, elementwise_affine=False))
        self.scaled, self.gated, self.grn = ScaledResidual(8, 0.5, drop_path=0.2), GatedResidual(), GRN(8)

    def forward(self, x, scale, shift, gate):
        x = self.scaled(x, lambda: self.linear(self.modulate(x, scale, shift)))
        return self.gated(x, lambda: self.grn(x), gate)


def test_a_block_compiles_without_a_break_copies_and_draws_the_same(fresh_dynamo):
    block = Block()
    inputs = [torch.randn(3, 2, 2, 8)] + [torch.randn(3, 1, 1, 8) for _ in range(3)]
    expected = block.eval()(*inputs)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(*inputs), expected)
    assert_bit_equal(copy.deepcopy(block)(*inputs), expected)
    block.train()
    torch.manual_seed(0)
    expected = block(*inputs)
    torch.manual_seed(0)
    assert_bit_equal(torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False), expected)


@pytest.mark.parametrize(
    ("module", "count"),
    [(Modulate(), 3), (Modulate(nn.LayerNorm(4)), 3), (GatedResidual(), 3), (ScaledResidual(4), 2), (GRN(4), 1)],
    ids=lambda value: type(value).__name__,
)
def test_fx_traces_the_modules(module, count):
    values = [torch.randn(2, 3, 5, 4) for _ in range(count)]
    module.eval()
    traced = torch.fx.symbolic_trace(module)
    torch.testing.assert_close(traced(*values), module(*values))


@pytest.mark.parametrize("draws", ["bernoulli", "rand"])
@pytest.mark.parametrize("shape", [(8, 1), (8, 1, 4)])
def test_a_scale_with_more_samples_than_the_branch(draws, shape):
    """One number is drawn for each sample of their product."""
    drop_path = {"bernoulli": timm_drop_path, "rand": transformers_drop_path}[draws](0.5)
    gamma, branch, x = torch.rand(shape), torch.rand(1, 4), torch.zeros(())
    torch.manual_seed(1)
    expected = x + drop_path(gamma * branch)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    result = functional.scaled_residual(x, branch, gamma, 0.5, True, draws=draws)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(result, expected)


def test_a_module_without_its_scale():
    residual, x = ScaledResidual(4, channel_dim=1), torch.rand(2, 4, 3)
    residual.gamma = None
    assert_bit_equal(residual(x, x), x + x)
    assert repr(residual) == "ScaledResidual(None, drop_path=0.0, draws='bernoulli', channel_dim=1)"
    assert residual.load_state_dict({"gamma": torch.ones(4)}, strict=False).unexpected_keys == ["gamma"]
    with pytest.raises(TypeError, match="gate is None; it must be a tensor"):
        GatedResidual()(x, x, None)


def test_what_is_misspelt_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="draws is 'normal'"):
        ScaledResidual(3, draws="normal")
    with pytest.raises(ValueError, match="draws is 'timm'"):
        functional.scaled_residual(x, x, drop_path=0.5, training=True, draws="timm")
    for p in (-0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"drop_path is {p}; it must be a probability"):
            ScaledResidual(3, drop_path=p)
        for draws in ("bernoulli", "rand"):
            with pytest.raises(ValueError, match=f"drop_path is {p}; it must be a probability"):
                functional.scaled_residual(x, x, drop_path=p, training=True, draws=draws)
    with pytest.raises(TypeError, match="the branch is a NoneType; it must be a tensor, or a function"):
        ScaledResidual(3)(x, None)
    with pytest.raises(ValueError, match="channel_dim is 5; x has 2 dimensions"):
        ScaledResidual(3, channel_dim=5)(x, x)

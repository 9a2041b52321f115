"""Attention of GPT-2 and T5: the forward stays, and is handed another eager function for transformers' attention interface."""

import copy
import sys

import pytest
import torch
import transformers

from safe_inplace import patch

from ..checks import assert_bit_equal
from .models import ATTENTION_IS_KNOWN, FAMILIES, transformers_model

pytestmark = pytest.mark.skipif(not ATTENTION_IS_KNOWN, reason="an older transformers, whose attentions no rule knows")

GPT2 = {"n_embd": 24, "n_layer": 1, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(params=["gpt2-eager", "t5-eager"])
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def plain(family):
    return family.make().eval()


@pytest.fixture
def model(plain):
    return copy.deepcopy(plain)


def assert_outputs_equal(ours, theirs):
    assert_bit_equal(ours[0], theirs[0])


@pytest.mark.parametrize(
    "config, reason",
    [
        ({}, "it attends by sdpa: only eager attention has sums of its own"),
        (
            {"attn_implementation": "eager", "reorder_and_upcast_attn": True},
            "it computes its scores in float32, in another way",
        ),
    ],
)
def test_other_attention_is_refused(config, reason):
    model = transformers_model("GPT2Config", "GPT2Model", **GPT2, **config)()
    assert patch(model).refused == [("h.0.attn", reason)]


def test_an_attention_by_itself():
    config = transformers.GPT2Config(**GPT2)
    attention = transformers.models.gpt2.modeling_gpt2.GPT2Attention(config, layer_idx=0).eval()
    assert config._attn_implementation is None
    x = torch.randn(2, 5, 24)
    expected = attention(x)[0]
    report = patch(attention, strict=True)
    torch.testing.assert_close(attention(x)[0], expected)
    counts = report.counts()
    assert counts["forward.replaced"] == counts["result.taken over"] == 1


def test_copies_are_known():
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    model = transformers_model("MT5Config", "MT5EncoderModel", **config, attn_implementation="eager")()
    assert len(patch(model, strict=True).replaced) == 1


def test_another_implementation_asked_for_since(plain, model, family):
    inputs = family.inputs()
    patch(model, strict=True)
    for net in (plain, model):
        net.set_attn_implementation("sdpa")
    assert_outputs_equal(model(**inputs), plain(**inputs))


def test_an_eager_function_that_is_registered_runs(plain, model, family, monkeypatch):
    def attend(module, query, key, value, attention_mask, **kwargs):
        return value.mean(dim=2, keepdim=True).expand_as(query).transpose(1, 2).contiguous(), None

    inputs = family.inputs()
    before = plain(**inputs)
    patch(model, strict=True)
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "eager", attend)
    assert_outputs_equal(model(**inputs), plain(**inputs))
    assert not torch.equal(plain(**inputs)[0], before[0])


def test_the_eager_function_of_the_library_replaced_since(plain, model, family, monkeypatch):
    (name,) = {type(module).__module__ for module in model.modules() if type(module).__name__.endswith("Attention")}

    def attend(module, query, key, value, attention_mask, **kwargs):
        return value.mean(dim=2, keepdim=True).expand_as(query).transpose(1, 2).contiguous(), None

    inputs, report = family.inputs(), patch(model, strict=True)
    monkeypatch.setattr(sys.modules[name], "eager_attention_forward", attend)
    assert_outputs_equal(model(**inputs), plain(**inputs))
    assert all(reason.startswith("forward.plain: a function that") for reason in report.counts())


def test_attentions_that_are_given_out(plain, model, family):
    inputs = family.inputs()
    patch(model, strict=True)
    for name, values in model(**inputs, output_attentions=True).items():
        if name.endswith("attentions"):
            torch.testing.assert_close(values, plain(**inputs, output_attentions=True)[name])


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generating_with_a_cache(kind):
    inputs = FAMILIES[f"{kind}-eager"].inputs()
    names = {"gpt2": ("GPT2Config", "GPT2LMHeadModel"), "t5": ("T5Config", "T5ForConditionalGeneration")}[kind]
    config = FAMILIES[f"{kind}-eager"].build().config.to_dict() | {"use_cache": True}
    model = getattr(transformers, names[1])(getattr(transformers, names[0])(**config, attn_implementation="eager")).eval()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    how |= {"decoder_start_token_id": 0, "eos_token_id": None}
    expected = model.generate(**inputs, **how)
    report = patch(model, strict=True)
    made = model.generate(**inputs, **how)
    assert torch.equal(made.sequences, expected.sequences)
    for ours, theirs in zip(made.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert report.counts()["forward.replaced"] >= 6 * len(report.replaced) / 2

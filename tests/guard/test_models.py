"""Ten steps of training of unmodified models, with AdamW, AMP and gradient clipping: guard has nothing to say."""

import importlib.util
import warnings

import pytest
import torch

from safe_inplace import HazardWarning, guard

STEPS = 10


def _transformers(config_name, model_name, inputs, **config):
    def build():
        import transformers

        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**config))
        return model, inputs

    return build


def _tokens():
    ids = torch.randint(1, 90, (2, 12))
    return {"input_ids": ids, "labels": ids}


def _pair():
    ids = torch.randint(1, 90, (2, 10))
    return {"input_ids": ids, "decoder_input_ids": ids, "labels": ids}


def _image():
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(0, 2, (2,))}


_SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_PATCHES = {"image_size": 32, "patch_size": 8, "num_labels": 2}

TRANSFORMERS = {
    "bert": _transformers("BertConfig", "BertForMaskedLM", _tokens, **_SMALL),
    "gpt2": _transformers("GPT2Config", "GPT2LMHeadModel", _tokens, vocab_size=96, n_embd=32, n_layer=2, n_head=4),
    "llama": _transformers("LlamaConfig", "LlamaForCausalLM", _tokens, **_SMALL),
    "gemma2": _transformers("Gemma2Config", "Gemma2ForCausalLM", _tokens, **_SMALL, head_dim=8, num_key_value_heads=2),
    "mamba": _transformers("MambaConfig", "MambaForCausalLM", _tokens, vocab_size=96, hidden_size=32, num_hidden_layers=2),
    "t5": _transformers(
        "T5Config", "T5ForConditionalGeneration", _pair, vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    ),
    "vit": _transformers("ViTConfig", "ViTForImageClassification", _image, **_PATCHES, **_SMALL),
    "convnext": _transformers(
        "ConvNextConfig", "ConvNextForImageClassification", _image, hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1]
    ),
    "swin": _transformers(
        "SwinConfig",
        "SwinForImageClassification",
        _image,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "resnet": _transformers(
        "ResNetConfig", "ResNetForImageClassification", _image, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1]
    ),
}


def _timm(name, size=64, **arguments):
    def build():
        import timm

        class Classifier(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = timm.create_model(name, num_classes=2, **arguments)

            def forward(self, pixels, labels):
                return {"loss": torch.nn.functional.cross_entropy(self.model(pixels), labels)}

        return Classifier(), lambda: {"pixels": torch.randn(2, 3, size, size), "labels": torch.randint(0, 2, (2,))}

    return build


TIMM = {
    name: _timm(name, **arguments)
    for name, arguments in {
        "resnet18": {},
        "mobilenetv3_small_050": {},
        "efficientnet_b0": {},
        "regnety_002": {},
        "densenet121": {},
        "vit_tiny_patch16_224": {"img_size": 64, "depth": 2},
        "mixer_s32_224": {"size": 224},
        "convnext_atto": {},
    }.items()
}


def _train(model, inputs, opened):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    with opened:
        for _ in range(STEPS):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                outputs = model(**inputs)
                loss = outputs["loss"]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def _check(build):
    torch.manual_seed(0)
    model, inputs = build()
    state, batch = {k: v.clone() for k, v in model.state_dict().items()}, inputs()
    opened = guard("raise", verify=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HazardWarning)
        torch.manual_seed(1)
        guarded = _train(model, batch, opened)
    assert opened.hazards == []
    model.load_state_dict(state)
    torch.manual_seed(1)
    plain = _train(model, batch, torch.enable_grad())
    # The guard changes no number; batch norms accumulate in the same order.
    torch.testing.assert_close(torch.tensor(guarded), torch.tensor(plain), rtol=1e-2, atol=1e-2)


def _installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


# `make test` installs transformers with every torch, and timm with a torch that there is a torchvision for.
MODELS = {f"transformers-{name}": build for name, build in TRANSFORMERS.items()}
if _installed("timm", "torchvision"):
    MODELS |= {f"timm-{name}": build for name, build in TIMM.items()}


def test_there_are_eight_models_or_more():
    assert len(MODELS) >= 8


@pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
def test_ten_steps_of_training_are_silent(build):
    _check(build)

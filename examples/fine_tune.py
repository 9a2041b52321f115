"""A vision model of transformers on scikit-learn's digits, its blocks patched, beside the same model as it was.

The weights are random, so that nothing is downloaded: a real run says `from_pretrained` where this one has a configuration.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
)

import safe_inplace
from examples.side_by_side import Run, parser, summary, train


def vit() -> nn.Module:
    """With LayerScale and stochastic depth."""
    config = Dinov2Config(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        drop_path_rate=0.1,
        num_labels=10,
    )
    return Dinov2ForImageClassification(config)


def convnextv2() -> nn.Module:
    config = ConvNextV2Config(
        num_channels=1, patch_size=1, num_stages=2, hidden_sizes=[32, 64], depths=[2, 2], drop_path_rate=0.1, num_labels=10
    )
    return ConvNextV2ForImageClassification(config)


MODELS = {"vit": vit, "convnextv2": convnextv2}


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(pixel_values=images).logits, labels)


def main(arguments: list[str] | None = None) -> list[Run]:
    parse = parser(__doc__)
    parse.add_argument("--model", choices=MODELS, default="vit")
    options = parse.parse_args(arguments)
    plain = MODELS[options.model]()
    patched = copy.deepcopy(plain)
    report = safe_inplace.patch(patched)
    print(report)
    runs = [Run("plain", plain.train(), loss), Run("patched", patched.train(), loss)]
    train(runs, options)
    print(summary(runs, options))
    print(report.counts())
    return runs


if __name__ == "__main__":
    main()

"""The rules, a file for each kind of model. A file that is imported here has registered its rules."""

from . import (
    diffusers_basic,
    diffusers_blocks,
    diffusers_norms,
    timm,
    transformers_attention,
    transformers_conv,
    transformers_swin,
    transformers_vit,
)

__all__ = [
    "diffusers_basic",
    "diffusers_blocks",
    "diffusers_norms",
    "timm",
    "transformers_attention",
    "transformers_conv",
    "transformers_swin",
    "transformers_vit",
]

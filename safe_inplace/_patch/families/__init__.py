"""The rules, a file for each kind of model. A file that is imported here has registered its rules."""

from . import transformers_conv, transformers_swin, transformers_vit

__all__ = ["transformers_conv", "transformers_swin", "transformers_vit"]

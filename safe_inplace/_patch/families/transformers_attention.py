"""Eager attention of GPT-2 and T5: the scores are scaled and shifted in one pass, in the memory that matmul gave them.

The forward of the attention stays: it asks transformers' attention interface for the function that attends, and hands it the
library's eager one for want of another. It is given one of these instead. Where another attention is asked for, that one runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import functional as forms
from ..replace import calling
from ..rules import rule

_MODELS = "transformers.models"


def _is_eager(module: Any) -> str | None:
    attention = module.config._attn_implementation
    # None is what an attention that is made by itself has: then the interface returns the eager one.
    if attention not in ("eager", None):
        return f"attends by {attention}: only eager attention has sums of its own"
    if getattr(module, "reorder_and_upcast_attn", False):
        return "computes its scores in float32, in another way"
    return None


def _weights(module: Any, query: Tensor, key: Tensor, scaling: float | None, dropout: float, dtype: Any, *shifts: Any) -> Tensor:
    scale = query.size(-1) ** -0.5 if scaling is None else scaling
    # In a list until an op pops them: then nobody else has them.
    scores = [torch.matmul(query, key.transpose(-1, -2))]
    given = [shift for shift in shifts if shift is not None]
    # A scale that is learned has a gradient, whatever its value is now.
    if isinstance(scale, Tensor) or scale != 1:
        scores.append(forms.ops.mul_add(scores.pop(), scale, given.pop(0)) if given else forms.ops.mul(scores.pop(), scale))
    for shift in given:
        scores.append(forms.ops.add(scores.pop(), shift))
    weights = F.softmax(scores.pop(), dim=-1)
    return F.dropout(weights if dtype is None else weights.type(dtype), p=dropout, training=module.training)


def _attend_as_gpt2(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    weights = _weights(module, query, key, scaling, dropout, value.dtype, attention_mask)
    return torch.matmul(weights, value).transpose(1, 2), weights


@rule(
    "47831b6d8440",
    name="gpt2-attention",
    homes=f"{_MODELS}.gpt2.modeling_gpt2.GPT2Attention",
    ops="mul_add",
    helpers={"eager_attention_forward": ("605409005acb",)},
    wants=_is_eager,
)
def gpt2(
    self: Any,
    hidden_states: Any,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> Any:
    return calling(self, eager_attention_forward=_attend_as_gpt2)(
        self,
        hidden_states,
        cache,
        attention_mask,
        encoder_hidden_states,
        encoder_attention_mask,
        output_attentions,
        **kwargs,
    )


def _attend_as_t5(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    weights = _weights(module, query, key, scaling, dropout, None, position_bias, attention_mask)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


@rule(
    "9ea8e040d7dc",
    name="t5-attention",
    homes=f"{_MODELS}.t5.modeling_t5.T5Attention",
    ops="add, add",
    helpers={"eager_attention_forward": ("8b7a7603894a",)},
    wants=_is_eager,
)
def t5(
    self: Any,
    hidden_states: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    return calling(self, eager_attention_forward=_attend_as_t5)(
        self, hidden_states, mask, key_value_states, position_bias, cache, **kwargs
    )

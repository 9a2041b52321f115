"""Swin of transformers: plain residuals, whose branches nobody needs afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...nn import functional as forms
from ..leaves import OPTIONAL_DROP_PATH, residual
from ..replace import function_of
from ..rules import rule

_SWIN = "transformers.models.swin.modeling_swin.SwinLayer"
_INLINES = {"drop_path": OPTIONAL_DROP_PATH}


def _attended(
    self: Any,
    hidden_states: Tensor,
    input_dimensions: Any,
    attention: Callable[[Tensor, Tensor | None], Tensor],
    shift: Callable[..., Tensor],
) -> Tensor:
    """The branch of the attention: what is attended to are windows of the image, which may be shifted before and back after."""
    window_partition, window_reverse = function_of(self, "window_partition"), function_of(self, "window_reverse")
    height, width = input_dimensions
    batch_size, _, channels = hidden_states.size()
    hidden = self.layernorm_before(hidden_states).view(batch_size, height, width, channels)
    hidden, pad_values = self.maybe_pad(hidden, height, width)
    _, padded_height, padded_width, _ = hidden.shape
    windows = window_partition(shift(hidden), self.window_size)
    windows = windows.view(-1, self.window_size * self.window_size, channels)
    mask = self.get_attn_mask(padded_height, padded_width, dtype=hidden.dtype, device=windows.device)
    windows = attention(windows, mask).view(-1, self.window_size, self.window_size, channels)
    windows = shift(window_reverse(windows, self.window_size, padded_height, padded_width), reverse=True)
    if pad_values[3] > 0 or pad_values[5] > 0:
        windows = windows[:, :height, :width, :].contiguous()
    return windows.view(batch_size, height * width, channels)


@rule("a18ac02cdc70", name="swin", homes=_SWIN, ops="add, add", inlines=_INLINES)
def swin(
    self: Any, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if not always_partition:
        self.set_shift_and_window_size(input_dimensions)
    weights = None

    def attention(windows: Tensor, mask: Tensor | None) -> Tensor:
        nonlocal weights
        attended, weights = self.attention(windows, mask, **kwargs)
        return self.dropout(attended)

    middle = residual(
        self, hidden_states, lambda: _attended(self, hidden_states, input_dimensions, attention, self.cyclic_shift), "drop_path"
    )
    result = forms.scaled_residual(
        middle, lambda: self.dropout(self.mlp(self.layernorm_after(middle))), branch_first=True
    )
    return result, weights


def _older(
    self: Any, hidden_states: Tensor, input_dimensions: Any, output_attentions: Any, always_partition: Any, *head_mask: Any
) -> tuple[Tensor, ...]:
    if not always_partition:
        self.set_shift_and_window_size(input_dimensions)
    weights: list[Tensor] = []

    def attention(windows: Tensor, mask: Tensor | None) -> Tensor:
        attended, *rest = self.attention(windows, mask, *head_mask, output_attentions=output_attentions)
        weights.extend(rest)
        return attended

    def shift(hidden: Tensor, reverse: bool = False) -> Tensor:
        if self.shift_size <= 0:
            return hidden
        by = self.shift_size if reverse else -self.shift_size
        return torch.roll(hidden, shifts=(by, by), dims=(1, 2))

    middle = residual(
        self, hidden_states, lambda: _attended(self, hidden_states, input_dimensions, attention, shift), "drop_path"
    )
    result = forms.scaled_residual(middle, lambda: self.output(self.intermediate(self.layernorm_after(middle))))
    return (result, weights[0]) if output_attentions else (result,)


# transformers 5.0 to 5.6.
@rule("4f7efe9eced1", name="swin", homes=_SWIN, ops="add, add", inlines=_INLINES)
def swin_with_its_mlp_in_two(
    self: Any,
    hidden_states: Tensor,
    input_dimensions: Any,
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
) -> tuple[Tensor, ...]:
    return _older(self, hidden_states, input_dimensions, output_attentions, always_partition)


# transformers 4.
@rule("79cdee1dcfd1", name="swin", homes=_SWIN, ops="add, add", inlines=_INLINES)
def swin_with_head_mask(
    self: Any,
    hidden_states: Tensor,
    input_dimensions: Any,
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
) -> tuple[Tensor, ...]:
    return _older(self, hidden_states, input_dimensions, output_attentions, always_partition, head_mask)

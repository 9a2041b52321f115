"""Swin of transformers: plain residuals, whose branches nobody needs afterwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...nn import functional as forms
from ..leaves import OPTIONAL_DROP_PATH, drop_path
from ..replace import function_of
from ..rules import rule


@rule(
    "a18ac02cdc70",
    name="swin",
    homes="transformers.models.swin.modeling_swin.SwinLayer",
    ops="add, add",
    inlines={"drop_path": OPTIONAL_DROP_PATH},
)
def swin(
    self: Any, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    if not always_partition:
        self.set_shift_and_window_size(input_dimensions)
    window_partition, window_reverse = function_of(self, "window_partition"), function_of(self, "window_reverse")
    height, width = input_dimensions
    batch_size, _, channels = hidden_states.size()
    weights = None

    def attended() -> Tensor:
        nonlocal weights
        hidden = self.layernorm_before(hidden_states).view(batch_size, height, width, channels)
        hidden, pad_values = self.maybe_pad(hidden, height, width)
        _, padded_height, padded_width, _ = hidden.shape
        windows = window_partition(self.cyclic_shift(hidden), self.window_size)
        windows = windows.view(-1, self.window_size * self.window_size, channels)
        mask = self.get_attn_mask(padded_height, padded_width, dtype=hidden.dtype, device=windows.device)
        windows, weights = self.attention(windows, mask, **kwargs)
        windows = self.dropout(windows).view(-1, self.window_size, self.window_size, channels)
        windows = self.cyclic_shift(
            window_reverse(windows, self.window_size, padded_height, padded_width), reverse=True
        )
        if pad_values[3] > 0 or pad_values[5] > 0:
            windows = windows[:, :height, :width, :].contiguous()
        return windows.view(batch_size, height * width, channels)

    middle = forms.scaled_residual(hidden_states, attended, **drop_path(self.drop_path))
    result = forms.scaled_residual(
        middle, lambda: self.dropout(self.mlp(self.layernorm_after(middle))), branch_first=True
    )
    return result, weights

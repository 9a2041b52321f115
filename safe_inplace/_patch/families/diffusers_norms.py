"""diffusers: adaptive layer norms, whose modulation is one pass over what was normalized."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...nn import functional as forms
from ..rules import rule

_HOME = "diffusers.models.normalization"


@rule("1c312a590a7d", name="ada-layer-norm", homes=f"{_HOME}.AdaLayerNorm", ops="mul_add")
def ada_layer_norm(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Any = None) -> Tensor:
    if self.emb is not None:
        temb = self.emb(timestep)
    temb = self.linear(self.silu(temb))
    if self.chunk_dim == 1:
        shift, scale = temb.chunk(2, dim=1)
        shift, scale = shift[:, None, :], scale[:, None, :]
    else:
        scale, shift = temb.chunk(2, dim=0)
    return forms.modulate(lambda: self.norm(x), scale, shift)


@rule("3f5a2a279cb6", name="ada-layer-norm-zero", homes=f"{_HOME}.AdaLayerNormZero", ops="mul_add")
def ada_layer_norm_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: Any = None,
    emb: Any = None,
) -> tuple[Tensor, ...]:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
    return forms.modulate(lambda: self.norm(x), scale[:, None], shift[:, None]), gate, shift_mlp, scale_mlp, gate_mlp


@rule("7234c6899676", name="ada-layer-norm-zero-single", homes=f"{_HOME}.AdaLayerNormZeroSingle", ops="mul_add")
def ada_layer_norm_zero_single(self: Any, x: Tensor, emb: Any = None) -> tuple[Tensor, Tensor]:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return forms.modulate(lambda: self.norm(x), scale[:, None], shift[:, None]), gate


@rule("2ab18c664d14", name="ada-layer-norm-continuous", homes=f"{_HOME}.AdaLayerNormContinuous", ops="mul_add")
def ada_layer_norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return forms.modulate(lambda: self.norm(x), scale[:, None, :], shift[:, None, :])


@rule("bdaa3d7594be", name="ada-layer-norm-zero-x", homes=f"{_HOME}.SD35AdaLayerNormZeroX", ops="mul_add, mul_add")
def ada_layer_norm_zero_x(self: Any, hidden_states: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
    chunks = self.linear(self.silu(emb)).chunk(9, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = chunks
    normed = [self.norm(hidden_states)]
    first = forms.modulate(normed[0], scale[:, None], shift[:, None])
    second = forms.modulate(normed.pop, scale2[:, None], shift2[:, None])
    return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2

"""diffusers: the block of PixArt, DiT and the older models, with five kinds of norms."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...nn import functional as forms
from ..replace import function_of
from ..rules import rule
from .diffusers_blocks import fed_forward


@rule(
    "afdd107384a9",
    name="basic-transformer-block",
    homes="diffusers.models.attention.BasicTransformerBlock",
    ops="mul_add or add for each part",
)
def basic_transformer_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: Any = None,
) -> Tensor:
    if cross_attention_kwargs is not None and cross_attention_kwargs.get("scale", None) is not None:
        function_of(self, "logger").warning(
            "Passing `scale` to `cross_attention_kwargs` is deprecated. `scale` will be ignored."
        )
    kind = self.norm_type
    gate_msa = shift_mlp = scale_mlp = gate_mlp = None
    if kind == "ada_norm":
        normed = self.norm1(hidden_states, timestep)
    elif kind == "ada_norm_zero":
        normed, *chunks = self.norm1(hidden_states, timestep, class_labels, hidden_dtype=hidden_states.dtype)
        gate_msa, shift_mlp, scale_mlp, gate_mlp = (chunk[:, None] for chunk in chunks)
    elif kind in ("layer_norm", "layer_norm_i2vgen"):
        normed = self.norm1(hidden_states)
    elif kind == "ada_norm_continuous":
        normed = self.norm1(hidden_states, added_cond_kwargs["pooled_text_emb"])
    elif kind == "ada_norm_single":
        table = self.scale_shift_table[None] + timestep.reshape(hidden_states.shape[0], 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        normed = forms.modulate(lambda: self.norm1(hidden_states), scale_msa, shift_msa)
    else:
        raise ValueError("Incorrect norm used")
    if self.pos_embed is not None:
        normed = self.pos_embed(normed)

    cross_attention_kwargs = cross_attention_kwargs.copy() if cross_attention_kwargs is not None else {}
    gligen_kwargs = cross_attention_kwargs.pop("gligen", None)
    hidden_states = forms.scaled_residual(
        hidden_states,
        lambda: self.attn1(
            normed,
            encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
            attention_mask=attention_mask,
            **cross_attention_kwargs,
        ),
        gate_msa,
        branch_first=True,
    )
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.squeeze(1)
    if gligen_kwargs is not None:
        hidden_states = self.fuser(hidden_states, gligen_kwargs["objs"])

    if self.attn2 is not None:
        normed = _before_cross_attention(self, hidden_states, timestep, added_cond_kwargs)
        hidden_states = forms.scaled_residual(
            hidden_states,
            lambda: self.attn2(
                normed,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **cross_attention_kwargs,
            ),
            branch_first=True,
        )

    def fed() -> Tensor:
        if kind == "ada_norm_continuous":
            normed = self.norm3(hidden_states, added_cond_kwargs["pooled_text_emb"])
        elif scale_mlp is None or shift_mlp is None:
            normed = self.norm3(hidden_states)
        else:
            norm = self.norm2 if kind == "ada_norm_single" else self.norm3
            normed = forms.modulate(lambda: norm(hidden_states), scale_mlp, shift_mlp)
        return fed_forward(self, self.ff, normed)

    hidden_states = forms.scaled_residual(hidden_states, fed, gate_mlp, branch_first=True)
    return hidden_states.squeeze(1) if hidden_states.ndim == 4 else hidden_states


def _before_cross_attention(self: Any, hidden_states: Tensor, timestep: Any, added_cond_kwargs: Any) -> Tensor:
    kind = self.norm_type
    if kind == "ada_norm_single":
        return hidden_states
    if kind == "ada_norm":
        normed = self.norm2(hidden_states, timestep)
    elif kind == "ada_norm_continuous":
        normed = self.norm2(hidden_states, added_cond_kwargs["pooled_text_emb"])
    else:
        normed = self.norm2(hidden_states)
    return normed if self.pos_embed is None else self.pos_embed(normed)

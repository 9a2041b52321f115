"""diffusers: transformer blocks with gated residuals and modulated norms (SD3, Flux, PixArt, DiT).

What an attention returns in a tuple is kept in a list until the residual pops it: then nobody else has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...nn import functional as forms
from ..replace import function_of
from ..rules import rule

_CLIP = 65504


def _modulated(norm: Any, hidden: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return forms.modulate(lambda: norm(hidden), scale[:, None], shift[:, None])


def fed_forward(self: Any, feed_forward: Any, hidden: Tensor) -> Tensor:
    if self._chunk_size is None:
        return feed_forward(hidden)
    chunked = function_of(self, "_chunked_feed_forward")
    return chunked(feed_forward, hidden, self._chunk_dim, self._chunk_size)


@rule(
    "9622ff097d1e",
    name="sd3",
    homes="diffusers.models.attention.JointTransformerBlock",
    ops="addcmul, mul_add, addcmul for each stream",
)
def sd3(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    joint_attention_kwargs = joint_attention_kwargs or {}
    if self.use_dual_attention:
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp, normed2, gate2 = self.norm1(hidden_states, emb=temb)
    else:
        normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
    context: list[Tensor] = []
    if self.context_pre_only:
        context_normed = self.norm1_context(encoder_hidden_states, temb)
    else:
        context_normed, *context = self.norm1_context(encoder_hidden_states, emb=temb)
    attended, context_attended = self.attn(
        hidden_states=normed, encoder_hidden_states=context_normed, **joint_attention_kwargs
    )
    made, context_made = [attended], [context_attended]
    del attended, context_attended
    hidden_states = forms.gated_residual(hidden_states, made.pop, gate_msa.unsqueeze(1))
    if self.use_dual_attention:
        hidden_states = forms.gated_residual(
            hidden_states, lambda: self.attn2(hidden_states=normed2, **joint_attention_kwargs), gate2.unsqueeze(1)
        )
    hidden_states = forms.gated_residual(
        hidden_states,
        lambda: fed_forward(self, self.ff, _modulated(self.norm2, hidden_states, scale_mlp, shift_mlp)),
        gate_mlp.unsqueeze(1),
    )
    if self.context_pre_only:
        return None, hidden_states
    gate_msa, shift_mlp, scale_mlp, gate_mlp = context
    encoder_hidden_states = forms.gated_residual(encoder_hidden_states, context_made.pop, gate_msa.unsqueeze(1))
    encoder_hidden_states = forms.gated_residual(
        encoder_hidden_states,
        lambda: fed_forward(self, self.ff_context, _modulated(self.norm2_context, encoder_hidden_states, scale_mlp, shift_mlp)),
        gate_mlp.unsqueeze(1),
    )
    return encoder_hidden_states, hidden_states


@rule(
    "63671b27292a",
    name="sd3-single",
    homes="diffusers.models.transformers.transformer_sd3.SD3SingleTransformerBlock",
    ops="addcmul, mul_add, addcmul",
)
def sd3_single(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
    middle = forms.gated_residual(
        hidden_states, lambda: self.attn(hidden_states=normed, encoder_hidden_states=None), gate_msa.unsqueeze(1)
    )
    return forms.gated_residual(
        middle, lambda: self.ff(_modulated(self.norm2, middle, scale_mlp, shift_mlp)), gate_mlp.unsqueeze(1)
    )


@rule(
    "5a0a0dcdbbac",
    name="flux",
    homes="diffusers.models.transformers.transformer_flux.FluxTransformerBlock",
    ops="addcmul, mul_add, addcmul for each stream",
)
def flux(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    normed, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
    context_normed, *context = self.norm1_context(encoder_hidden_states, emb=temb)
    # The attention's, of the context, and perhaps of an image prompt: the last first, to be popped.
    made = list(
        self.attn(
            hidden_states=normed,
            encoder_hidden_states=context_normed,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
    )[::-1]
    if len(made) not in (2, 3):
        raise UnboundLocalError(f"the attention returned {len(made)} values, of which this block takes 2 or 3")
    hidden_states = forms.gated_residual(hidden_states, made.pop, gate_msa.unsqueeze(1))
    hidden_states = forms.gated_residual(
        hidden_states,
        lambda: self.ff(_modulated(self.norm2, hidden_states, scale_mlp, shift_mlp)),
        gate_mlp.unsqueeze(1),
    )
    if len(made) == 2:
        hidden_states = forms.ops.add(hidden_states, made.pop(0))
    gate_msa, shift_mlp, scale_mlp, gate_mlp = context
    encoder_hidden_states = forms.gated_residual(encoder_hidden_states, made.pop, gate_msa.unsqueeze(1))
    encoder_hidden_states = forms.gated_residual(
        encoder_hidden_states,
        lambda: self.ff_context(_modulated(self.norm2_context, encoder_hidden_states, scale_mlp, shift_mlp)),
        gate_mlp.unsqueeze(1),
    )
    if encoder_hidden_states.dtype == torch.float16:
        encoder_hidden_states = encoder_hidden_states.clip(-_CLIP, _CLIP)
    return encoder_hidden_states, hidden_states


@rule(
    "cdd5b4744b3e",
    name="flux-single",
    homes="diffusers.models.transformers.transformer_flux.FluxSingleTransformerBlock",
    ops="addcmul",
)
def flux_single(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    length = encoder_hidden_states.shape[1]
    hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = self.norm(hidden_states, emb=temb)

    def branch() -> Tensor:
        fed = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(
            hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        return self.proj_out(torch.cat([attended, fed], dim=2))

    hidden_states = forms.gated_residual(hidden_states, branch, gate.unsqueeze(1))
    if hidden_states.dtype == torch.float16:
        hidden_states = hidden_states.clip(-_CLIP, _CLIP)
    return hidden_states[:, :length], hidden_states[:, length:]

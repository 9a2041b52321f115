"""Vision transformers of transformers: residuals with LayerScale and DropPath."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...nn import functional as forms
from ..leaves import LAYER_SCALE, OPTIONAL_DROP_PATH, drop_path
from ..rules import rule

_MODELS = "transformers.models"


@rule(
    "d86542f0cac1",
    name="dinov2",
    homes=f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Layer",
    ops="mul_add, mul_add",
    inlines={"layer_scale1": LAYER_SCALE, "layer_scale2": LAYER_SCALE, "drop_path": OPTIONAL_DROP_PATH},
)
def dinov2(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    drop = drop_path(self.drop_path)
    middle = forms.scaled_residual(
        hidden_states,
        lambda: self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)[0],
        self.layer_scale1.lambda1,
        branch_first=True,
        **drop,
    )
    return forms.scaled_residual(
        middle, lambda: self.mlp(self.norm2(middle)), self.layer_scale2.lambda1, branch_first=True, **drop
    )


@rule(
    "bce84dd72315",
    name="dinov3",
    homes=f"{_MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer",
    ops="mul_add, mul_add",
    inlines={"layer_scale1": LAYER_SCALE, "layer_scale2": LAYER_SCALE, "drop_path": OPTIONAL_DROP_PATH},
)
def dinov3(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    return dinov2(self, hidden_states, attention_mask, position_embeddings=position_embeddings, **kwargs)


@rule(
    "5bb396067159",
    name="beit",
    homes=f"{_MODELS}.beit.modeling_beit.BeitLayer",
    ops="mul_add, mul_add",
    inlines={"drop_path": OPTIONAL_DROP_PATH},
)
def beit(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: Any = None,
    **kwargs: Any,
) -> Tensor:
    if self.relative_position_bias is not None:
        height, width = resolution
        window_size = (height // self.patch_size, width // self.patch_size)
        bias = self.relative_position_bias(window_size, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
        attention_mask = bias + attention_mask if attention_mask is not None else bias
    drop = drop_path(self.drop_path)
    middle = forms.scaled_residual(
        hidden_states,
        lambda: self.dropout(
            self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask, **kwargs)[0]
        ),
        self.lambda_1,
        branch_first=True,
        **drop,
    )
    return forms.scaled_residual(
        middle, lambda: self.dropout(self.mlp(self.layernorm_after(middle))), self.lambda_2, branch_first=True, **drop
    )


@rule(
    "719660323160",
    name="data2vec-vision",
    homes=f"{_MODELS}.data2vec.modeling_data2vec_vision.Data2VecVisionLayer",
    ops="mul_add, mul_add",
    inlines={"drop_path": OPTIONAL_DROP_PATH},
)
def data2vec_vision(
    self: Any,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: Any = None,
) -> tuple[Tensor, ...]:
    attended, *rest = self.attention(
        self.layernorm_before(hidden_states),
        output_attentions=output_attentions,
        relative_position_bias=relative_position_bias,
        interpolate_pos_encoding=interpolate_pos_encoding,
        resolution=resolution,
    )
    made = [attended]
    del attended
    drop = drop_path(self.drop_path)
    middle = forms.scaled_residual(hidden_states, made.pop, self.lambda_1, branch_first=True, **drop)
    result = forms.scaled_residual(
        middle,
        lambda: self.output(self.intermediate(self.layernorm_after(middle))),
        self.lambda_2,
        branch_first=True,
        **drop,
    )
    return (result, *rest)

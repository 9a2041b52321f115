"""Vision transformers of transformers: residuals with LayerScale and DropPath."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..leaves import LAYER_SCALE, OPTIONAL_DROP_PATH, residual
from ..rules import Leaf, rule

_MODELS = "transformers.models"
_DINOV2 = f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Layer"
_DINOV3 = f"{_MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer"
_BEIT = (
    f"{_MODELS}.beit.modeling_beit.BeitLayer",
    f"{_MODELS}.data2vec.modeling_data2vec_vision.Data2VecVisionLayer",
)
_BEIT_INLINES = {"drop_path": OPTIONAL_DROP_PATH}
_DINO_INLINES: dict[str, Leaf | tuple[Leaf, ...]] = {
    "layer_scale1": LAYER_SCALE,
    "layer_scale2": LAYER_SCALE,
    "drop_path": OPTIONAL_DROP_PATH,
}
_OPS = "mul_add, mul_add"


def _first_of_two(made: tuple[Tensor, Any]) -> Tensor:
    """Unpacked as in the plain lines; and nobody else has it then."""
    first, _ = made
    popped = [first]
    del first, made
    return popped.pop()


def _dino(self: Any, hidden_states: Tensor, attended: Callable[[Tensor], Tensor]) -> Tensor:
    middle = residual(
        self, hidden_states, lambda: attended(self.norm1(hidden_states)), "layer_scale1", "drop_path", branch_first=True
    )
    return residual(
        self, middle, lambda: self.mlp(self.norm2(middle)), "layer_scale2", "drop_path", branch_first=True
    )


@rule("d86542f0cac1", name="dinov2", homes=_DINOV2, ops=_OPS, inlines=_DINO_INLINES)
def dinov2(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    def attended(normed: Tensor) -> Tensor:
        return _first_of_two(self.attention(normed, attention_mask=attention_mask, **kwargs))

    return _dino(self, hidden_states, attended)


# transformers 5.0 to 5.12.
@rule("65b62ee75ef5", name="dinov2", homes=_DINOV2, ops=_OPS, inlines=_DINO_INLINES)
def dinov2_without_mask(self: Any, hidden_states: Tensor) -> Tensor:
    return _dino(self, hidden_states, self.attention)


# transformers 4.
@rule("e8bccbc24d81", name="dinov2", homes=_DINOV2, ops=_OPS, inlines=_DINO_INLINES)
def dinov2_with_head_mask(self: Any, hidden_states: Tensor, head_mask: Tensor | None = None) -> Tensor:
    return _dino(self, hidden_states, lambda normed: self.attention(normed, head_mask))


@rule("bce84dd72315", name="dinov3", homes=_DINOV3, ops=_OPS, inlines=_DINO_INLINES)
def dinov3(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    return dinov2(self, hidden_states, attention_mask, position_embeddings=position_embeddings, **kwargs)


# transformers 4 and 5.0.
@rule("ebafc08790f1", name="dinov3", homes=_DINOV3, ops=_OPS, inlines=_DINO_INLINES)
def dinov3_without_keywords(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    return dinov2(self, hidden_states, attention_mask, position_embeddings=position_embeddings)


def _scaled_residuals(
    self: Any,
    hidden_states: Tensor,
    attended: Callable[[], Tensor],
    fed: Callable[[Tensor], Tensor],
    scale: Callable[[Any], Any],
) -> Tensor:
    middle = residual(self, hidden_states, attended, "drop_path", gamma=lambda: scale(self.lambda_1), branch_first=True)
    return residual(self, middle, lambda: fed(middle), "drop_path", gamma=lambda: scale(self.lambda_2), branch_first=True)


def _needed(scale: Any) -> Any:
    if scale is None:
        raise TypeError("unsupported operand type(s) for *: 'NoneType' and 'Tensor'")
    return scale


@rule("5bb396067159", name="beit", homes=_BEIT, ops=_OPS, inlines=_BEIT_INLINES)
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

    def attended() -> Tensor:
        return self.dropout(
            _first_of_two(self.attention(self.layernorm_before(hidden_states), attention_mask=attention_mask, **kwargs))
        )

    def fed(middle: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.layernorm_after(middle)))

    return _scaled_residuals(self, hidden_states, attended, fed, _needed)


def _data2vec(self: Any, hidden_states: Tensor, *head_mask: Any, **attention: Any) -> tuple[Tensor, ...]:
    outputs = self.attention(self.layernorm_before(hidden_states), *head_mask, **attention)
    # Kept in a list until the residual pops it: then nobody else has it.
    made, rest = [outputs[0]], outputs[1:]
    del outputs

    def fed(middle: Tensor) -> Tensor:
        return self.output(self.intermediate(self.layernorm_after(middle)))

    result = _scaled_residuals(self, hidden_states, made.pop, fed, lambda gamma: gamma)
    return (result,) + rest  # noqa: RUF005 - which takes nothing but a tuple


# Data2Vec, and BEiT of transformers 5.0 to 5.6.
@rule("719660323160", name="beit", homes=_BEIT, ops=_OPS, inlines=_BEIT_INLINES)
def data2vec_vision(
    self: Any,
    hidden_states: Tensor,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: Any = None,
) -> tuple[Tensor, ...]:
    return _data2vec(
        self,
        hidden_states,
        output_attentions=output_attentions,
        relative_position_bias=relative_position_bias,
        interpolate_pos_encoding=interpolate_pos_encoding,
        resolution=resolution,
    )


# transformers 4.
@rule("ef2c0d78720d", name="beit", homes=_BEIT, ops=_OPS, inlines=_BEIT_INLINES)
def beit_with_head_mask(
    self: Any,
    hidden_states: Tensor,
    head_mask: Tensor | None = None,
    output_attentions: bool = False,
    relative_position_bias: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: Any = None,
) -> tuple[Tensor, ...]:
    return _data2vec(
        self,
        hidden_states,
        head_mask,
        output_attentions=output_attentions,
        relative_position_bias=relative_position_bias,
        interpolate_pos_encoding=interpolate_pos_encoding,
        resolution=resolution,
    )

"""timm: residuals with LayerScale and DropPath, and GRN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, cat

from ...nn import functional as forms
from ..leaves import METAFORMER_SCALE, OPTIONAL_TIMM_DROP_PATH, OPTIONAL_TIMM_LAYER_SCALE, residual
from ..rules import IDENTITY, rule

_TWO_DROPS = {"drop_path1": OPTIONAL_TIMM_DROP_PATH, "drop_path2": OPTIONAL_TIMM_DROP_PATH}


def _mlp_residual(self: Any, x: Tensor, *names: str, gamma: Callable[[], Tensor | None] = lambda: None) -> Tensor:
    """With which most blocks end."""
    return residual(self, x, lambda: self.mlp(self.norm2(x)), *names, gamma=gamma)


_VIT = "timm.models.vision_transformer.Block"
_VIT_INLINES = {"ls1": OPTIONAL_TIMM_LAYER_SCALE, "ls2": OPTIONAL_TIMM_LAYER_SCALE, **_TWO_DROPS}


@rule("8561ddd356fd", name="timm-vit", homes=_VIT, ops="addcmul, addcmul", inlines=_VIT_INLINES)
def vit(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return _vit(self, x, attn_mask=attn_mask, is_causal=is_causal)


# timm before 1.0.26.
@rule("87e064935b69", name="timm-vit", homes=_VIT, ops="addcmul, addcmul", inlines=_VIT_INLINES)
def vit_never_causal(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return _vit(self, x, attn_mask=attn_mask)


def _vit(self: Any, x: Tensor, **attention: Any) -> Tensor:
    middle = residual(self, x, lambda: self.attn(self.norm1(x), **attention), "ls1", "drop_path1")
    return _mlp_residual(self, middle, "ls2", "drop_path2")


_EVA = "timm.models.eva.EvaBlock"


@rule("a6a462dede61", name="timm-eva", homes=_EVA, ops="addcmul, addcmul", inlines=_TWO_DROPS)
def eva(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    return _eva(self, x, lambda: self.gamma_2, rope=rope, attn_mask=attn_mask, is_causal=is_causal)


# timm 1.0.26 to 1.0.28.
@rule("97f3beb49c94", name="timm-eva", homes=_EVA, ops="addcmul, addcmul", inlines=_TWO_DROPS)
def eva_scaled_by_the_first(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    return _eva(self, x, lambda: _second_scale(self), rope=rope, attn_mask=attn_mask, is_causal=is_causal)


# timm before 1.0.26.
@rule("2440f5b56b9f", name="timm-eva", homes=_EVA, ops="addcmul, addcmul", inlines=_TWO_DROPS)
def eva_never_causal(self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
    return _eva(self, x, lambda: _second_scale(self), rope=rope, attn_mask=attn_mask)


def _eva(self: Any, x: Tensor, second: Callable[[], Tensor | None], **attention: Any) -> Tensor:
    middle = residual(
        self, x, lambda: self.attn(self.norm1(x), **attention), "drop_path1", gamma=lambda: self.gamma_1
    )
    return _mlp_residual(self, middle, "drop_path2", gamma=second)


def _second_scale(self: Any) -> Tensor | None:
    """Where the plain lines look at the first scale for both."""
    return None if self.gamma_1 is None else self.gamma_2


_EVA_POST_NORM = "timm.models.eva.EvaBlockPostNorm"


@rule("69a56874fc80", name="timm-eva-post-norm", homes=_EVA_POST_NORM, ops="add, add", inlines=_TWO_DROPS)
def eva_post_norm(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    return _eva_post_norm(self, x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)


# timm before 1.0.26.
@rule("278459b72447", name="timm-eva-post-norm", homes=_EVA_POST_NORM, ops="add, add", inlines=_TWO_DROPS)
def eva_post_norm_never_causal(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    return _eva_post_norm(self, x, rope=rope, attn_mask=attn_mask)


def _eva_post_norm(self: Any, x: Tensor, **attention: Any) -> Tensor:
    middle = residual(self, x, lambda: self.norm1(self.attn(x, **attention)), "drop_path1")
    return residual(self, middle, lambda: self.norm2(self.mlp(middle)), "drop_path2")


@rule("481caded03fe", name="timm-beit", homes="timm.models.beit.Block", ops="addcmul, addcmul", inlines=_TWO_DROPS)
def beit(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    middle = residual(
        self,
        x,
        lambda: self.attn(self.norm1(x), shared_rel_pos_bias=shared_rel_pos_bias),
        "drop_path1",
        gamma=lambda: self.gamma_1,
    )
    return _mlp_residual(self, middle, "drop_path2", gamma=lambda: _second_scale(self))


@rule(
    "e473045e4151",
    name="timm-cait",
    homes="timm.models.cait.LayerScaleBlock",
    ops="addcmul, addcmul",
    inlines={"drop_path": OPTIONAL_TIMM_DROP_PATH},
)
def cait(self: Any, x: Tensor) -> Tensor:
    middle = residual(self, x, lambda: self.attn(self.norm1(x)), "drop_path", gamma=lambda: self.gamma_1)
    return _mlp_residual(self, middle, "drop_path", gamma=lambda: self.gamma_2)


@rule(
    "149159453eba",
    name="timm-cait-class",
    homes="timm.models.cait.LayerScaleBlockClassAttn",
    ops="addcmul, addcmul",
    inlines={"drop_path": OPTIONAL_TIMM_DROP_PATH},
)
def cait_class(self: Any, x: Tensor, x_cls: Tensor) -> Tensor:
    middle = residual(
        self, x_cls, lambda: self.attn(self.norm1(cat((x_cls, x), dim=1))), "drop_path", gamma=lambda: self.gamma_1
    )
    return _mlp_residual(self, middle, "drop_path", gamma=lambda: self.gamma_2)


@rule(
    "280201e7b20d",
    name="timm-xcit",
    homes="timm.models.xcit.XCABlock",
    ops="addcmul, addcmul, addcmul",
    inlines={**_TWO_DROPS, "drop_path3": OPTIONAL_TIMM_DROP_PATH},
)
def xcit(self: Any, x: Tensor, H: int, W: int) -> Tensor:
    first = residual(self, x, lambda: self.attn(self.norm1(x)), "drop_path1", gamma=lambda: self.gamma1)
    # The third comes second, as in timm.
    second = residual(
        self, first, lambda: self.local_mp(self.norm3(first), H, W), "drop_path3", gamma=lambda: self.gamma3
    )
    return _mlp_residual(self, second, "drop_path2", gamma=lambda: self.gamma2)


@rule(
    "95f12f9ac071",
    name="timm-xcit-class",
    homes="timm.models.xcit.ClassAttentionBlock",
    ops="addcmul, add",
    inlines=_TWO_DROPS,
)
def xcit_class(self: Any, x: Tensor) -> Tensor:
    def attended() -> Tensor:
        normed = self.norm1(x)
        return cat([self.attn(normed), normed[:, 1:]], dim=1)

    def classified() -> Tensor:
        return cat([self.gamma2 * self.mlp(normed[:, 0:1]), normed[:, 1:]], dim=1)

    middle = residual(self, x, attended, "drop_path1", gamma=lambda: self.gamma1)
    normed = self.norm2(middle) if self.tokens_norm else cat([self.norm2(middle[:, 0:1]), middle[:, 1:]], dim=1)
    return residual(self, normed, classified, "drop_path2")


@rule(
    "ef587687cb03",
    name="timm-convnext",
    homes="timm.models.convnext.ConvNeXtBlock",
    ops="mul_add",
    inlines={"drop_path": OPTIONAL_TIMM_DROP_PATH},
)
def convnext(self: Any, x: Tensor) -> Tensor:
    def branch() -> Tensor:
        hidden = self.conv_dw(x)
        if self.use_conv_mlp:
            return self.mlp(self.norm(hidden))
        return self.mlp(self.norm(hidden.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    def gamma() -> Tensor | None:
        return None if self.gamma is None else self.gamma.reshape(1, -1, 1, 1)

    return residual(self, self.shortcut(x), branch, "drop_path", gamma=gamma, branch_first=True)


@rule("adede9ec29c6", name="timm-grn", homes="timm.layers.grn.GlobalResponseNorm", ops="mul_add")
def grn(self: Any, x: Tensor) -> Tensor:
    # With this function for the norm: autocast treats it otherwise than others.
    norms = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
    norms = norms / (norms.mean(dim=self.channel_dim, keepdim=True) + self.eps)
    return forms.ops.mul_add(x, self.weight.view(self.wb_shape) * norms + 1, self.bias.view(self.wb_shape))


@rule(
    "1cfe8299df0d",
    name="timm-metaformer",
    homes="timm.models.metaformer.MetaFormerBlock",
    ops="addcmul, addcmul",
    inlines={"layer_scale1": (METAFORMER_SCALE, IDENTITY), "layer_scale2": (METAFORMER_SCALE, IDENTITY)},
)
def metaformer(self: Any, x: Tensor) -> Tensor:
    # What is dropped is the branch before it is scaled, so DropPath draws in the branch's dtype: it is called.
    middle = residual(
        self, self.res_scale1(x), lambda: self.drop_path1(self.token_mixer(self.norm1(x))), "layer_scale1"
    )
    return residual(
        self, self.res_scale2(middle), lambda: self.drop_path2(self.mlp(self.norm2(middle))), "layer_scale2"
    )

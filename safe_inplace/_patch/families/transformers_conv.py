"""ConvNeXt of transformers and its kin: residuals with a scale and DropPath, and GRN."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...nn import functional as forms
from ..leaves import GRN, OPTIONAL_DROP_PATH, grn, residual
from ..rules import rule

_MODELS = "transformers.models"


@rule(
    "1649e5200814",
    name="convnext",
    homes=f"{_MODELS}.convnext.modeling_convnext.ConvNextLayer",
    ops="addcmul",
    inlines={"drop_path": OPTIONAL_DROP_PATH},
)
def convnext(self: Any, features: Tensor) -> Tensor:
    def branch() -> Tensor:
        hidden = self.pwconv1(self.layernorm(self.dwconv(features).permute(0, 2, 3, 1)))
        return self.pwconv2(self.act(hidden)).permute(0, 3, 1, 2)

    return residual(self, features, branch, "drop_path", gamma=lambda: _channels_first(self.layer_scale_parameter))


@rule(
    "6199cc3860d8",
    name="dinov3-convnext",
    homes=f"{_MODELS}.dinov3_convnext.modeling_dinov3_convnext.DINOv3ConvNextLayer",
    ops="addcmul",
    inlines={"drop_path": OPTIONAL_DROP_PATH},
)
def dinov3_convnext(self: Any, features: Tensor) -> Tensor:
    def branch() -> Tensor:
        hidden = self.pointwise_conv1(self.layer_norm(self.depthwise_conv(features).permute(0, 2, 3, 1)))
        return self.pointwise_conv2(self.activation_fn(hidden)).permute(0, 3, 1, 2)

    return residual(self, features, branch, "drop_path", gamma=lambda: _channels_first(self.gamma))


def _channels_first(gamma: Any) -> Any:
    """For a branch whose channels come first what was for one with its channels last."""
    if not isinstance(gamma, Tensor) or gamma.ndim == 0:
        return gamma
    return gamma[(None,) * (4 - gamma.ndim)].permute(0, 3, 1, 2)


@rule(
    "fe85afdb1f48",
    name="convnextv2",
    homes=f"{_MODELS}.convnextv2.modeling_convnextv2.ConvNextV2Layer",
    ops="mul_add, add",
    inlines={"grn": GRN, "drop_path": OPTIONAL_DROP_PATH},
)
def convnextv2(self: Any, features: Tensor) -> Tensor:
    def branch() -> Tensor:
        return self.pwconv2(grn(self, activated)).permute(0, 3, 1, 2)

    def activated() -> Tensor:
        return self.act(self.pwconv1(self.layernorm(self.dwconv(features).permute(0, 2, 3, 1))))

    return residual(self, features, branch, "drop_path")


@rule(
    "91ed2bea9f08",
    name="convnextv2-grn",
    homes=f"{_MODELS}.convnextv2.modeling_convnextv2.ConvNextV2GRN",
    ops="mul_add",
)
def convnextv2_grn(self: Any, hidden_states: Tensor) -> Tensor:
    return forms.grn(hidden_states, self.weight, self.bias)

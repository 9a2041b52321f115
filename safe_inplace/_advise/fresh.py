"""Who always returns a tensor in memory of its own, never an argument, a view of one, or what it keeps; and keeps no argument."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .. import ops

# Not their subclasses, which may do anything.
PLAIN = (torch.Tensor, nn.Parameter)


def is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """By identity: a program's own classes may say that they equal any other."""
    kind = type(value)
    return any(kind is each for each in kinds)


def _named(names: str, *spaces: Any) -> list[Any]:
    return [getattr(space, name) for space in spaces for name in names.split()]


# As functions of torch and as methods of tensors.
_NAMES = """
    abs acos add addbmm addcdiv addcmul addmm addmv asin atan baddbmm bmm ceil clamp clamp_max clamp_min clone copysign cos
    cosh cumprod cumsum div erf erfc exp exp2 expm1 floor frac gather heaviside hypot index_select lerp log log10 log1p log2
    log_softmax logaddexp logcumsumexp logit logsumexp masked_fill matmul maximum mean minimum mm mul multiply neg negative
    pow prod reciprocal relu remainder round rsqrt scatter scatter_add sigmoid sign sin sinc sinh softmax sqrt square std
    sub subtract sum tan tanh trunc var where
"""
_OF_TORCH = """
    arange bernoulli cat concat conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d empty empty_like
    empty_strided full full_like layer_norm linspace group_norm multinomial normal ones ones_like outer rand rand_like randint
    randint_like randn randn_like randperm rms_norm stack zeros zeros_like
"""
_OF_FUNCTIONAL = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding gelu glu group_norm layer_norm linear
    log_softmax logsigmoid rms_norm scaled_dot_product_attention softmax softplus softsign tanhshrink
"""
_OF_MODULES = """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d Bilinear Conv1d
    Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d ELU Embedding GELU GLU GroupNorm Hardswish LayerNorm
    LeakyReLU Linear LogSoftmax MaxPool1d MaxPool2d MaxPool3d Mish RMSNorm ReLU ReLU6 SELU SiLU Sigmoid Softmax Softplus
    Softsign Tanh
"""
METHODS = frozenset(_NAMES.split())
MODULES = frozenset(_OF_MODULES.split())
# What they run when this is imported: somebody may put another forward, or another function, in its place.
_FORWARDS = {id(module): module.forward for module in (*_named(_OF_MODULES, nn), nn.Sequential)}
_CALLS = (nn.Module.__call__, nn.Module._call_impl)
_OF_INSTANCES = ("forward", "_conv_forward")  # that somebody may have given to one module
_OF_F = {name: function for name, function in vars(functional).items() if callable(function)}
_OURS = _named("add add_mul addcmul mul mul_add", ops)
# By identity: comparing what a program calls would run its code. They are kept, since an identity may come again.
_KEPT = [*_named(_NAMES + _OF_TORCH, torch), *_named(_OF_FUNCTIONAL, functional), *_OURS]
_FUNCTIONS = frozenset(map(id, _KEPT))


def is_fresh(callee: Any) -> bool:
    """Of its type alone: a program's own objects may answer anything, or raise."""
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return False
    kind = type(callee)
    if id(kind) in _FORWARDS:
        if not _is_plain_module(callee) or kind.forward is not _FORWARDS[id(kind)]:
            return False
        # The first is given the argument, and what the last returns is returned.
        ends = [] if kind is not nn.Sequential else [callee[0], callee[-1]] if len(callee) else [None]
        return not callee.__dict__.get("inplace", False) and all(map(is_fresh, ends))
    if kind is types.BuiltinMethodType and isinstance(callee.__self__, torch.Tensor):
        return is_one_of(callee.__self__, PLAIN) and callee.__name__ in METHODS
    return id(callee) in _FUNCTIONS


def _is_plain_module(module: nn.Module) -> bool:
    if (type(module).__call__, type(module)._call_impl) != _CALLS or module._compiled_call_impl is not None:
        return False
    if module._forward_hooks or module._forward_pre_hooks or any(name in module.__dict__ for name in _OF_INSTANCES):
        return False
    held = (*module._parameters.values(), *module._buffers.values())
    if not all(value is None or is_one_of(value, PLAIN) for value in held):
        return False
    every = nn.modules.module
    hooks = (*every._global_forward_hooks.values(), *every._global_forward_pre_hooks.values())
    return all(any(hook is own for own in own_hooks) for hook in hooks) and all(
        getattr(functional, name, None) is function for name, function in _OF_F.items()
    )


# On all modules, and of this package.
own_hooks: list[Any] = []

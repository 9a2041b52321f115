"""A whole backend outside of the core: torch's spare device, in the host's memory, with kernels that compute one element
after the other. Importing it registers the device under the name `toy`; there is no way back, so tests do it in a process
of their own."""

import types

import torch

from safe_inplace import _C

from . import _toy_backend

calls = _toy_backend.calls

torch.utils.rename_privateuse1_backend("toy")
device_module = types.ModuleType("torch.toy")
device_module.__dict__.update(
    is_available=lambda: True,
    is_initialized=lambda: True,
    is_in_bad_fork=lambda: False,
    _is_in_bad_fork=lambda: False,
    _lazy_init=lambda: None,
    current_device=lambda: 0,
    device_count=lambda: 1,
)
torch._register_device_module("toy", device_module)
known = _C.register_backend(_toy_backend.backend)

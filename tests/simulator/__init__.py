"""The CUDA kernels' own code, run on the CPU block by block and thread by thread, in place of the CPU's kernels.

The choice of path, index arithmetic, tails, alignment and the order of summation are those of the device. It throws on a
misaligned access, and shared memory and workspaces start as NaN. `make test` builds it, as does by hand
`python setup.py build_test_extensions`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from safe_inplace import _C

from . import _simulator


@contextmanager
def simulated(**device: Any) -> Iterator[None]:
    """Ops on the CPU run the CUDA kernels, with this `index_limit`, `small_limit`, `target_blocks` and order (`reversed`)."""
    settings = _simulator.configure(**device)
    cpu = _C.register_backend(_simulator.backend)
    launches()
    try:
        yield
    finally:
        _C.register_backend(cpu)
        _simulator.configure(**settings)


def launches() -> list[dict[str, Any]]:
    """What was launched since the last call: kernel, vector, index_bits, blocks, workspace."""
    return _simulator.launches()


@contextmanager
def readings(tensor: torch.Tensor) -> Iterator[list[int]]:
    """Fills the list with how often kernels load each element of a contiguous tensor inside the block."""
    counts: list[int] = []
    _simulator.watch(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    try:
        yield counts
    finally:
        loads = torch.frombuffer(bytearray(_simulator.take_loads()), dtype=torch.uint8)
        per_element = loads.view(-1, tensor.element_size())
        assert (per_element == per_element[:, :1]).all(), "a part of an element was loaded"
        counts.extend(per_element[:, 0].tolist())

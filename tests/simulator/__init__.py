"""The CUDA kernels' own code, run on the CPU block by block and thread by thread, in place of the CPU's kernels.

The choice of path, index arithmetic, tails, alignment and the order of summation are those of the device. It throws on a
misaligned access, and shared memory and workspaces start as NaN. `make test` builds it, as does by hand
`python setup.py build_test_extensions`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safe_inplace import _C

from . import _simulator


@contextmanager
def simulated(**device: Any) -> Iterator[None]:
    """Ops on the CPU run the CUDA kernels, on a device with this `index_limit`, `target_blocks` and order (`reversed`)."""
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

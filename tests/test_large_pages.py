"""What the CPU kernels are the first to touch is asked for in large pages where it is mapped anew: a fault for each small
page costs several times what the kernel takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import safe_inplace

SMAPS = Path("/proc/self/smaps")
MiB = 1 << 20

pytestmark = pytest.mark.skipif(
    not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(), reason="the system does not tell of its mappings"
)


def large_pages_asked_for(tensor: torch.Tensor) -> bool:
    """Whether the mapping of the tensor's middle carries the kernel's mark of madvise(MADV_HUGEPAGE)."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            begin, end = (int(bound, 16) for bound in mapping.groups())
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("memory outside every mapping")


def node_output(size: int) -> torch.Tensor:
    return torch.ones(size // 4, requires_grad=True) * 1


SIZES = pytest.mark.parametrize("size, large", [(64 * MiB, True), (16 * MiB, False)])


def asked_for_large_pages() -> int:
    """The bytes of all mappings that carry the mark."""
    asked = size = 0
    for line in SMAPS.read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            begin, end = (int(bound, 16) for bound in mapping.groups())
            size = end - begin
        elif line.startswith("VmFlags:") and "hg" in line.split():
            asked += size
    return asked


@SIZES
def test_the_kept_copy(size, large):
    """Saved-tensor hooks would show it, but where they are the copy is made ahead, by torch."""
    x = node_output(size)
    before = asked_for_large_pages()
    result = safe_inplace.mul_(x, torch.full((1,), 2.0, requires_grad=True))
    assert (asked_for_large_pages() - before >= size - 2 * MiB) == large
    assert not large_pages_asked_for(result)


@SIZES
def test_a_new_gradient(size, large):
    result = safe_inplace.mul_(node_output(size), torch.full((1,), 2.0))
    gradient = torch.ones(size // 4)
    asked: list[bool] = []
    result.grad_fn.register_hook(lambda grads, _: asked.append(large_pages_asked_for(grads[0])))
    result.backward(gradient)
    assert asked == [large]
    assert not large_pages_asked_for(gradient)

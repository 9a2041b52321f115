"""An installed safe_inplace at work: an op, its gradient, and guard's word for a write that torch cannot see."""

import re
import sys
from pathlib import Path

import torch

import safe_inplace

assert Path(safe_inplace.__file__).is_relative_to(sys.prefix), f"{safe_inplace.__file__} is not what was installed"

x, scale, shift = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
assert torch.autograd.gradcheck(safe_inplace.mul_add, (x, scale, shift))
assert torch.autograd.gradcheck(lambda x, *operands: safe_inplace.mul_add_(x.clone(), *operands), (x, scale, shift))

try:
    with safe_inplace.guard():
        y = x.exp()
        y.data.mul_(2)  # the write
        y.sum().backward()
except safe_inplace.HazardError as error:
    line = next(number for number, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# the write"))
    assert re.search(rf"{Path(__file__).name}:{line}\b", str(error)), error
else:
    sys.exit("guard let a harmful write pass")
print("op, gradient and guard work")

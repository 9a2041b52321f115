"""Every op on the toy device against torch's own on the CPU, forward and backward. Prints how often the kernels ran."""

import itertools

import torch

from safe_inplace import guard

from ..layouts import random_tensor
from ..op_table import OPS
from . import calls, known

SHAPE = (2, 3, 4)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
OPERANDS = {
    "full": lambda dtype: random_tensor(SHAPE, dtype),
    "transposed": lambda dtype: random_tensor(SHAPE[::-1], dtype).permute(2, 1, 0),
    "vector": lambda dtype: random_tensor(SHAPE[-1:], dtype),
    "number": lambda dtype: 0.5,
}


def run(function, leaves, given):
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in leaves]
    input = leaves[0].clone()
    function(input, *leaves[1:])
    assert input._version == 1
    wanted = [t for t in leaves if isinstance(t, torch.Tensor)]
    return [input, *torch.autograd.grad(input, wanted, given)]


def check(op, dtype, kinds):
    leaves = [random_tensor(SHAPE, dtype), *(OPERANDS[kind](dtype) for kind in kinds)]
    given = random_tensor(SHAPE, dtype)
    there = [t.to("toy") if isinstance(t, torch.Tensor) else t for t in leaves]
    forward_calls, _ = calls()
    ours = run(op.function, there, given.to("toy"))
    assert calls()[0] == forward_calls + 1, f"no kernel ran for {op.name}"
    assert {t.device.type for t in ours} == {"toy"}
    for result, expected in zip(ours, run(op.function, leaves, given), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


def check_refusals(op):
    input = torch.ones(2, 3).to("toy")
    try:
        op.function(input, *[torch.ones(4).to("toy") for _ in op.operands])
    except RuntimeError as error:
        assert "must match" in str(error)
    else:
        raise AssertionError(f"{op.name} took a shape that does not broadcast")
    assert input._version == 0 and torch.equal(input.cpu(), torch.ones(2, 3))


def check_guard():
    """Verify says once that it does not reach a device without a digest, and all else is as elsewhere."""
    leaf = torch.ones(3).to("toy").requires_grad_()
    with guard("copy") as found:
        saved = leaf.exp()
        result = saved * 1
        saved.mul_(2)
        result.sum().backward()
    assert len(found.hazards) == 1
    torch.testing.assert_close(leaf.grad.cpu(), torch.ones(3).exp())


assert known is None
for op in OPS:
    check_refusals(op)
    for dtype, *kinds in itertools.product(DTYPES, *[OPERANDS] * len(op.operands)):
        check(op, dtype, kinds)
check_guard()
print(*calls())

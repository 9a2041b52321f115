"""The implementations that are measured side by side, each made from the op's row of the table."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch

from .cases import Case

IN_PLACE, OUT_OF_PLACE = "torch in place", "torch out of place"
COMPILED, COMPILED_IN_PLACE = "torch.compile", "torch.compile in place"
TRITON, OURS = "triton", "safe_inplace"
ORDER = [IN_PLACE, OUT_OF_PLACE, COMPILED, COMPILED_IN_PLACE, TRITON, OURS]

Function = Callable[..., torch.Tensor]


def torch_in_place(case: Case) -> Function:
    """torch's own method where there is one, else the two calls that people write."""
    if case.op.torch_method and (case.layout.has_tensors or len(case.op.operands) == 1):
        return getattr(torch.Tensor, case.op.torch_method)
    return case.op.two_step


def torch_out_of_place(case: Case) -> Function:
    if case.op.torch_method and (case.layout.has_tensors or len(case.op.operands) == 1):
        return getattr(torch, case.op.torch_method.removesuffix("_"))
    return case.op.reference


def compiled(function: Function) -> Function:
    """Compiled for exactly these shapes, as a training loop would have it."""

    def call(*arguments):
        return function(*arguments)

    # Compiled code belongs to a code object, and is not guarded by which builtin a closure of it calls: with one code
    # object for all, the out-of-place form would run what was compiled for the in-place form.
    own = FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def compiler_works(device: torch.device) -> bool:
    return device.type == "cuda" or shutil.which("g++") is not None


def implementations(case: Case, device: torch.device, compile: bool = True) -> dict[str, Function]:
    found = {IN_PLACE: torch_in_place(case), OUT_OF_PLACE: torch_out_of_place(case)}
    if compile and case.compiled and compiler_works(device):
        # Every case compiles the same few code objects; their caches would overflow into eager without a word.
        torch.compiler.reset()
        found[COMPILED] = compiled(found[OUT_OF_PLACE])
        # On a GPU it is the same kernel but for the address that it stores to, and each costs seconds to compile.
        if not case.mode.grad and device.type == "cpu":
            found[COMPILED_IN_PLACE] = compiled(found[IN_PLACE])
    # The kernels for Triton walk all operands in the order of the input's memory.
    in_order = case.layout.beside is None
    if device.type == "cuda" and torch.cuda.is_available() and not case.mode.grad and in_order:
        from .triton_kernels import elementwise

        found[TRITON] = partial(elementwise, case)
    found[OURS] = case.op.function
    return found

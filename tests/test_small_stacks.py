"""The ops in threads of 64 KiB of stack, in which torch's own run."""

import os
import subprocess
import sys

import pytest
import torch

from .layouts import KERNEL_DTYPES, short

# A crash ends the process, which must not be pytest's.
PROGRAM = """
import sys, threading
import torch
from safe_inplace import _C
from tests.layouts import LARGE, MEDIUM, random_tensor
from tests.op_table import OPS

threads, *dtypes = sys.argv[1:]
threads = int(threads)
torch.set_num_threads(threads)
layouts, memories = (MEDIUM, ("dense", "transposed")) if threads == 1 else (LARGE, ("transposed",))
failed = []


def run(op, layout, dtype, operand_dtype, memory):
    tensors = [t.detach().requires_grad_() for t in layout.tensors(len(op.operands), dtype, "cpu", operand_dtype)]
    grad_output = random_tensor(layout.shape, dtype)
    if memory == "transposed":
        grad_output = grad_output.mT.contiguous().mT if grad_output.dim() > 1 else grad_output
    result = op.function(tensors[0].clone(memory_format=torch.preserve_format), *tensors[1:])
    result.backward(grad_output)
    assert all(t.grad is not None for t in tensors)


def work():
    try:
        for dtype in (getattr(torch, name) for name in dtypes):
            print(dtype, flush=True)
            for op in OPS:
                for layout in layouts:
                    for operand_dtype in {dtype, torch.float32 if dtype.itemsize == 2 else dtype}:
                        for memory in memories:
                            run(op, layout, dtype, operand_dtype, memory)
            # the digest of guard's verify
            _C.digest(torch.ones(100_003, dtype=dtype))
            _C.digest(torch.ones(300, 400, dtype=dtype)[:, ::2])
    except BaseException as error:
        failed.append(error)
        raise


# From Python 3.14 on the interpreter keeps half of that for itself, and torch's own backward does not run.
threading.stack_size((128 if sys.version_info >= (3, 14) else 64) * 1024)
thread = threading.Thread(target=work)
thread.start()
thread.join()
sys.exit(bool(failed))
"""


# With two, OpenMP makes its own, of OMP_STACKSIZE.
@pytest.mark.parametrize("threads, dtypes", [(1, KERNEL_DTYPES), (2, [torch.bfloat16, torch.complex128])], ids=["one", "two"])
def test_every_op_and_layout_in_64_kib(threads, dtypes):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads), *map(short, dtypes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_STACKSIZE": "64k"},
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])

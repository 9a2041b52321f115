"""A backend is what registers: one outside of the core works as the core's own do."""

import subprocess
import sys

import pytest
import torch

import safe_inplace


def test_a_backend_outside_of_the_core():
    result = subprocess.run([sys.executable, "-m", "tests.toy_backend"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    forward_calls, backward_calls = map(int, result.stdout.split())
    assert forward_calls > 100 and backward_calls > 100


@pytest.mark.parametrize("other", [None, 3, torch._C._to_dlpack(torch.ones(1))], ids=["none", "number", "another capsule"])
def test_only_a_backend_registers(other):
    with pytest.raises(TypeError):
        safe_inplace._C.register_backend(other)

import os
import zlib

# The compile caches do not see a changed C++ backward.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch

from safe_inplace._guard import say

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seed(request):
    """Each test has its own seed, whatever runs before it and on whichever worker."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """What guard says once, it says to each test anew, whatever ran before it; except what it says where the first compiled
    region of a process runs, which has a test with a process of its own."""
    monkeypatch.setattr(say, "_said", {"compiled region"})


@pytest.fixture(autouse=True)
def one_thread():
    """Workers share the cores; a test of threads asks for more itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


"""A plugin of pytest for `make coverage`: what a process has counted is written before it may end without notice. A worker has
seconds to go once its tests are done, and os._exit, by which forked processes end, runs nothing of what counts are written in."""

import ctypes
import os
import sys
from typing import NoReturn

EXTENSIONS = ["safe_inplace._C", "tests.simulator._simulator", "tests.toy_backend._toy_backend"]


def write_counts() -> None:
    for name in EXTENSIONS:
        if name in sys.modules:
            counted = ctypes.CDLL(sys.modules[name].__file__)
            # What is written is added to the file, and counted again from zero.
            counted.__gcov_dump()
            counted.__gcov_reset()


def pytest_configure() -> None:
    leave_at_once = os._exit

    def leave(status: int) -> NoReturn:
        write_counts()
        leave_at_once(status)

    os._exit = leave


def pytest_sessionfinish() -> None:
    write_counts()
    if "coverage" in sys.modules:
        sys.modules["coverage"].Coverage.current().save()

"""guard in training over two processes: silent and without effect where the program is right, and a hazard is named still."""

import pytest

from tests.guard import ranks


@pytest.mark.parametrize("name", ranks.PROGRAMS)
def test_two_processes(name):
    ranks.run(name)

"""python -m safe_inplace run."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import safe_inplace

ROOT = Path(safe_inplace.__file__).parent.parent
PROGRAM = textwrap.dedent(
    """
    import sys
    import torch

    def step(x):
        h = x * 1
        y = h * h
        h.mul_(10)
        return y

    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        if "clean" in sys.argv:
            (x * x).sum().backward()
        else:
            step(x).sum().backward()
    print(__name__, sys.argv[1:], x.grad.tolist())
    if "three" in sys.argv:
        sys.exit(3)
    """
).lstrip()


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "safe_inplace", "run", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def line(text):
    return PROGRAM[: PROGRAM.index(text)].count("\n") + 1


def test_raise_stops_at_the_write(program):
    done = run(program, "program.py")
    assert done.returncode == 1 and done.stdout == ""
    assert "safe_inplace guard: 1 hazard between 1 pair of lines" in done.stderr
    assert f"program.py:{line('h.mul_')}, in step" in done.stderr
    assert f"program.py:{line('y = h')}, in step" in done.stderr
    assert f"{os.sep}_guard{os.sep}" not in done.stderr
    assert done.stderr.count("y = h * h") == 1 and "runpy" not in done.stderr and "\x1b" not in done.stderr


def test_colour_on_a_terminal_and_nowhere_else(program):
    """What the program writes to a log of its own stays plain, wherever its messages go."""
    (program / "logs.py").write_text(
        PROGRAM + "\n" + "import logging\nlogging.basicConfig(filename='log')\n"
        "try:\n    step(x)\nexcept RuntimeError:\n    logging.exception('caught')\n"
    )
    master, terminal = os.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "safe_inplace", "run", "logs.py", "clean"],
        cwd=program,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    while chunk := _read(master):
        shown += chunk
    assert done.wait(timeout=120) == 1
    assert b"\x1b[1;31mwritten" in shown and b"h.mul_(10)" in shown
    logged = (program / "log").read_text()
    assert "HazardError" in logged and "h.mul_(10)" in logged and "\x1b" not in logged


def _read(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # on Linux that is how a terminal ends
        return b""


def test_copy_runs_on_and_counts(program):
    done = run(program, "--on-hazard", "copy", "--json", "found.json", "program.py", "--verify", "-m")
    assert done.returncode == 1, done.stderr
    assert done.stdout == "__main__ ['--verify', '-m'] [4.0, 4.0, 4.0]\n"
    assert "2 times, 24 B copied" in done.stderr
    found = json.loads((program / "found.json").read_text())
    assert found["hazards_seen"] == 2 and found["bytes_copied"] == 24 and not found["verify"]
    (hazard,) = found["hazards"]
    assert hazard["mutation"]["lineno"] == line("h.mul_") and hazard["save"]["lineno"] == line("y = h")
    assert hazard["op"] == "aten.mul_.Tensor" and hazard["count"] == 2 and hazard["remedies"]


def test_warn_lets_torch_refuse(program):
    done = run(program, "--on-hazard=warn", "program.py")
    assert done.returncode == 1
    assert "HazardWarning" in done.stderr and "backward" in done.stderr


def test_defer_stops_where_backward_asks_for_the_value(program):
    done = run(program, "--on-hazard", "defer", "program.py")
    assert done.returncode == 1 and done.stdout == ""
    assert "has been modified by an inplace operation" in done.stderr and "step(x).sum().backward()" in done.stderr
    assert f"program.py:{line('h.mul_')}, in step" in done.stderr
    assert f"program.py:{line('y = h')}, in step" in done.stderr


@pytest.mark.parametrize(("arguments", "status"), [(["clean"], 0), (["clean", "three"], 3)])
def test_a_clean_program_keeps_its_status(program, arguments, status):
    done = run(program, "--verify", "program.py", *arguments)
    assert done.returncode == status, done.stderr
    assert done.stderr == "safe_inplace guard: no hazards\n"


def test_a_module(program):
    done = run(program, "--on-hazard", "copy", "-m", "program", "--flag", "clean")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("__main__ ['--flag', 'clean']")


def test_a_program_that_fails_by_itself(program):
    (program / "fails.py").write_text("def f():\n    raise KeyError('gone')\nf()\n")
    done = run(program, "fails.py")
    assert done.returncode == 1
    assert "KeyError: 'gone'" in done.stderr and "runpy" not in done.stderr and "_run.py" not in done.stderr


def test_nothing_to_run(program):
    assert run(program).returncode == 2

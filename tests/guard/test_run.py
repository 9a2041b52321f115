"""python -m safe_inplace run."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import safe_inplace
from safe_inplace.__main__ import main

HAZARDS = 86
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

FORWARDS = PROGRAM.replace("step(x).sum().backward()", "step(x)").replace(", x.grad.tolist()", "")


def run(folder, *arguments, python=("-m", "safe_inplace", "run"), **environment):
    return subprocess.run(
        [sys.executable, *python, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
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
    assert done.returncode == HAZARDS and done.stdout == ""
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
    assert done.wait(timeout=120) == HAZARDS
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
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ ['--verify', '-m'] [4.0, 4.0, 4.0]\n"
    assert "2 times, 24 B copied" in done.stderr
    found = json.loads((program / "found.json").read_text())
    assert found["hazards_seen"] == 2 and found["bytes_copied"] == 24 and not found["verify"]
    (hazard,) = found["hazards"]
    assert hazard["mutation"]["lineno"] == line("h.mul_") and hazard["save"]["lineno"] == line("y = h")
    assert hazard["op"] == "aten.mul_.Tensor" and hazard["count"] == 2 and hazard["remedies"]


def test_warn_lets_torch_refuse(program):
    done = run(program, "--on-hazard=warn", "program.py")
    assert done.returncode == HAZARDS
    assert done.stderr.startswith("safe_inplace guard: a value") and "backward" in done.stderr


def test_defer_stops_where_backward_asks_for_the_value(program):
    done = run(program, "--on-hazard", "defer", "program.py")
    assert done.returncode == HAZARDS and done.stdout == ""
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



def at_once(program, text, *arguments):
    (program / "other.py").write_text(text)
    done = run(program, *arguments, "other.py")
    assert done.returncode == 0, done.stderr
    return done.stdout


ABOUT = """
import sys
annotated: int = 1
print([__file__, sys.argv, sys.path[0], __name__, __package__, __spec__ and __spec__.name])
print(sorted(globals()), sys.modules["__main__"].__annotations__)
"""


@pytest.mark.parametrize("way", ["script", "path", "link", "module", "package", "folder"])
def test_a_program_finds_about_itself_what_the_interpreter_tells(tmp_path, way):
    package = tmp_path / "inner" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import sys\nprint(sys.argv)\n")
    for name in ("inner/script.py", "inner/package/__main__.py"):
        (tmp_path / name).write_text(ABOUT)
    (tmp_path / "link.py").symlink_to("inner/script.py")
    folder, arguments = {
        "script": ("inner", ["script.py"]),
        "path": ("", ["inner/script.py"]),
        "link": ("", ["link.py"]),
        "module": ("inner", ["-m", "script"]),
        "package": ("inner", ["-m", "package"]),
        "folder": ("", ["inner/package"]),
    }[way]
    plain = subprocess.run(
        [sys.executable, *arguments, "--flag", "-m"], cwd=tmp_path / folder, capture_output=True, text=True, timeout=120
    )
    done = run(tmp_path / folder, *arguments, "--flag", "-m")
    assert plain.returncode == 0 and done.stdout == plain.stdout
    assert done.stderr == "safe_inplace guard: no hazards\n"


def test_what_the_program_leaves_behind_finds_its_module(program):
    (program / "late.py").write_text(
        "import atexit, pickle\nclass Thing: pass\nthing = Thing()\n"
        "atexit.register(lambda: print(type(pickle.loads(pickle.dumps(thing))) is Thing))\n"
    )
    assert run(program, "late.py").stdout == "True\n"


def test_a_script_that_changes_folder_keeps_its_lines_and_its_remedies(program):
    (program / "moves.py").write_text("import os\nos.chdir('/')\n" + PROGRAM.replace("h.mul_(10)", "h = h.mul_(10)"))
    done = run(program, "moves.py")
    assert "h = h.mul_(10)" in done.stderr and "y = h * h" in done.stderr
    assert "Write it out of place: h = h.mul(10)" in done.stderr


def test_two_dashes_end_the_options(program):
    done = run(program, "--on-hazard", "copy", "--", "program.py", "--", "--json")
    assert done.stdout == "__main__ ['--', '--json'] [4.0, 4.0, 4.0]\n"


def test_version(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "safe_inplace", "--version"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"safe_inplace {safe_inplace.__version__}\n" and done.returncode == 0


def test_the_console_script(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, _, function = project["scripts"]["safe-inplace"].partition(":")
    script = tmp_path / "safe-inplace"
    script.write_text(f"import sys\nfrom {name} import {function}\nsys.exit({function}())\n")
    (tmp_path / "x.py").write_text("import sys\nprint(sys.path[0])\n")
    (tmp_path / "y").mkdir()
    for arguments, status, text in ((["run", "../x.py"], 0, f"{tmp_path}\n"), (["run"], 2, "usage: safe-inplace run [")):
        done = subprocess.run(
            [sys.executable, script, *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path / "y",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status and (done.stdout or done.stderr).startswith(text), done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to run"),
        (["--verify"], "nothing to run"),
        (["--"], "nothing to run"),
        (["-m"], "nothing to run"),
        (["--bogus", "program.py"], "unrecognized arguments: --bogus"),
        (["--on-hazard", "never", "program.py"], "invalid choice: 'never'"),
        (["--json", "no/such/folder.json", "program.py"], "--json no/such/folder.json: No such file"),
    ],
)
def test_a_call_that_is_wrong_shows_the_usage_of_run(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["run", *arguments])
    printed = capsys.readouterr()
    assert exit.value.code == 2 and printed.out == ""
    assert printed.err.startswith("usage: python -m safe_inplace run [--on-hazard") and complaint in printed.err


def test_unknown_arguments_of_other_commands_show_their_usage(tmp_path, capsys):
    for command in ("env", "check-sources"):
        with pytest.raises(SystemExit) as exit:
            main([command, "--bogus"])
        assert exit.value.code == 2
        assert capsys.readouterr().err.startswith(f"usage: python -m safe_inplace {command}")


@pytest.mark.parametrize(
    ("arguments", "status"), [(["gone.py"], 2), (["-m", "gone"], 1), (["-m", "gone.too"], 1), (["empty"], 1), (["broken.py"], 1)]
)
def test_no_verdict_where_nothing_ran(program, arguments, status):
    (program / "empty").mkdir()
    (program / "broken.py").write_text("def\n")
    plain = subprocess.run([sys.executable, *arguments], cwd=program, capture_output=True, text=True, timeout=120)
    done = run(program, *arguments)
    assert done.returncode == plain.returncode == status
    assert "hazards" not in done.stderr and done.stderr.splitlines()[-1].partition(": ")[2] == (
        plain.stderr.splitlines()[-1].partition(": ")[2]
    )


def test_the_file_is_opened_before_the_program_starts_and_where_it_started(program):
    text = at_once(
        program,
        "import os\nprint(os.path.exists('found.json'))\nos.makedirs('x')\nos.chdir('x')",
        "--json",
        "found.json",
    )
    assert text == "True\n"
    found = json.loads((program / "found.json").read_text())
    assert found["hazards"] == [] and found["program"] == ["other.py"] and found["status"] == 0


NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.ReLU(inplace=True))
    def forward(self, x): return self.body(x)
Net()(torch.ones(1, 2)).sum().backward()
"""


def test_the_file_is_the_documented_one(program):
    (program / "train.py").write_text(NET)
    assert run(program, "--on-hazard", "copy", "--json", "found.json", "train.py", "--epochs", "3").returncode == 0
    text = (program / "found.json").read_text()
    page = (ROOT / "docs" / "run.md").read_text()
    (example,) = re.findall(r"^```json\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    found, documented = (json.loads(each.replace(str(program), "/home/me")) for each in (text, example))
    # Of the machine and of the build.
    assert found.pop("pid") > 0 < documented.pop("pid")
    assert found.pop("torch").partition(".")[0] == documented.pop("torch").partition(".")[0]
    assert found.pop("safe_inplace").count(".") == documented.pop("safe_inplace").count(".")
    assert found == documented
    (hazard,) = found["hazards"]
    begin, end = hazard["mutation"]["columns"]
    assert hazard["mutation"]["source"][begin:end] == "self.body(x)"


def test_hazards_have_a_status_that_no_program_has(program):
    for code, mode, status in ((3, "warn", HAZARDS), (0, "copy", 0), (3, "copy", 3)):
        (program / "other.py").write_text(FORWARDS + f"\nsys.exit({code})\n")
        assert run(program, "--on-hazard", mode, "other.py").returncode == status
    for code in (HAZARDS, HAZARDS + 256):
        (program / "other.py").write_text(f"import sys\nsys.exit({code})\n")
        done = run(program, "other.py")
        assert done.returncode == 1 and "no hazards" in done.stderr and f"exits with {HAZARDS}" in done.stderr


def test_copy_that_could_not_repair_is_told_by_the_status(program):
    """What was overwritten before the guard could see it."""
    (program / "other.py").write_text(
        "import threading, torch, _thread\nx = torch.ones(3, requires_grad=True)\nh = x * 1\ny = h * h\n"
        "import numpy\nalias = h.detach().numpy()\nalias *= 2\ny.sum().backward()\n"
    )
    done = run(program, "--on-hazard", "copy", "--verify", "other.py")
    assert done.returncode == HAZARDS, done.stderr


IN_A_GROUP = PROGRAM.replace("step(x).sum()", """
        try:
            step(x)
        except RuntimeError as error:
            raise ExceptionGroup("of tasks", [ValueError("another"), error]) from None
        x.sum()""")


@pytest.mark.parametrize(
    ("text", "status"), [(PROGRAM, 0), (IN_A_GROUP, 0), ("raise KeyError", 1), ("import sys; sys.exit(3)", 3)]
)
def test_exit_zero_is_for_hazards_alone(program, text, status):
    (program / "other.py").write_text(text)
    done = run(program, "--exit-zero", "other.py")
    assert done.returncode == status, done.stderr
    assert ("1 hazard" in done.stderr) == (text in (PROGRAM, IN_A_GROUP))


def test_ctrl_c_ends_it_as_it_ends_the_interpreter(program):
    """By the signal: a shell's loop around the program stops."""
    # What began in the background of a shell ignores the signal, and so do its children.
    (program / "waits.py").write_text(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nsignal.raise_signal(signal.SIGINT)\n"
    )
    done = run(program, "--json", "found.json", "waits.py")
    assert done.returncode == -signal.SIGINT and done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("KeyboardInterrupt\nsafe_inplace guard: no hazards\n")
    assert json.loads((program / "found.json").read_text())["status"] == -signal.SIGINT
    (program / "waits.py").write_text(PROGRAM + "raise KeyboardInterrupt\n")
    assert run(program, "--on-hazard", "copy", "waits.py").returncode == -signal.SIGINT
    (program / "waits.py").write_text(FORWARDS + "raise KeyboardInterrupt\n")
    assert run(program, "--on-hazard", "warn", "waits.py").returncode == HAZARDS


@pytest.mark.parametrize("mode", ["warn", "defer"])
def test_warnings_that_are_errors_stop_nothing(program, mode):
    """Neither what guard finds nor what it cannot look at is a warning of the program's."""
    (program / "strict.py").write_text(
        "import torch, warnings\nwarnings.simplefilter('error')\n"
        "with torch.autograd.graph.save_on_cpu():\n    torch.ones(2, requires_grad=True).sin().sum().backward()\n"
        "torch.func.grad(torch.sin)(torch.ones(()))\n" + FORWARDS
    )
    done = run(program, "--on-hazard", mode, "strict.py")
    assert done.stdout == "__main__ []\n" and "Traceback" not in done.stderr
    assert "save_on_cpu" in done.stderr and "torch.func" in done.stderr
    assert done.returncode == (HAZARDS if mode == "warn" else 0)
    if mode == "warn":
        at_once, at_the_end = done.stderr.split("safe_inplace guard: 2 hazards between 1 pair of lines")
        assert at_once.count("h.mul_(10)") == at_the_end.count("| h.mul_(10)") == 1


def test_a_program_that_another_takes_over_is_told_of_before(program):
    """In a line of PATH it looks into folders without the program, too."""
    (program / "first.py").write_text(
        FORWARDS + "import os\n"
        "os.environ['PATH'] = f'/nowhere:{os.path.dirname(sys.executable)}'\n"
        "name = os.path.basename(sys.executable)\n"
        "arguments = [name, *(['-I'] if 'alone' in sys.argv else []), '-c', 'print(7); raise SystemExit(3)']\n"
        "try:\n    os.execvp('no-such-program', arguments)\nexcept FileNotFoundError:\n    print('none')\n"
        "sys.stdout.flush()\nos.execvp(name, arguments)\n"
    )
    done = run(program, "--on-hazard", "warn", "--json", "found.json", "first.py")
    assert (done.returncode, done.stdout) == (3, "__main__ []\nnone\n7\n"), done.stderr
    assert done.stderr.count("2 hazards between 1 pair of lines") == 1
    found = json.loads((program / "found.json").read_text())
    assert found["status"] is None and found["hazards_seen"] == 2 and found["unguarded"] == {"threads": 0, "processes": 0}
    (program / "second.py").write_text(
        "import os, sys\nos.execve(sys.executable, argv=[sys.executable, '-c', 'print(5)'], env=dict(os.environ))\n"
    )
    assert run(program, "second.py").stdout == "5\n"
    done = run(program, "--on-hazard", "warn", "--json", "found.json", "first.py", "alone")
    assert json.loads((program / "found.json").read_text())["unguarded"]["processes"] == 1
    assert "1 process ran unguarded" in done.stderr


def test_a_report_at_the_end_by_sigterm(program):
    # Python answers a signal between two steps: one that comes right before a long sleep waits for its end.
    (program / "waits.py").write_text(
        FORWARDS + "\nimport time\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-m", "safe_inplace", "run", "--on-hazard", "copy", "--json", "found.json", "waits.py"],
        cwd=program,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while started.stdout.readline() != "ready\n":
        assert started.poll() is None
    started.terminate()
    _, told = started.communicate(timeout=60)
    assert started.returncode == -signal.SIGTERM
    assert "2 hazards between 1 pair of lines" in told
    found = json.loads((program / "found.json").read_text())
    assert found["hazards_seen"] == 2 and found["status"] == -signal.SIGTERM


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_sigterm_while_a_stream_is_written(program, stream):
    """Its lock is held, and no more can be written to it."""
    (program / "writes.py").write_text(
        FORWARDS + "import io, os, signal\n"
        "class Pipe(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, data):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        return len(data)\n"
        f"sys.{stream} = io.TextIOWrapper(io.BufferedWriter(Pipe()))\n"
        f"print('text', file=sys.{stream}, flush=True)\n"
    )
    done = run(program, "--on-hazard", "copy", "--json", "found.json", "writes.py")
    assert done.returncode == -signal.SIGTERM
    assert "2 hazards between 1 pair of lines" in done.stderr
    assert json.loads((program / "found.json").read_text())["hazards_seen"] == 2


def test_the_program_keeps_its_own_answer_to_sigterm(program):
    (program / "answers.py").write_text(
        "import os, signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nos.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = run(program, "answers.py")
    assert done.returncode == 7 and done.stderr == "safe_inplace guard: no hazards\n"


# Of each: what it prints, and its status.
RIGHT = {
    "objects of __main__ in a spawned pool": (
        """
        import multiprocessing
        class Thing:
            def __init__(self, value): self.value = value
        def work(thing): return Thing(thing.value + 1)
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [Thing(1)])[0].value, Thing.__module__)
        """,
        "2 __main__\n",
        0,
    ),
    "a worker that an atexit function stops": (
        """
        import atexit, multiprocessing
        context = multiprocessing.get_context("fork")
        stop = context.Event()
        context.Process(target=stop.wait).start()
        atexit.register(stop.set)
        atexit.register(print, "asks it to stop")
        print("through")
        """,
        "through\nasks it to stop\n",
        0,
    ),
    "its own hook of exceptions": (
        """
        import sys
        def hook(kind, value, trace): print(kind.__name__, value, trace.tb_frame.f_code.co_name)
        sys.excepthook = hook
        raise ValueError("boom")
        """,
        "ValueError boom <module>\n",
        1,
    ),
    "children with paths and bytes in their environment": (
        """
        import os, pathlib, subprocess, sys
        for environment in ({**os.environ, "PYTHONPATH": pathlib.Path("src")}, os.environb):
            subprocess.run([sys.executable, "-c", "print('child')"], env=environment, check=True)
        """,
        "child\nchild\n",
        0,
    ),
    "a negative status": ("import sys; print('ends'); sys.exit(-1)", "ends\n", 255),
}


@pytest.mark.parametrize(("text", "printed", "status"), RIGHT.values(), ids=RIGHT)
def test_a_right_program_does_what_it_does_alone(tmp_path, text, printed, status):
    (tmp_path / "program.py").write_text(textwrap.dedent(text))
    done = run(tmp_path, "--json", "found.json", "program.py", PYTHONUNBUFFERED="1")
    assert (done.stdout, done.returncode) == (printed, status), done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["status"] == status


def test_what_a_program_exits_with_is_printed(tmp_path):
    (tmp_path / "program.py").write_text("import sys\nsys.exit(ValueError('bad configuration'))\n")
    done = run(tmp_path, "program.py")
    assert done.returncode == 1 and done.stderr.startswith("bad configuration\n")


def test_a_script_that_comes_through_a_pipe(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "safe_inplace", "run", "/dev/stdin"],
        input="print('hello')",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("hello\n", 0), done.stderr


# What a program may do to what the verdict needs.
SPOILS = {
    "another stderr, no temporary folder, cancelled": """
        import asyncio, os, shutil, sys, tempfile
        class Tee:
            def write(self, text): sys.__stderr__.write(text)
            def flush(self): pass
        sys.stderr = Tee()
        shutil.rmtree(os.environ["SAFE_INPLACE_GUARD_RECORDS"])
        async def main():
            asyncio.current_task().cancel()
            await asyncio.sleep(1)
        asyncio.run(main())
    """,
    "no stderr, a full stdout": """
        import sys
        sys.stderr, sys.stdout = None, open("/dev/full", "w")
        print("cannot be written")
    """,
    "a hazard at the end of all": "",
}


@pytest.mark.parametrize("text", SPOILS.values(), ids=SPOILS)
def test_the_verdict_is_not_lost(tmp_path, text):
    forward = FORWARDS[: FORWARDS.index("x = torch")] + "x = torch.ones(3, requires_grad=True)\n"
    at_the_end = "step(x)\n" if text else "import atexit\natexit.register(step, x)\n"
    (tmp_path / "program.py").write_text(forward + at_the_end + textwrap.dedent(text))
    done = run(tmp_path, "--on-hazard", "warn", "--json", "found.json", "program.py")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["hazards_seen"] == 1 and done.returncode == HAZARDS, done.stderr
    assert "1 hazard between 1 pair of lines" in done.stderr

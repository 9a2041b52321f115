"""guard for a whole process: its threads, and the processes that it starts."""

import json
import os
import textwrap

import pytest

from tests.guard.test_run import HAZARDS, ROOT, run

STEP = """
import torch

def step(_=None):
    x = torch.ones(3, requires_grad=True)
    h = x * 1
    y = h * h
    h.mul_(10)
    y.sum().backward()
    return x.grad.tolist()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "steps.py").write_text(STEP)
    return tmp_path


def watched(folder, text, *options, mode="copy", **environment):
    """Runs the text; the answer is the process, and what the file tells."""
    (folder / "program.py").write_text(textwrap.dedent(text))
    done = run(folder, "--on-hazard", mode, "--json", "found.json", *options, "program.py", **environment)
    return done, json.loads((folder / "found.json").read_text())


def lines(hazards):
    return {(hazard["mutation"]["source"], hazard["save"]["source"]) for hazard in hazards}


HERE = {("h.mul_(10)", "y = h * h")}

THREADS = {
    "thread": "threading.Thread(target=step).start()",
    "subclass": """
class Own(threading.Thread):
    def run(self): step()
Own().start()""",
    "timer": "threading.Timer(0, step).start()",
    "pool that is left": "pool = concurrent.futures.ThreadPoolExecutor(1); pool.submit(step)",
    "pool": "concurrent.futures.ThreadPoolExecutor(1).submit(step).result()",
    # Until it is gone: torch does not survive a thread that runs when the interpreter ends.
    "raw": """
begun = threading.Event()
_thread.start_new_thread(lambda: (begun.set(), step()), ())
begun.wait()
while _thread._count(): time.sleep(0.01)""",
    "raw with keywords": """
begun = threading.Event()
_thread.start_new_thread(lambda *, function: (function.set(), step()), (), {"function": begun})
begun.wait()
while _thread._count(): time.sleep(0.01)""",
}


@pytest.mark.parametrize("text", THREADS.values(), ids=THREADS)
def test_threads_are_watched(folder, text):
    done, found = watched(folder, f"import concurrent.futures, threading, time, _thread\nfrom steps import step\n{text}\n")
    assert done.returncode == 0, done.stderr
    assert lines(found["hazards"]) == HERE and found["bytes_copied"] == 12
    assert found["processes"] == [] and found["unguarded"] == {"threads": 0, "processes": 0}


IN_A_THREAD = {
    "guard": "with safe_inplace.guard('copy'): step()",
    "verify": "with safe_inplace.guard('copy', verify=True): step()",
    "guard in guard": "with safe_inplace.guard('copy'), safe_inplace.guard('warn'): pass",
    "recorded ops": "safe_inplace.mul_(torch.ones(3, requires_grad=True) * 1, 2).sum().backward()",
}


@pytest.mark.parametrize("code", IN_A_THREAD.values(), ids=IN_A_THREAD)
def test_a_thread_ends_without_the_interpreter(folder, code):
    """What a thread would have to take the interpreter's lock for as it ends kills the process where that ends meanwhile."""
    text = f"""
        import _thread, ctypes, os, sys, threading, time
        import safe_inplace, torch
        from steps import step
        def main():
            {code}
            # The first that the thread does at its end is to wait until the main thread holds the lock.
            holding.__cxa_thread_atexit_impl(ctypes.cast(holding.usleep, ctypes.c_void_p), ctypes.c_void_p(200_000), None)
            paths.append(b"/proc/self/task/%d" % threading.get_native_id())
        paths = []
        holding = ctypes.PyDLL(None)  # its calls keep the lock
        sys.setswitchinterval(1e3)  # and nothing else gives it away
        _thread.start_new_thread(main, ())
        while not paths or _thread._count():
            time.sleep(0.001)
        end = time.monotonic() + 10
        while holding.access(paths[0], os.F_OK) == 0 and time.monotonic() < end:
            holding.usleep(1000)
        print("ended" if time.monotonic() < end else "waits")
    """
    (folder / "program.py").write_text(textwrap.dedent(text))
    done = run(folder, "program.py", python=())
    assert done.stdout == "ended\n", done.stderr


def test_a_hazard_in_a_thread_is_an_error_there_and_in_the_status(folder):
    done, _ = watched(folder, "import threading\nfrom steps import step\nthreading.Thread(target=step).start()\n", mode="raise")
    assert done.returncode == HAZARDS and "Exception in thread" in done.stderr


MULTIPROCESSING = """
import multiprocessing
from steps import step
if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    {body}
"""
PROCESSES = {
    **{
        f"{method} {kind}": MULTIPROCESSING.format(method=method, body=body)
        for method in ("fork", "spawn", "forkserver")
        for kind, body in {
            "process": "p = context.Process(target=step); p.start(); p.join(); assert p.exitcode == 0",
            "pool": "\n    with context.Pool(1) as pool: print(pool.map(step, [0]))",
            "left alone": "context.Process(target=step).start()",
        }.items()
    },
    "os.fork, os._exit": """
        import os
        from steps import step
        pid = os.fork()
        if not pid:
            step()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    """,
    "os.fork, sys.exit": """
        import os, sys
        from steps import step
        pid = os.fork()
        if not pid:
            step()
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    """,
    "killed": """
        import os, signal
        from steps import step
        pid = os.fork()
        if not pid:
            step()
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
    """,
    "subprocess": """
        import subprocess, sys
        subprocess.run([sys.executable, "-Werror", "-c", "import steps; steps.step()"], check=True)
    """,
    "subprocess elsewhere": """
        import os, subprocess, sys
        code = f"import sys; sys.path.insert(0, {os.getcwd()!r}); import steps; steps.step()"
        subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    """,
    "of a subprocess": """
        import subprocess, sys
        code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import steps; steps.step()'], check=True)"
        subprocess.run([sys.executable, "-c", code], check=True)
    """,
    "workers of a DataLoader": """
        import torch
        from steps import step
        class Steps(torch.utils.data.Dataset):
            def __len__(self): return 1
            def __getitem__(self, index): return torch.tensor(step())
        if __name__ == "__main__":
            print(list(torch.utils.data.DataLoader(Steps(), num_workers=1)))
    """,
}


@pytest.mark.parametrize("text", PROCESSES.values(), ids=PROCESSES)
def test_processes_are_watched(folder, text):
    done, found = watched(folder, text)
    assert done.returncode == 0, done.stderr
    (process,) = found["processes"]
    assert lines(process["hazards"]) == HERE and found["hazards"] == []
    assert found["unguarded"] == {"threads": 0, "processes": 0}
    assert f"safe_inplace guard, process {process['pid']} (" in done.stderr and "no hazards" not in done.stderr
    assert done.stderr.count("h.mul_(10)") == 1


def test_what_was_found_before_a_fork_is_told_once(folder):
    done, found = watched(
        folder,
        """
        import os
        from steps import step
        step()
        if not os.fork():
            step(); step()
            os._exit(0)
        os.wait()
        """,
    )
    (process,) = found["processes"]
    assert found["hazards_seen"] == 1 and process["hazards"][0]["count"] == 2, done.stderr


def test_what_is_told_in_a_forked_process_is_no_warning_there(folder):
    (folder / "steps.py").write_text(STEP.replace("y.sum().backward()\n    return x.grad.tolist()", ""))
    text = PROCESSES["os.fork, os._exit"].replace("step()\n", "import warnings; warnings.simplefilter('error'); step()\n")
    done, found = watched(folder, text, mode="warn")
    assert done.returncode == HAZARDS and len(found["processes"]) == 1 and "Traceback" not in done.stderr


def test_hazards_of_other_processes_count_for_the_status(folder):
    done, _ = watched(folder, PROCESSES["spawn process"].replace("assert p.exitcode == 0", "pass"), mode="raise")
    assert done.returncode == HAZARDS
    done, _ = watched(folder, PROCESSES["os.fork, os._exit"], mode="defer")
    assert done.returncode == HAZARDS


def test_a_program_that_ends_at_once_is_told_of(folder):
    done, found = watched(folder, "import os\nfrom steps import step\nstep()\nos._exit(5)\n")
    assert done.returncode == 5 and lines(found["hazards"]) == HERE and found["status"] == 5
    assert done.stderr.count("h.mul_(10)") == 1


def test_verify_reaches_other_processes(folder):
    (folder / "steps.py").write_text(STEP.replace("h.mul_(10)", "h.detach().numpy()[:] = 10"))
    done, found = watched(folder, PROCESSES["spawn process"].replace("assert p.exitcode == 0", "pass"), "--verify")
    (process,) = found["processes"]
    assert [hazard["kind"] for hazard in process["hazards"]] == ["corrupted"], done.stderr


UNGUARDED = {
    "isolated": "[sys.executable, '-I', '-c', 'pass']",
    "cluster": "[sys.executable, '-uS', '-c', 'pass']",
    "bare environment": "[sys.executable, '-c', 'pass'], env={}",
    "own path": "[sys.executable, '-c', 'pass'], env={**os.environ, 'PYTHONPATH': '/'}",
    "nowhere to leave what it finds": "[sys.executable, '-c', 'pass'], "
    "env={name: value for name, value in os.environ.items() if name != 'SAFE_INPLACE_GUARD_RECORDS'}",
}


@pytest.mark.parametrize("call", UNGUARDED.values(), ids=UNGUARDED)
def test_processes_that_guard_cannot_reach_are_counted(folder, call):
    done, found = watched(folder, f"import os, subprocess, sys\nsubprocess.run({call})\n")
    assert found["unguarded"] == {"threads": 0, "processes": 1}
    assert done.stderr == "safe_inplace guard: no hazards in what was watched, but 1 process ran unguarded\n"


def test_programs_that_are_not_python_are_not_counted(folder):
    _, found = watched(folder, "import subprocess\nsubprocess.run(['true'], env={})\n")
    assert found["unguarded"] == {"threads": 0, "processes": 0}


def test_what_a_compiler_starts_is_not_counted(folder):
    text = "import torch\nx = torch.ones(9, requires_grad=True)\ntorch.compile(lambda x: (x.sin() * 2).sum())(x).backward()\n"
    done, found = watched(folder, text, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    assert found["unguarded"] == {"threads": 0, "processes": 0} and "safe_inplace guard: no hazards\n" in done.stderr


def test_threads_that_were_there_before_torch_are_counted(folder):
    text = """
        import subprocess, sys
        code = "import threading, time; threading.Thread(target=time.sleep, args=(20,), daemon=True).start(); import torch"
        subprocess.run([sys.executable, "-c", code], check=True)
    """
    done, found = watched(folder, text)
    assert found["unguarded"] == {"threads": 1, "processes": 0} and "1 thread ran unguarded" in done.stderr


def test_an_interpreter_with_another_torch_goes_on_and_is_counted(folder):
    (folder / "other" / "torch").mkdir(parents=True)
    (folder / "other" / "torch" / "__init__.py").write_text("__version__ = '1.0+other'\n")
    text = """
        import subprocess, sys
        code = "import sys; sys.path.insert(0, 'other'); import torch; print(torch.__version__)"
        subprocess.run([sys.executable, "-c", code], check=True)
    """
    done, found = watched(folder, text)
    assert done.stdout == "1.0+other\n" and found["unguarded"]["processes"] == 1
    assert "1 process ran unguarded" in done.stderr and "this is torch 1.0+other" in done.stderr


def test_a_sitecustomize_of_the_user_runs_and_torch_is_not_imported(folder):
    (folder / "own").mkdir()
    (folder / "own" / "sitecustomize.py").write_text("print('own', __name__)\n")
    text = """
        import subprocess, sys
        code = "import sys; print('torch' in sys.modules, 'safe_inplace' in sys.modules, [p for p in sys.path if '_child' in p])"
        subprocess.run([sys.executable, "-c", code], check=True)
    """
    done, _ = watched(folder, text, PYTHONPATH=f"{ROOT}{os.pathsep}{folder / 'own'}")
    assert done.stdout == "own sitecustomize\nown sitecustomize\nFalse False []\n", done.stderr


def test_a_program_that_fails_in_its_sitecustomize_is_told_as_ever(folder):
    (folder / "own").mkdir()
    (folder / "own" / "sitecustomize.py").write_text("import gone\n")
    text = """
        import subprocess, sys
        print(subprocess.run([sys.executable, "-c", ""], check=True, capture_output=True, text=True).stderr)
    """
    done, _ = watched(folder, text, PYTHONPATH=f"{ROOT}{os.pathsep}{folder / 'own'}")
    assert "No module named 'gone'" in done.stdout and "Error in sitecustomize" in done.stdout


class TestWithoutTheCommand:
    """SAFE_INPLACE_GUARD alone."""

    PROGRAM = "import safe_inplace\nfrom steps import step\nstep()\n"

    def run(self, folder, text, mode):
        (folder / "program.py").write_text(textwrap.dedent(text))
        return run(folder, "program.py", python=(), SAFE_INPLACE_GUARD=mode)

    def test_guards_the_program(self, folder):
        done = self.run(folder, self.PROGRAM, "copy")
        assert done.returncode == 0 and done.stderr.startswith("safe_inplace guard: 1 hazard") and "h.mul_(10)" in done.stderr
        done = self.run(folder, self.PROGRAM, "raise")
        assert done.returncode == 1 and "HazardError" in done.stderr

    def test_guards_what_the_program_starts(self, folder):
        done = self.run(folder, "import safe_inplace\n" + PROCESSES["spawn process"], "copy,verify")
        assert done.returncode == 0 and "process" in done.stderr and done.stderr.count("h.mul_(10)") == 1

    def test_run_takes_over(self, folder):
        (folder / "program.py").write_text(self.PROGRAM)
        done = run(folder, "--on-hazard", "copy", "program.py", SAFE_INPLACE_GUARD="raise")
        assert done.returncode == 0 and done.stderr.count("safe_inplace guard:") == 1

    @pytest.mark.parametrize("mode", ["loud", "copy,loud", "verify"])
    def test_a_misspelt_mode(self, folder, mode):
        done = self.run(folder, self.PROGRAM, mode)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith(f"ValueError: SAFE_INPLACE_GUARD is '{mode}': set it to raise, warn, copy")


def test_no_folder_is_left(folder):
    temporary = folder / "tmp"
    temporary.mkdir()
    done, _ = watched(folder, PROCESSES["spawn process"], TMPDIR=str(temporary))
    assert done.returncode == 0 and not [name for name in os.listdir(temporary) if name.startswith("safe_inplace")]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RANKS = "import os\nfrom steps import step\nif os.environ['RANK'] == '1': step()\n"


def test_ranks_that_the_program_starts(folder):
    (folder / "ranks.py").write_text(RANKS)
    done = run(folder, "--on-hazard", "copy", "--json", "found.json", *TORCHRUN, "ranks.py")
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    (process,) = found["processes"]
    assert process["rank"] == 1 and process["program"] == ["ranks.py"]
    assert "safe_inplace guard, rank 1, process" in done.stderr


def test_ranks_that_run_under_the_command(folder):
    (folder / "ranks.py").write_text(RANKS)
    done = run(
        folder, "-m", "safe_inplace", "run", "--on-hazard", "copy", "--json", "found.json", "ranks.py", python=TORCHRUN
    )
    assert done.returncode == 0, done.stderr
    assert "safe_inplace guard, rank 0: no hazards" in done.stderr and "safe_inplace guard, rank 1: 1 hazard" in done.stderr
    for rank in range(2):
        found = json.loads((folder / f"found.rank{rank}.json").read_text())
        assert found["rank"] == rank and found["hazards_seen"] == rank

"""A wheel for a torch, and what it does in a fresh environment, where nothing of the source tree is to be seen."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.pages import ROOT

from .environments import ANEW, LOGS, Done, Environment, run
from .rows import Wheel, counts

DIST = ROOT / "dist"
CHECK = Path(__file__).with_name("check_wheel.py")
# Of tests/, what needs nothing else of the tree and no extension of its own.
TESTS = (
    "test_values.py",
    "test_contract.py",
    "test_gradients.py",
    "test_refusals.py",
    "test_out_of_place.py",
    "test_views.py",
    "test_nn.py",
    "guard/test_guard.py",
    "guard/test_bugs.py",
)


def build(environment: Environment, with_cuda: bool, arguments: str = "", reuse: bool = False) -> Wheel:
    row = Wheel(environment.torch, environment.version, arguments=arguments, with_cuda=with_cuda)
    if not row.install(environment):
        return row
    key = f"{environment.key}-{'cuda' if with_cuda else 'cpu'}"
    force = {"FORCE_CUDA": str(int(with_cuda)), "PYTHONPATH": None}
    scratch = LOGS / f"wheel-{key}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)

    if with_cuda:
        # Stops where a build would, before it compiles.
        done = run([environment.python, "setup.py", "dist_info", "--output-dir", scratch], f"{key}-toolkit.log", **force)
        if done.status:
            row.problem = done.last_words
            return row

    # Nothing in the tree, whose *.egg-info would be an installed package to those who look there; nothing compiled before.
    made = scratch / "dist"
    commands = ["egg_info", "--egg-base", scratch, "build", "--build-base", scratch]
    # Which builds again, if it is let.
    commands += ["bdist_wheel", "--skip-build", "--dist-dir", made]
    before = time.monotonic()
    done = run([environment.python, "setup.py", *commands], f"{key}-wheel.log", **force, **({} if reuse else ANEW))
    row.build_seconds = None if reuse else time.monotonic() - before
    row.failed = done.status != 0
    if row.failed:
        row.problem = f"not built: {done.last_words}"
        return row
    (wheel,) = made.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    wheel = wheel.replace(DIST / wheel.name)
    row.name, row.size = wheel.name, wheel.stat().st_size
    row.read_note(zipfile.ZipFile(wheel).read("safe_inplace/_build_info.py").decode())

    done = environment.make(f"{environment.venv}/.extra-test")
    with TemporaryDirectory() as folder:
        if done.status == 0:
            done = try_out(environment, wheel, key, Path(folder), row)
    row.failed = done.status != 0
    if row.failed and not (row.tests and row.tests.failed):
        row.problem = f"does not work: {done.last_words}"
    return row


def build_all(environment: Environment, arguments: str = "", reuse: bool = False) -> list[Wheel]:
    """One without CUDA and, where the torch has CUDA, one with; the one that FORCE_CUDA names, where it is set."""
    force = os.environ.get("FORCE_CUDA", "")
    made = [] if force == "1" else [build(environment, False, arguments, reuse)]
    if force == "1" or (not force and made[0].torch_cuda):
        made.append(build(environment, True, arguments, reuse))
    return made


def fresh(environment: Environment, folder: Path) -> Path:
    """The Python of a new environment, which finds what that one has installed, torch above all."""
    # Without a pip of its own: a setuptools would come with it, older than what a torch requires.
    subprocess.run([environment.python, "-m", "venv", "--without-pip", folder], check=True)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    theirs, ours = (
        subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
        for python in (environment.python, folder / "bin" / "python")
    )
    # As a folder of packages: with the files in it by which it finds others in turn.
    Path(ours, "installed.pth").write_text(f"import site; site.addsitedir({theirs!r})\n")
    return folder / "bin" / "python"


def try_out(environment: Environment, wheel: Path, key: str, folder: Path, row: Wheel) -> Done:
    python = fresh(environment, folder / "environment")
    place = folder / "place"
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    xml = LOGS / f"wheel-{key}.xml"
    xml.unlink(missing_ok=True)
    pytest = ["pytest", "-n", jobs, "--dist", "worksteal", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    # With what it requires, of which there is nothing to be had but the torch that is there, whatever pip was told elsewhere.
    steps = {
        "install": ["-m", "pip", "--isolated", "install", "-q", "--no-index", wheel],
        "env": ["-m", "safe_inplace", "env"],
        "check": ["-P", CHECK],
        "tests": ["-m", *pytest, *(f"tests/{name}" for name in TESTS), *shlex.split(row.arguments)],
    }
    for name, words in steps.items():
        done = run([python, *words], f"{key}-{name}.log", folder=place, PYTHONPATH=None, PIP_CONFIG_FILE=os.devnull)
        if name == "env" and done.status == 0:
            built_with_cuda = "built with CUDA" in done.output
            if built_with_cuda != row.with_cuda:
                return Done(1, f"CUDA is {'' if built_with_cuda else 'not '}in it")
        if done.status:
            break
    row.tests = counts(xml)
    return done

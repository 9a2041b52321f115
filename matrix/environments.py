"""The torches that are gone through, the Python of each, and the virtual environments that make sets up for them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Each torch, and the Python that it is tested with where that one is found.
TESTED: dict[str, str] = PROJECT["tool"]["safe_inplace"]["tested"]
LOGS = ROOT / "build" / "matrix"
# torch compiles by ccache where it finds one; what that one has kept would make the time of a build another's.
ANEW = {"CCACHE_RECACHE": "1"}


@dataclass(frozen=True)
class Done:
    status: int
    output: str

    @property
    def last_words(self) -> str:
        """The line that says why: an error's, or the last that is not make's own."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip() and not line.startswith("make")]
        errors = [line for line in lines if re.match(r"error\b|safe_inplace cannot be built", line, re.IGNORECASE)]
        return (errors or lines or [f"status {self.status}"])[-1]


def run(words: Sequence[str | Path], log: str, folder: Path | None = None, **environment: str | None) -> Done:
    """Runs it in the tree or that folder, with all that it says shown, and kept in the log. A variable that is None is taken
    out of its environment."""
    LOGS.mkdir(parents=True, exist_ok=True)
    changed = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    output = []
    with (
        (LOGS / log).open("w") as file,
        subprocess.Popen(
            words, cwd=folder or ROOT, env=changed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        for line in process.stdout or ():
            print(line, end="", flush=True)
            file.write(line)
            file.flush()
            output.append(line)
    return Done(process.returncode, "".join(output))


def interpreters() -> dict[str, str]:
    """A Python of each version in range that is found, by its version."""
    first, beyond = map(int, re.findall(r"3\.(\d+)", PROJECT["project"]["requires-python"]))
    versions = [f"3.{minor}" for minor in range(first, beyond)]
    found: dict[str, str] = {}
    for python in (*(f"python{version}" for version in versions), "python3", sys.executable):
        # Not all that lies on PATH runs: it may be the stub of a manager of versions.
        try:
            asked = [python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
            version = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        except OSError:
            continue
        if version in versions:
            found.setdefault(version, python)
    return found


def chosen(torches: Mapping[str, str], found: Collection[str]) -> dict[str, str]:
    """The Python of each torch: the one that it names, or else, of those found, the one that the fewest have so far."""
    taken = Counter({version: 0 for version in sorted(found)})
    taken.update(version for version in torches.values() if version in found)
    python = {}
    for torch, version in torches.items():
        if version not in found:
            version = min(taken, key=taken.__getitem__)
            taken[version] += 1
        python[torch] = version
    return python


@dataclass(frozen=True)
class Environment:
    torch: str
    version: str
    interpreter: str

    @property
    def key(self) -> str:
        return f"torch-{self.torch}"

    @property
    def venv(self) -> str:
        """That of `make test` for this torch, unless it is there and of another Python."""
        usual = f".venv/{self.key}"
        settings = ROOT / usual / "pyvenv.cfg"
        version = re.search(r"^version = (3\.\d+)", settings.read_text(), re.MULTILINE) if settings.is_file() else None
        return usual if version is None or version[1] == self.version else f"{usual}-python{self.version}"

    @property
    def python(self) -> Path:
        return ROOT / self.venv / "bin" / "python"

    def make(self, *targets: str, arguments: str = "", **environment: str) -> Done:
        variables = {"TORCH": f"torch=={self.torch}", "VENV": self.venv, "PYTHON": self.interpreter, "ARGS": arguments}
        log = f"{self.key}-{Path(targets[0]).name.strip('.')}.log"
        # What the make that started this was given is in its environment as well.
        started = dict.fromkeys(("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES"))
        return run(["make", *targets, *(f"{name}={value}" for name, value in variables.items())], log, **started, **environment)

    def about_torch(self) -> tuple[str, str | None]:
        """Its own version, which says more than the package's, and that of its CUDA."""
        program = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))"
        asked = subprocess.run([self.python, "-c", program], capture_output=True, text=True, check=True)
        version, cuda = json.loads(asked.stdout)
        return version, cuda


def compiler() -> str:
    words = shlex.split(os.environ.get("CXX", "c++"))
    try:
        said = subprocess.run([*words, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "none"
    return said.partition("\n")[0]


def environments(wanted: str = "") -> list[Environment]:
    """Of each torch that is wanted, in one text: all that are tested where it is empty."""
    torches = {torch: TESTED.get(torch, "") for torch in wanted.split()} or TESTED
    unknown = sorted(set(torches) - set(TESTED))
    if unknown:
        raise SystemExit(f"{', '.join(unknown)} is none of the torches in pyproject.toml: {', '.join(TESTED)}")
    found = interpreters()
    return [Environment(torch, version, found[version]) for torch, version in chosen(TESTED, found).items() if torch in torches]

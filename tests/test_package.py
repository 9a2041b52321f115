"""The package as a user meets it: the command, the errors of an import that cannot work, the README's table."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import safe_inplace
from safe_inplace import _build

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(safe_inplace.__file__).parent


def run_python(*arguments: str, path: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=path, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def package_copy(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "safe_inplace", ignore=ignored)
    return tmp_path / "safe_inplace"


def import_error(package: Path) -> str:
    """The error of an import, as its last line: shows that it is an ImportError and one line long."""
    result = run_python("-c", "import safe_inplace", path=package.parent)
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


def test_env_says_what_was_built_for_what():
    result = run_python("-m", "safe_inplace", "env", path=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    assert safe_inplace.__version__ in result.stdout
    assert result.stdout.count(f"torch {torch.__version__}") == 2
    cuda = _build.read_build().cuda
    assert (f"built with CUDA {cuda}" if cuda else "not in this build") in result.stdout
    if cuda:
        assert ("not usable" in result.stdout) == (not torch.cuda.is_available())


def test_command_without_arguments_says_what_it_can_do():
    result = run_python("-m", "safe_inplace", path=PACKAGE.parent)
    assert result.returncode == 2
    assert "usage: python -m safe_inplace" in result.stderr and "env" in result.stderr


def test_the_note_of_the_build_agrees_with_the_extension():
    build = _build.read_build()
    assert safe_inplace._C.build_info() == {"torch": build.torch, "cuda": build.cuda, "cuda_archs": build.cuda_archs}


def test_import_works_from_a_copy(package_copy):
    """The twin of the tests below: what they break is what makes it fail."""
    assert run_python("-c", "import safe_inplace", path=package_copy.parent).returncode == 0


def test_import_under_another_torch_names_both(package_copy):
    note = package_copy / "_build_info.py"
    note.write_text(note.read_text().replace(repr(torch.__version__), "'2.11.9+other'"))
    message = import_error(package_copy)
    assert message.startswith("ImportError: safe_inplace was built for torch 2.11.9+other, ")
    assert f"this is torch {torch.__version__}" in message and "pip install" in message


def test_import_without_a_build_says_how_to_build(package_copy):
    (package_copy / "_build_info.py").unlink()
    message = import_error(package_copy)
    assert message.startswith("ImportError: ") and "has not been built" in message and "pip install" in message


def test_import_under_another_python_names_both(package_copy):
    for extension in package_copy.glob("_C*.so"):
        extension.rename(package_copy / "_C.cpython-310-x86_64-linux-gnu.so")
    message = import_error(package_copy)
    assert message.startswith("ImportError: ") and f"this is Python {sys.version_info.major}.{sys.version_info.minor}" in message


def test_import_does_not_load_what_an_earlier_build_left_for_this_python(package_copy):
    """In one tree, for one Python after another: each leaves its file, and the note is of the last torch."""
    note = package_copy / "_build_info.py"
    note.write_text(re.sub("^python = .*$", "python = '3.10'", note.read_text(), flags=re.MULTILINE))
    message = import_error(package_copy)
    assert "was built for Python 3.10, but this is Python" in message


@pytest.mark.skipif(_build.read_build().cuda is not None, reason="needs a build without CUDA")
def test_the_first_call_on_cuda_says_that_it_was_left_out(tmp_path):
    program = """
import warnings
import torch
import safe_inplace
from torch._subclasses.fake_tensor import FakeTensorMode

class OnCuda(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0]

def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except (NotImplementedError, RuntimeError):  # no device
            pass
    return [str(warning.message) for warning in caught if "safe_inplace" in str(warning.message)]

x = torch.Tensor._make_wrapper_subclass(OnCuda, (3,), device="cuda")
assert warned(lambda: safe_inplace.add_(torch.ones(3, dtype=torch.int64), 1)) == []
with FakeTensorMode():
    assert warned(lambda: safe_inplace.mul(torch.empty(3, device="cuda"), 2)) == []
assert warned(lambda: safe_inplace.FIRST) == []
# Without its dispatch, what is left is a tensor on a GPU.
with torch._C._DisableTorchDispatch():
    (said,) = warned(lambda: safe_inplace.FIRST)
    assert said.startswith("safe_inplace was built without CUDA: "), said
    assert warned(lambda: safe_inplace.SECOND) == []
"""
    for first, second in (("mul_(x, 2)", "add(x, x)"), ("add(x, x)", "mul_(x, 2)")):
        result = run_python("-c", program.replace("FIRST", first).replace("SECOND", second), path=PACKAGE.parent)
        assert result.returncode == 0, result.stderr


def test_make_says_what_each_target_does():
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    said = subprocess.run(["make", "-s", "-C", ROOT], capture_output=True, text=True, timeout=60).stdout
    targets = re.findall(r"^make (\S+) {2,}\S", said, re.MULTILINE)
    assert sorted(targets) == sorted(set(phony.split()) - {"help", "again"})


def test_make_installs_no_other_torch_with_what_the_tests_need(tmp_path):
    """One of the packages, or a setting of pip, may want another."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"""#!/bin/bash
[[ "$1 $2" == "-m pip" ]] || exec {sys.executable} "$@"
while [ $# -gt 0 ]; do [[ $1 == -c ]] && cat "$2" >> {tmp_path}/constraints; shift; done
""")
    python.chmod(0o755)
    for stamp in (".python", ".torch"):
        (tmp_path / stamp).touch()
    words = ["make", "-s", "-C", ROOT, "TORCH=torch==2.13.0", f"VENV={tmp_path}", f"{tmp_path}/.extra-test"]
    subprocess.run(words, check=True, timeout=60)
    assert (tmp_path / "constraints").read_text() == f"torch=={version('torch')}\n"


def test_the_table_of_the_readme_lists_the_ops():
    listed = re.findall(r"^\| `(\w+_)\(input, ", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed == [row["names"][0] for row in safe_inplace._C.op_table()]


class TestDescription:
    """README.md as a package index shows it, where no file of the repository lies beside it."""

    LINK = re.compile(r"!?\[[^\]]*\]\(([^)]*)\)")

    def description(self, folder: Path, repository: str = "") -> str:
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        (folder / "safe_inplace").mkdir()
        (folder / "safe_inplace" / "__init__.py").write_text("__version__ = '0'")
        if repository:
            with (folder / "pyproject.toml").open("a") as file:
                file.write(f'\n[project.urls]\nRepository = "{repository}"\n')
        done = subprocess.run(
            [sys.executable, "setup.py", "egg_info"], cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        (information,) = folder.glob("*.egg-info/PKG-INFO")
        head, _, text = information.read_text().partition("\n\n")
        assert "Description-Content-Type: text/markdown" in head
        return text

    def test_no_link_leads_to_a_file_that_is_not_there(self, tmp_path):
        text = self.description(tmp_path)
        targets = self.LINK.findall(text)
        assert targets and all(re.match("[a-z]+:|#", target) for target in targets)
        readme = (ROOT / "README.md").read_text()
        files = [target for target in self.LINK.findall(readme) if not re.match("[a-z]+:|#", target)]
        assert len(files) > 5 and all((ROOT / target.partition("#")[0]).is_file() for target in files)
        # Nothing else has changed.
        assert re.findall(r"^(?:#|    |```).*$", text, re.MULTILINE) == re.findall(r"^(?:#|    |```).*$", readme, re.MULTILINE)

    def test_links_lead_to_the_repository_that_is_named(self, tmp_path):
        text = self.description(tmp_path, "https://forge.example/us/safe_inplace")
        assert "[docs/guard.md](https://forge.example/us/safe_inplace/blob/HEAD/docs/guard.md)" in text
        assert "](https://forge.example/us/safe_inplace/raw/HEAD/docs/first-look.png)" in text
        assert "[in the program](#guard)" in text
        assert all(re.match("https:|#", target) for target in self.LINK.findall(text))


class TestBuildThatCannotBeDone:
    """Each says in one line why, and what to install."""

    def build(self, tmp_path: Path, torch_package: str = "", **environment: str) -> str:
        if torch_package:
            (tmp_path / "torch").mkdir()
            (tmp_path / "torch" / "__init__.py").write_text(torch_package)
            environment["PYTHONPATH"] = str(tmp_path)
        result = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
            env={**os.environ, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("safe_inplace cannot be built: ")]
        return line.removeprefix("safe_inplace cannot be built: ")

    def test_torch_out_of_range(self, tmp_path):
        line = self.build(tmp_path, torch_package="__version__ = '2.9.1'")
        assert line.startswith("torch 2.9.1 is not supported") and "pip install 'torch>=" in line

    def test_no_torch(self, tmp_path):
        line = self.build(tmp_path, torch_package="raise ModuleNotFoundError(name='torch')")
        assert line.startswith("torch is not installed")

    @pytest.mark.parametrize("command", ["dist_info", "editable_wheel", "bdist_wheel"])
    def test_no_torch_stops_before_a_front_end_could_fetch_one(self, tmp_path, command):
        """dist_info is what pip and uv run before they look for what the package requires."""
        fake = tmp_path / "torch.py"
        fake.write_text("raise ModuleNotFoundError(name='torch')")
        result = setup_of_small_sources(tmp_path, command, sources={"csrc/small.cpp": ""}, PYTHONPATH=str(tmp_path))
        assert result.returncode == 1 and "Traceback" not in result.stderr
        for front_end, install in (("pip", "pip install"), ("uv", "uv pip install"), ("build", "pip install")):
            (line,) = re.findall(rf"^  {front_end}: +(.+)$", result.stderr, re.MULTILINE)
            assert line.startswith(f"{install} 'torch>=") and re.search(r"--no-(build-)?isolation", line)

    def test_no_compiler(self, tmp_path):
        line = self.build(tmp_path, CXX="no-such-compiler")
        assert "no-such-compiler" in line and "install g++" in line

    def test_misspelt_force(self, tmp_path):
        assert "FORCE_CUDA is 'yes'" in self.build(tmp_path, FORCE_CUDA="yes")

    @pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
    def test_cuda_forced_on_a_torch_without(self, tmp_path):
        assert "was built without CUDA" in self.build(tmp_path, FORCE_CUDA="1")

    # What is asked of torch before a toolkit is looked for.
    WITH_CUDA = "__version__ = '2.13.0'\nclass version:\n    cuda = '13.0'\n"

    @pytest.mark.parametrize("force", ["1", ""], ids=["forced", "found"])
    @pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
    def test_cuda_home_without_nvcc(self, tmp_path, variable, force):
        homes = {"CUDA_HOME": "", "CUDA_PATH": "", variable: str(tmp_path)}
        line = self.build(tmp_path, self.WITH_CUDA, FORCE_CUDA=force, **homes)
        assert line.startswith(f"nvcc was not found in {tmp_path / 'bin'}, where {variable} says it is; ")
        assert "install the CUDA 13.0 toolkit" in line and f"unset {variable}" in line

    @pytest.mark.parametrize(
        "nvcc, words",
        [
            ("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.148'\n", "nvcc is of CUDA 9.2"),
            ("#!/bin/sh\nexit 1\n", "names no release"),
            ("#!/no/such/interpreter\n", "cannot be run (No such file or directory)"),
        ],
        ids=["of another CUDA", "fails", "cannot be run"],
    )
    def test_cuda_home_with_a_wrong_nvcc(self, tmp_path, nvcc, words):
        file = tmp_path / "bin" / "nvcc"
        file.parent.mkdir()
        file.write_text(nvcc)
        file.chmod(0o755)
        line = self.build(tmp_path, self.WITH_CUDA, FORCE_CUDA="", CUDA_HOME=str(tmp_path))
        assert words in line and "install the CUDA 13.0 toolkit" in line

    def test_cuda_home_is_not_looked_at_where_no_cuda_is_wanted(self, tmp_path):
        """The twin of those above: the build goes on to the compiler."""
        line = self.build(tmp_path, self.WITH_CUDA, FORCE_CUDA="0", CUDA_HOME=str(tmp_path), CXX="no-such-compiler")
        assert "no-such-compiler" in line


SMALL_MODULE = """
#include <Python.h>
#include <stdexcept>

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "NAME", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit_NAME() {
  return Py_IsInitialized() ? PyModule_Create(&definition) : throw std::runtime_error("takes libstdc++");
}
"""


def setup_of_small_sources(
    folder: Path, *commands: str, sources: dict[str, str], **environment: str
) -> subprocess.CompletedProcess:
    """Runs setup.py in a tree whose C++ files are these."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    always = {"safe_inplace/__init__.py": "__version__ = '0'", "csrc/torch_headers.h": "#include <stdexcept>"}
    for name, text in {**always, **sources}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return subprocess.run(
        [sys.executable, "setup.py", *commands],
        env={**os.environ, "FORCE_CUDA": "0", **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


class TestMetadata:
    """A wheel names the one torch that it was compiled for, an sdist the range of those that it can be compiled for."""

    TORCH = Version(torch.__version__).public

    def pack(self, folder: Path, *commands: str) -> Path:
        result = setup_of_small_sources(folder, *commands, sources={"csrc/small.cpp": SMALL_MODULE.replace("NAME", "_C")})
        assert result.returncode == 0, result.stderr
        (file,) = (folder / "dist").iterdir()
        return file

    def of_torch(self, wheel: Path) -> list[str]:
        archive = zipfile.ZipFile(wheel)
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return re.findall(r"^Requires-Dist: (torch[^v].*)$", archive.read(name).decode(), re.MULTILINE)

    def test_a_wheel(self, tmp_path):
        wheel = self.pack(tmp_path, "bdist_wheel")
        assert wheel.name.startswith(f"safe_inplace-0+torch{self.TORCH}.cpu-")
        assert self.of_torch(wheel) == [f"torch=={self.TORCH}"]

    def test_a_wheel_requires_no_torch_that_its_import_refuses(self, tmp_path):
        """Nor refuses the one that it is for: torch's own version may name its CUDA, which that of its package may leave out."""
        (requirement,) = map(Requirement, self.of_torch(self.pack(tmp_path, "bdist_wheel")))
        mine = Version(torch.__version__)
        fits = requirement.specifier.contains
        assert fits(str(mine)) and fits(mine.public)
        major, minor, patch = mine.release
        for other in (f"{major}.{minor}.{patch + 1}", f"{major}.{minor}.{patch + 1}+cpu", f"{major}.{minor + 1}.0"):
            assert not fits(other), other

    def test_an_sdist_and_a_wheel_from_it(self, tmp_path):
        """The wheel has the sdist's version: pip refuses another one where the sdist came from an index."""
        sdist = self.pack(tmp_path, "sdist")
        assert sdist.name == "safe_inplace-0.tar.gz"
        shutil.unpack_archive(sdist, tmp_path)
        unpacked = tmp_path / "safe_inplace-0"
        text = (unpacked / "PKG-INFO").read_text()
        assert re.search(r"^Requires-Dist: torch<[\d.]+,>=[\d.]+$", text, re.MULTILINE)
        wheel = self.pack(unpacked, "bdist_wheel")
        assert wheel.name.startswith("safe_inplace-0-")
        assert self.of_torch(wheel) == [f"torch=={self.TORCH}"]


def test_a_build_that_leaves_cuda_out_says_so(tmp_path):
    """On a machine without nvcc, with a torch that has CUDA; and not where nobody wants CUDA."""
    program = """
import runpy, shutil, sys
from pathlib import Path
import torch

torch.version.cuda = "13.0"
is_file, which = Path.is_file, shutil.which
Path.is_file = lambda path: path.name != "nvcc" and is_file(path)
shutil.which = lambda name, *rest, **named: None if name == "nvcc" else which(name, *rest, **named)
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    sources = {"csrc/small.cpp": SMALL_MODULE.replace("NAME", "_C")}
    setup_of_small_sources(tmp_path, "--version", sources=sources)
    for force, said in (("", 1), ("0", 0)):
        environment = {**os.environ, "CUDA_HOME": "", "CUDA_PATH": "", "FORCE_CUDA": force}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("safe_inplace is built without CUDA: ") == said


class TestHeadersCompiledOnce:
    HEADER = 'inline const char* name() { return "first"; }\n'

    def build(self, folder: Path, header: str, **environment: str) -> Path:
        """The object of a file that uses what it does not include."""
        module = SMALL_MODULE.replace('"NAME"', "name()").replace("NAME", "_C")
        sources = {"csrc/torch_headers.h": header, "csrc/small.cpp": module}
        result = setup_of_small_sources(folder, "build_ext", "--inplace", sources=sources, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        (object_file,) = folder.glob("build/temp*/csrc/small.o")
        return object_file

    def test_they_are_compiled_again_where_something_has_changed(self, tmp_path):
        assert b"first" in self.build(tmp_path, self.HEADER).read_bytes()
        (compiled,) = tmp_path.glob("build/temp*/headers-*/torch_headers.h.gch")
        made = compiled.stat().st_mtime_ns
        self.build(tmp_path, self.HEADER)
        assert compiled.stat().st_mtime_ns == made
        assert b"other" in self.build(tmp_path, self.HEADER.replace("first", "other")).read_bytes()
        assert len(list(tmp_path.glob("build/temp*/headers-*"))) == 1

    def test_without_them_the_build_is_the_same(self, tmp_path):
        compiler = tmp_path / "compiler"
        compiler.write_text("#!/bin/bash\n[[ \" $* \" == *' c++-header '* ]] && exit 1\nexec c++ \"$@\"\n")
        compiler.chmod(0o755)
        assert b"first" in self.build(tmp_path, self.HEADER, CXX=str(compiler)).read_bytes()
        assert not list(tmp_path.glob("build/temp*/headers-*/torch_headers.h.gch"))


class TestExtensionsOfTheTests:
    """The simulator of the CUDA kernels and the toy backend: nobody who installs the package gets them."""

    def test_a_wheel_is_without_them_though_they_were_built_before(self, tmp_path):
        sources = {"csrc/small.cpp": SMALL_MODULE.replace("NAME", "_C")}
        for name in ("simulator", "toy_backend"):
            sources[f"tests/{name}/small.cpp"] = SMALL_MODULE.replace("NAME", f"_{name}")
        result = setup_of_small_sources(
            tmp_path, "build_test_extensions", "build_ext", "--inplace", "bdist_wheel", sources=sources
        )
        assert result.returncode == 0, result.stderr
        for made in ("tests/simulator/_simulator", "tests/toy_backend/_toy_backend", "safe_inplace/_C"):
            assert list(tmp_path.glob(f"{made}*.so"))
        (wheel,) = (tmp_path / "dist").glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert any(re.fullmatch(r"safe_inplace/_C\S*\.so", name) for name in names)
        assert {name.split("/")[0].split("-")[0] for name in names} == {"safe_inplace"}

    def test_the_library_holds_nothing_of_the_simulator(self):
        # Not above: the other tests run where it has not been built.
        from .simulator import _simulator

        marks = re.compile(rb"simulator|HostLauncher|misaligned access in a simulated", re.IGNORECASE)
        assert marks.search(Path(_simulator.__file__).read_bytes())
        assert not marks.search(Path(safe_inplace._C.__file__).read_bytes())


COMPILERS_OF_A_COPY = {
    "nothing but its own": """
arguments=()
for argument; do [[ $argument == */libstdc++.so.6 ]] || arguments+=("$argument"); done
exec g++ -static-libstdc++ "${arguments[@]}"
""",
    "parts of its own before the shared one": """
[[ " $* " == *" -shared "* ]] || exec g++ "$@"
exec g++ -Wl,-u,_ZNSt6localeC1Ev "$(g++ -print-file-name=libstdc++.a)" "$@"
""",
}


class TestCompilerThatLinksItsOwnLibstdcxx:
    """The build of setup.py, of one small file in place of csrc/."""

    SOURCE = r"""
#include <Python.h>

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

namespace {

PyObject* refuse(PyObject*, PyObject*) {
  try {
    TORCH_CHECK_VALUE(false, "shape ", c10::IntArrayRef({2, 3}), " and ", 0.5, " and the end");
  } catch (const c10::Error& error) {
    PyErr_SetString(PyExc_ValueError, error.what_without_backtrace());
  }
  return nullptr;
}

PyMethodDef functions[] = {{"refuse", refuse, METH_NOARGS, nullptr}, {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&definition);
}
"""
    PROGRAM = """
import torch
from safe_inplace import _C
try:
    _C.refuse()
except ValueError as error:
    assert str(error) == "shape [2, 3] and 0.5 and the end", error
"""

    def build(self, folder: Path, compiler: str) -> subprocess.CompletedProcess:
        wrapper = folder / "compiler"
        wrapper.write_text(f"#!/bin/bash\n{compiler}\n")
        wrapper.chmod(0o755)
        return setup_of_small_sources(
            folder, "build_ext", "--inplace", sources={"csrc/small.cpp": self.SOURCE}, CXX=str(wrapper)
        )

    def stopped(self, folder: Path, compiler: str) -> str:
        result = self.build(folder, compiler)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert not list(folder.glob("**/_C*.so")), "what must not be imported was left behind"
        return result.stderr.splitlines()[-1]

    @pytest.mark.parametrize("flags", ["-static-libstdc++", "-static-libstdc++ -static-libgcc"])
    def test_the_shared_one_is_used_and_a_message_arrives_whole(self, tmp_path, flags):
        result = self.build(tmp_path, f'exec g++ {flags} "$@"')
        assert result.returncode == 0, result.stderr
        result = run_python("-c", self.PROGRAM, path=tmp_path)
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("compiler", COMPILERS_OF_A_COPY.values(), ids=COMPILERS_OF_A_COPY.keys())
    def test_a_copy_of_its_own_stops_the_build(self, tmp_path, compiler):
        line = self.stopped(tmp_path, compiler)
        assert line.startswith("safe_inplace cannot be built: the linker put a copy of libstdc++ into the extension, ")
        assert "CXX" in line

    def test_libcxx_stops_the_build(self, tmp_path):
        line = self.stopped(tmp_path, 'exec g++ -D_LIBCPP_VERSION=14000 "$@"')
        assert line.startswith("safe_inplace cannot be built: ") and "libc++" in line


class TestCounts:
    """What `make coverage` counts in the core is written by every process of the tests, by those too that end without notice."""

    SOURCE = r"""
#include <Python.h>
#include <stdexcept>

namespace {

PyObject* in_worker(PyObject*, PyObject*) {
  return PyLong_FromLong(1); // in a worker
}

PyObject* in_fork(PyObject*, PyObject*) {
  return PyLong_FromLong(2); // in what it forks
}

PyObject* in_program(PyObject*, PyObject*) {
  return PyLong_FromLong(3); // in a program
}

PyObject* nowhere(PyObject*, PyObject*) {
  return PyLong_FromLong(4); // nowhere
}

PyMethodDef functions[] = {{"in_worker", in_worker, METH_NOARGS, nullptr},
                           {"in_fork", in_fork, METH_NOARGS, nullptr},
                           {"in_program", in_program, METH_NOARGS, nullptr},
                           {"nowhere", nowhere, METH_NOARGS, nullptr},
                           {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

} // namespace

PyMODINIT_FUNC PyInit__C() {
  return Py_IsInitialized() ? PyModule_Create(&definition) : throw std::runtime_error("takes libstdc++");
}
"""
    TESTS = """
import os
import subprocess
import sys

import pytest
from safe_inplace import _C

def test_in_fork():
    pid = os.fork()
    if pid == 0:
        _C.in_fork()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

@pytest.mark.parametrize("time", range(4))
def test_in_worker(time):
    _C.in_worker()

def test_in_program():
    subprocess.run([sys.executable, "-c", "from safe_inplace import _C; _C.in_program()"], check=True)
"""
    # No worker has time to end by itself.
    CONFTEST = """
import os
import signal

def pytest_unconfigure(config):
    if hasattr(config, "workerinput"):
        os.kill(os.getpid(), signal.SIGKILL)
"""

    @pytest.mark.skipif(shutil.which("gcov") is None, reason="needs gcov")
    def test_counts_of_workers_and_of_what_they_start(self, tmp_path):
        recipe = (ROOT / "Makefile").read_text()
        (compiling,) = re.findall(r"SAFE_INPLACE_CXXFLAGS='([^']*--coverage[^']*)'", recipe)
        (linking,) = re.findall(r"LDFLAGS='(--coverage[^']*)'", recipe)
        sources = {
            "csrc/small.cpp": self.SOURCE,
            "tests/__init__.py": "",
            "tests/counts.py": (ROOT / "tests" / "counts.py").read_text(),
            "suite/conftest.py": self.CONFTEST,
            "suite/test_small.py": self.TESTS,
        }
        result = setup_of_small_sources(
            tmp_path, "build_ext", "--inplace", sources=sources, SAFE_INPLACE_CXXFLAGS=compiling, LDFLAGS=linking, CXX="g++"
        )
        assert result.returncode == 0, result.stderr
        tests = run_python("-m", "pytest", "-n", "2", "-p", "tests.counts", "-p", "no:cacheprovider", "suite", path=tmp_path)
        assert " 6 passed" in tests.stdout, tests.stdout + tests.stderr
        (counts,) = tmp_path.rglob("small.gcda")
        read = subprocess.run(["gcov", "--stdout", counts], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        lines = re.findall(r"^ *([\d#]+)\*?: *\d+:  return .* // (.*)$", read, re.MULTILINE)
        found = {place: times for times, place in lines}
        # What a fork counts begins with what the worker that forked had counted.
        assert int(found.pop("in a worker")) >= 4
        assert found == {"in what it forks": "1", "in a program": "1", "nowhere": "#####"}

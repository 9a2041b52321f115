"""Build of safe_inplace._C, and of the extensions that its tests use. What is declared lives in pyproject.toml; here is only
what depends on the torch found."""

import ast
import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import NoReturn

from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH = PROJECT["tool"]["safe_inplace"]["torch"]
CORE = ("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/guard/*.cpp")

# Machine code for the two data-centre generations in use; the PTX of the newer one is compiled by the driver of any
# later GPU, so that a wheel built on a machine without a GPU (where torch has no device to ask) runs on all of them.
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"


def stop(problem: str, remedy: str) -> NoReturn:
    raise SystemExit(f"safe_inplace cannot be built: {problem}; {remedy}")


def import_torch():
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        # pip builds in an environment of its own, which hides the torch that this interpreter has; but the extension
        # works with one torch only, the one that will run it, so a torch fetched for the build would be the wrong one.
        sys.path.append(sysconfig.get_path("purelib"))
        try:
            import torch
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            needed = shlex.join([TORCH, *PROJECT["build-system"]["requires"]])
            stop(
                "torch is not installed where the build runs",
                "the extension is compiled for the torch that will run it, so none is fetched; install one first, and build "
                "without isolation:\n"
                f"  pip:    pip install {needed} && pip install --no-build-isolation .\n"
                f"  uv:     uv pip install {needed} && uv pip install --no-build-isolation .\n"
                f"  build:  pip install {needed} build && python -m build --wheel --no-isolation",
            )
    if not Requirement(TORCH).specifier.contains(torch.__version__, prereleases=True):
        stop(f"torch {torch.__version__} is not supported", f"pip install '{TORCH}'")
    return torch


def require_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        stop(f"no C++ compiler ({compiler} is not on PATH)", "install g++ 11 or newer, or name a compiler in CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        stop(
            f"Python.h is not in {sysconfig.get_path('include')}",
            f"install the headers of Python {sysconfig.get_python_version()} "
            f"(Debian, Ubuntu: python{sysconfig.get_python_version()}-dev)",
        )


def find_cuda_home(wanted: str) -> Path | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            home = Path(os.environ[variable])
            if not (home / "bin" / "nvcc").is_file():
                stop(
                    f"nvcc was not found in {home / 'bin'}, where {variable} says it is",
                    f"install the CUDA {wanted} toolkit and name its folder there, unset {variable}, or set FORCE_CUDA=0",
                )
            return home
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return Path("/usr/local/cuda") if Path("/usr/local/cuda/bin/nvcc").is_file() else None
    # The nvcc on PATH may be a link to, or a script around, the real one: only the compiler knows its own folder.
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent


def cuda_toolkit(torch) -> tuple[Path, str] | None:
    """The toolkit to compile device code with and its version, or None for a build without CUDA."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        stop(f"FORCE_CUDA is {force!r}", "set it to 1 (with CUDA), to 0 (without), or leave it unset")
    if force == "0" or (not force and torch.version.cuda is None):
        return None
    if torch.version.cuda is None:
        stop(f"FORCE_CUDA=1, but torch {torch.__version__} was built without CUDA", "install a CUDA build of torch")
    wanted = torch.version.cuda
    home = find_cuda_home(wanted)
    if home is None:
        if not force:
            return None
        stop(
            "FORCE_CUDA=1, but nvcc was not found",
            f"install the CUDA {wanted} toolkit and put its nvcc on PATH or its folder in CUDA_HOME",
        )
    nvcc = home / "bin" / "nvcc"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        stop(f"{nvcc} cannot be run ({error.strerror})", f"install the CUDA {wanted} toolkit, or set FORCE_CUDA=0")
    version = re.search(r"release (\d+\.\d+)", text)
    if version is None:
        stop(f"{nvcc} --version names no release", f"install the CUDA {wanted} toolkit, or set FORCE_CUDA=0")
    if version.group(1).split(".")[0] != wanted.split(".")[0]:
        stop(
            f"nvcc is of CUDA {version.group(1)}, torch {torch.__version__} of CUDA {wanted}",
            f"install the CUDA {wanted} toolkit and name its folder in CUDA_HOME, or set FORCE_CUDA=0",
        )
    return home, version.group(1)


def version(facts: dict[str, str | None] | None = None) -> str:
    (literal,) = re.findall(r"^__version__ = (.+)$", (ROOT / "safe_inplace" / "__init__.py").read_text(), re.MULTILINE)
    public = ast.literal_eval(literal)
    # The version that an index promises of an sdist is the version that its build must have.
    if facts is None or (ROOT / "PKG-INFO").is_file():
        return public
    return f"{public}+torch{Version(facts['torch']).public}.{'cu' + facts['cuda'].replace('.', '') if facts['cuda'] else 'cpu'}"


def system_includes(torch, cuda_home: Path | None) -> list[str]:
    from torch.utils.cpp_extension import include_paths

    folders = [Path(folder) for folder in include_paths("cuda" if cuda_home else "cpu")]
    if cuda_home:
        # ATen's CUDA headers include cuBLAS's, cuSPARSE's and cuSOLVER's. A toolkit installed without these libraries
        # lacks them; torch's own nvidia packages carry them. Last in order: the toolkit's headers fit its compiler.
        site_packages = Path(torch.__file__).parent.parent
        folders.append(site_packages / "nvidia" / f"cu{torch.version.cuda.split('.')[0]}" / "include")
        needed = ("cublas_v2.h", "cusparse.h", "cusolverDn.h")
        missing = [name for name in needed if not any((folder / name).is_file() for folder in folders)]
        if missing:
            stop(
                f"{', '.join(missing)} not found in the toolkit {cuda_home} nor beside torch",
                f"install the development files of cuBLAS, cuSPARSE and cuSOLVER {torch.version.cuda}, "
                "or set FORCE_CUDA=0",
            )
    # As system folders: warnings are wanted for this project's code only.
    return [argument for folder in folders if folder.is_dir() for argument in ("-isystem", str(folder))]


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def shared_runtimes(compiler: list[str]) -> list[str]:
    """The shared libstdc++ and libgcc of the compiler, to be linked by name: what they have, a compiler that links its own
    copies statically (by -static-libstdc++, or because it was configured so) then no longer takes from those."""
    found = []
    for name in ("libstdc++.so.6", "libgcc_s.so.1"):
        answer = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        path = Path(answer.stdout.strip())
        if path.is_absolute() and path.is_file():
            found.append(str(path))
    return found


def precompiled(header: Path, compile: list[str], folder: Path) -> list[str]:
    """The arguments that include it in every file: already compiled, where the compiler can do that."""
    key = hashlib.sha256(shlex.join([*compile, header.read_text()]).encode()).hexdigest()[:16]
    copy = folder.absolute() / f"headers-{key}" / header.name
    compiled = copy.with_name(f"{header.name}.gch")
    # Made once: objects that are older than it would be compiled again.
    if not compiled.is_file():
        for old in folder.glob("headers-*"):
            shutil.rmtree(old)
        copy.parent.mkdir(parents=True)
        shutil.copy(header, copy)
        compiled.with_name(f"{compiled.name}.sum").write_text(key)
        partial = copy.with_name("partial")
        if subprocess.run([*compile, "-x", "c++-header", str(header), "-o", str(partial)], check=False).returncode == 0:
            partial.rename(compiled)
    # ccache, which torch starts where it is installed, keeps what was compiled with such a header only if it is told to.
    os.environ.setdefault("CCACHE_SLOPPINESS", "pch_defines,time_macros")
    os.environ.setdefault("CCACHE_PCH_EXTSUM", "true")
    return ["-include", str(copy)]


def require_libstdcxx(compiler: list[str]) -> None:
    macros = subprocess.run(
        [*compiler, "-std=c++20", "-dM", "-E", "-x", "c++", "-include", "version", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    if "_LIBCPP_VERSION" in macros.stdout:
        stop(f"{compiler[0]} compiles for libc++, torch was built with libstdc++", "leave -stdlib=libc++ out")


def require_shared_libstdcxx(library: Path) -> None:
    """A second libstdc++ in the process mixes with torch's: the first message that streams a number ends in the middle, or
    crashes. So the result of the link is read, whatever the flags that led to it."""
    needed, defined = dynamic_names(library)
    if "libstdc++.so.6" not in needed or any(re.match("_ZN?K?S[tao]", name) for name in defined):
        library.unlink()
        stop(
            "the linker put a copy of libstdc++ into the extension, torch uses the shared one",
            "name a compiler in CXX that links libstdc++.so.6, and leave -static-libstdc++ out",
        )


def dynamic_names(library: Path) -> tuple[list[str], list[str]]:
    """Of a 64-bit ELF library: the libraries that it needs, and the global symbols that it defines (without weak ones: every
    use of a template makes some)."""
    data = library.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * size) for i in range(count)]

    def entries(kind: int, layout: str):
        for _, type, _, _, start, length, link, _, _, _ in sections:
            if type == kind:
                for entry in struct.iter_unpack(layout, data[start : start + length]):
                    yield entry, sections[link][4]

    def text(start: int) -> str:
        return data[start : data.index(b"\0", start)].decode()

    SHT_DYNAMIC, SHT_DYNSYM, DT_NEEDED, STB_GLOBAL, SHN_UNDEF = 6, 11, 1, 1, 0
    needed = [text(names + value) for (tag, value), names in entries(SHT_DYNAMIC, "<qQ") if tag == DT_NEEDED]
    defined = [
        text(names + name)
        for (name, info, _, section, _, _), names in entries(SHT_DYNSYM, "<IBBHQQ")
        if info >> 4 == STB_GLOBAL and section != SHN_UNDEF
    ]
    return needed, defined


def extensions() -> tuple[Extension, list[Extension], type, dict[str, str | None]]:
    """What is shipped, what only the tests use, the command that builds them, and what they are built for."""
    torch = import_torch()
    require_compiler()
    toolkit = cuda_toolkit(torch)
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit[0])
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    facts = {
        "torch": torch.__version__,
        "cuda": toolkit[1] if toolkit else None,
        "cuda_archs": os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit else None,
        "python": sysconfig.get_python_version(),
    }
    strings = [
        f'-DSAFE_INPLACE_{name.upper()}="{value}"'
        for name, value in (
            ("torch_version", facts["torch"]),
            ("cuda_version", facts["cuda"]),
            ("cuda_archs", facts["cuda_archs"]),
        )
        if value
    ]
    shared = ["-std=c++20", "-O3", *system_includes(torch, toolkit[0] if toolkit else None)]
    cxx = [
        *shared,
        "-g0",
        "-Wall",
        "-Wextra",
        # The kernels say themselves where a product and a sum may round once (multiply_add in csrc/numeric.h).
        "-ffp-contract=off",
        "-fvisibility=hidden",
        # Error messages of torch quote __FILE__; the folder of the build says nothing to those who read them.
        f"-fmacro-prefix-map={ROOT}/=",
        # at::parallel_for is a template: a file compiled without OpenMP runs it on one thread and says nothing.
        "-fopenmp",
    ]
    # Last, so that they win: make sanitize.
    last = os.environ.get("SAFE_INPLACE_CXXFLAGS", "").split()
    # at::parallel_for in a .cu file needs OpenMP in the host compiler as well.
    nvcc = [*shared, "--extended-lambda", "-lineinfo", "-Xcompiler", "-g0,-fvisibility=hidden,-fopenmp"]
    shipped = (CUDAExtension if toolkit else CppExtension)(
        "safe_inplace._C",
        sources(*CORE, *(["csrc/cuda/*.cu", "csrc/cuda/*.cpp"] if toolkit else [])),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("SAFE_INPLACE_WITH_CUDA", None)] if toolkit else [],
        extra_compile_args={"cxx": [*cxx, *strings, *last], "nvcc": nvcc},
        extra_link_args=["-fopenmp"],
    )
    for_tests = [
        CppExtension(
            f"tests.{folder}._{folder}",
            sources(f"tests/{folder}/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            # Many instances, each run on a few thousand elements: compiling them well would take longer than all tests.
            extra_compile_args={"cxx": [*cxx, "-O1", *last]},
        )
        for folder in ("simulator", "toy_backend")
    ]
    return shipped, for_tests, BuildExtension, facts


def left_out(facts: dict[str, str | None]) -> str | None:
    """What to say of a build without CUDA that nobody asked for."""
    import torch

    if torch.version.cuda is None or facts["cuda"] or os.environ.get("FORCE_CUDA"):
        return None
    return (
        f"safe_inplace is built without CUDA: torch {facts['torch']} has CUDA {torch.version.cuda}, but nvcc was not found; on "
        f"CUDA tensors its ops will be right and gain nothing. Install the CUDA {torch.version.cuda} toolkit and put its nvcc on "
        "PATH or its folder in CUDA_HOME; FORCE_CUDA=0 says that no CUDA is wanted."
    )


def build_arguments() -> dict:
    shipped, for_tests, build_extension, facts = extensions()
    cuda_left_out = left_out(facts)

    class build_checked(build_extension):
        def command_of(self, ext: Extension) -> list[str]:
            folders = [*ext.include_dirs, *self.compiler.include_dirs]
            macros = [f"-D{name}" for name, _ in ext.define_macros]
            arguments = [*self.compiler.compiler_so[1:], *(f"-I{folder}" for folder in folders), *macros]
            return [*self.compiler.compiler_cxx, *arguments, *ext.extra_compile_args["cxx"]]

        def build_extension(self, ext: Extension) -> None:
            require_libstdcxx(self.compiler.compiler_cxx)
            ext.extra_link_args += shared_runtimes(self.compiler.compiler_cxx)
            flags = ext.extra_compile_args
            if ext is shipped:
                include = precompiled(ROOT / "csrc" / "torch_headers.h", self.command_of(ext), Path(self.build_temp))
                ext.extra_compile_args = {**flags, "cxx": [*flags["cxx"], *include]}
            super().build_extension(ext)
            ext.extra_compile_args = flags  # the next command adds to them
            require_shared_libstdcxx(Path(self.get_ext_fullpath(ext.name)))

    class build_ext(build_checked):
        """Leaves a note beside the extension of what it was built for: it can be read where the extension cannot be
        loaded any more, under another torch."""

        def run(self) -> None:
            if cuda_left_out:
                print(cuda_left_out, file=sys.stderr)
            super().run()
            package = ROOT / "safe_inplace" if self.inplace else Path(self.build_lib, "safe_inplace")
            package.mkdir(parents=True, exist_ok=True)
            lines = [f"{name} = {value!r}\n" for name, value in facts.items()]
            (package / "_build_info.py").write_text("# Written by setup.py.\n" + "".join(lines))

    class build_test_extensions(build_checked):
        """What only the tests use: in the tree, and by no command that installs or packs."""

        def finalize_options(self) -> None:
            modules, self.distribution.ext_modules = self.distribution.ext_modules, for_tests
            self.inplace = True
            super().finalize_options()
            self.distribution.ext_modules = modules
            # A folder of its own: what lies in the usual one goes into the next wheel.
            self.build_temp = str(Path(self.build_temp, "tests"))
            self.build_lib = str(Path(self.build_temp, "lib"))

    return {
        "version": version(facts),
        # The import refuses any other: nobody promises that a class keeps its layout in the next patch release.
        "install_requires": [f"torch=={Version(facts['torch']).public}"],
        "ext_modules": [shipped],
        "cmdclass": {"build_ext": build_ext, "build_test_extensions": build_test_extensions},
    }


def description() -> str:
    """README.md as a package index shows it, without the repository beside it: a link to a file of the repository leads to where
    `project.urls.Repository` of pyproject.toml says that it is. Where nothing is said there, the text of the link stays, and of
    a picture its words."""
    repository = PROJECT["project"].get("urls", {}).get("Repository", "").removesuffix("/")

    def elsewhere(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        if repository:
            return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"
        return f"*{text}*" if picture else text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", elsewhere, (ROOT / "README.md").read_text(encoding="utf-8"))


ABOUT = {"license": "BSD-3-Clause", "long_description": description(), "long_description_content_type": "text/markdown"}

# An sdist can be made without torch and without a compiler, and fits every torch in range. The metadata of a wheel cannot: what
# it requires is the torch that was found, and where there is none, the front end must hear so before it fetches any.
COMPILES = {"build", "build_ext", "build_test_extensions", "bdist_wheel", "editable_wheel", "dist_info", "develop", "install"}
if COMPILES & set(sys.argv):
    setup(**ABOUT, **build_arguments())
else:
    setup(**ABOUT, version=version(), install_requires=[TORCH], ext_modules=[Extension("safe_inplace._C", sources(*CORE))])

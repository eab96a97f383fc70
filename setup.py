"""Compiles csrc with CMake and Ninja; all else about the package is in pyproject.toml.

FASTKD_BUILD says what to compile:

    auto   (default) what this machine can; what is left out is said, and the install succeeds
    none   nothing: pure Python
    cpu    the CPU kernels alone, or the install fails
    cuda   the CUDA kernels as well, or the install fails

FASTKD_CUDA_ARCHS says which GPUs to compile the CUDA kernels for:

    (unset)  those of this machine; on a machine without a GPU the same as all
    native   those of this machine; without a GPU no CUDA kernels, as if there were no nvcc
    all      every usual one: compute capability 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0
    80;9.0   these compute capabilities

PTX of the newest is added, which drivers compile for newer GPUs. Progress goes to stderr, which pip
shows with -v.
"""

import contextlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from itertools import dropwhile, islice
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import architectures
import nvcc

MODES = ("auto", "none", "cpu", "cuda")
MODE = os.environ.get("FASTKD_BUILD") or "auto"
if MODE not in MODES:
    raise SystemExit(f"fastkd: FASTKD_BUILD must be one of {', '.join(MODES)}; got {MODE!r}")

NO_COMPILER = (
    "no C++ compiler was found; install one (on Debian, apt install g++) or name it in CXX, "
    "then install fastkd again"
)


class LeftOutError(Exception):
    """Kernels that cannot be compiled here, and the remedy."""


class NativeBuild(build_ext):
    """Compiles `_native`, and leaves `_build.txt` beside it for `python -m fastkd.info`."""

    def run(self):
        built = Path(self.build_lib, "fastkd")
        package = Path("fastkd") if self.inplace else built
        # An earlier build's module must not pass for this one's, least of all in a wheel.
        for folder in {built, package}:
            for stale in folder.glob("_native*"):
                stale.unlink()
        try:
            super().run()
            cpu = "compiled"
        except LeftOutError as reason:
            if MODE != "auto":
                raise SystemExit(f"fastkd: FASTKD_BUILD={MODE} cannot be done: {reason}") from None
            cpu = f"left out: {reason}"
            self.cuda = "left out with them"
        note = f"CPU kernels: {cpu}\nCUDA kernels: {self.cuda}\n"
        print(note, end="", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.txt").write_text(note)

    def build_extension(self, ext):
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        compiler = cxx_compiler()
        if MODE == "cpu":
            self.cuda = "left out: FASTKD_BUILD=cpu"
        else:
            try:
                settings, made = cuda()
                say(f"compiling CPU kernels, and CUDA kernels {made}")
                say("this takes minutes where nothing was compiled before")
                self.compile(module, compiler, settings)
                self.cuda = f"compiled {made}"
                return
            except LeftOutError as reason:
                if MODE == "cuda":
                    raise
                self.cuda = f"left out: {reason}"
        say("compiling CPU kernels alone")
        self.compile(module, compiler)

    def compile(self, module, compiler, settings=()):
        import pybind11

        # Ninja and pybind11 are named each time: CMake's cache may hold the folders of an isolated
        # build that is long gone. It must not hold an nvcc that is not asked for.
        # A folder for each compiler: CMake forgets its other settings when the compiler changes.
        build = Path(self.build_temp, re.sub(r"\W+", "-", compiler))
        os.environ["CXX"] = compiler
        self.cmake(
            *("-S", "csrc", "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_MAKE_PROGRAM={ninja()}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            "-UFASTKD_NVCC",
            *settings,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        self.cmake("--build", str(build))

    def cmake(self, *args):
        """Shows Ninja's progress as it comes; the rest at the end, if CMake fails or on request."""
        lines = []
        with subprocess.Popen(
            [cmake(), *args],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"NINJA_STATUS": "[%f/%t] "},
        ) as running:
            for line in running.stdout:
                if line.startswith("["):
                    say(line.rstrip())
                elif line.strip():
                    lines.append(line.rstrip())
        if lines:
            self.announce("\n".join(lines), logging.ERROR if running.returncode else logging.INFO)
        if running.returncode:
            errors = dropwhile(lambda line: "error" not in line.lower(), lines)
            raise LeftOutError("\n".join(["compiling failed", *islice(errors, 4)]))


def say(text):
    print(f"fastkd: {text}", file=sys.stderr, flush=True)


def cxx_compiler():
    # Left to itself, CMake also searches /usr/bin, and finds a compiler that PATH hides.
    names = map(shutil.which, ("c++", "g++", "clang++"))
    compiler = os.environ.get("CXX") or next(filter(None, names), None)
    if compiler is None:
        raise LeftOutError(NO_COMPILER)
    return compiler


# pip brings both of these for a build; without pip there may be those of the system.


def ninja():
    with contextlib.suppress(metadata.PackageNotFoundError):
        found = next(file.locate() for file in metadata.files("ninja") if file.stem == "ninja")
        return str(Path(found).resolve())
    return on_path("ninja")


def cmake():
    with contextlib.suppress(ImportError):
        from cmake import CMAKE_BIN_DIR

        return str(Path(CMAKE_BIN_DIR, "cmake"))
    return on_path("cmake")


def on_path(program):
    found = shutil.which(program)
    if found is None:
        raise LeftOutError(f"{program} was not found; pip install {program}")
    return found


def cuda():
    """What CMake must know for the CUDA kernels, and what it will make, in words."""
    wanted = os.environ.get("FASTKD_CUDA_ARCHS", "")
    try:
        toolkit = nvcc.find()
        chosen, reason = architectures.choose(wanted, toolkit.architectures)
    except (nvcc.UnusableError, architectures.UnsuitableError) as problem:
        raise LeftOutError(problem) from None
    except ValueError as error:
        raise SystemExit(f"fastkd: {error}") from None
    settings = (
        f"-DFASTKD_NVCC={toolkit.path}",
        f"-DFASTKD_NVCC_FLAGS={';'.join(nvcc.FLAGS)}",
        f"-DFASTKD_CUDART={toolkit.cudart}",
        f"-DFASTKD_CUDA_ARCHS={';'.join(map(str, chosen))}",
    )
    names = ", ".join(f"sm_{architecture}" for architecture in chosen)
    release = "{}.{}".format(*toolkit.release)
    made = (
        f"for {names}, and PTX of compute_{chosen[-1]}, by {toolkit.path} of CUDA {release}; "
        f"{reason}"
    )
    return settings, made


setup(
    ext_modules=[] if MODE == "none" else [Extension("fastkd._native", sources=[])],
    cmdclass={"build_ext": NativeBuild},
)

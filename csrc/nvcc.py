"""Finds an nvcc to compile with. Asked by setup.py and by `make cuda-check`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

OLDEST_RELEASE = (12, 4)  # takes the g++ 13 that distributions have

# The host's constexpr functions serve the device too.
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr")

REMEDY = (
    "install NVIDIA's CUDA toolkit, with nvcc on PATH or CUDA_HOME or CUDACXX set, or pip install "
    "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"
)


class UnusableError(Exception):
    """Why there is no nvcc to compile with."""


class Nvcc(NamedTuple):
    path: str
    release: tuple[int, int]
    architectures: frozenset[int]  # all that it knows
    cudart: str  # the CUDA runtime, to be linked statically


def find() -> Nvcc:
    """The first nvcc that can be used."""
    problems = []
    for path in candidates():
        try:
            return ask(path)
        except UnusableError as problem:
            problems.append(f"{path} {problem}")
    raise UnusableError(f"{'; '.join(problems) or 'no nvcc was found'}; {REMEDY}")


def candidates() -> list[str]:
    """CUDACXX alone where it is set; otherwise that of CUDA_HOME, of PATH, of pip."""
    if named := os.environ.get("CUDACXX"):
        return [named]
    places = []
    if home := os.environ.get("CUDA_HOME"):
        places.append(Path(home, "bin/nvcc"))
    if on_path := shutil.which("nvcc"):
        places.append(Path(on_path))
    # pip's isolated builds hide the environment's packages from sys.path.
    installed = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    places += [Path(folder, "nvidia/cu13/bin/nvcc") for folder in installed]
    return list(dict.fromkeys(str(place) for place in places if place.is_file()))


def ask(path: str) -> Nvcc:
    release = re.search(r"release (\d+)\.(\d+)", _say(path, "--version"))
    if release is None:
        raise UnusableError("does not tell its release")
    version = int(release[1]), int(release[2])
    if version < OLDEST_RELEASE:
        older = "is of CUDA {}.{}, older than {}.{}"
        raise UnusableError(older.format(*version, *OLDEST_RELEASE))
    known = frozenset(map(int, re.findall(r"sm_(\d+)\b", _say(path, "--list-gpu-code"))))
    steps = _say(path, "--dryrun", "-c", "x.cu")
    folders = [*re.findall(r'"-L([^"]+)"', steps), *re.findall(r"#\$ TOP=(.+)", steps)]
    places = [Path(folder, name) for folder in folders for name in ("", "lib")]
    runtimes = [place / "libcudart_static.a" for place in places]
    runtime = next((file for file in runtimes if file.is_file()), None)
    if runtime is None:
        raise UnusableError("comes without libcudart_static.a")
    return Nvcc(path, version, known, str(runtime.resolve()))


def _say(*command: str) -> str:
    try:
        return subprocess.run(
            command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True
        ).stdout
    except subprocess.CalledProcessError as error:
        raise UnusableError(f"fails: {error.output.partition(os.linesep)[0]}") from None
    except OSError as error:
        raise UnusableError(f"does not run: {error.strerror}") from None

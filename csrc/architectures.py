"""Chooses the GPUs that the CUDA kernels are compiled for. Asked by setup.py."""

import ctypes
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

# For wheels, containers and machines without a GPU, as far as nvcc knows them.
USUAL = (80, 86, 89, 90, 100, 120)
OLDEST = 80  # bfloat16 arithmetic

# Of CUdevice_attribute in cuda.h.
_MAJOR, _MINOR = 75, 76


class NoGpuError(Exception):
    """Why no GPU is found here."""


class UnsuitableError(Exception):
    """Why there is no GPU to compile for."""


def capabilities(library: str = "libcuda.so.1") -> list[int]:
    """The compute capabilities of the GPUs that the driver shows, as 90 for 9.0, each once.

    The driver's library is asked and not nvidia-smi: containers often have no nvidia-smi, and those
    of older drivers do not know the question. CUDA_VISIBLE_DEVICES hides GPUs here as it does from
    programs.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        raise NoGpuError("no NVIDIA driver is installed") from None
    _check("cuInit", driver.cuInit(0))
    count = ctypes.c_int()
    _check("cuDeviceGetCount", driver.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
        raise NoGpuError("the NVIDIA driver shows no GPU")
    return sorted({_capability(driver, ordinal) for ordinal in range(count.value)})


def _capability(driver: ctypes.CDLL, ordinal: int) -> int:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _check("cuDeviceGet", driver.cuDeviceGet(ctypes.byref(device), ordinal))
    for attribute, value in ((_MAJOR, major), (_MINOR, minor)):
        status = driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        _check("cuDeviceGetAttribute", status)
    return 10 * major.value + minor.value


def _check(function: str, status: int) -> None:
    if status:
        raise NoGpuError(f"the NVIDIA driver shows no GPU ({function} returned {status})")


class Choice(NamedTuple):
    architectures: list[int]
    reason: str


def choose(
    wanted: str, known: Collection[int], find_gpus: Callable[[], list[int]] = capabilities
) -> Choice:
    """What to compile for, of what nvcc knows, by `wanted`: the value of FASTKD_CUDA_ARCHS.

    Where that is empty: this machine's GPUs, or all the usual ones on a machine without a GPU.
    """
    wanted = wanted.strip()
    if wanted not in ("", "all", "native"):
        return Choice(_named(wanted, known), "named by FASTKD_CUDA_ARCHS")
    usual = [number for number in USUAL if number in known]
    if wanted == "all":
        return Choice(usual, "all, by FASTKD_CUDA_ARCHS")
    try:
        found = find_gpus()
    except NoGpuError as reason:
        if wanted:
            raise UnsuitableError(f"FASTKD_CUDA_ARCHS=native, and {reason}") from None
        return Choice(usual, f"all, because {reason}")
    return Choice(_serving(found, known), "for the GPU of this machine")


def _named(wanted: str, known: Collection[int]) -> list[int]:
    possible = _possible(known)
    chosen = set()
    for word in re.split(r"[;,\s]+", wanted):
        parts = re.fullmatch(r"(\d+)\.?(\d)", word)
        if parts is None or int(parts[1] + parts[2]) not in possible:
            names = ", ".join(map(str, possible))
            raise ValueError(
                f"FASTKD_CUDA_ARCHS must be 'all', 'native' or a list of {names}; got {wanted!r}"
            )
        chosen.add(int(parts[1] + parts[2]))
    return sorted(chosen)


def _serving(capabilities: list[int], known: Collection[int]) -> list[int]:
    """For each GPU itself, or the newest before it: its driver compiles PTX for a newer GPU."""
    possible = _possible(known)
    older = [[number for number in possible if number <= gpu] for gpu in capabilities]
    chosen = sorted({numbers[-1] for numbers in older if numbers})
    if not chosen:
        present = ", ".join(f"{gpu // 10}.{gpu % 10}" for gpu in capabilities)
        oldest = f"{OLDEST // 10}.{OLDEST % 10}"
        raise UnsuitableError(
            f"the GPU of this machine has compute capability {present}, and the kernels need "
            f"{oldest}; FASTKD_CUDA_ARCHS=all compiles them for other machines"
        )
    return chosen


def _possible(known: Collection[int]) -> list[int]:
    return sorted(number for number in known if number >= OLDEST)

"""How a CPU is timed, and what machine it is; `benchmarks.cuda` has the same methods."""

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastkd import info

# More than any last-level cache holds, source and destination together.
_COPY_BYTES = 1 << 29
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


class Cpu:
    """The CPU, with an allocator that keeps its pages or that of the system.

    With the system's, every large gradient lies in pages that the kernel must find and clear: the
    same price for each contender, and on a virtual machine one that changes from minute to minute.
    PyTorch's tuning guide recommends an allocator that keeps them; so does this benchmark.
    """

    name = "cpu"

    def __init__(self, allocator: str = "keep") -> None:
        self.allocator = "system"
        if allocator == "keep":
            with contextlib.suppress(AttributeError, OSError):  # no glibc
                libc = ctypes.CDLL(None)
                if libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1):
                    self.allocator = "keep"

    def time(self, prepare: Callable[[], None], step: Callable[[], Any]) -> float:
        prepare()
        start = time.perf_counter()
        kept = step()
        elapsed = time.perf_counter() - start
        del kept
        return elapsed

    def host_seconds(self, prepare: Callable[[], None], step: Callable[[], Any]) -> None:
        """Nothing lags behind the host here."""

    def graph_seconds(
        self, prepare: Callable[[], None], step: Callable[[], Any], ideal_bytes: int
    ) -> None:
        """There are no graphs here."""

    def peak_extra_bytes(self, prepare: Callable[[], None], step: Callable[[], Any]) -> int | None:
        """The growth of resident memory at its peak; a kernel's own scratch shows, too.

        The kernel counts pages in batches: differences below about half a megabyte mean nothing.
        """
        prepare()
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            step()
            return max(0, _resident("VmHWM") - before)
        except OSError:
            return None

    def copy_bandwidth(self, seconds: float) -> dict[str, float]:
        """Bytes read and written per second: into mapped memory (warm), and into fresh memory."""
        source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
        target = source.clone()
        copies = {"warm": lambda: target.copy_(source), "fresh": source.clone}
        samples: dict[str, list[float]] = {name: [] for name in copies}
        deadline = time.monotonic() + seconds
        while len(samples["warm"]) < 3 or time.monotonic() < deadline:
            for name, copy in copies.items():
                samples[name].append(self.time(lambda: None, copy))
        return {name: 2 * _COPY_BYTES / statistics.median(s) for name, s in samples.items()}

    def on_chip_bytes(self) -> int:
        """The second-level cache of one core."""
        with contextlib.suppress(OSError, ValueError):
            size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
            return int(size.removesuffix("K")) << 10
        return 1 << 20

    def machine(self) -> dict[str, Any]:
        found = info.collect()
        return {
            "device": found["devices"]["cpu"]["name"],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "instruction_set_of_native": found["native"].get("instruction_set", "none"),
            "on_chip_bytes": self.on_chip_bytes(),
            "allocator": self.allocator,
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": system(),
            # Of the minute before: a run on a busy machine says so.
            "load": os.getloadavg()[0],
        }

    def versions(self) -> dict[str, str]:
        return {"compiler": _compiler()}


def system() -> str:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"{platform.system()} {platform.release()}"


def _compiler() -> str:
    """The one that torch.compile uses, unless CXX says otherwise."""
    try:
        command = [os.environ.get("CXX", "g++"), "--version"]
        return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError:
        return "none"


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"no {field} in /proc/self/status")

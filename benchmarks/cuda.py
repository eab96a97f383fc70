"""How an NVIDIA GPU is timed, and which one it is: the methods of `benchmarks.cpu`."""

import contextlib
import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch

from benchmarks.cpu import system

Action = Callable[[], Any]

# More than any cache holds.
_COPY_BYTES = 1 << 30
_HOST_CALLS = 20
_REPLAYS = 20
# Enough to keep a GPU's memory busy, when several multiprocessors share each.
_SAMPLES_AT_A_TIME = 32
# In one graph: an event tells time to half a microsecond.
_SMALL_STEPS = 20
_CAPTURE_WARMUPS = 2


class Cuda:
    """The current GPU. What every contender multiplies in float32 is true float32, not TF32."""

    name = "cuda"

    def __init__(self) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.properties = torch.cuda.get_device_properties()
        # So large that the host, too, gets ahead of the GPU while it is filled.
        self.flusher = self._empty(4 * self.properties.L2_cache_size)

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.name)

    def time(self, prepare: Action, step: Action) -> float:
        """Between two events on the GPU; where the host is slower, this is the host's time.

        The cache is flushed by writing: a step then meets as many lines that wait to be written
        back as it leaves behind itself.
        """
        prepare()
        self.flusher.zero_()
        return self._between_events(step)

    def _between_events(self, step: Action) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = step()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) / 1e3

    def host_seconds(self, prepare: Action, step: Action) -> float:
        """Until everything is in the GPU's queue: the median of some calls."""
        samples = []
        for _ in range(_HOST_CALLS):
            prepare()
            torch.cuda.synchronize()
            start = time.perf_counter()
            kept = step()
            samples.append(time.perf_counter() - start)
            del kept
        return statistics.median(samples)

    def graph_seconds(self, prepare: Action, step: Action, ideal_bytes: int) -> float:
        """Of the step in a CUDA graph, which leaves the host out; raises if it cannot be captured.

        One step that exceeds the cache, and finds it flushed; or many others, which find there
        what the one before has left, as in training.
        """
        steps = 1 if ideal_bytes > self.properties.L2_cache_size else _SMALL_STEPS
        graph = _captured(prepare, step, steps)
        samples = [self.time(_nothing, graph.replay) for _ in range(_REPLAYS)]
        return statistics.median(samples) / steps

    def peak_extra_bytes(self, prepare: Action, step: Action) -> int:
        """As torch's allocator counts it."""
        prepare()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self, seconds: float) -> dict[str, float]:
        """Bytes read and written per second by a copy within the GPU's memory."""
        source, target = self._empty(_COPY_BYTES).zero_(), self._empty(_COPY_BYTES)
        samples: list[float] = []
        deadline = time.monotonic() + seconds
        while len(samples) < 3 or time.monotonic() < deadline:
            samples.append(self._between_events(lambda: target.copy_(source)))
        return {"warm": 2 * _COPY_BYTES / statistics.median(samples)}

    def on_chip_bytes(self) -> int:
        """One sample's part of the L2 cache, from which it can be read once more."""
        return self.properties.L2_cache_size // _SAMPLES_AT_A_TIME

    def machine(self) -> dict[str, Any]:
        found = self.properties
        return {
            "device": found.name,
            "cores": os.cpu_count(),
            "multiprocessors": found.multi_processor_count,
            "capability": f"{found.major}.{found.minor}",
            "l2_bytes": found.L2_cache_size,
            "on_chip_bytes": self.on_chip_bytes(),
            "memory_bytes": found.total_memory,
            "driver": _driver(),
            "system": system(),
            "load": os.getloadavg()[0],
        }

    def versions(self) -> dict[str, str]:
        return {
            "cuda": torch.version.cuda or "none",
            "triton": _version("triton"),
            "liger-kernel": _version("liger-kernel"),
        }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _nothing() -> None:
    pass


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(prepare: Action, step: Action, steps: int) -> torch.cuda.CUDAGraph:
    """So many steps, one after another, after the warm-up on a side stream that torch asks for.

    What waits for the GPU, as Liger-Kernel does, cannot be captured. The last step of the warm-up
    finds that out, because a capture that fails keeps the memory of its graph for good.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_CAPTURE_WARMUPS):
            prepare()
            step()
        with _waiting_is_an_error():
            prepare()
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            prepare()
            step()
    return graph


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return "unknown"

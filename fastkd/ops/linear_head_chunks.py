"""How many rows of a linear head have logits at a time."""

import os
from collections.abc import Sequence

import torch

from fastkd.parameters import Heads

# More rows make a CPU's products no faster. On a GPU each chunk reads and writes the weight's whole
# gradient in float32, which takes less time than the product only if the chunk has many rows.
_MOST = {"cpu": 512, "cuda": 2048}
_LEAST = 16
# The logits of a chunk take at most this part of the memory that is free.
_SHARE = 8


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which products are computed: float32 in the place of float16, of which a CPU has none."""
    return torch.float32 if dtype == torch.float16 and device.type == "cpu" else dtype


def bytes_of_row(heads: Heads, classes: Sequence[int], device: torch.device) -> int:
    """Of the logits of one row of each side that is a head; `classes` are those of both sides."""
    sides = (heads.student_is_head, heads.dtype), (heads.teacher_is_head, heads.teacher_dtype)
    total = 0
    for count, (is_head, name) in zip(classes, sides, strict=True):
        if is_head:
            dtype = product_dtype(getattr(torch, name), device)
            total += count * dtype.itemsize
    return total


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, so that the device cannot be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def free_bytes(device: torch.device) -> int | None:
    """What could be allocated now, without waiting for the device; None where nothing tells."""
    if is_capturing(device):
        return None
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def pick(bytes_of_row: int, free: int | None, device: torch.device) -> int:
    """A power of 2, the same for all amounts of free memory between two powers of 2."""
    most = _MOST.get(device.type, _MOST["cuda"])
    if free is None:
        return most
    room = _power_of_2(free) // _SHARE // max(bytes_of_row, 1)
    return max(_LEAST, min(most, _power_of_2(room)))


def _power_of_2(x: int) -> int:
    """The largest that is no larger."""
    return 1 << max(x, 1).bit_length() - 1

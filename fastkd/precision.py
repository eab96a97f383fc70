"""In which dtype the losses compute."""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Private to torch. Where it is missing, a device that is first met under a mode is taken for one
# that computes in float64, and raises if it does not.
_without_modes: Callable[[], contextlib.AbstractContextManager[None]] = getattr(
    torch._C, "_DisableTorchDispatch", contextlib.nullcontext
)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, otherwise float32: half precision is storage, never arithmetic."""
    is_double = torch.float64 in [t.dtype for t in tensors]
    return torch.float64 if is_double else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device computes in it, otherwise float32."""
    return torch.float64 if _has_float64(device.type) else torch.float32


def _has_float64(device: str) -> bool:
    return device in ("cpu", "cuda") or _computes_float64(device)


# A fact about the machine, which compiled code may hold.
_has_float64._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _computes_float64(device: str) -> bool:
    """By trying it once: devices refuse float64 by various errors, and some only to compute."""
    try:
        # Under the modes that may be active the tensor might be one in name only.
        with _without_modes():
            torch.ones(1, dtype=torch.float64, device=device).add_(1)
    except Exception:
        return False
    return True

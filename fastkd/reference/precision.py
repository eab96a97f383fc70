"""In which dtype the losses compute."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, otherwise float32: half precision is storage, never arithmetic."""
    is_double = torch.float64 in [t.dtype for t in tensors]
    return torch.float64 if is_double else torch.float32

"""The compiled module, which knows nothing of torch, and where and how it runs a call.

The module is `fastkd._native`; the environment variable FASTKD_NATIVE_PATH names another build of
it. It is loaded when a call first needs it.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastkd.parameters import OF_OPERATORS

# Private to torch; the public way makes a Stream object first.
_raw_stream: Any = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda index: torch.cuda.current_stream(index).cuda_stream,
)


@functools.cache
def load() -> ModuleType | str:
    """The compiled module, or why it cannot be loaded."""
    path = os.environ.get("FASTKD_NATIVE_PATH")
    try:
        if not path:
            return importlib.import_module("fastkd._native")
        spec = importlib.util.spec_from_file_location("fastkd._native", path)
        if spec is None or spec.loader is None:
            return f"FASTKD_NATIVE_PATH={path} is no Python module"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError:
        return "this installation was built without the compiled module"
    except (ImportError, OSError) as error:
        return f"the compiled module does not load ({error})"


def loaded() -> Any:
    """The compiled module, for a call that `refuse` has found nothing against."""
    module = load()
    assert not isinstance(module, str), module
    return module


def place_of(tensor: Tensor) -> tuple[int, int]:
    """Where the module runs a call on such tensors: the index of a GPU and a stream of it.

    The CPU's index is -1, and what would be a stream is the number of threads.
    """
    index: int = tensor.get_device()
    return index, torch.get_num_threads() if index < 0 else _raw_stream(index)


# Parameter objects are immutable, and a training run uses a handful.
@functools.lru_cache(maxsize=256)
def struct_of(p: Any) -> Any:
    """The module's object of the same name and fields."""
    fields = {name: value for name, value in p._asdict().items() if name not in OF_OPERATORS}
    return getattr(loaded(), type(p).__name__)(**fields)


def scratch(place: tuple[int, int], like: Tensor, operator: str, *arguments: Any) -> Tensor | None:
    """Memory in which the blocks of a GPU put their sums together; a CPU needs none."""
    if place[0] < 0:
        return None
    size = getattr(loaded(), f"{operator}_scratch_bytes")(*arguments)
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def as_buffer(grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, and in the precision of the loss."""
    return grad_output.to(dtype).contiguous()

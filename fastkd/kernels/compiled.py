"""The compiled module, which knows nothing of torch, and what it sees of tensors.

The module is `fastkd._native`; the environment variable FASTKD_NATIVE_PATH names another build of
it. It is loaded when a call first needs it.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastkd.ops.attention import MapParameters, TransferParameters
    from fastkd.ops.soft_target import Parameters

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_KINDS = {"sum": 0, "sum_pow": 0, "max_pow": 1}
_DISTANCES = {"norm": 0, "mse": 1}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}


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


def views(*tensors: Tensor | None) -> list[Any]:
    """What the module sees of tensors, which the caller keeps alive."""
    return [
        None if t is None else (t.data_ptr(), DTYPES[t.dtype], t.shape, t.stride()) for t in tensors
    ]


def view(t: Tensor) -> Any:
    """The same of one."""
    return views(t)[0]


def address(t: Tensor | None) -> int:
    """Where a contiguous tensor begins; 0 where there is none."""
    return 0 if t is None else t.data_ptr()


def addresses(winners: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[int]:
    """Of the winners that go with the slopes; 0 where the kind of map has none."""
    return [w.data_ptr() for w in winners] or [0] * len(slopes)


# Parameter objects are immutable, and a training run uses a handful.
@functools.lru_cache(maxsize=256)
def soft_target_parameters(p: "Parameters", threads: int) -> Any:
    """As the module wants them; a GPU has no use for the threads."""
    return loaded().SoftTarget(*p[:5], REDUCTIONS[p.reduction], p.dim, threads)


@functools.lru_cache(maxsize=256)
def map_parameters(p: "MapParameters", threads: int) -> Any:
    """As the module wants them; a GPU has no use for the threads."""
    return loaded().Map(_KINDS[p.kind], p.p, p.eps, p.channel_dim, threads)


@functools.lru_cache(maxsize=256)
def transfer_parameters(p: "TransferParameters") -> Any:
    """As the module wants them."""
    reduction = REDUCTIONS[p.reduction]
    return loaded().Transfer(_DISTANCES[p.distance], p.order, p.beta, reduction)


def as_buffer(grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, and in the precision of the loss."""
    return grad_output.to(dtype).contiguous()

"""Hands tensors to the compiled module, which knows nothing of torch.

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

from fastkd.dispatch import Facts, Refusal
from fastkd.reference.precision import compute_dtype

if TYPE_CHECKING:
    from fastkd.ops import attention as attention_ops
    from fastkd.ops import hint as hint_ops
    from fastkd.ops import soft_target as soft_target_ops

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}
_KINDS = {"sum": 0, "sum_pow": 0, "max_pow": 1}
_DISTANCES = {"norm": 0, "mse": 1}


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


def refuse(facts: Facts) -> Refusal | None:
    """Why the compiled module does not serve a call, or None if it does."""
    if facts.device != "cpu":
        return Refusal(
            f"the compiled module of this release has no kernels for {facts.device} tensors",
            'Pass backend="reference" to use plain PyTorch without this warning.',
        )
    if facts.transformed:
        return Refusal(
            "a torch.func transform or a lazy negation stands between the tensors and their memory",
            'Pass backend="reference" to use plain PyTorch without this warning.',
        )
    module = load()
    if isinstance(module, str):
        return Refusal(
            module,
            "Install a C++ compiler and reinstall fastkd; `python -m fastkd.info` tells more.",
        )
    return None


def _module() -> Any:
    module = load()
    assert not isinstance(module, str), module
    return module


def _views(*tensors: Tensor | None) -> list[Any]:
    """What the module sees of tensors, which the caller keeps alive."""
    return [
        None if t is None else (t.data_ptr(), _DTYPES[t.dtype], t.shape, t.stride())
        for t in tensors
    ]


def _view(t: Tensor) -> Any:
    return _views(t)[0]


def _addresses(winners: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[int]:
    """Of the winners that go with the slopes; 0 where the kind of map has none."""
    return [w.data_ptr() for w in winners] or [0] * len(slopes)


def _grad_output(grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, and in the precision of the loss."""
    return grad_output.to(dtype).contiguous()


# Parameter objects are immutable, and a training run uses a handful.
@functools.lru_cache(maxsize=256)
def _soft_target(p: "soft_target_ops.Parameters", threads: int) -> Any:
    return _module().SoftTarget(*p[:5], _REDUCTIONS[p.reduction], p.dim, threads)


@functools.lru_cache(maxsize=256)
def _map(p: "attention_ops.MapParameters", threads: int) -> Any:
    return _module().Map(_KINDS[p.kind], p.p, p.eps, p.channel_dim, threads)


@functools.lru_cache(maxsize=256)
def _hint(p: "hint_ops.Parameters", threads: int) -> Any:
    return _module().Hint(p.scale, _REDUCTIONS[p.reduction], threads)


def soft_target_forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    loss: Tensor,
    statistics: Tensor | None,
    gradient: Tensor | None,
    p: "soft_target_ops.Parameters",
) -> None:
    """Fill the loss, and those that are wanted of the rows' statistics and the gradient."""
    if labels is not None:
        labels = labels.contiguous()
    views = _views(student, teacher, gradient)
    _module().soft_target_forward(
        *views[:2],
        0 if labels is None else labels.data_ptr(),
        loss.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
        views[2],
        _soft_target(p, torch.get_num_threads()),
    )


def soft_target_backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    statistics: Tensor,
    to_student: Tensor | None,
    to_teacher: Tensor | None,
    p: "soft_target_ops.Parameters",
) -> None:
    """Fill the gradients that are wanted."""
    grad_output = _grad_output(grad_output, statistics.dtype)
    if labels is not None:
        labels = labels.contiguous()
    _module().soft_target_backward(
        *_views(grad_output, student, teacher),
        0 if labels is None else labels.data_ptr(),
        statistics.data_ptr(),
        *_views(to_student, to_teacher),
        _soft_target(p, torch.get_num_threads()),
    )


def attention_map_forward(
    features: Tensor, raw: Tensor, winners: Tensor, p: "attention_ops.MapParameters"
) -> None:
    """Fill the unnormalised map, and the winners of max_pow."""
    parameters = _map(p, torch.get_num_threads())
    _module().attention_map_forward(*_views(features, raw), winners.data_ptr(), parameters)


def attention_transfer_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    slopes: Sequence[Tensor],
    winners: Sequence[Tensor],
    gradients: Sequence[Tensor],
    transfer: "attention_ops.TransferParameters",
    p: "attention_ops.MapParameters",
) -> None:
    """Fill the loss, slopes and winners, and the gradients if there are any."""
    module = _module()
    module.attention_transfer_forward(
        _views(*students),
        _views(*teachers),
        _view(loss),
        _views(*slopes),
        _addresses(winners, slopes),
        _views(*gradients),
        module.Transfer(
            _DISTANCES[transfer.distance],
            transfer.order,
            transfer.beta,
            _REDUCTIONS[transfer.reduction],
        ),
        _map(p, torch.get_num_threads()),
    )


def attention_backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    slopes: Sequence[Tensor],
    winners: Sequence[Tensor],
    gradients: Sequence[Tensor],
    p: "attention_ops.MapParameters",
) -> None:
    """Fill the features' gradients."""
    grad_output = _grad_output(grad_output, slopes[0].dtype)
    _module().attention_backward(
        _view(grad_output),
        _views(*features),
        _views(*slopes),
        _addresses(winners, slopes),
        _views(*gradients),
        _map(p, torch.get_num_threads()),
    )


def hint_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    gradients: Sequence[Tensor],
    p: "hint_ops.Parameters",
) -> None:
    """Fill the loss, and the students' gradients if there are any."""
    _module().hint_forward(
        _views(*students),
        _views(*teachers),
        _view(loss),
        _views(*gradients),
        _hint(p, torch.get_num_threads()),
    )


def hint_backward(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    p: "hint_ops.Parameters",
) -> None:
    """Fill the gradients that are wanted, of students and then of teachers."""
    grad_output = _grad_output(grad_output, compute_dtype(*students, *teachers))
    _module().hint_backward(
        _view(grad_output),
        _views(*students),
        _views(*teachers),
        _views(*gradients),
        _hint(p, torch.get_num_threads()),
    )

"""Hands tensors to the compiled module's CPU kernels, and those of a GPU to `cuda`."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd.dispatch import Facts, Refusal
from fastkd.kernels import cuda
from fastkd.kernels.compiled import (
    REDUCTIONS,
    address,
    addresses,
    as_buffer,
    load,
    loaded,
    map_parameters,
    soft_target_parameters,
    transfer_parameters,
    view,
    views,
)
from fastkd.kernels.refusals import OBSTACLES, USE_REFERENCE
from fastkd.reference.precision import compute_dtype

if TYPE_CHECKING:
    from fastkd.ops import attention as attention_ops
    from fastkd.ops import hint as hint_ops
    from fastkd.ops import soft_target as soft_target_ops


def refuse(facts: Facts) -> Refusal | None:
    """Why the compiled module does not serve a call, or None if it does."""
    device = facts.device.partition(":")[0]
    if device not in ("cpu", "cuda"):
        return Refusal(f"the compiled module has no kernels for {device} tensors", USE_REFERENCE)
    if facts.obstacle is not None:
        return OBSTACLES[facts.obstacle]
    module = load()
    if isinstance(module, str):
        return Refusal(
            module,
            "Install a C++ compiler and reinstall fastkd; `python -m fastkd.info` tells more.",
        )
    return None if device == "cpu" else cuda.refuse(module, facts)


@functools.lru_cache(maxsize=256)
def _hint(p: "hint_ops.Parameters", threads: int) -> Any:
    return loaded().Hint(p.scale, REDUCTIONS[p.reduction], threads)


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
    if not student.is_cpu:
        return cuda.soft_target_forward(student, teacher, labels, loss, statistics, gradient, p)
    if labels is not None:
        labels = labels.contiguous()
    sides = views(student, teacher, gradient)
    loaded().soft_target_forward(
        *sides[:2],
        address(labels),
        loss.data_ptr(),
        address(statistics),
        sides[2],
        soft_target_parameters(p, torch.get_num_threads()),
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
    in_place: bool = False,
) -> None:
    """Fill the gradients that are wanted.

    `in_place` says that they are those for a `grad_output` of 1: on a GPU they stay where it is 1.
    """
    if not student.is_cpu:
        return cuda.soft_target_backward(
            grad_output, student, teacher, labels, statistics, to_student, to_teacher, p, in_place
        )
    grad_output = as_buffer(grad_output, statistics.dtype)
    if labels is not None:
        labels = labels.contiguous()
    loaded().soft_target_backward(
        *views(grad_output, student, teacher),
        address(labels),
        statistics.data_ptr(),
        *views(to_student, to_teacher),
        soft_target_parameters(p, torch.get_num_threads()),
    )


def soft_target_ensemble(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: tuple[float, ...],
    labels: Tensor | None,
    loss: Tensor | None,
    parts: Tensor | None,
    gradient: Tensor | None,
    grad_output: Tensor | None,
    p: "soft_target_ops.Parameters",
    in_place: bool = False,
) -> None:
    """Fill those that are wanted of the loss, its parts, and the student's gradient.

    The gradient is for `grad_output`, or for 1 without one. `in_place` says that it is that for a
    `grad_output` of 1: on a GPU it stays where it is 1.
    """
    if not student.is_cpu:
        return cuda.soft_target_ensemble(
            student, teachers, weights, labels, loss, parts, gradient, grad_output, p, in_place
        )
    dtype = compute_dtype(student, *teachers)
    if grad_output is not None:
        grad_output = as_buffer(grad_output, dtype)
    if labels is not None:
        labels = labels.contiguous()
    loaded().soft_target_ensemble(
        view(student),
        views(*teachers),
        weights,
        address(labels),
        address(loss),
        address(parts),
        *views(gradient, grad_output),
        soft_target_parameters(p, torch.get_num_threads()),
    )


def attention_map_forward(
    features: Tensor, raw: Tensor, winners: Tensor, p: "attention_ops.MapParameters"
) -> None:
    """Fill the unnormalised map, and the winners of max_pow."""
    if not raw.is_cpu:
        return cuda.attention_map_forward(features, raw, winners, p)
    parameters = map_parameters(p, torch.get_num_threads())
    loaded().attention_map_forward(*views(features, raw), winners.data_ptr(), parameters)


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
    if not loss.is_cpu:
        return cuda.attention_transfer_forward(
            students, teachers, loss, slopes, winners, gradients, transfer, p
        )
    loaded().attention_transfer_forward(
        views(*students),
        views(*teachers),
        view(loss),
        views(*slopes),
        addresses(winners, slopes),
        views(*gradients),
        transfer_parameters(transfer),
        map_parameters(p, torch.get_num_threads()),
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
    if not grad_output.is_cpu:
        return cuda.attention_backward(grad_output, features, slopes, winners, gradients, p)
    grad_output = as_buffer(grad_output, slopes[0].dtype)
    loaded().attention_backward(
        view(grad_output),
        views(*features),
        views(*slopes),
        addresses(winners, slopes),
        views(*gradients),
        map_parameters(p, torch.get_num_threads()),
    )


def hint_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    gradients: Sequence[Tensor],
    p: "hint_ops.Parameters",
) -> None:
    """Fill the loss, and the students' gradients if there are any."""
    if not loss.is_cpu:
        return cuda.hint_forward(students, teachers, loss, gradients, p)
    loaded().hint_forward(
        views(*students),
        views(*teachers),
        view(loss),
        views(*gradients),
        _hint(p, torch.get_num_threads()),
    )


def hint_backward(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    p: "hint_ops.Parameters",
    in_place: bool = False,
) -> None:
    """Fill the gradients that are wanted, of students and then of teachers.

    `in_place` says that they are those for a `grad_output` of 1: on a GPU they stay where it is 1.
    """
    if not grad_output.is_cpu:
        return cuda.hint_backward(grad_output, students, teachers, gradients, p, in_place)
    grad_output = as_buffer(grad_output, compute_dtype(*students, *teachers))
    loaded().hint_backward(
        view(grad_output),
        views(*students),
        views(*teachers),
        views(*gradients),
        _hint(p, torch.get_num_threads()),
    )


def squared_distances(x: Tensor, to: Tensor) -> None:
    """Fill the squared distances between the rows of a contiguous matrix."""
    if not x.is_cpu:
        return cuda.squared_distances(x, to)
    loaded().squared_distances(*views(x, to), torch.get_num_threads())


def rkd_distance(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """From squared distances, fill the loss and its derivatives by the student's."""
    if not student.is_cpu:
        return cuda.rkd_distance(student, teacher, loss, slopes, delta)
    loaded().rkd_distance(*views(student, teacher, loss, slopes), delta, torch.get_num_threads())


def rkd_angle(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """From squared distances, fill the loss and its derivatives by the student's."""
    if not student.is_cpu:
        return cuda.rkd_angle(student, teacher, loss, slopes, delta)
    loaded().rkd_angle(*views(student, teacher, loss, slopes), delta, torch.get_num_threads())


def similarity(student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None) -> None:
    """From Gram matrices, fill the loss and its derivatives by the student's."""
    if not student.is_cpu:
        return cuda.similarity(student, teacher, loss, slopes)
    loaded().similarity(*views(student, teacher, loss, slopes), torch.get_num_threads())


def max_pool(features: Tensor, pooled: Tensor, winners: Tensor | None) -> None:
    """Fill the maxima of as many bins as `pooled` has positions, and where they were if wanted."""
    loaded().max_pool(*views(features, pooled), address(winners), torch.get_num_threads())


def max_pool_backward(grad_output: Tensor, winners: Tensor, gradient: Tensor) -> None:
    """Fill the gradient of the features that `winners` were among."""
    threads = torch.get_num_threads()
    grad_output = grad_output.to(compute_dtype(gradient))
    loaded().max_pool_backward(view(grad_output), winners.data_ptr(), view(gradient), threads)


def multiply(gradients: Sequence[Tensor], grad_output: Tensor) -> None:
    """Multiply each gradient in place by a scalar."""
    if not grad_output.is_cpu:
        return cuda.multiply(gradients, grad_output)
    for gradient in gradients:
        gradient.mul_(grad_output)

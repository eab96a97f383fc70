"""Operators of soft targets, alone and with the hard labels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.operators import define, kernels
from fastkd.parameters import SoftTarget, in_schema
from fastkd.precision import compute_dtype

# Per row: maximum and sum of exponentials of student and teacher at T, the student's sum at
# temperature 1, the KL divergence and the cross-entropy. These two are multiplied by 2^-24, so that
# those of any finite logits are finite. All that backward needs of a row and its one teacher. Where
# the losses of rows are reduced, the number of rows that count comes after the last row.
STATISTICS = 7

_PARAMETERS = in_schema(SoftTarget)


def existing(
    p: SoftTarget, student: Tensor, teachers: Sequence[Tensor], *gradients: Tensor | None
) -> tuple[Any, ...]:
    """The same tensors without the classes that do not exist."""
    count = p.num_classes
    if count is None:
        return student, teachers, *gradients

    def existing(x: Tensor) -> Tensor:
        return x.narrow(p.dim, 0, count)

    to = [None if gradient is None else existing(gradient) for gradient in gradients]
    return existing(student), [existing(teacher) for teacher in teachers], *to


def fill_padding(p: SoftTarget, *gradients: Tensor | None) -> None:
    """Where no classes exist a gradient is 0.

    After the kernels, which say how the memory of a gradient is best mapped before they touch it.
    """
    count = p.num_classes
    if count is None:
        return
    for gradient in gradients:
        if gradient is not None:
            gradient.narrow(p.dim, count, gradient.shape[p.dim] - count).zero_()


def times(grad_output: Tensor, factor: Tensor | None) -> Tensor:
    """That of the losses which kernels find, from that of what the factor makes of them."""
    return grad_output if factor is None else grad_output * factor


def weighted(found: Tensor, factor: Tensor) -> Tensor:
    """The loss, from what kernels find."""
    return (found * factor).sum()


def outputs(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    with_parts: bool,
    with_statistics: bool,
    with_gradient: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Room for the loss, its parts, the statistics and the gradient, as far as they are wanted."""
    dtype = compute_dtype(student, *teachers)
    rows: Sequence[int] = ()
    if p.reduction == "none":
        rows = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    parts = statistics = None
    if with_parts:
        parts = student.new_empty((2, *rows), dtype=dtype)
    if with_statistics:
        count = student.numel() // student.shape[p.dim]
        statistics = student.new_empty(count * STATISTICS + (p.reduction != "none"), dtype=dtype)
    gradient = torch.empty_like(student) if with_gradient else None
    return student.new_empty(rows, dtype=dtype), parts, statistics, gradient


@define(
    "soft_target_forward(Tensor student, Tensor[] teachers, Tensor? labels, "
    "Tensor[] temperatures, Tensor? factor, bool with_parts, "
    f"bool with_statistics, bool with_gradient, {_PARAMETERS}) "
    "-> (Tensor loss, Tensor parts, Tensor statistics, Tensor gradient)",
    outputs,
    SoftTarget,
)
def forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    with_parts: bool,
    with_statistics: bool,
    with_gradient: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, its parts `(hard, T² KL)`, what backward needs of each row, and the gradient.

    The gradient alone is multiplied by the factor, a number or one for each row. There are
    statistics where there is one teacher, of logits, and the divergence is a KL divergence.
    """
    inputs = student, teachers, labels, temperatures
    found = outputs(*inputs, factor, with_parts, with_statistics, with_gradient, p)
    *of_rows, gradient = found
    student, teachers, to = existing(p, student, teachers, gradient)
    kernels(p.backend, "soft_target").soft_target_forward(
        student, teachers, labels, *of_rows, to, p, temperatures=temperatures, grad_output=factor
    )
    fill_padding(p, gradient)
    return found


def _gradients(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    to_temperatures: bool,
    p: SoftTarget,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        torch.empty_like(student) if to_student else None,
        torch.empty_like(teachers[0]) if to_teacher else None,
        temperatures[0].new_empty((3, *temperatures[0].shape)) if to_temperatures else None,
    )


@define(
    "soft_target_backward(Tensor grad_output, Tensor student, Tensor[] teachers, Tensor? labels, "
    f"Tensor[] temperatures, Tensor? statistics, bool to_student, bool to_teacher, "
    f"bool to_temperatures, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)",
    _gradients,
    SoftTarget,
)
def backward(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor | None,
    to_student: bool,
    to_teacher: bool,
    to_temperatures: bool,
    p: SoftTarget,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the student, of its one teacher and of the temperatures."""
    inputs = grad_output, student, teachers, labels, temperatures, statistics
    found = _gradients(*inputs, to_student, to_teacher, to_temperatures, p)
    student, teachers, *to = existing(p, student, teachers, *found[:2])
    kernels(p.backend, "soft_target").soft_target_backward(
        grad_output,
        student,
        teachers,
        labels,
        statistics,
        *to,
        p,
        temperatures=temperatures,
        to_temperatures=found[2],
    )
    fill_padding(p, *found[:2])
    return found


def _room_for_terms(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor,
    p: SoftTarget,
) -> Tensor:
    return student.new_empty((statistics.numel() // STATISTICS, 2), dtype=torch.float64)


@define(
    "soft_target_terms(Tensor student, Tensor[] teachers, Tensor? labels, Tensor[] temperatures, "
    f"Tensor statistics, {_PARAMETERS}) -> Tensor",
    _room_for_terms,
    SoftTarget,
)
def terms(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor,
    p: SoftTarget,
) -> Tensor:
    """What the classes of a shard add to (Σφ, Σψ) of each row, from statistics of whole rows.

    Of a divergence of probabilities, whose backward takes the Σψ of all shards in the place that
    statistics have for the divergence.
    """
    found = _room_for_terms(student, teachers, labels, temperatures, statistics, p)
    student, teachers = existing(p, student, teachers)
    kernels(p.backend, "shards").soft_target_terms(
        student, teachers, labels, statistics, found, p, temperatures=temperatures
    )
    return found


@define(
    "soft_target_rescale(Tensor(a!) gradient, Tensor grad_output, Tensor student, "
    "Tensor[] teachers, Tensor? labels, Tensor[] temperatures, Tensor? statistics, Tensor? factor, "
    "bool in_place, "
    f"{_PARAMETERS}) -> ()",
    lambda *_: None,
    SoftTarget,
)
def rescale(
    gradient: Tensor,
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor | None,
    factor: Tensor | None,
    in_place: bool,
    p: SoftTarget,
) -> None:
    """The student's gradient for a scalar `grad_output`, computed from the inputs.

    `in_place` says that `gradient` holds forward's, for a `grad_output` of 1 and the same factor.
    """
    student, teachers, to = existing(p, student, teachers, gradient)
    kernels(p.backend, "soft_target").soft_target_backward(
        times(grad_output, factor),
        student,
        teachers,
        labels,
        statistics,
        to,
        None,
        p,
        in_place=grad_output if in_place else None,
        temperatures=temperatures,
    )
    fill_padding(p, gradient)

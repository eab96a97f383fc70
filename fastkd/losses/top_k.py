"""Checks of teachers that kept k classes, and what the losses make of these."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.logits import TopK
from fastkd.losses import checks, rows
from fastkd.precision import compute_dtype
from fastkd.reference.top_k import Slots, slots_of
from fastkd.tensors import can_be_read

# The tails of each kind; those of the second have true probabilities.
_RENORMALIZED, _TRUE = ("renormalize", "renormalize_both"), ("zero", "bucket")
# Those that make of both sides distributions over the same classes.
_OF_ALL_DIVERGENCES = ("bucket", "renormalize_both")
_VALUES = ("logits", "log_probs")
_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint32, torch.uint16, torch.uint8),
)


def check_temperature(teacher: TopK, teacher_temperature: Any) -> None:
    """There is none where the values are used as they are."""
    checks.choice("values_are", teacher.values_are, _VALUES)
    if teacher.values_are == "log_probs" and teacher_temperature is not None:
        raise ValueError(
            "teacher_temperature softens logits, and with values_are='log_probs' the teacher's "
            f"values are used as they are: leave it out, got {teacher_temperature!r}"
        )


def check_tensors(student: Tensor, teacher: TopK, dim: int) -> list[Tensor]:
    """The values, and the log-sum-exp if there is one; they go with the tail."""
    values, indices, lse = teacher.values, teacher.indices, teacher.lse
    checks.choice("tail", teacher.tail, (*_RENORMALIZED, *_TRUE))
    checks.floating(("values", values))
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in _INTEGERS:
        raise TypeError(f"indices must be integers, such as int64, got {indices.dtype}")
    shape = rows.shape_of(student, dim)
    if values.shape[:-1] != shape or values.ndim != student.ndim or values.shape[-1] == 0:
        raise ValueError(
            f"values must have the shape of the rows, {tuple(shape)}, and the kept classes as the "
            f"last dimension, got {tuple(values.shape)}"
        )
    checks.same_shape("values", values, "indices", indices)
    for name, tensor in (("values", values), ("indices", indices)):
        checks.same_device("student_logits", student, name, tensor)
    needs_lse = teacher.tail in _TRUE and teacher.values_are == "logits"
    if lse is None:
        if needs_lse:
            raise ValueError(
                f"tail={teacher.tail!r} needs true probabilities: pass lse, the log-sum-exp of all "
                "of the teacher's logits over its temperature, or log-probabilities with "
                "values_are='log_probs'"
            )
        return [values]
    if not needs_lse:
        raise ValueError(
            f"lse belongs to values_are='logits' and tail 'zero' or 'bucket', got values_are="
            f"{teacher.values_are!r} and tail={teacher.tail!r}"
        )
    checks.floating(("lse", lse))
    checks.same_device("student_logits", student, "lse", lse)
    if lse.shape != shape:
        raise ValueError(
            f"lse must have the shape of the rows, {tuple(shape)}, got {tuple(lse.shape)}"
        )
    return [values, lse]


def check_divergence(teacher: TopK, divergence: str) -> None:
    """Forward KL alone compares what is no distribution over the same classes."""
    if divergence != "forward_kl" and teacher.tail not in _OF_ALL_DIVERGENCES:
        raise ValueError(
            f"divergence={divergence!r} needs tail 'bucket' or 'renormalize_both', where both "
            f"sides have the same classes; tail {teacher.tail!r} goes with 'forward_kl' alone"
        )


def slots(
    teacher: TopK,
    tensors: Sequence[Tensor],
    classes: int,
    temperature: float,
    temperatures: Sequence[Tensor],
    labels: Tensor | None,
    ignore_index: int,
) -> Slots:
    """The classes that the teacher kept, of rows whose labels are not ignored.

    `tensors` are the student and the teacher's. The temperature is the teacher's; a tensor has its
    place in `temperatures`.
    """
    ignored = None if labels is None else labels == ignore_index
    heat: float | Tensor = temperatures[1] if temperatures else temperature
    found = slots_of(
        teacher.values,
        teacher.indices,
        teacher.lse,
        teacher.tail,
        1.0 if teacher.values_are == "log_probs" else heat,
        classes,
        ignored,
        compute_dtype(*tensors),
    )
    _check_range(found.indices, classes)
    return found


def _check_range(indices: Tensor, classes: int) -> None:
    """Each is a class, where that can be looked at; the last one of a row is its largest."""
    if not can_be_read(indices) or indices.numel() == 0:
        return
    largest = int(indices[..., -1].max())
    if largest >= classes:
        raise ValueError(
            f"indices must lie in [0, {classes - 1}], or be negative for padding, got {largest}"
        )

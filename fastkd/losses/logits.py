"""Checks of logits, of teachers with their weights, and of labels."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.logits import SIDES, LogProbabilities, Probabilities, TopK
from fastkd.losses import checks, rows, top_k
from fastkd.ranks import Ranks
from fastkd.reference.soft_target import zero
from fastkd.tensors import can_be_read

_MOST_TEACHERS = 64
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl")
# Of the divergences of mixtures, what each is at a beta of 0 and of 1; None: its own formula.
_ENDS: dict[str, tuple[str, str | None]] = {
    "jsd": ("forward_kl", "reverse_kl"),
    "skew_kl": ("forward_kl", None),
    "skew_reverse_kl": ("reverse_kl", None),
}
_BETA = 0.5  # the default
_DEFAULT = ("forward_kl", _BETA)
_LEAST_BETA = 1e-30  # of which float32 holds a part of a probability
_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)


def teacher_of(
    teacher: Probabilities | LogProbabilities | TopK, teacher_temperature: Any
) -> tuple[Tensor | TopK, str, Any]:
    """The tensor of a teacher, what its numbers are, and their temperature.

    One that kept k classes has more than one tensor, and stays as it is.
    """
    if isinstance(teacher, TopK):
        top_k.check_temperature(teacher, teacher_temperature)
        return teacher, "top_k", teacher_temperature
    if isinstance(teacher, Probabilities):
        tensor, teacher_is = teacher.probabilities, "probabilities"
    else:
        tensor, teacher_is = teacher.log_probabilities, "log_probabilities"
    name = type(teacher).__name__
    if teacher_temperature is not None:
        raise ValueError(
            f"teacher_temperature softens logits, and the teacher's {name} are used as they are: "
            f"leave it out, got {teacher_temperature!r}"
        )
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must hold a tensor, got {type(tensor).__name__}")
    return tensor, teacher_is, 1.0


def check_logits(
    student: Tensor,
    teacher: Any,
    weights: Any,
    dim: int,
    num_classes: Any,
    ranks: Ranks | None = None,
) -> tuple[int, int | None, list[Tensor], tuple[float, ...], list[Tensor]]:
    """The classes' dimension and their number, which is None where no logits are padded.

    Then the teachers with their weights, and the teachers of weight 0. Over ranks the number is
    that of all, and what is returned that of this one.
    """
    ensemble = checks.items(teacher)
    is_ensemble = ensemble is not None
    teachers = [teacher] if ensemble is None else ensemble
    checks.floating(("student_logits", student))
    if student.ndim == 0:
        raise ValueError("logits must have at least one dimension, got shape ()")
    dim = checks.dimension("dim", dim, student.ndim)
    if isinstance(teacher, TopK):
        teachers, to_compare = top_k.check_tensors(student, teacher, dim), []
    else:
        to_compare = teachers
    for i, one in enumerate(to_compare):
        name = f"teacher_logits[{i}]" if is_ensemble else "teacher_logits"
        if isinstance(one, SIDES):
            raise TypeError(
                f"{name} must be a tensor of logits, got {type(one).__name__}: of an ensemble of "
                "probabilities pass the mean, Probabilities(w1 * p1 + w2 * p2)"
            )
        checks.floating((name, one))
        checks.same_device("student_logits", student, name, one)
        if num_classes is None:
            checks.same_shape("student_logits", student, name, one)
        else:
            check_same_rows(student, name, one, dim)
    if not 1 <= len(teachers) <= _MOST_TEACHERS:
        raise ValueError(
            f"teacher_logits must hold 1 to {_MOST_TEACHERS} teachers, got {len(teachers)}"
        )
    classes = student.shape[dim]
    if ranks is not None or num_classes is not None:
        stored = [x.shape[dim] for x in (student, *to_compare)]
        if ranks is None:
            num_classes = check_num_classes(num_classes, stored)
        else:
            if num_classes is not None:
                num_classes = checks.integer("num_classes", num_classes)
            ranks.split(stored[0], min(stored[1:], default=stored[0]), num_classes)
            num_classes = None if ranks.here == max(stored) else ranks.here
        classes = count_classes(student, dim, num_classes, ranks)
    if classes == 0:
        raise ValueError(
            f"logits must have at least one class along dim {dim}, got {tuple(student.shape)}"
        )
    if classes == 1:
        _warn_of_one_class()
    if weights is None:
        weights = (1.0,) if isinstance(teacher, TopK) else (1 / len(teachers),) * len(teachers)
        return dim, num_classes, teachers, weights, []
    if not is_ensemble:
        raise ValueError(
            "teacher_weights needs a sequence of teachers as teacher_logits, got one teacher"
        )
    shares = _check_weights(weights, len(teachers))
    both = list(zip(teachers, shares, strict=True))
    return (
        dim,
        num_classes,
        [t for t, share in both if share > 0],
        tuple([share for share in shares if share > 0]),
        [t for t, share in both if share == 0],
    )


def count_classes(student: Tensor, dim: int, num_classes: int | None, ranks: Ranks | None) -> int:
    """How many exist, of what `check_logits` has found; over ranks, on all of them."""
    if ranks is not None:
        return ranks.classes
    return student.shape[dim] if num_classes is None else num_classes


def check_same_rows(student: Tensor, name: str, teacher: Tensor, dim: int) -> None:
    """Their shapes are the same but for the number of classes."""
    if student.ndim != teacher.ndim or rows.shape_of(student, dim) != rows.shape_of(teacher, dim):
        raise ValueError(
            f"student_logits and {name} must have the same shape but for the classes along "
            f"dim {dim}, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def check_num_classes(num_classes: Any, stored: list[int]) -> int | None:
    """All logits have so many. None where none has more."""
    count = checks.integer("num_classes", num_classes)
    if not 1 <= count <= min(stored):
        raise ValueError(
            f"num_classes must lie in [1, {min(stored)}], since the logits have "
            f"{' and '.join(map(str, stored))} classes, got {count}"
        )
    return None if count == max(stored) else count


def check_divergence(divergence: Any, beta: Any) -> tuple[str, float]:
    """The divergence and its beta; where that is 0 or 1, what the divergence is there."""
    if type(divergence) is str and type(beta) is float and (divergence, beta) == _DEFAULT:
        return _DEFAULT  # sooner than the checks would
    checks.choice("divergence", divergence, DIVERGENCES)
    beta = checks.number("beta", beta, at_least=0, at_most=1)
    if divergence not in _ENDS:
        if beta != _BETA:
            names = ", ".join(map(repr, _ENDS))
            raise ValueError(
                f"beta belongs to divergence {names}; for {divergence!r} it must stay {_BETA}, "
                f"got {beta!r}"
            )
        return divergence, _BETA
    end = _ENDS[divergence][0] if beta == 0 else _ENDS[divergence][1] if beta == 1 else None
    if end is not None:
        return end, _BETA
    if beta < _LEAST_BETA:
        raise ValueError(f"beta must be 0 or at least {_LEAST_BETA:g}, got {beta!r}")
    return divergence, beta


def _check_weights(weights: Any, teachers: int) -> list[float]:
    """Their shares of the sum."""
    given = checks.items(weights)
    if given is None:
        raise TypeError(
            f"teacher_weights must be a sequence of numbers, got {type(weights).__name__}"
        )
    if len(given) != teachers:
        raise ValueError(
            f"teacher_weights must hold one number for each of {teachers} teachers, "
            f"got {len(given)}"
        )
    numbers = [checks.number(f"teacher_weights[{i}]", w, at_least=0) for i, w in enumerate(given)]
    largest = max(numbers)
    if largest == 0:
        raise ValueError(f"teacher_weights must not all be 0, got {given}")
    # Divided twice, because a sum of large weights may overflow.
    numbers = [number / largest for number in numbers]
    total = sum(numbers)
    return [number / total for number in numbers]


@functools.cache
def _warn_once_of_one_class() -> None:
    warnings.warn(
        "logits with a single class: softmax is 1 whatever they hold, so the loss is 0 for ever. "
        "Two classes are made of one logit z by torch.stack([torch.zeros_like(z), z], dim)",
        stacklevel=6,
    )


def _warn_of_one_class() -> None:
    _warn_once_of_one_class()


@functools.cache
def _warn_once_of_last_dim() -> None:
    warnings.warn(
        "logits of 4 or more dimensions have their classes in the last one unless dim is given: "
        "pass dim=1 for (N, C, H, W), or the last dimension as a positive number, dim=3 of 4, "
        "which does not warn",
        stacklevel=6,
    )


def _warn_of_last_dim() -> None:
    _warn_once_of_last_dim()


# Called while a function is compiled, and not part of the graph.
_warn_of_one_class._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warn_of_last_dim._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_last_dim(logits: Tensor, dim: int, labels: Tensor | None = None) -> None:
    """Warn once in the process where a last dimension may be meant to be the width of images.

    Labels tell which dimension has the classes, unless their shape fits both.
    """
    if dim == -1 and logits.ndim >= 4 and (labels is None or _fit_dim_1(logits, labels)):
        _warn_of_last_dim()


def check_labels(logits: Tensor, labels: Tensor, ignore_index: int, dim: int) -> Tensor:
    """The labels as int64."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels must be integers, such as int64, got {labels.dtype}")
    checks.same_device("student_logits", logits, "labels", labels)
    shape = rows.shape_of(logits, dim)
    if labels.shape != shape:
        remedy = "; dim=1 says that the classes come second, as in (N, C, H, W)"
        raise ValueError(
            f"labels must have the logits' shape without dim {dim}, {tuple(shape)}, "
            f"got {tuple(labels.shape)}{remedy if _fit_dim_1(logits, labels) else ''}"
        )
    if labels.dtype == torch.int64:
        return labels
    wide = labels.to(torch.int64)
    if labels.dtype != torch.uint64:
        return wide
    # What int64 does not hold becomes negative, and must not be the ignored label there.
    too_large = wide < 0
    if can_be_read(wide) and too_large.any():
        raise _no_class(int(wide[too_large][0]) + 2**64, logits.shape[dim], ignore_index)
    return wide.masked_fill(too_large, -2 if ignore_index == -1 else -1)


def _fit_dim_1(logits: Tensor, labels: Tensor) -> bool:
    """Whether the labels are those of `(N, C, *spatial)`."""
    return logits.ndim > 1 and labels.shape == logits.shape[:1] + logits.shape[2:]


def check_label_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Each is a class or `ignore_index`, where that can be looked at."""
    if not can_be_read(labels) or labels.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(labels))
    if 0 <= low and high < classes:
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
    if wrong.numel():
        raise _no_class(int(wrong[0]), classes, ignore_index)


def _no_class(label: int, classes: int, ignore_index: int) -> ValueError:
    return ValueError(
        f"labels must lie in [0, {classes - 1}] or be ignore_index={ignore_index}, got {label}"
    )


def tied(loss: Tensor, unused: Sequence[Tensor]) -> Tensor:
    """The loss, towards which a teacher of weight 0 that requires a gradient has one of 0."""
    for teacher in unused:
        if teacher.requires_grad:
            loss = loss + zero(teacher).to(loss.dtype)
    return loss

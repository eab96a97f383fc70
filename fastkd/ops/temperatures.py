"""The gradients of temperatures, from those of the logits: torch's own operations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype
from fastkd.reference.scaled import LOGIT_SCALE, largest, shifted
from fastkd.reference.soft_target import divisor_of


def exchanged(temperatures: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of the sides in each other's place; the one whose square multiplies the loss stays."""
    if not temperatures:
        return temperatures
    student, teacher, root = temperatures
    return teacher, student, root


def of_divergence(p: SoftTarget) -> SoftTarget:
    """Whose gradients are by the logits themselves, and have no term of the labels."""
    return p._replace(hard_weight=0.0, label_smoothing=0.0, softcap=0.0, teacher_softcap=0.0)


def to_temperatures(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    statistics: Tensor | None,
    wanted: Sequence[bool],
    p: SoftTarget,
    to_sides: Callable[..., Sequence[Tensor | None]],
    forward: Callable[..., Sequence[Tensor | None]],
) -> tuple[Tensor | None, ...]:
    """Those that are wanted, from the gradients of the logits in the precision of the loss.

    `to_sides` and `forward` are what gives those gradients and the losses of rows.
    """
    if p.soft_weight == 0 or not any(wanted):
        return tuple(torch.zeros_like(t) for t in temperatures)
    dtype = compute_dtype(student, *teachers)
    student, teachers = student.to(dtype), [t.to(dtype) for t in teachers]
    inputs = student, teachers, labels, temperatures
    p = of_divergence(p)
    if labels is not None:  # what an ignored row has for a temperature may be anything
        temperatures = [t.masked_fill(labels == p.ignore_index, 1) for t in temperatures]
    of_student, of_teacher, root = temperatures
    of_sides = [wanted[0], *[wanted[1]] * len(teachers)]
    found, *others = to_sides(grad_output, *inputs, statistics, of_sides, p)
    to_student = to_teacher = to_root = None
    if found is not None:
        to_student = by_temperature(found, student, of_student, p.dim)
    for gradient, teacher in zip(others, teachers, strict=True):
        if gradient is not None:
            part = by_temperature(gradient, teacher, of_teacher, p.dim)
            to_teacher = part if to_teacher is None else to_teacher + part
    if wanted[2]:  # of T² times what else a row's loss is
        losses = forward(*inputs, None, False, False, False, p._replace(reduction="none"))[0]
        assert losses is not None
        divisor = divisor_of(losses.numel(), student.shape[p.dim], losses, labels, p)
        to_root = 2 * losses / root * (grad_output.to(dtype) / divisor)
    return to_student, to_teacher, to_root


def by_temperature(
    gradient: Tensor, logits: Tensor, temperature: Tensor, dim: int, top: Tensor | None = None
) -> Tensor:
    """The derivative by T of what depends on logits / T and has this gradient.

    It is `-1/T sum(g (x - max x))`, because the sum of g is 0. Classes without a gradient, and
    those of -inf, contribute 0. `top` are maxima that are known.
    """
    gradient, logits = gradient.movedim(dim, -1), logits.movedim(dim, -1)
    top = largest(logits) if top is None else top.movedim(dim, -1)
    products = gradient * shifted(logits, top)
    nothing = (gradient == 0) | (logits == -torch.inf)
    return products.masked_fill(nothing, 0).sum(-1) / temperature * (-1 / LOGIT_SCALE)

"""Hands tensors to the compiled module, one function an operator; the device decides there."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.facts import OBSTACLES, USE_REFERENCE, Facts, Refusal
from fastkd.kernels import cuda
from fastkd.kernels.compiled import as_buffer, load, loaded, place_of, scratch, struct_of
from fastkd.parameters import Hint, Map, Metrics, SoftTarget, Transfer
from fastkd.precision import compute_dtype


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


def soft_target_forward(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    loss: Tensor,
    parts: Tensor | None,
    statistics: Tensor | None,
    gradient: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    grad_output: Tensor | None = None,
) -> None:
    """Fill the loss, and those that are wanted of its parts, the statistics and the gradient.

    The gradient is that for `grad_output`, one number or one a row.
    """
    place = place_of(student)
    labels = labels if labels is None else labels.contiguous()
    memory = scratch(place, student, "soft_target")
    outputs = loss, parts, statistics, gradient
    if grad_output is not None:
        grad_output = as_buffer(grad_output, loss.dtype)
    loaded().soft_target_forward(
        place, student, teachers, labels, *outputs, memory, struct_of(p), temperatures, grad_output
    )


def soft_target_backward(
    grad_output: Tensor,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor | None,
    to_student: Tensor | None,
    to_teacher: Tensor | None,
    p: SoftTarget,
    in_place: Tensor | None = None,
    temperatures: Sequence[Tensor] = (),
    to_temperatures: Tensor | None = None,
) -> None:
    """Fill the gradients that are wanted, where there are statistics from these.

    Where the number `in_place` is 1, the student's is there already: on a GPU it stays. Statistics
    give the gradients of temperatures, too, one kind after another.
    """
    place = place_of(student)
    grad_output = as_buffer(grad_output, compute_dtype(student, *teachers))
    labels = labels if labels is None else labels.contiguous()
    memory = scratch(place, student, "soft_target") if statistics is None else None
    if in_place is not None:
        in_place = as_buffer(in_place, grad_output.dtype)
    inputs = grad_output, student, teachers, labels, statistics
    loaded().soft_target_backward(
        place,
        *inputs,
        to_student,
        to_teacher,
        memory,
        struct_of(p),
        in_place,
        temperatures,
        to_temperatures,
    )


def soft_target_terms(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    statistics: Tensor,
    terms: Tensor,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
) -> None:
    """Fill what the classes of a shard add to (Σφ, Σψ) of each row."""
    labels = labels if labels is None else labels.contiguous()
    inputs = student, teachers, labels, statistics, terms
    loaded().soft_target_terms(place_of(student), *inputs, struct_of(p), temperatures)


def top_k_forward(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    loss: Tensor | None,
    parts: Tensor | None,
    log_q: Tensor | None,
    gradient: Tensor | None,
    listed_only: bool,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
    grad_output: Tensor | None = None,
    first: int = 0,
    sums: Tensor | None = None,
    logits: Tensor | None = None,
) -> None:
    """Fill what is wanted of the loss, its parts, the student's log-probabilities and its gradient.

    The gradient is that for `grad_output`, one number or one a row; it may be the student itself.
    The sums and logits are those of whole rows, where the student has a shard of the classes.
    """
    place = place_of(student)
    labels = labels if labels is None else labels.contiguous()
    memory = scratch(place, student, "top_k")
    outputs = loss, parts, log_q, gradient
    if grad_output is not None:
        grad_output = as_buffer(grad_output, log_p.dtype)
    loaded().top_k_forward(
        place,
        *(student, indices, log_p, log_rest, labels, *outputs, memory),
        *(listed_only, first, sums, logits, struct_of(p), temperatures, grad_output),
    )


def top_k_sums(
    student: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    sums: Tensor,
    listed_only: bool,
    first: int,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
) -> None:
    """Fill what rows have of the classes of a shard, of which `first` is the first one."""
    place = place_of(student)
    labels = labels if labels is None else labels.contiguous()
    memory = scratch(place, student, "top_k")
    inputs = student, indices, labels, sums, memory, listed_only, first
    loaded().top_k_sums(place, *inputs, struct_of(p), temperatures)


def distillation_metrics(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    values: Tensor,
    argmax: Tensor,
    p: Metrics,
) -> None:
    """Fill the values of rows, one after another, and both arg-maxima."""
    if mask is not None:
        mask = mask.contiguous().view(torch.uint8)
    loaded().distillation_metrics(
        place_of(student), student, teacher, mask, values, argmax, struct_of(p)
    )


def attention_map_forward(features: Tensor, raw: Tensor, argmax: Tensor, p: Map) -> None:
    """Fill the unnormalised map, and the argmax of max_pow."""
    loaded().attention_map_forward(place_of(raw), features, raw, argmax, struct_of(p))


def attention_transfer_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    slopes: Sequence[Tensor],
    argmax: Sequence[Tensor],
    gradients: Sequence[Tensor],
    transfer: Transfer,
    p: Map,
) -> None:
    """Fill the loss, slopes and argmax, and the gradients if there are any."""
    place = place_of(loss)
    memory = scratch(place, loss, "attention", slopes, len(students))
    outputs = loss, slopes, argmax, gradients
    loaded().attention_transfer_forward(
        place, students, teachers, *outputs, memory, struct_of(transfer), struct_of(p)
    )


def attention_backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    slopes: Sequence[Tensor],
    argmax: Sequence[Tensor],
    gradients: Sequence[Tensor],
    p: Map,
) -> None:
    """Fill the features' gradients."""
    grad_output = as_buffer(grad_output, slopes[0].dtype)
    place = place_of(grad_output)
    loaded().attention_backward(
        place, grad_output, features, slopes, argmax, gradients, struct_of(p)
    )


def hint_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    gradients: Sequence[Tensor],
    p: Hint,
) -> None:
    """Fill the loss, and the students' gradients if there are any."""
    place = place_of(loss)
    pairs = students, teachers, loss, gradients
    by_row = p.reduction == "none"
    memory = scratch(place, loss, *(("hint_rows", *pairs) if by_row else ("hint",)))
    loaded().hint_forward(place, *pairs, memory, struct_of(p))


def hint_backward(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    p: Hint,
    in_place: bool = False,
) -> None:
    """Fill the gradients that are wanted, of students and then of teachers.

    `in_place` says that they are those for a `grad_output` of 1: on a GPU they stay where it is 1.
    """
    grad_output = as_buffer(grad_output, compute_dtype(*students, *teachers))
    place = place_of(grad_output)
    loaded().hint_backward(
        place, grad_output, students, teachers, gradients, struct_of(p), in_place
    )


def squared_distances(x: Tensor, to: Tensor) -> None:
    """Fill the squared distances between the rows of a contiguous matrix."""
    loaded().squared_distances(place_of(x), x, to)


def rkd_distance(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """From squared distances, fill the loss and its derivatives by the student's."""
    place = place_of(loss)
    memory = scratch(place, loss, "rkd")
    loaded().rkd_distance(place, student, teacher, loss, slopes, memory, delta)


def rkd_angle(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """From squared distances, fill the loss and its derivatives by the student's."""
    place = place_of(loss)
    memory = scratch(place, loss, "rkd")
    loaded().rkd_angle(place, student, teacher, loss, slopes, memory, delta)


def similarity(student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None) -> None:
    """From Gram matrices, fill the loss and its derivatives by the student's."""
    place = place_of(loss)
    memory = scratch(place, loss, "similarity", len(student))
    loaded().similarity(place, student, teacher, loss, slopes, memory)


def max_pool(features: Tensor, pooled: Tensor, argmax: Tensor | None) -> None:
    """Fill the maxima of as many bins as `pooled` has positions, and where they were if wanted."""
    loaded().max_pool(place_of(features), features, pooled, argmax)


def max_pool_backward(grad_output: Tensor, argmax: Tensor, gradient: Tensor) -> None:
    """Fill the gradient of the features that were pooled."""
    grad_output = grad_output.to(compute_dtype(gradient))
    loaded().max_pool_backward(place_of(gradient), grad_output, argmax, gradient)


def multiply(gradients: Sequence[Tensor], grad_output: Tensor) -> None:
    """Multiply each gradient in place by a scalar."""
    loaded().multiply(place_of(grad_output), gradients, grad_output)

"""Operators of losses on logits whose teacher kept k classes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.operators import define, kernels
from fastkd.ops.soft_target_operators import existing, fill_padding
from fastkd.parameters import SoftTarget, in_schema

_SLOTS = "Tensor indices, Tensor log_p, Tensor? log_rest, Tensor? labels, Tensor[] temperatures"
_PARAMETERS = in_schema(SoftTarget)


def _outputs(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    listed_only: bool,
    with_parts: bool,
    with_log_q: bool,
    with_gradient: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    rows: Sequence[int] = ()
    if p.reduction == "none":
        rows = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    count, k = indices.shape
    return (
        log_p.new_empty(rows),
        log_p.new_empty((2, *rows)) if with_parts else None,
        log_p.new_empty((count, k + 1)) if with_log_q else None,
        torch.empty_like(student) if with_gradient else None,
    )


@define(
    f"top_k_forward(Tensor student, {_SLOTS}, Tensor? factor, bool listed_only, bool with_parts, "
    f"bool with_log_q, bool with_gradient, {_PARAMETERS}) "
    "-> (Tensor loss, Tensor parts, Tensor log_q, Tensor gradient)",
    _outputs,
    SoftTarget,
)
def forward(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    listed_only: bool,
    with_parts: bool,
    with_log_q: bool,
    with_gradient: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, its parts `(hard, T² D)`, the student's logarithms, and its gradient.

    Those are its log-probabilities of the slots, and last of all other classes together. The
    gradient alone is multiplied by the factor, a number or one for each row.
    """
    slots = indices, log_p, log_rest, labels
    flags = listed_only, with_parts, with_log_q, with_gradient
    found = _outputs(student, *slots, temperatures, factor, *flags, p)
    *of_rows, gradient = found
    logits, _, to = existing(p, student, (), gradient)
    kernels(p.backend, "top_k").top_k_forward(
        *(logits, *slots, *of_rows, to, listed_only, p),
        temperatures=temperatures,
        grad_output=factor,
    )
    fill_padding(p, gradient)
    return found


def _losses(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    listed_only: bool,
    with_parts: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None]:
    inputs = student, indices, log_p, log_rest, labels, temperatures, factor, listed_only
    return _outputs(*inputs, with_parts, False, False, p)[:2]


@define(
    f"top_k_forward_(Tensor(a!) student, {_SLOTS}, Tensor? factor, bool listed_only, "
    f"bool with_parts, {_PARAMETERS}) -> (Tensor loss, Tensor parts)",
    _losses,
    SoftTarget,
)
def forward_(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    listed_only: bool,
    with_parts: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None]:
    """The loss and its parts; `student` then holds the gradient, times the factor."""
    slots = indices, log_p, log_rest, labels
    found = _losses(student, *slots, temperatures, factor, listed_only, with_parts, p)
    logits, _, to = existing(p, student, (), student)
    kernels(p.backend, "top_k").top_k_forward(
        *(logits, *slots, *found, None, to, listed_only, p),
        temperatures=temperatures,
        grad_output=factor,
    )
    fill_padding(p, student)
    return found


@define(
    f"top_k_backward(Tensor grad_output, Tensor student, {_SLOTS}, bool listed_only, "
    f"{_PARAMETERS}) -> Tensor",
    lambda grad_output, student, *_: torch.empty_like(student),
    SoftTarget,
)
def backward(
    grad_output: Tensor,
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    listed_only: bool,
    p: SoftTarget,
) -> Tensor:
    """The student's gradient, from its logits."""
    gradient = torch.empty_like(student)
    slots = indices, log_p, log_rest, labels
    _fill(gradient, grad_output, student, *slots, temperatures, listed_only, p)
    return gradient


def _fill(
    gradient: Tensor,
    grad_output: Tensor,
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    listed_only: bool,
    p: SoftTarget,
) -> None:
    logits, _, to = existing(p, student, (), gradient)
    kernels(p.backend, "top_k").top_k_forward(
        *(logits, indices, log_p, log_rest, labels, None, None, None, to, listed_only, p),
        temperatures=temperatures,
        grad_output=grad_output,
    )
    fill_padding(p, gradient)


# The same into memory that is there: a gradient in half precision for another `grad_output`.
rescale = define(
    f"top_k_rescale(Tensor(a!) gradient, Tensor grad_output, Tensor student, {_SLOTS}, "
    f"bool listed_only, {_PARAMETERS}) -> ()",
    lambda *_: None,
    SoftTarget,
)(_fill)


# What top_k_sums finds of each row: a maximum, the sums of exponentials relative to it at the
# student's temperature and at 1, and the scaled sum of logits.
SUMS = 4


@define(
    "top_k_sums(Tensor student, Tensor indices, Tensor? labels, Tensor[] temperatures, "
    f"bool listed_only, int first, {_PARAMETERS}) -> Tensor",
    lambda student, indices, *_: student.new_empty((len(indices), SUMS), dtype=torch.float64),
    SoftTarget,
)
def sums_of_shard(
    student: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    listed_only: bool,
    first: int,
    p: SoftTarget,
) -> Tensor:
    """Of the classes of a shard that no slot lists, or of all if `listed_only`.

    Then the softmax at T is over the slots, and all that is summed is at temperature 1.
    """
    sums = student.new_empty((len(indices), SUMS), dtype=torch.float64)
    logits, _ = existing(p, student, ())
    kernels(p.backend, "top_k_sums").top_k_sums(
        logits, indices, labels, sums, listed_only, first, p, temperatures
    )
    return sums


def _of_shard(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    sums: Tensor,
    logits: Tensor,
    listed_only: bool,
    with_log_q: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    inputs = student, indices, log_p, log_rest, labels, temperatures, None, listed_only
    return _outputs(*inputs, True, with_log_q, False, p)[:3]


@define(
    f"top_k_shard_forward(Tensor student, {_SLOTS}, Tensor sums, Tensor logits, bool listed_only, "
    f"bool with_log_q, {_PARAMETERS}) -> (Tensor loss, Tensor parts, Tensor log_q)",
    _of_shard,
    SoftTarget,
)
def forward_of_shard(
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    sums: Tensor,
    logits: Tensor,
    listed_only: bool,
    with_log_q: bool,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `forward`, from the sums of whole rows and the logits of slots and labels alone."""
    slots = indices, log_p, log_rest, labels
    found = _of_shard(student, *slots, temperatures, sums, logits, listed_only, with_log_q, p)
    shard, _ = existing(p, student, ())
    kernels(p.backend, "top_k").top_k_forward(
        *(shard, *slots, *found, None, listed_only, p),
        temperatures=temperatures,
        sums=sums,
        logits=logits,
    )
    return found


@define(
    f"top_k_shard_backward(Tensor grad_output, Tensor student, {_SLOTS}, Tensor sums, "
    f"Tensor logits, bool listed_only, int first, {_PARAMETERS}) -> Tensor",
    lambda grad_output, student, *_: torch.empty_like(student),
    SoftTarget,
)
def backward_of_shard(
    grad_output: Tensor,
    student: Tensor,
    indices: Tensor,
    log_p: Tensor,
    log_rest: Tensor | None,
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    sums: Tensor,
    logits: Tensor,
    listed_only: bool,
    first: int,
    p: SoftTarget,
) -> Tensor:
    """The gradient of the classes of a shard, of which `first` is the first one."""
    gradient = torch.empty_like(student)
    shard, _, to = existing(p, student, (), gradient)
    kernels(p.backend, "top_k").top_k_forward(
        *(shard, indices, log_p, log_rest, labels, None, None, None, to, listed_only, p),
        temperatures=temperatures,
        grad_output=grad_output,
        first=first,
        sums=sums,
        logits=logits,
    )
    fill_padding(p, gradient)
    return gradient

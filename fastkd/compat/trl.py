"""TRL's distillation losses (trl 1.16) on fastkd.

`generalized_jsd_loss` of `GKDTrainer`, `chunked_divergence_loss` of `DistillationTrainer`, and of
`SDPOTrainer` and `SDFTTrainer` `compute_topk_self_distillation_loss` and
`compute_full_logit_self_distillation_loss`. See `fastkd.compat` for what all modules share.

None has a factor T². Over no token a mean is 0 where TRL's is NaN.

Example:
    >>> from fastkd.compat.trl import chunked_divergence_loss, generalized_jsd_loss
    >>> student = torch.randn(2, 8, 100, requires_grad=True)
    >>> teacher, labels = torch.randn(2, 8, 100), torch.randint(100, (2, 8))
    >>> generalized_jsd_loss(student, teacher, labels, beta=0.1).backward()
    >>> hidden, weight = torch.randn(2, 8, 16, requires_grad=True), torch.randn(100, 16)
    >>> of_teacher, weight_of_teacher = torch.randn(2, 8, 32), torch.randn(100, 32)
    >>> loss, entropy_sum, n_valid = chunked_divergence_loss(
    ...     hidden, of_teacher, weight, weight_of_teacher, labels != 0, beta=0.5
    ... )
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.compat._common import log_sum_exp, wide
from fastkd.logits import LinearHead, LogProbabilities, TopK
from fastkd.losses.soft_target import soft_target_loss

__all__ = [
    "chunked_divergence_loss",
    "compute_full_logit_self_distillation_loss",
    "compute_topk_self_distillation_loss",
    "generalized_jsd_loss",
]


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Compute the generalised Jensen-Shannon divergence of `GKDTrainer`, without a factor T².

    `beta KL(P‖M) + (1 − beta) KL(Q‖M)` with `M = beta P + (1 − beta) Q`, the teacher's `P =
    softmax(teacher/T)` and the student's Q; forward KL at 0 and reverse KL at 1. It is
    `trl.experimental.gkd.GKDTrainer.generalized_jsd_loss`, and in fastkd
    `soft_target_loss(..., divergence="jsd", beta=beta, scale_t2=False, mask=labels != -100)`.

    Args:
        student_logits: `(B, L, V)`, or any shape `(*rows, V)`.
        teacher_logits: the same shape. They receive a gradient if they require one.
        labels: of the rows' shape; a row whose label is -100 does not count. Default: None.
        beta: in [0, 1]. Default: 0.5.
        temperature: T, above 0. Default: 1.0.
        reduction: `"batchmean"` for the sum over the rows that count (without labels over the
            first dimension alone, as in TRL: L times larger than over tokens), `"sum"`, `"mean"`
            for the sum over rows × classes, or `"none"` for the terms of each class of the rows
            that count, which torch computes. Default: `"batchmean"`.
        num_items_in_batch: a positive number in the place of any reduction's divisor, whatever
            `reduction` says. A tensor of several gives one loss for each. Default: None.

    Returns:
        A scalar; with `reduction="none"` and no `num_items_in_batch` a tensor of the logits' shape,
        or `(rows that count, V)` with labels.

    Raises:
        ValueError: an argument is out of its range, or shapes differ.
    """
    mask = None if labels is None else labels != -100
    if reduction == "none" and num_items_in_batch is None:
        student, teacher = wide(student_logits), wide(teacher_logits)
        terms = _jsd_terms(student / temperature, teacher / temperature, beta)
        return terms if mask is None else terms[mask]
    loss = functools.partial(
        soft_target_loss,
        student_logits,
        teacher_logits,
        temperature=temperature,
        scale_t2=False,
        divergence="jsd",
        beta=beta,
        mask=mask,
    )
    if num_items_in_batch is not None:
        return _over_items(loss, num_items_in_batch, student_logits.device)
    per_sample = reduction == "batchmean" and mask is None
    return loss(reduction=reduction, normalizer=max(len(student_logits), 1) if per_sample else None)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the divergence of `DistillationTrainer` from hidden states and heads.

    The loss of `generalized_jsd_loss` of the logits `softcap * tanh(scale * (hidden @ weight.T +
    bias) / softcap)`, which never exist as a whole, over the completion's tokens. It is
    `_chunked_divergence_loss` of `trl/trainer/distillation_trainer.py`, whose name it has as well,
    and in fastkd `soft_target_loss` of two `LinearHead`s. The teacher receives no gradient, nor
    does anything through the entropy.

    TRL keeps the logits of half-precision hidden states in float32; here they are rounded to the
    hidden states' dtype, as those of an ordinary layer are. Weights of another dtype are cast to
    it, where autocast is off. The sum of entropies takes one more product with the student's
    head; without it call `soft_target_loss` itself. Weights that DeepSpeed ZeRO-3 has split must
    be gathered around the call.

    Args:
        student_hidden_states: `(B, L, H)`, or any shape `(*rows, H)`.
        teacher_hidden_states: `(*rows, H')`, of the same rows.
        student_lm_head_weight: `(V, H)`. A DTensor is gathered.
        teacher_lm_head_weight: `(V, H')`.
        completion_mask: of the rows' shape; rows of 0 do not count.
        beta: in [0, 1], as in `generalized_jsd_loss`.
        num_items_in_batch: what the sum over tokens is divided by. Default: None, the tokens that
            count, 1 at least.
        student_lm_head_bias: `(V,)`. Default: None.
        teacher_lm_head_bias: `(V,)`. Default: None.
        student_logit_scale: multiplies the student's logits. Default: 1.0.
        teacher_logit_scale: multiplies the teacher's logits. Default: 1.0.
        student_final_logit_softcapping: bounds the student's logits. Default: None.
        teacher_final_logit_softcapping: bounds the teacher's logits. Default: None.
        temperature: T, above 0. Default: 1.0.

    Returns:
        `(loss, entropy_sum, n_valid)`: the loss, the sum of the student's entropies at T over the
        tokens that count, in nats, and how many these are.
    """
    student = _head(
        student_hidden_states,
        student_lm_head_weight,
        student_lm_head_bias,
        student_logit_scale,
        student_final_logit_softcapping,
    )
    with torch.no_grad():
        teacher = _head(
            teacher_hidden_states.detach(),
            teacher_lm_head_weight.detach(),
            None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach(),
            teacher_logit_scale,
            teacher_final_logit_softcapping,
        )
    mask = completion_mask != 0
    loss = functools.partial(
        soft_target_loss,
        student,
        teacher,
        temperature=temperature,
        scale_t2=False,
        divergence="jsd",
        beta=beta,
        mask=mask,
    )
    if num_items_in_batch is None:
        mean = loss()
    else:
        mean = _over_items(loss, num_items_in_batch, student_hidden_states.device)
    return mean, _entropy_sum(student, mask, temperature), mask.sum()


_chunked_divergence_loss = chunked_divergence_loss


def compute_topk_self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    distillation_topk: int,
    distillation_alpha: float,
    distillation_add_tail: bool,
) -> Tensor:
    """Compute the divergence over the student's likeliest classes, as `SDPOTrainer` does.

    The student's `distillation_topk` largest logits name the classes of both sides. These are
    renormalised to 1, or with `distillation_add_tail` the rest of each side is one class more. It
    is the function of `trl/experimental/sdpo/loss_utils.py`, and in fastkd `soft_target_loss` of a
    `TopK` teacher. TRL sets the rest of either side to 1e-7 at least, without a gradient there;
    here that is so for the teacher's alone.

    Args:
        student_logits: `(*rows, V)`.
        teacher_logits: the same shape. They receive a gradient if they require one.
        distillation_topk: how many classes.
        distillation_alpha: beta of `generalized_jsd_loss`: 0 is forward KL, 1 reverse KL.
        distillation_add_tail: whether the rest is a class.

    Returns:
        One divergence for each row.
    """
    indices = student_logits.topk(distillation_topk, dim=-1).indices
    values = teacher_logits.gather(-1, indices)
    if distillation_add_tail:
        teacher = TopK(values, indices, tail="bucket", lse=log_sum_exp(teacher_logits))
    else:
        teacher = TopK(values, indices, tail="renormalize_both")
    return soft_target_loss(
        student_logits, teacher, divergence="jsd", beta=distillation_alpha, reduction="none"
    )


def compute_full_logit_self_distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distillation_alpha: float
) -> Tensor:
    """Compute the divergence over all classes, as `SDPOTrainer` does.

    It is the function of `trl/experimental/sdpo/loss_utils.py`, and in fastkd
    `soft_target_loss(..., divergence="jsd", beta=distillation_alpha, reduction="none")`.

    Args:
        student_logits: `(*rows, V)`.
        teacher_logits: the same shape. They receive a gradient if they require one.
        distillation_alpha: beta of `generalized_jsd_loss`: 0 is forward KL, 1 reverse KL.

    Returns:
        One divergence for each row.
    """
    return soft_target_loss(
        student_logits,
        teacher_logits,
        divergence="jsd",
        beta=distillation_alpha,
        reduction="none",
    )


def _over_items(loss: Callable[..., Tensor], count: float | Tensor, device: torch.device) -> Tensor:
    """The sum over rows by the count, of which a `Trainer` has one for each GPU of DataParallel."""
    if isinstance(count, Tensor):
        count = count.to(device)
        if count.ndim > 0:
            return loss(reduction="sum") / count
    return loss(normalizer=count)


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> LinearHead:
    def whole(x: Tensor) -> Tensor:
        x = x.full_tensor() if hasattr(x, "full_tensor") else x  # a DTensor
        return x if torch.is_autocast_enabled(hidden.device.type) else x.to(hidden.dtype)

    bias = None if bias is None else whole(bias)
    return LinearHead(hidden, whole(weight), bias, scale=scale, softcap=softcap)


@torch.no_grad()
def _entropy_sum(student: LinearHead, mask: Tensor, temperature: float) -> Tensor:
    """Of the rows that count: what is left of a reverse KL from probabilities that are all 1."""
    ones = student.hidden.new_zeros(()).expand(*mask.shape, len(student.weight))
    return -soft_target_loss(
        student,
        LogProbabilities(ones),
        temperature=temperature,
        scale_t2=False,
        divergence="reverse_kl",
        mask=mask,
        reduction="sum",
    )


def _jsd_terms(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Of each class, which the fused losses add up."""
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    of_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student

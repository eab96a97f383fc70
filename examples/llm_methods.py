"""The ways to train a student, each as fastkd computes it and as eager PyTorch does.

All targets are softened at temperature 1, as is usual for language, and the labels keep a tenth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from llm_tokens import PADDING

SOFT_WEIGHT, HARD_WEIGHT = 0.9, 0.1
# Of the teacher's tokens at each position so many are in the cache.
TOP_K = 32


class Head(NamedTuple):
    """The end of a model: logits are made where a loss needs them, and only there."""

    hidden: Tensor  # (batch, length, width)
    weight: Tensor  # (vocabulary, width)

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight)


class Cached(NamedTuple):
    """What the cache has of a teacher, (batch, length, TOP_K) each."""

    log_probabilities: Tensor
    indices: Tensor


# Of (student, teacher, labels); padded positions have the label PADDING, and do not count.
Loss = Callable[[Head, Any, Tensor], Tensor]


def cross_entropy(student: Head, teacher: None, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING)


def _distillation_loss(student: Any, teacher: Any, labels: Tensor, **keywords: Any) -> Tensor:
    return fastkd.distillation_loss(
        student,
        teacher,
        labels,
        temperature=1.0,
        soft_weight=SOFT_WEIGHT,
        hard_weight=HARD_WEIGHT,
        ignore_index=PADDING,
        **keywords,
    )


def _of_logits(divergence: str) -> Loss:
    def loss(student: Head, teacher: Head, labels: Tensor) -> Tensor:
        # Nothing reads the student's logits after the loss: its gradient may have their memory.
        return _distillation_loss(
            student.logits, teacher.logits, labels, divergence=divergence, inplace=True
        )

    return loss


def _of_top_k(student: Head, teacher: Cached, labels: Tensor) -> Tensor:
    """The tokens that the cache lacks are one class more, on both sides."""
    kept = fastkd.TopK(
        teacher.log_probabilities, teacher.indices, values_are="log_probs", tail="bucket"
    )
    return _distillation_loss(student.logits, kept, labels, inplace=True)


def _of_heads(student: Head, teacher: Head, labels: Tensor) -> Tensor:
    return _distillation_loss(fastkd.LinearHead(*student), fastkd.LinearHead(*teacher), labels)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P‖Q) of each row."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _eager(divergence: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The mean over the positions that count, as its users write it."""

    def loss(student: Head, teacher: Head, labels: Tensor) -> Tensor:
        logits = student.logits
        rows = divergence(F.log_softmax(teacher.logits, -1), F.log_softmax(logits, -1))
        hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING)
        return SOFT_WEIGHT * rows[labels != PADDING].mean() + HARD_WEIGHT * hard

    return loss


def _eager_top_k(student: Head, teacher: Cached, labels: Tensor) -> Tensor:
    logits = student.logits
    log_p = teacher.log_probabilities.float()
    log_q = F.log_softmax(logits, -1).gather(-1, teacher.indices.long())
    # The mass that no slot has, kept above 0 where rounding leaves none.
    rests = (torch.log1p(-x.exp().sum(-1).clamp(max=1 - 1e-6)) for x in (log_p, log_q))
    rest_p, rest_q = rests
    rows = _kl(log_p, log_q) + rest_p.exp() * (rest_p - rest_q)
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING)
    return SOFT_WEIGHT * rows[labels != PADDING].mean() + HARD_WEIGHT * hard


class Method(NamedTuple):
    name: str
    recipe: str
    loss: Loss
    eager: Loss  # the same in eager PyTorch
    teacher: str | None = "head"  # what it needs of the teacher: that, its "cache", or nothing


ALONE = Method("student alone", "cross-entropy", cross_entropy, cross_entropy, None)
METHODS = (
    ALONE,
    Method("forward KL", "KL(P‖Q)", _of_logits("forward_kl"), _eager(_kl)),
    Method(
        "reverse KL",
        "KL(Q‖P)",
        _of_logits("reverse_kl"),
        _eager(lambda log_p, log_q: _kl(log_q, log_p)),
    ),
    Method("JSD", "Jensen-Shannon, β = 0.5", _of_logits("jsd"), _eager(_jsd)),
    Method(
        f"top {TOP_K}",
        "KL(P‖Q) of the cached tokens and the rest",
        _of_top_k,
        _eager_top_k,
        "cache",
    ),
    Method("linear heads", "KL(P‖Q) without logits", _of_heads, _eager(_kl)),
)

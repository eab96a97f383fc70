"""Other divergences between logits than forward KL, and a mask, in soft targets."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.workloads.workload import Inputs, Shape, Workload


def _kl(log_of: Tensor, log_from: Tensor) -> Tensor:
    return F.kl_div(log_from, log_of, reduction="none", log_target=True).sum(-1)


def rows_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, divergence: str, beta: float = 0.5
) -> Tensor:
    """The divergence of each row; the classes are last."""
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    if divergence == "forward_kl":
        rows = _kl(log_p, log_q)
    elif divergence == "reverse_kl":
        rows = _kl(log_q, log_p)
    elif divergence == "tvd":
        rows = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    elif divergence == "jsd":
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        rows = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    else:
        log_of, log_other = (log_p, log_q) if divergence == "skew_kl" else (log_q, log_p)
        rows = _kl(log_of, torch.log(beta * log_of.exp() + (1 - beta) * log_other.exp()))
    return rows * temperature**2


def divergence_loss(student: Tensor, teacher: Tensor, **keywords: Any) -> Tensor:
    return rows_loss(student, teacher, **keywords).mean()


def masked_loss(student: Tensor, teacher: Tensor, mask: Tensor, **keywords: Any) -> Tensor:
    rows = rows_loss(student, teacher, divergence="forward_kl", **keywords)
    return rows.masked_fill(~mask, 0).sum() / mask.sum()


def fused_masked_loss(student: Tensor, teacher: Tensor, mask: Tensor, **keywords: Any) -> Tensor:
    return fastkd.soft_target_loss(student, teacher, mask=mask, **keywords)


def masked_part(
    student: Tensor, teacher: Tensor, mask: Tensor, **keywords: Any
) -> Iterator[Tensor]:
    """Some rows' share of the loss: half of all rows count, and of some rows any number."""
    yield fused_masked_loss(
        student, teacher, mask, normalizer=len(student) / 2, backend="reference", **keywords
    )


def keep_apart(inputs: Inputs, temperature: float) -> None:
    """No class has nearly the same probability on both sides.

    There the total variation has its kink: rounding decides the sign of the class's gradient.
    """
    student, teacher = inputs.batch
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    # A class that is moved moves all others of its row a little.
    while (near := (log_p - F.log_softmax(student.float() / temperature, -1)).abs() < 1e-4).any():
        student[near] += 2


def _divergence(temperature: float, shape: Shape, divergence: str, **others: Any) -> Workload:
    return Workload(
        "soft_target_loss",
        "soft targets, divergences",
        (shape,),
        (shape,),
        divergence_loss,
        title=divergence,
        keywords={"temperature": temperature, "divergence": divergence, **others},
        prepare=partial(keep_apart, temperature=temperature) if divergence == "tvd" else None,
    )


def _masked(temperature: float, shape: Shape) -> Workload:
    return Workload(
        "soft_target_loss",
        "soft targets, mask",
        (shape,),
        (shape,),
        masked_loss,
        title="half of the rows",
        keywords={"temperature": temperature},
        fused=fused_masked_loss,
        half_masked=True,
        samples_least=2,
        parts=masked_part,
    )


_vision = partial(_divergence, 4.0, (256, 1000))
_language = partial(_divergence, 2.0, (1024, 32000))

WORKLOADS = (
    *(
        sized(name, **keywords)
        for sized in (_vision, _language)
        for name, keywords in (
            ("reverse_kl", {}),
            ("jsd", {"beta": 0.5}),
            ("tvd", {}),
            ("skew_kl", {"beta": 0.1}),
            ("skew_reverse_kl", {"beta": 0.1}),
        )
    ),
    _masked(4.0, (256, 1000)),
    _masked(2.0, (1024, 32000)),
)

"""DistillKit's losses as functions, each a sum over tokens."""

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from fastkd.compat._common import wide
from fastkd.logits import Probabilities, Teacher, TopK
from fastkd.losses.soft_target import soft_target_loss
from fastkd.precision import compute_dtype, widest_dtype

# What DistillKit leaves out by default. More would change digits of a loss.
_LARGEST_EPS = 1e-8


class MissingProbabilityHandling(Enum):
    """What a teacher of k classes gives to the others; DistillKit's own is taken as well."""

    ZERO = "zero"
    SYMMETRIC_UNIFORM = "symmetric_uniform"


def dense_kl_div(
    logits: Tensor, target_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Sum over tokens `KL(P‖Q)`, without T²; `kl.py`.

    Args:
        logits: the student's, `(B, S, V)`.
        target_logits: the teacher's, which receive a gradient if they require one.
        mask: as in `sparse_kl_div`. Default: None.
        temperature: T of both sides. Default: 1.0.
    """
    return _summed("forward_kl", logits, target_logits, mask, temperature)


def sparse_kl_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: MissingProbabilityHandling = MissingProbabilityHandling.ZERO,
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Sum over tokens `KL(P‖Q)`, without T²; `kl.py`.

    With both values of `missing` it is `fastkd.soft_target_loss` of a `TopK` teacher.

    Args:
        logits: the student's, `(B, S, V)`.
        target_ids: the classes that the teacher kept, `(B, S, k)`.
        target_values: their log-probabilities or logits, `(B, S, k)`.
        mask: `(B, S)` or `(B, S, 1)`, True for tokens that count, or numbers that weight them.
            Default: None, all count.
        eps: what DistillKit leaves out; at most 1e-8, which changes no digit. Default: 1e-8.
        missing: what the teacher gives to other classes. Default: `ZERO`.
        log_target: whether the values are log-probabilities. Default: True.
        temperature: T of both sides. Default: 1.0.
        target_generation_temperature: G of the values. Default: 1.0.
        student_generation_temperature: that of the student's logits. Default: 1.0.
        chunk_length: no matter here, where one pass keeps the gradient alone. Default: None.

    Raises:
        ValueError: `eps` is larger, or logits are to have a rest.
    """
    return _sparse(
        "forward_kl",
        logits,
        target_ids,
        target_values,
        mask,
        eps,
        missing,
        log_target,
        temperature,
        target_generation_temperature,
        student_generation_temperature,
        chunk_length,
    )


def dense_js_div(
    logits: Tensor, target_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Sum over tokens `½ KL(P‖M) + ½ KL(Q‖M)`, `M = (P + Q) / 2`, without T²; `jsd.py`.

    Args:
        logits: the student's, `(B, S, V)`.
        target_logits: the teacher's, which receive a gradient if they require one.
        mask: as in `sparse_kl_div`. Default: None.
        temperature: T of both sides. Default: 1.0.
    """
    return _summed("jsd", logits, target_logits, mask, temperature)


def sparse_js_div(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: MissingProbabilityHandling = MissingProbabilityHandling.ZERO,
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Sum over tokens `½ KL(P‖M) + ½ KL(Q‖M)`, `M = (P + Q) / 2`, without T²; `jsd.py`.

    With `ZERO` the teacher's k probabilities are written out among V classes, for `chunk_length`
    tokens of each sequence at a time. Other arguments are those of `sparse_kl_div`.
    """
    return _sparse(
        "jsd",
        logits,
        target_ids,
        target_values,
        mask,
        eps,
        missing,
        log_target,
        temperature,
        target_generation_temperature,
        student_generation_temperature,
        chunk_length,
    )


def dense_tvd(
    logits: Tensor, target_logits: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Sum over tokens `½ Σ |P − Q|`, without T²; `tvd.py`.

    Args:
        logits: the student's, `(B, S, V)`.
        target_logits: the teacher's, which receive a gradient if they require one.
        mask: as in `sparse_kl_div`. Default: None.
        temperature: T of both sides. Default: 1.0.
    """
    return _summed("tvd", logits, target_logits, mask, temperature)


def sparse_tvd(
    logits: Tensor,
    target_ids: Tensor,
    target_values: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    missing: MissingProbabilityHandling = MissingProbabilityHandling.ZERO,
    log_target: bool = True,
    temperature: float = 1.0,
    target_generation_temperature: float = 1.0,
    student_generation_temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Tensor:
    """Sum over tokens `½ Σ |P − Q|`, without T²; `tvd.py`.

    With `ZERO` the teacher's k probabilities are written out among V classes, for `chunk_length`
    tokens of each sequence at a time. Other arguments are those of `sparse_kl_div`.
    """
    return _sparse(
        "tvd",
        logits,
        target_ids,
        target_values,
        mask,
        eps,
        missing,
        log_target,
        temperature,
        target_generation_temperature,
        student_generation_temperature,
        chunk_length,
    )


def _summed(
    divergence: str,
    logits: Tensor,
    teacher: Teacher,
    mask: Tensor | None,
    temperature: float,
    **keywords: Any,
) -> Tensor:
    """Over the tokens that count, without T²."""
    return soft_target_loss(
        logits,
        teacher,
        temperature=temperature,
        scale_t2=False,
        reduction="sum",
        divergence=divergence,
        **_rows(mask),
        **keywords,
    )


def _rows(mask: Tensor | None) -> dict[str, Any]:
    """What counts, as keywords."""
    if mask is None:
        return {}
    mask = mask.squeeze(-1) if mask.ndim == 3 else mask
    return {"mask": mask} if mask.dtype == torch.bool else {"row_weight": mask.float()}


def _sparse(
    divergence: str,
    logits: Tensor,
    ids: Tensor,
    values: Tensor,
    mask: Tensor | None,
    eps: float,
    missing: MissingProbabilityHandling,
    log_target: bool,
    temperature: float,
    target_temperature: float,
    student_temperature: float,
    chunk_length: int | None,
) -> Tensor:
    if eps > _LARGEST_EPS:
        raise ValueError(f"eps must be at most {_LARGEST_EPS:g}, got {eps}: nothing is left out")
    has_rest = missing.value == MissingProbabilityHandling.SYMMETRIC_UNIFORM.value
    if has_rest and not log_target:
        raise ValueError(
            "missing must be MissingProbabilityHandling.ZERO with log_target=False: logits of k "
            "classes do not tell what the others have"
        )
    values, power = values.detach(), target_temperature / temperature
    temperature = temperature / student_temperature
    if has_rest:
        log_p = values if abs(power - 1) <= 1e-9 else _retempered(values, power)
        kept = TopK(log_p, ids, values_are="log_probs", tail="bucket")
        return _summed(divergence, logits, kept, mask, temperature)
    if divergence == "forward_kl":
        kept, of_teacher = TopK(values, ids), 1 / power
        return _summed(divergence, logits, kept, mask, temperature, teacher_temperature=of_teacher)
    p = (power * wide(values)).softmax(-1)
    sums = []
    for start in range(0, logits.shape[1], chunk_length or logits.shape[1]):
        tokens = slice(start, start + (chunk_length or logits.shape[1]))
        part = logits[:, tokens]
        written = p.new_zeros(part.shape).scatter_add_(-1, ids[:, tokens], p[:, tokens])
        of_part = None if mask is None else mask[:, tokens]
        sums.append(_summed(divergence, part, Probabilities(written), of_part, temperature))
    return torch.stack(sums).sum()


def _retempered(log_p: Tensor, power: float) -> Tensor:
    """Log-probabilities whose odds, that of the rest among them, are raised to a power."""
    exact = log_p.to(widest_dtype(log_p.device))
    rest = (1 - exact.exp().sum(-1, keepdim=True)).clamp(0, 1)
    total = torch.logaddexp((power * exact).logsumexp(-1, keepdim=True), power * rest.log())
    return (power * exact - total).to(compute_dtype(log_p))

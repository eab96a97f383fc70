"""TRL's divergence of logits, as its users write it: in eager PyTorch, on any device.

It computes in float32, as the eager statements do.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from benchmarks.liger import divergence_of
from benchmarks.workloads import Workload, keywords, linear_head, top_k

Statement = Callable[..., Tensor]
# The divergences that it has, by its beta; that of "jsd" is the workload's own.
_BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


@cache
def _generalized_jsd_loss() -> Statement:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


def jsd(workload: Workload) -> Statement:
    loss = _generalized_jsd_loss()
    keywords = workload.keywords
    temperature = keywords["temperature"]
    beta = keywords.get("beta", _BETAS[divergence_of(workload)])

    def soft_target_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        labels = None if mask is None else 100 * (mask.long() - 1)  # -100 does not count
        found = loss(student.float(), teacher.float(), labels, beta, temperature)
        return found * temperature**2

    return soft_target_loss


@cache
def _chunked_divergence_loss() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return _chunked_divergence_loss


def linear_jsd(workload: Workload) -> Statement:
    """That of its DistillationTrainer, of hidden states and heads."""
    loss, beta = _chunked_divergence_loss(), _BETAS[divergence_of(workload)]

    def soft_target_loss(
        student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        mask = torch.ones(1, len(student), device=student.device)
        return loss(student[None], teacher[None], weight, teacher_weight, mask, beta)[0]

    return soft_target_loss


CONTENDERS = {"trl": jsd, "trl_linear": linear_jsd}


def refusal(name: str, workload: Workload) -> str | None:
    """Why it cannot take part, or None if it can."""
    if workload.loss != "soft_target_loss":
        return f"trl is for soft_target_loss, not for {workload.loss}"
    if divergence_of(workload) not in _BETAS:
        return f"TRL has no {divergence_of(workload)}"
    if (workload.family == linear_head.FAMILY) != (name == "trl_linear"):
        return "trl_linear is for linear heads, and trl for logits"
    if workload.family in (keywords.FAMILY, top_k.FAMILY):
        return "TRL's divergence has no such keyword and no such teacher"
    if workload.keywords.get("dim", -1) != -1:
        return "TRL takes rows of logits, with the classes last"
    if len(workload.teacher) > len(workload.student):
        return "TRL takes one teacher"
    try:
        _chunked_divergence_loss() if name == "trl_linear" else _generalized_jsd_loss()
    except ImportError as missing:
        return f"TRL cannot be imported: {missing}"
    return None

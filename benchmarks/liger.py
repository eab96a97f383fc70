"""Liger-Kernel's losses on logits, as its users write them.

They compute in float32, as the eager statements do: in bfloat16 Liger-Kernel adds up a loss in
bfloat16.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Workload, keywords, linear_head, top_k

Statement = Callable[..., Tensor]


def divergence_of(workload: Workload) -> str:
    return workload.keywords.get("divergence", "forward_kl")


def kl_div(workload: Workload) -> Statement:
    """Its KL divergence and its cross-entropy."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean", log_target=False)
    cross_entropy = LigerCrossEntropyLoss()

    def soft_target_loss(
        student: Tensor, teacher: Tensor, *, temperature: float, dim: int = -1
    ) -> Tensor:
        log_q = F.log_softmax(student.float() / temperature, dim=dim)
        p = F.softmax(teacher.float() / temperature, dim=dim)
        return divergence(log_q, p) * temperature**2

    def distillation_loss(
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        *,
        temperature: float,
        soft_weight: float = 0.9,
        hard_weight: float = 0.1,
    ) -> Tensor:
        # The cross-entropy writes its gradient over the logits: a copy, and nobody reads it after.
        logits = student.to(torch.float32, copy=True)
        soft = soft_target_loss(logits, teacher, temperature=temperature)
        return hard_weight * cross_entropy(logits, labels) + soft_weight * soft

    statements = {"soft_target_loss": soft_target_loss, "distillation_loss": distillation_loss}
    return partial(statements[workload.loss], **workload.keywords)


def _labels(mask: Tensor | None) -> Tensor | None:
    """What tells Liger-Kernel which rows count; -100 does not."""
    return None if mask is None else 100 * (mask.long() - 1)


def jsd(workload: Workload) -> Statement:
    """Its Jensen-Shannon divergence: with beta 0 the same KL divergence, with 1 the reverse."""
    from liger_kernel.transformers import LigerJSD

    temperature = workload.keywords["temperature"]
    ends = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": workload.keywords.get("beta", 0.5)}
    divergence = LigerJSD(beta=ends[divergence_of(workload)])

    def soft_target_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        log_q = F.log_softmax(student.float() / temperature, dim=-1)
        log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
        return divergence(log_q, log_p, _labels(mask)) * temperature**2

    return soft_target_loss


def tvd(workload: Workload) -> Statement:
    """Its total variation distance."""
    from liger_kernel.transformers import LigerTVDLoss

    temperature = workload.keywords["temperature"]
    distance = LigerTVDLoss(reduction="batchmean")

    def soft_target_loss(student: Tensor, teacher: Tensor) -> Tensor:
        q = F.softmax(student.float() / temperature, dim=-1)
        p = F.softmax(teacher.float() / temperature, dim=-1)
        return distance(q, p) * temperature**2

    return soft_target_loss


def linear_jsd(workload: Workload) -> Statement:
    """Its Jensen-Shannon divergence of linear heads, chunk by chunk, without torch.compile."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[divergence_of(workload)]
    divergence = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False
    )

    def soft_target_loss(
        student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        return divergence(student, weight, teacher, teacher_weight, labels)

    return soft_target_loss


CONTENDERS = {"liger": kl_div, "liger_jsd": jsd, "liger_tvd": tvd, "liger_linear": linear_jsd}
LOSSES = {
    "liger": ("soft_target_loss", "distillation_loss"),
    "liger_jsd": ("soft_target_loss",),
    "liger_tvd": ("soft_target_loss",),
    "liger_linear": ("soft_target_loss",),
}
DIVERGENCES = {
    "liger": ("forward_kl",),
    "liger_jsd": ("forward_kl", "reverse_kl", "jsd"),
    "liger_tvd": ("tvd",),
    "liger_linear": ("forward_kl", "reverse_kl", "jsd"),
}


def refusal(name: str, workload: Workload, device: str) -> str | None:
    """Why this contender cannot take part, or None if it can."""
    if workload.loss not in LOSSES[name]:
        return f"{name} is for {' and '.join(LOSSES[name])}, not for {workload.loss}"
    if divergence_of(workload) not in DIVERGENCES[name]:
        return f"{name} is for {', '.join(DIVERGENCES[name])}, not for {divergence_of(workload)}"
    if (workload.family == linear_head.FAMILY) != (name == "liger_linear"):
        return "liger_linear is for linear heads, and the others are for logits"
    if workload.half_masked and name == "liger":
        return "Liger-Kernel's KL divergence takes no mask"
    if workload.family in (keywords.FAMILY, top_k.FAMILY):
        return "Liger-Kernel's divergences have no such keyword and no such teacher"
    if workload.keywords.get("dim", -1) != -1:
        return "Liger-Kernel takes rows of logits, with the classes last"
    if len(workload.teacher) > len(workload.student):
        return "Liger-Kernel takes one teacher"
    if device == "cpu" and name != "liger_linear":
        return "Liger-Kernel's kernels are for a GPU"
    try:
        if name == "liger_linear":
            import liger_kernel.chunked_loss
        else:
            import liger_kernel.transformers  # noqa: F401
    except ImportError as missing:
        return f"Liger-Kernel cannot be imported: {missing}"
    return None

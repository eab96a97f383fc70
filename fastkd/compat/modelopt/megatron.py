"""The losses of logits of Model-Optimizer's plugin for Megatron."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastkd.compat._common import log_sum_exp
from fastkd.logits import TopK
from fastkd.losses.soft_target import soft_target_loss

# The loss, whether to add it up over tensor-parallel ranks, and whether ranks have parts of the
# sequence.
Result = tuple[Tensor, bool, bool]


class LogitsKLLoss(_Loss):
    """KL divergence of each token's softened logits, without T²; `plugins/megatron.py`.

    `KL(P‖Q)` of the teacher's P and the student's Q, or `KL(Q‖P)`.

    With tensor parallelism the library asks Megatron for the group of ranks that share the classes
    and returns each rank's part of the loss. Here the group is an argument, and every rank gets
    the whole loss, which nobody has to add up: `tp_reduce` is False then.

    Args:
        model_config: an object of which `tensor_model_parallel_size` alone is read, 1 without it.
        temperature: T, above 0. Default: 1.0.
        reverse: take `KL(Q‖P)`. Default: False.
        group: the `torch.distributed` process group over whose ranks the classes are split; not an
            argument of the library. Default: None.

    Raises:
        ValueError: `tensor_model_parallel_size` is above 1 and there is no group.
    """

    def __init__(
        self,
        model_config: Any,
        temperature: float = 1.0,
        reverse: bool = False,
        *,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        size = getattr(model_config, "tensor_model_parallel_size", 1)
        if size > 1 and group is None:
            raise ValueError(
                f"tensor_model_parallel_size is {size}: pass the process group of these ranks as "
                "group, such as parallel_state.get_tensor_model_parallel_group()"
            )
        self._config = model_config
        self._temperature = temperature
        self._reverse = reverse
        self._group = group

    def forward(self, predictions: Tensor, targets: Tensor) -> Result:
        """Of logits `(s, b, V)`, or tuples that start with them, the losses `(b, s)` and flags."""
        student, teacher = _logits(predictions, targets)
        return self._result(student, teacher, tp_reduce=self._group is None)

    def _result(self, student: Tensor, teacher: Tensor | TopK, tp_reduce: bool) -> Result:
        loss = soft_target_loss(
            student,
            teacher,
            temperature=self._temperature,
            scale_t2=False,
            divergence="reverse_kl" if self._reverse else "forward_kl",
            reduction="none",
            group=self._group,
        )
        return loss.transpose(0, 1).contiguous(), tp_reduce, False


class TopLogitsKLLoss(LogitsKLLoss):
    """`LogitsKLLoss` of the teacher's k likeliest classes and of all others as one more.

    `plugins/megatron.py` after release 0.47; in fastkd a `TopK` teacher with `tail="bucket"`. The
    library sets the rest of either side to 1.2e-7 at least, without a gradient there; here the
    teacher's counts as 1e-7 at least, and the student's is as it is.

    Args:
        model_config: as in `LogitsKLLoss`.
        temperature: T, above 0. Default: 1.0.
        reverse: take `KL(Q‖P)`. Default: False.
        top_k: how many classes of each row. Default: 1024.
        top_p: in (0, 1]; keep of these the likeliest until their probabilities reach it. Default:
            None, all.
        top_p_min_k: how many `top_p` leaves at least. Default: 1.
        group: as in `LogitsKLLoss`; each rank has as many classes. Default: None.

    Raises:
        ValueError: `top_p` or `top_p_min_k` is out of its range.
    """

    def __init__(
        self,
        model_config: Any,
        temperature: float = 1.0,
        reverse: bool = False,
        top_k: int = 1024,
        *,
        top_p: float | None = None,
        top_p_min_k: int = 1,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        super().__init__(model_config, temperature, reverse, group=group)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        if top_p_min_k < 1:
            raise ValueError(f"top_p_min_k must be at least 1, got {top_p_min_k}")
        self.top_k = top_k
        self.top_p = top_p
        self.top_p_min_k = top_p_min_k

    def forward(self, predictions: Tensor, targets: Tensor) -> Result:
        """Of logits `(s, b, V)`, or tuples that start with them, the losses `(b, s)` and flags."""
        student, teacher = _logits(predictions, targets)
        values, indices = _top(teacher, self.top_k, self._group)
        lse = log_sum_exp(teacher, self._temperature)
        if self._group is not None:
            lse = _gathered(lse[..., None], self._group).logsumexp(-1)
        if self.top_p is not None:
            p = (values.to(lse.dtype) / self._temperature - lse[..., None]).exp()
            stays = p.cumsum(-1) - p < self.top_p
            stays[..., : self.top_p_min_k] = True
            indices = indices.masked_fill(~stays, -1)
        kept = TopK(values, indices, tail="bucket", lse=lse)
        return self._result(student, kept, tp_reduce=False)


class TopKLogitsKLLoss(LogitsKLLoss):
    """`LogitsKLLoss` over the teacher's k likeliest classes alone, to which both sides sum up.

    The class of this name in releases up to 0.47. After it the name is an alias of
    `TopLogitsKLLoss`, whose loss is another, so that this class warns of it. In fastkd a `TopK`
    teacher with `tail="renormalize_both"`.

    Args:
        model_config: as in `TopLogitsKLLoss`.
        temperature: T, above 0. Default: 1.0.
        reverse: take `KL(Q‖P)`. Default: False.
        top_k: how many classes of each row. Default: 1024.
        group: as in `LogitsKLLoss`. Default: None.
    """

    def __init__(
        self,
        model_config: Any,
        temperature: float = 1.0,
        reverse: bool = False,
        top_k: int = 1024,
        *,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        warnings.warn(
            "TopKLogitsKLLoss renormalises both sides over the k classes, as releases of "
            "Model-Optimizer up to 0.47 do; where yours has TopLogitsKLLoss, that is the class to "
            "take",
            stacklevel=2,
        )
        super().__init__(model_config, temperature, reverse, group=group)
        self.top_k = top_k

    def forward(self, predictions: Tensor, targets: Tensor) -> Result:
        """Of logits `(s, b, V)`, or tuples that start with them, the losses `(b, s)` and flags."""
        student, teacher = _logits(predictions, targets)
        values, indices = _top(teacher, self.top_k, self._group)
        kept = TopK(values, indices, tail="renormalize_both")
        return self._result(student, kept, tp_reduce=False)


def _logits(predictions: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Without the biases that a parallel layer of Megatron returns beside them."""
    if isinstance(predictions, tuple):
        predictions, targets = predictions[0], targets[0]
    return predictions, targets.detach()


def _top(teacher: Tensor, k: int, group: Any) -> tuple[Tensor, Tensor]:
    """The k largest logits and their classes, of all ranks, each of which has as many classes."""
    classes = teacher.shape[-1]
    size = 1 if group is None else dist.get_world_size(group)
    if not 1 <= k <= classes * size:
        raise ValueError(
            f"top_k must be at least 1 and at most the number of classes, {classes * size}, got {k}"
        )
    values, indices = teacher.topk(min(k, classes), dim=-1)
    if group is None:
        return values, indices
    indices += dist.get_rank(group) * classes
    values, order = _gathered(values, group).topk(k, dim=-1)
    return values, _gathered(indices, group).gather(-1, order)


def _gathered(part: Tensor, group: Any) -> Tensor:
    """The parts of all ranks side by side."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts, -1)

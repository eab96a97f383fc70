"""Liger-Kernel's losses of hidden states and the weights of linear layers."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.logits import LinearHead, Probabilities, TopK
from fastkd.losses.distillation import distillation_loss
from fastkd.losses.soft_target import soft_target_loss

# Inside a logarithm no digit of a loss depends on such an eps.
_LARGEST_EPS = 1e-8


class LigerFusedLinearJSD(torch.nn.Module):
    """`LigerJSD` of two linear layers' logits over T; `transformers/fused_linear_jsd.py`.

    It is `fastkd.soft_target_loss` of two `LinearHead`s. Half-precision logits are rounded, as an
    ordinary layer's are; on a GPU the library's are not.

    Args:
        jsd_beta: in [0, 1]; forward KL at 0, reverse KL at 1. Default: 0.5.
        ignore_index: the label of rows that do not count. Default: -100.
        temperature: T, above 0. Default: 1.0.
        accum_dtype: None or `torch.float32`, in which a weight's gradient is summed here with
            either; the library's None means the weight's dtype. Default: None.

    Raises:
        ValueError: `accum_dtype` is another one.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_accum_dtype(accum_dtype)
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        """Of hidden states `(BT, H)`, weights `(V, H)` and labels `(BT,)` or None a scalar."""
        return soft_target_loss(
            LinearHead(student_input, student_weight),
            LinearHead(teacher_input.detach(), teacher_weight.detach()),
            temperature=self.temperature,
            scale_t2=False,
            divergence="jsd",
            beta=self.jsd_beta,
            mask=kept(shift_labels, self.ignore_index),
        )


class LigerFusedLinearKLDivLoss(torch.nn.Module):
    """`KL(p‖softmax(x/T))` of a linear layer's x; `transformers/fused_linear_kl_div.py`.

    It is `fastkd.soft_target_loss` of a `LinearHead` and `Probabilities`, which T does not soften.

    Args:
        reduction: `"batchmean"`, `"mean"` (over rows × classes) or `"sum"`, of the rows that count.
            Default: `"batchmean"`.
        ignore_index: the label of rows that do not count. Default: -100.
        temperature: T, above 0. Default: 1.0.
        eps: p counts as eps at least inside the library's `log p`. Here the term of p = 0 is 0
            without it, and others are exact: for each p below eps the loss is up to `eps/e` larger
            there, and the gradient is the same. At most 1e-8. Default: 1e-10.
        accum_dtype: None or `torch.float32`, as in `LigerFusedLinearJSD`. Default: None.

    Raises:
        ValueError: `reduction`, `eps` or `accum_dtype` is another one.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(f"reduction must be 'batchmean', 'mean' or 'sum', got {reduction!r}")
        if eps > _LARGEST_EPS:
            raise ValueError(
                f"eps must be at most {_LARGEST_EPS:g}, got {eps}: the target's logarithm is taken "
                "without it, and only such an eps changes no digit of the loss"
            )
        _check_accum_dtype(accum_dtype)
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Of hidden states `(BT, H)`, a weight `(V, H)` and probabilities `(BT, V)` a scalar."""
        return soft_target_loss(
            LinearHead(student_input, student_weight),
            Probabilities(target.detach()),
            temperature=self.temperature,
            scale_t2=False,
            reduction=self.reduction,
            mask=kept(shift_labels, self.ignore_index),
        )


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """Hard labels and `LigerFusedLinearJSD`, each weighted; `chunked_loss/jsd_loss.py`.

    The mean over the rows whose label is not `ignore_index` of `weight_hard_loss · CE +
    weight_soft_loss · JSD`: `fastkd.distillation_loss` of two `LinearHead`s, with
    `soft_weight=weight_soft_loss / T**2`.

    Where the teacher has more classes, the library gives the student logits of 0 for them, which
    take part in its softmax, and so does this class. To leave the teacher's padding out pass
    `num_classes` to `fastkd.distillation_loss`.

    Args:
        weight_hard_loss: of the cross-entropy, at temperature 1. Default: 0.5.
        weight_soft_loss: of the divergence. Default: 0.5.
        beta: in [0, 1]; forward KL at 0, reverse KL at 1. Default: 0.5.
        ignore_index: the label of rows that do not count. Default: -100.
        temperature: T, above 0, of the divergence. Default: 1.0.
        compiled: no matter; kernels need no compiler. Default: True.
        chunk_size: the rows that have logits at a time. Default: 1024.
        return_soft_hard_loss: return the parts, too, unweighted and detached. Default: False.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.beta = beta
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Of hidden states `(BT, H)`, weights `(V, H)` and labels `loss` or `loss, soft, hard`."""
        student = LinearHead(student_input, student_weight, student_bias)
        teacher_bias = None if teacher_bias is None else teacher_bias.detach()
        teacher = LinearHead(teacher_input.detach(), teacher_weight.detach(), teacher_bias)
        parts = functools.partial(
            distillation_loss,
            labels=true_labels,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            chunk_size=self.chunk_size,
            return_parts=True,
        )
        soften = functools.partial(
            parts,
            divergence="jsd",
            beta=self.beta,
            soft_weight=self.weight_soft_loss / self.temperature**2,
        )
        missing = len(teacher_weight) - len(student_weight)
        if missing > 0:
            # A teacher that no product is needed for.
            none = TopK(student_input.new_zeros(*true_labels.shape, 1), true_labels[..., None])
            of_labels, hard, _ = parts(
                student, none, soft_weight=0, hard_weight=self.weight_hard_loss
            )
            of_teacher, _, soft = soften(_with_zeros(student, missing), teacher, hard_weight=0)
            loss = of_labels + of_teacher
        else:
            loss, hard, soft = soften(student, teacher, hard_weight=self.weight_hard_loss)
        if not self.return_soft_hard_loss:
            return loss
        return loss, soft / self.temperature**2, hard


def kept(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows count; None where all do."""
    return None if labels is None else labels != ignore_index


def _check_accum_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32):
        raise ValueError(f"accum_dtype must be None or torch.float32, got {dtype}")


def _with_zeros(head: LinearHead, missing: int) -> LinearHead:
    """With logits of 0 for so many more classes."""
    bias = None if head.bias is None else F.pad(head.bias, (0, missing))
    return LinearHead(head.hidden, F.pad(head.weight, (0, 0, 0, missing)), bias)

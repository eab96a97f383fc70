"""KD_Lib's losses (SforAiDl/KD_Lib, `KD_Lib/KD`) on fastkd.

Modules of losses: `ATLoss`, `RKDLoss`, `RKDDistanceLoss` and `RKDAngleLoss`. The teacher comes
first in all of them.

KD_Lib's trainers have their losses in a method, `calculate_kd_loss`. The classes `BANN`, `CSKD`,
`MessyCollab`, `SelfTraining`, `SoftRandom`, `VanillaKD` and `VirtualTeacher` here hold this method
and nothing else. It goes into a trainer by inheritance, before KD_Lib's class, and raises a
ValueError where the trainer was given a `loss_fn` of another kind than its default. Their
cross-entropy is of labels `(N,)` that are classes: a label of -100, which KD_Lib leaves out of the
cross-entropy alone, is an error.

Left out, since no kernel of fastkd serves the formula: `LabelSmoothReg` and `ProbShift`, whose KL
divergence has its sides exchanged before the logarithm; `Attention`, whose maps are of single
logits, so that its soft term is 0; `RCO`, whose soft term is NaN, as the target is a logarithm;
`MeanTeacher`, which raises. `BERT2LSTM`, `DML`, `NoisyTeacher` and `TAKD` compute a
`torch.nn.MSELoss()`: where they take a `loss_fn`, pass `fastkd.nn.HintLoss(half=False,
reduction="mean")`. See `fastkd.compat` for what all modules share.

Example:
    >>> from fastkd.compat import kd_lib
    >>> loss = kd_lib.RKDLoss()(torch.randn(16, 64), torch.randn(16, 32))
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.compat import _common
from fastkd.losses.attention import attention_transfer_loss
from fastkd.losses.hint import hint_loss
from fastkd.losses.rkd import rkd_angle_loss
from fastkd.product import product

__all__ = [
    "BANN",
    "CSKD",
    "ATLoss",
    "MessyCollab",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "SelfTraining",
    "SoftRandom",
    "VanillaKD",
    "VirtualTeacher",
]


class ATLoss(torch.nn.Module):
    """`mean((Q_S − Q_T) ** p)`, `Q = normalize(vec(A ** p))`; `vision/attention/loss_metric.py`.

    No channels are added up: an activation is its own map, of all its elements, so that student and
    teacher must have one shape. `fastkd.attention_transfer_loss` adds up channels. For
    `norm_type=2` the loss is computed by fastkd, for others by torch.

    Args:
        norm_type: p, the exponent of the map, and of the difference. Default: 2.
    """

    def __init__(self, norm_type: float = 2) -> None:
        super().__init__()
        self.p = norm_type

    def forward(self, teacher_output: Iterable[Tensor], student_output: Iterable[Tensor]) -> Any:
        """Of lists of activations `(N, *)` the sum over pairs, a scalar; 0.0 for empty lists."""
        loss: Any = 0.0
        for teacher, student in zip(teacher_output, student_output, strict=False):
            # One channel.
            maps = [_common.wide(x).reshape(len(x), 1, -1) for x in (student, teacher)]
            if self.p == 2:
                loss = loss + attention_transfer_loss(maps[0], maps[1], distance="mse")
            else:
                q_s, q_t = (F.normalize(x.pow(self.p).flatten(1)) for x in maps)
                loss = loss + (q_s - q_t).pow(self.p).mean()
        return loss


class RKDDistanceLoss(torch.nn.Module):
    """The smooth L1 loss of distances over their positive mean plus 1e-7.

    `vision/RKD/loss_metric.py`. Squares of distances are 1e-10 at least, and the teacher receives
    no gradient. The 1e-7 is why torch computes it; `fastkd.rkd_distance_loss` divides by the mean
    alone.
    """

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Of embeddings `(N, D)`, which may differ in D, a scalar."""
        return _common.distance_loss(student, teacher.detach(), eps=1e-10, of_mean=1e-7)


class RKDAngleLoss(torch.nn.Module):
    """The smooth L1 loss of cosines, `fastkd.rkd_angle_loss`; `vision/RKD/loss_metric.py`.

    The teacher receives no gradient. With `normalize=False` it is the loss of inner products of the
    differences, which torch computes, in memory of `N × N × D`.
    """

    def forward(self, teacher: Tensor, student: Tensor, normalize: bool = True) -> Tensor:
        """Of embeddings `(N, D)`, which may differ in D, a scalar."""
        if normalize:
            return rkd_angle_loss(student, teacher.detach())

        def products(x: Tensor) -> Tensor:
            x = _common.wide(x)
            differences = x[None] - x[:, None]
            return product(differences, differences.mT)

        return F.smooth_l1_loss(products(student), products(teacher.detach()))


class RKDLoss(torch.nn.Module):
    """`dist_ratio` times `RKDDistanceLoss` plus `angle_ratio` times `RKDAngleLoss`.

    Args:
        dist_ratio: the weight of the distances. Default: 0.5.
        angle_ratio: the weight of the angles. Default: 0.5.
        normalize: of `RKDAngleLoss`. Default: True.
    """

    def __init__(
        self, dist_ratio: float = 0.5, angle_ratio: float = 0.5, normalize: bool = True
    ) -> None:
        super().__init__()
        self.dist_ratio = dist_ratio
        self.angle_ratio = angle_ratio
        self.normalize = normalize
        self.distances = RKDDistanceLoss()
        self.angles = RKDAngleLoss()

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Of embeddings `(N, D)`, which may differ in D, a scalar."""
        angles = self.angles(teacher, student, self.normalize)
        return self.angle_ratio * angles + self.dist_ratio * self.distances(teacher, student)


class _Trainer:
    """What a loss needs of KD_Lib's trainer."""

    temp: float
    distil_weight: float
    loss_fn: torch.nn.Module

    def _soft_and_hard(self, student: Tensor, teacher: Tensor, labels: Tensor, **of: Any) -> Tensor:
        """`w · loss_fn` of softened distributions, times T² of the student's, `+ (1 − w) · CE`."""
        reduction = of.pop("reduction", None) or self._reduction()
        share = _common.soft_share(reduction, student)
        weights = {
            "soft_weight": self.distil_weight * share,
            "hard_weight": 1 - self.distil_weight,
        }
        return _common.soft_and_hard(student, teacher, labels, **weights, **of)

    def _reduction(self) -> str:
        loss = self.loss_fn
        is_default = isinstance(loss, torch.nn.KLDivLoss) and not loss.log_target
        if not is_default or loss.reduction not in ("mean", "batchmean"):
            raise ValueError(
                'loss_fn must be torch.nn.KLDivLoss() or that with reduction="batchmean", '
                f"got {loss!r}"
            )
        return str(loss.reduction)


class VanillaKD(_Trainer):
    """`(1 − w) · CE + w · T² · mean((softmax(t/T) − softmax(s/T))²)`.

    `vision/vanilla/vanilla_kd.py`. A squared difference, where `fastkd.distillation_loss` has the
    KL divergence.
    """

    def calculate_kd_loss(
        self, y_pred_student: Tensor, y_pred_teacher: Tensor, y_true: Tensor
    ) -> Tensor:
        """Of logits `(N, K)` and labels `(N,)`, a scalar."""
        loss = self.loss_fn
        if not isinstance(loss, torch.nn.MSELoss) or loss.reduction != "mean":
            raise ValueError(f"loss_fn must be torch.nn.MSELoss(), got {loss!r}")
        student, teacher = (_common.wide(logits) for logits in (y_pred_student, y_pred_teacher))
        sides = ((logits / self.temp).softmax(1) for logits in (student, teacher))
        soft = hint_loss(*sides, half=False, reduction="mean")
        hard = F.cross_entropy(student, y_true)
        return self.distil_weight * self.temp**2 * soft + (1 - self.distil_weight) * hard


class MessyCollab(_Trainer):
    """`(1 − w) · CE + w · T² · KL`; `vision/noisy/messy_collab.py`.

    With the default `loss_fn`, `torch.nn.KLDivLoss()`, the KL divergence is a mean over rows and
    classes, K times smaller than in `fastkd.distillation_loss`.
    """

    def calculate_kd_loss(
        self, y_pred_student: Tensor, y_pred_teacher: Tensor, y_true: Tensor
    ) -> Tensor:
        """Of logits `(N, K)` and labels `(N,)`, a scalar."""
        return self._soft_and_hard(y_pred_student, y_pred_teacher, y_true, temperature=self.temp)


class SoftRandom(MessyCollab):
    """As `MessyCollab`; `vision/noisy/soft_random.py`."""


class BANN(_Trainer):
    """`loss_fn(s, y)` in the first generation, then as `MessyCollab`; `vision/BANN/BANN.py`.

    The KL divergence is a mean over rows and classes, whatever `loss_fn` is.
    """

    gen: int

    def calculate_kd_loss(
        self, y_pred_student: Tensor, y_pred_teacher: Tensor, y_true: Tensor
    ) -> Tensor:
        """Of logits `(N, K)` and labels `(N,)`, a scalar."""
        if self.gen == 0:
            first: Tensor = self.loss_fn(y_pred_student, y_true)
            return first
        return self._soft_and_hard(
            y_pred_student, y_pred_teacher, y_true, temperature=self.temp, reduction="mean"
        )


class CSKD(_Trainer):
    """`T² · KL` between two samples of a class, the sum over N; `vision/CSKD/cskd.py`."""

    def calculate_kd_loss(self, y_pred_pair_1: Tensor, y_pred_pair_2: Tensor) -> Tensor:
        """Of logits `(N, K)`, of which the second are the target, a scalar."""
        return _common.kl_div(y_pred_pair_1, y_pred_pair_2, temperature=self.temp)


class SelfTraining(_Trainer):
    """`(1 − w) · CE + w · KL(softmax(t/T) ‖ softmax(s))`; `vision/teacher_free/self_training.py`.

    The teacher's logits alone are softened, and there is no T². With the default `loss_fn`,
    `torch.nn.KLDivLoss()`, the KL divergence is a mean over rows and classes.
    """

    def calculate_kd_loss(
        self, y_pred_student: Tensor, y_pred_teacher: Tensor, y_true: Tensor
    ) -> Tensor:
        """Of logits `(N, K)` and labels `(N,)`, a scalar."""
        return self._soft_and_hard(
            y_pred_student, y_pred_teacher, y_true, temperature=1.0, teacher_temperature=self.temp
        )


class VirtualTeacher(SelfTraining):
    """As `SelfTraining` with a made-up teacher; `vision/teacher_free/virtual_teacher.py`.

    Its logits are `correct_prob` for the label's class and `(1 − correct_prob) / (K − 1)` for the
    others: KD_Lib takes the softmax of these probabilities over T.
    """

    correct_prob: float

    def calculate_kd_loss(  # type: ignore[override]
        self, y_pred_student: Tensor, y_true: Tensor
    ) -> Tensor:
        """Of logits `(N, K)` and labels `(N,)`, a scalar."""
        others = (1 - self.correct_prob) / (y_pred_student.shape[1] - 1)
        teacher = torch.full_like(_common.wide(y_pred_student), others, requires_grad=False)
        teacher.scatter_(1, y_true[:, None], self.correct_prob)
        return super().calculate_kd_loss(y_pred_student, teacher, y_true)

"""RepDistiller's criteria (HobbitLong/RepDistiller, `distiller_zoo`) on fastkd.

`DistillKL`, `HintLoss`, `Attention`, `Similarity`, `RKDLoss` and `FSP`. Its other criteria
(`ABLoss`, `Correlation`, `FactorTransfer`, `KDSVD`, `NSTLoss`, `PKT`, `VIDLoss` and `CRDLoss`) have
formulas for which fastkd has no kernel, and stay RepDistiller's. See `fastkd.compat` for what all
modules share.

Example:
    >>> from fastkd.compat.repdistiller import Attention, DistillKL
    >>> loss = DistillKL(4.0)(torch.randn(8, 10), torch.randn(8, 10))
    >>> maps = [torch.randn(8, 16, 32, 32)], [torch.randn(8, 64, 32, 32)]
    >>> loss = 0.9 * loss + 1000 * sum(Attention()(*maps))
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.compat import _common
from fastkd.losses.fsp import fsp_loss
from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from fastkd.losses.similarity import similarity_preserving_loss

__all__ = ["FSP", "Attention", "DistillKL", "HintLoss", "RKDLoss", "Similarity"]


class DistillKL(torch.nn.Module):
    """`T² · KL(softmax(y_t/T) ‖ softmax(y_s/T))`, the sum over the batch size.

    The classes are dimension 1: of `(N, K, H, W)` the sum over pixels is divided by N alone, where
    `fastkd.soft_target_loss(y_s, y_t, temperature=T, dim=1)` divides by N·H·W.
    `distiller_zoo/KD.py`.

    Args:
        T: the temperature, a number or a floating tensor without dimensions.
    """

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        """Of the student's and the teacher's logits `(N, K, *)`, a scalar."""
        return _common.kl_div(y_s, y_t, temperature=self.T)


class HintLoss(torch.nn.Module):
    """The mean squared difference of features, over all elements; `distiller_zoo/FitNet.py`.

    `fastkd.hint_loss` has the paper's ½ and divides by the batch size unless
    `half=False, reduction="mean"`.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Of features of one shape, a scalar.

        Raises:
            ValueError: shapes differ, which `torch.nn.MSELoss` broadcasts with a warning.
        """
        return _common.mean_square(f_s, f_t)


class Attention(torch.nn.Module):
    """The mean squared difference of `normalize(mean over channels of f ** p)`.

    `distiller_zoo/AT.py`. It takes no absolute value: an odd p gives other maps than
    `fastkd.attention_transfer_loss` where features are negative, and one with a fraction NaN. These
    p are computed by torch up to the map. Where heights differ, the higher features are
    average-pooled to a square of the other's height. Of lists of unequal length the longer one's
    rest is left out, which fastkd's own function refuses.

    Args:
        p: the exponent. Default: 2.
    """

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        self.p = p

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """Of lists of features `(N, C, H, W)` a list of scalars, one for each pair."""
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one pair, a scalar."""
        return _common.attention_loss([(f_s, f_t)], self.p)

    def at(self, f: Tensor) -> Tensor:
        """The map of features `(N, C, H, W)`, `(N, H·W)`."""
        return _common.attention_map(f, self.p)


class Similarity(torch.nn.Module):
    """`‖Q_S − Q_T‖_F² / N²`, Q being the Gram matrix of samples with each row over its L2 norm.

    `distiller_zoo/SP.py`. Of lists of unequal length the longer one's rest is left out, which
    `fastkd.similarity_preserving_loss` refuses.
    """

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """Of lists of features `(N, *)` a list of losses of shape `(1,)`, one for each pair."""
        return [self.similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def similarity_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """The loss of one pair, of shape `(1,)`."""
        return similarity_preserving_loss(*map(_common.samples, (f_s, f_t))).reshape(1)


class RKDLoss(torch.nn.Module):
    """`w_d` times the loss of distances plus `w_a` times that of angles; `distiller_zoo/RKD.py`.

    The teacher receives no gradient. RepDistiller gives samples that coincide the distance 1e-6,
    and counts it in the mean that distances are divided by; here, as in `fastkd.rkd_distance_loss`,
    they have distance 0 and are not counted. Eight duplicates in a batch of 64 change the loss by
    half a percent. In float32 RepDistiller's distances between samples that are close are rounding
    errors; here the sums are in float64.

    Args:
        w_d: the weight of the distances. Default: 25.
        w_a: the weight of the angles. Default: 50.
    """

    def __init__(self, w_d: float = 25, w_a: float = 50) -> None:
        super().__init__()
        self.w_d = w_d
        self.w_a = w_a

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        """Of features `(N, *)`, which are flattened and need not be of one size, a scalar."""
        student, teacher = (_common.samples(f).flatten(1) for f in (f_s, f_t.detach()))
        distances = rkd_distance_loss(student, teacher)
        return self.w_d * distances + self.w_a * rkd_angle_loss(student, teacher)


class FSP(torch.nn.Module):
    """The mean squared difference of `F₁ F₂ᵀ / (h·w)` between neighbours; `distiller_zoo/FSP.py`.

    Of two layers whose heights differ, the higher one is average-pooled to a square of the other's
    height. `fastkd.fsp_loss` max-pools and sums over the matrix, as the paper does.

    Args:
        s_shapes: the shapes of the student's layers, of which the channels are compared.
        t_shapes: the shapes of the teacher's layers.

    Raises:
        AssertionError: there are not as many shapes on both sides.
        ValueError: a layer's channels differ.
    """

    def __init__(
        self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        assert len(s_shapes) == len(t_shapes), "unequal length of feat list"
        channels = [[shape[1] for shape in shapes] for shapes in (s_shapes, t_shapes)]
        if channels[0] != channels[1]:
            raise ValueError(f"num of channels not equal (error in FSP): {channels}")

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        """Of lists of layers `(N, C, H, W)` a list of scalars, one for each two neighbours."""
        neighbours = zip(itertools.pairwise(g_s), itertools.pairwise(g_t), strict=False)
        return [self._loss(s, t) for s, t in neighbours]

    @staticmethod
    def _loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
        entries = student[0].shape[1] * student[1].shape[1]
        sides = (_common.pool_to_height(*pair) for pair in (student, teacher))
        return fsp_loss(*sides, pair_weights=[1 / entries])

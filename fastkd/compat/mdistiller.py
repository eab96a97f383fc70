"""mdistiller's losses (megvii-research/mdistiller, `mdistiller/distillers`) on fastkd.

`kd_loss`, `at_loss`, `single_stage_at_loss`, `rkd_loss`, `sp_loss`, `similarity_loss`, `hcl_loss`,
and `mse_loss` for the line of `FitNet` that calls `F.mse_loss`. The distillers call them by their
names in the module that defines them, so that an import there in the place of the definition is all
that a program needs. The losses of CRD, DKD, KDSVD, NST, OFD, PKT and VID have formulas for which
fastkd has no kernel. See `fastkd.compat` for what all modules share.

Example:
    >>> from fastkd.compat.mdistiller import at_loss, kd_loss
    >>> loss = kd_loss(torch.randn(8, 10), torch.randn(8, 10), 4.0)
    >>> maps = [torch.randn(8, 16, 32, 32)], [torch.randn(8, 64, 32, 32)]
    >>> loss = 0.9 * loss + 1000 * at_loss(*maps, 2)
"""

from collections.abc import Iterable

from torch import Tensor

from fastkd.compat import _common
from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from fastkd.losses.similarity import similarity_preserving_loss
from fastkd.losses.soft_target import soft_target_loss

__all__ = [
    "at_loss",
    "hcl_loss",
    "kd_loss",
    "mse_loss",
    "rkd_loss",
    "similarity_loss",
    "single_stage_at_loss",
    "sp_loss",
]

_EPS = 1e-12


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """`T² · KL(softmax(teacher/T) ‖ softmax(student/T))`, the mean over rows; `KD.py`.

    Of logits `(N, K, *)`, a scalar. It is `fastkd.soft_target_loss` with `dim=1`.
    """
    return soft_target_loss(logits_student, logits_teacher, temperature=temperature, dim=1)


def at_loss(g_s: Iterable[Tensor], g_t: Iterable[Tensor], p: float) -> Tensor | int:
    """The sum of `single_stage_at_loss` over pairs of features `(N, C, H, W)`; `AT.py`.

    Of lists of unequal length the longer one's rest is left out, which
    `fastkd.attention_transfer_loss` refuses: a recipe of mdistiller pairs stages that way which are
    not each other's. A scalar, and 0 for empty lists.
    """
    pairs = list(zip(g_s, g_t, strict=False))
    return _common.attention_loss(pairs, p) if pairs else 0


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """The mean squared difference of `normalize(mean over channels of f ** p)`; `AT.py`.

    It takes no absolute value: an odd p gives other maps than `fastkd.attention_transfer_loss`
    where features are negative, and one with a fraction NaN. These p are computed by torch up to
    the map. Where heights differ, the higher features are average-pooled to a square of the other's
    height. Of features `(N, C, H, W)`, a scalar.
    """
    return _common.attention_loss([(f_s, f_t)], p)


def mse_loss(input: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of features, as `FitNet.py` calls `F.mse_loss(f_s, f_t)`.

    `fastkd.hint_loss` has the paper's ½ and divides by the batch size unless `half=False,
    reduction="mean"`. Of features of one shape, a scalar.

    Raises:
        ValueError: shapes differ, which `F.mse_loss` broadcasts with a warning.
    """
    return _common.mean_square(input, target)


def hcl_loss(fstudent: Iterable[Tensor], fteacher: Iterable[Tensor]) -> Tensor | float:
    """The loss of `ReviewKD`, summed over pairs of features; `ReviewKD.py`.

    The mean squared difference of features, and of the features pooled to squares of 4, 2 and 1
    pixels a side, weighted. The weights are 1, ½, ¼ and ⅛, over their sum; a square that is not
    below the features' height is left out. Of features `(N, C, H, W)` of one shape, a scalar. Of
    lists of unequal length the longer one's rest is left out. 0.0 for empty lists.
    """
    pairs = zip(fstudent, fteacher, strict=False)
    return sum((_common.hierarchical_context_loss(*pair, (4, 2, 1)) for pair in pairs), 0.0)


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = _EPS,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """The weighted sum of the losses of distances and of angles; `RKD.py`.

    The teacher receives no gradient. With the default `eps`, samples that coincide have the
    distance 1e-6 in mdistiller, which is counted in the mean that distances are divided by; here,
    as in `fastkd.rkd_distance_loss`, they have distance 0 and are not counted. Eight duplicates in
    a batch of 64 change the loss by half a percent. In float32 mdistiller's distances between
    samples that are close are rounding errors; here the sums are in float64. Squared distances, and
    another `eps`, are computed by torch as mdistiller does.

    Args:
        f_s: features `(N, *)`, which are flattened.
        f_t: features `(N, *)`, which may be of another size.
        squared: squares in the place of distances. Default: False.
        eps: the least square of a distance. Default: 1e-12.
        distance_weight: the weight of the distances. Default: 25.
        angle_weight: the weight of the angles. Default: 50.

    Returns:
        A scalar.
    """
    student, teacher = (_common.samples(f).flatten(1) for f in (f_s, f_t.detach()))
    if squared or eps != _EPS:
        distances = _common.distance_loss(student, teacher, eps=eps, squared=squared)
    else:
        distances = rkd_distance_loss(student, teacher)
    return distance_weight * distances + angle_weight * rkd_angle_loss(student, teacher)


def sp_loss(g_s: Iterable[Tensor], g_t: Iterable[Tensor]) -> Tensor | int:
    """The sum of `similarity_loss` over pairs of features, of shape `(1,)`; `SP.py`.

    Of lists of unequal length the longer one's rest is left out, which
    `fastkd.similarity_preserving_loss` refuses. 0 for empty lists.
    """
    return sum(similarity_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False))


def similarity_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """`‖Q_S − Q_T‖_F² / N²`, Q being the Gram matrix of samples with each row over its L2 norm.

    `SP.py`. Of features `(N, *)`, of shape `(1,)`.
    """
    return similarity_preserving_loss(*map(_common.samples, (f_s, f_t))).reshape(1)

"""Losses on features and on relations between samples or layers."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.compat import _common
from fastkd.compat.torchdistill.outputs import OfTwoModules, Outputs, check_mode
from fastkd.losses.attention import attention_transfer_loss
from fastkd.losses.hint import hint_loss
from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
from fastkd.product import product

# By a name of one's own, what is compared, and its "weight", which is 1 if it is not there.
Pairs = Mapping[str, Mapping[str, Any]]


def _features(outputs: Outputs, pair: Mapping[str, Any], name: str) -> Tensor:
    features: Tensor = outputs[pair[name]["path"]][pair[name]["io"]]
    return features


class ATLoss(torch.nn.Module):
    """Attention transfer with the maps of squares, summed over pairs.

    `mode="code"` is the mean squared difference of normalised maps, and `mode="paper"` the sum of
    the norms `‖Q_S − Q_T‖₂` over N, without the half that `fastkd.attention_transfer_loss` has.

    Args:
        at_pairs: `{name: {"student": {"path", "io"}, "teacher": {"path", "io"}, "weight"}}`, of
            features `(N, C, H, W)` that agree in N, H and W.
        mode: `"code"` or `"paper"`. Default: `"code"`.
        **kwargs: not used, as in torchdistill.

    Raises:
        ValueError: mode is another one.
    """

    def __init__(self, at_pairs: Pairs, mode: str = "code", **kwargs: Any) -> None:
        super().__init__()
        check_mode(mode)
        self.at_pairs = at_pairs
        self.mode = mode

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar."""
        pairs = self.at_pairs.values()
        return attention_transfer_loss(
            [_features(student_io_dict, pair, "student") for pair in pairs],
            [_features(teacher_io_dict, pair, "teacher") for pair in pairs],
            pair_weights=[pair.get("weight", 1) for pair in pairs],
            distance="norm" if self.mode == "paper" else "mse",
            beta=2.0 if self.mode == "paper" else 1.0,
        )


class FSPLoss(torch.nn.Module):
    """The norms of the columns of FSP matrices' differences, `Σ_c ‖(G_S − G_T)_·c‖₂`, over N.

    `G = F₁ F₂ᵀ / (h·w)`, where the larger layer is max-pooled to the smaller. The paper and
    `fastkd.fsp_loss` add up squares in the place of the norms of columns. torch computes G.

    Args:
        fsp_pairs: `{name: {"student_first": {"path", "io"}, "student_second", "teacher_first",
            "teacher_second", "weight"}}`, of features `(N, C, H, W)`.
        **kwargs: not used, as in torchdistill.
    """

    def __init__(self, fsp_pairs: Pairs, **kwargs: Any) -> None:
        super().__init__()
        self.fsp_pairs = fsp_pairs

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Any:
        """A scalar."""
        loss: Any = 0
        for pair in self.fsp_pairs.values():
            columns = [
                _columns(
                    _features(outputs, pair, f"{side}_first"),
                    _features(outputs, pair, f"{side}_second"),
                )
                for side, outputs in (("student", student_io_dict), ("teacher", teacher_io_dict))
            ]
            squares = hint_loss(*columns, half=False, reduction="none")
            # A norm's gradient at 0 is 0, a root's is not finite.
            norms = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()
            loss = loss + pair.get("weight", 1) * norms.sum()
        first = next(iter(self.fsp_pairs.values()))
        return loss / len(_features(student_io_dict, first, "student_first"))


def _columns(first: Tensor, second: Tensor) -> Tensor:
    """The columns of the FSP matrices, `(N·C₂, C₁)`."""
    size = [min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True)]
    layers = [
        x if list(x.shape[2:]) == size else F.adaptive_max_pool2d(x, size) for x in (second, first)
    ]
    second, first = (_common.wide(x).flatten(2) for x in layers)
    return (product(second, first.mT) / first.shape[2]).flatten(0, 1)


class RKDLoss(torch.nn.Module):
    """`dist_factor` times the loss of distances plus `angle_factor` times that of angles.

    The teacher receives no gradient. torchdistill gives samples that coincide the distance 1e-6,
    and counts it in the mean that distances are divided by; here, as in `fastkd.rkd_distance_loss`,
    they have distance 0 and are not counted. Eight duplicates in a batch of 64 change the loss by
    half a percent. In float32 torchdistill's distances between samples that are close are rounding
    errors; here the sums are in float64.

    Args:
        student_output_path: the student's module, whose output `(N, *)` is flattened.
        teacher_output_path: the teacher's module.
        dist_factor: the weight of the distances; with 0 or None they are not computed.
        angle_factor: the weight of the angles; with 0 or None they are not computed.
        reduction: `"mean"` over the N² distances and the N³ angles, or `"sum"`.
        **kwargs: not used, as in torchdistill.

    Raises:
        ValueError: reduction is another one; matrices of N² and N³ terms have no sum.
    """

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float | None,
        angle_factor: float | None,
        reduction: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        self.student_output_path = student_output_path
        self.teacher_output_path = teacher_output_path
        self.dist_factor = dist_factor
        self.angle_factor = angle_factor
        self.reduction = reduction

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Any:
        """A scalar."""
        student = student_io_dict[self.student_output_path]["output"].flatten(1)
        teacher = teacher_io_dict[self.teacher_output_path]["output"].flatten(1).detach()
        samples = len(student) if self.reduction == "sum" else 1
        loss: Any = 0
        if self.dist_factor:
            loss = self.dist_factor * samples**2 * rkd_distance_loss(student, teacher)
        if self.angle_factor:
            loss = loss + self.angle_factor * samples**3 * rkd_angle_loss(student, teacher)
        return loss


class SPKDLoss(torch.nn.Module):
    """`‖Q_S − Q_T‖_F² / N²`, Q being the Gram matrix of samples with each row over its **L1** norm.

    The paper, and `fastkd.similarity_preserving_loss`, divide by the L2 norm; torchdistill calls
    `normalize(G, 1)`, which names the norm and not the dimension. torch computes Q.

    Args:
        student_output_path: the student's module, whose output is `(N, *)`.
        teacher_output_path: the teacher's module.
        reduction: `"batchmean"`; with any other the sum is not divided by N².
        **kwargs: not used, as in torchdistill.
    """

    def __init__(
        self, student_output_path: str, teacher_output_path: str, reduction: str, **kwargs: Any
    ) -> None:
        super().__init__()
        self.student_output_path = student_output_path
        self.teacher_output_path = teacher_output_path
        self.reduction = reduction

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar."""
        student = student_io_dict[self.student_output_path]["output"].flatten(1)
        teacher = teacher_io_dict[self.teacher_output_path]["output"].flatten(1)
        sides = (_common.wide(z) for z in (student, teacher))
        rows = (F.normalize(product(z, z.mT), p=1, dim=1) for z in sides)
        loss = hint_loss(*rows, half=False, reduction="sum")
        return loss / len(student) ** 2 if self.reduction == "batchmean" else loss


class HierarchicalContextLoss(OfTwoModules):
    """The mean squared difference of features, and of the features pooled to squares, weighted.

    The weights are 1, ½, ¼ and so on, over their sum. A size that is not below the features' height
    is left out.

    Args:
        student_module_path: the student's module.
        student_module_io: `"input"` or `"output"` of it: a pair, of which the first is the
            features.
        teacher_module_path: the teacher's module.
        teacher_module_io: `"input"` or `"output"` of it: features `(N, C, H, W)`.
        reduction: `"mean"` or `"sum"` over elements. Default: `"mean"`.
        output_sizes: heights of the squares. Default: None, `[4, 2, 1]`.
        **kwargs: not used, as in torchdistill.

    Raises:
        ValueError: reduction is another one.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        reduction: str = "mean",
        output_sizes: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io
        )
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        self.reduction = reduction
        self.output_sizes = [4, 2, 1] if output_sizes is None else output_sizes

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar."""
        (student, _), teacher = self.outputs(student_io_dict, teacher_io_dict)
        return _common.hierarchical_context_loss(
            student, teacher, self.output_sizes, self.reduction
        )

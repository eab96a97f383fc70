"""Losses on logits."""

from typing import Any

import torch
from torch import Tensor

from fastkd.compat import _common
from fastkd.compat.torchdistill.outputs import OfTwoModules, Outputs, check_mode, no_terms
from fastkd.losses.soft_target import soft_target_loss


class KDLoss(OfTwoModules):
    """`alpha · CE + beta · T² · KL(softmax(t/T) ‖ softmax(s/T))`.

    alpha weights the *hard* term. Where alpha is None or 0, or there are no targets, the loss is
    the KL divergence without beta and without T²; `fastkd.soft_target_loss` multiplies by T² unless
    `scale_t2=False`. "batchmean" divides the sum over `(N, K, *)` by N alone.

    Rows with the `ignore_index` of the cross-entropy count in the KL divergence, but not in
    `fastkd.distillation_loss`. Where one is given, or class weights are, or targets are
    probabilities or those of pixels, the two terms are two calls. Otherwise they are one, in which
    a target of -100, torch's own default, is an error (on a GPU a NaN loss).

    Args:
        student_module_path: the student's module.
        student_module_io: `"input"` or `"output"` of it: logits `(N, K, *)`.
        teacher_module_path: the teacher's module.
        teacher_module_io: `"input"` or `"output"` of it.
        temperature: T.
        alpha: the weight of the cross-entropy. Default: None.
        beta: the weight of the KL divergence. Default: None, 1 − alpha.
        reduction: `"batchmean"`, `"mean"` over rows and classes, or `"sum"`. The cross-entropy is a
            mean in the first two. Default: `"batchmean"`.
        **kwargs: of `torch.nn.CrossEntropyLoss`.

    Raises:
        ValueError: reduction is `"none"`.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io
        )
        no_terms(reduction)
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1 - alpha if beta is None and alpha is not None else beta
        self.reduction = reduction
        of_mean = "mean" if reduction == "batchmean" else reduction
        self.cross_entropy_loss = torch.nn.CrossEntropyLoss(reduction=of_mean, **kwargs)
        self._is_one_call = kwargs.keys() <= {"label_smoothing"}

    def forward(
        self,
        student_io_dict: Outputs,
        teacher_io_dict: Outputs,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """A scalar; targets are classes `(N, *)` or probabilities `(N, K, *)`."""
        student, teacher = self.outputs(student_io_dict, teacher_io_dict)
        if not self.alpha or targets is None:
            return self._soft(student, teacher)
        assert self.beta is not None
        # Pixels are often left out, by torch's default of -100; samples are not.
        if self._is_one_call and targets.ndim == 1:
            return _common.soft_and_hard(
                student,
                teacher,
                targets,
                temperature=self.temperature,
                soft_weight=self.beta * _common.soft_share(self.reduction, student),
                hard_weight=self.alpha,
                label_smoothing=self.cross_entropy_loss.label_smoothing,
                reduction="sum" if self.reduction == "sum" else "batchmean",
            )
        # Weights of classes have the dtype of the logits.
        weighted = self.cross_entropy_loss.weight is not None
        hard = self.cross_entropy_loss(student if weighted else _common.wide(student), targets)
        return self.alpha * hard + self.beta * self.temperature**2 * self._soft(student, teacher)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _common.kl_div(
            student,
            teacher,
            temperature=self.temperature,
            scale_t2=False,
            reduction=self.reduction,
        )


class LogitStdKDLoss(KDLoss):
    """`KDLoss` of logits that are standardised row by row: less their mean, over `eps + std`.

    `std` is torch's, over K − 1, and its gradient counts. The cross-entropy is of the logits as
    they are. The T² that is dropped, and what alpha and beta weight, are those of `KDLoss`.

    Args:
        student_module_path: the student's module.
        student_module_io: `"input"` or `"output"` of it: logits `(N, K)`.
        teacher_module_path: the teacher's module.
        teacher_module_io: `"input"` or `"output"` of it.
        temperature: T.
        eps: what is added to the standard deviation. Default: 1e-7.
        alpha: the weight of the cross-entropy. Default: None.
        beta: the weight of the KL divergence. Default: None, 1 − alpha.
        reduction: as in `KDLoss`. Default: `"batchmean"`.
        **kwargs: of `torch.nn.CrossEntropyLoss`.

    Raises:
        ValueError: reduction is `"none"`; logits have more than two dimensions, of which
            torchdistill standardises the last and softens the second; or, on a CPU, they are not
            finite.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = 1e-7,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        of_modules = student_module_path, student_module_io, teacher_module_path, teacher_module_io
        super().__init__(*of_modules, temperature, alpha, beta, reduction, **kwargs)
        self.eps = eps
        self._is_one_call = False

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.ndim != 2:
            raise ValueError(f"logits must be (N, K), got {tuple(student.shape)}")
        # To standardise is to divide by another temperature: what is subtracted changes no softmax.
        of_rows = [
            self.temperature * (self.eps + _common.wide(x).std(-1)) for x in (student, teacher)
        ]
        return _common.kl_div(
            student,
            teacher,
            temperature=of_rows[0],
            teacher_temperature=of_rows[1],
            scale_t2=False,
            reduction=self.reduction,
        )


class SKDInstanceLoss(OfTwoModules):
    """KL divergence of softened logits: the instance-wise term of Streamlined KD.

    `mode="paper"` has no T², and divides the sum over `(N, K, *)` by N alone.
    `fastkd.soft_target_loss` multiplies by T² unless `scale_t2=False`. `mode="code"` has T², is a
    mean over all rows, and leaves out those whose teacher is surer than in the median row; these
    count in the mean.

    Args:
        student_module_path: the student's module.
        student_module_io: `"input"` or `"output"` of it: logits `(N, K, *)`.
        teacher_module_path: the teacher's module.
        teacher_module_io: `"input"` or `"output"` of it.
        temperature: T. Default: 4.0.
        mode: `"paper"` or `"code"`. Default: `"paper"`.
        **kwargs: not used, as in torchdistill.

    Raises:
        ValueError: mode is another one.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float = 4.0,
        mode: str = "paper",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io
        )
        check_mode(mode)
        self.temperature = temperature
        self.mode = mode

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar."""
        student, teacher = self.outputs(student_io_dict, teacher_io_dict)
        if self.mode == "paper":
            return _common.kl_div(student, teacher, temperature=self.temperature, scale_t2=False)
        confidence = _common.wide(teacher.detach()).softmax(1).amax(1)
        # Weights, because rows that a mask leaves out would not count. NaN stays NaN.
        unsure = (confidence <= confidence.quantile(0.5)).to(confidence.dtype)
        weights = torch.where(confidence.isnan(), confidence, unsure)
        return soft_target_loss(
            student, teacher, temperature=self.temperature, row_weight=weights, dim=1
        )


class SRDLoss(torch.nn.Module):
    """`2 log Σ |F_S − F_T|^exponent` of features, plus the KL divergence of logits without T².

    The first term is torch's own.

    Args:
        student_feature_module_path: the student's module of features.
        student_feature_module_io: `"input"` or `"output"` of it.
        teacher_feature_module_path: the teacher's.
        teacher_feature_module_io: `"input"` or `"output"` of it; features of one shape.
        student_linear_module_path: the student's module of logits.
        student_linear_module_io: `"input"` or `"output"` of it: logits `(N, K, *)`.
        teacher_linear_module_path: the teacher's.
        teacher_linear_module_io: `"input"` or `"output"` of it.
        exponent: of the features' difference. Default: 1.0.
        temperature: T. Default: 1.0.
        reduction: `"batchmean"`, `"mean"` or `"sum"`, of the KL divergence. Default: `"batchmean"`.
        **kwargs: not used, as in torchdistill.

    Raises:
        ValueError: reduction is `"none"`.
    """

    def __init__(
        self,
        student_feature_module_path: str,
        student_feature_module_io: str,
        teacher_feature_module_path: str,
        teacher_feature_module_io: str,
        student_linear_module_path: str,
        student_linear_module_io: str,
        teacher_linear_module_path: str,
        teacher_linear_module_io: str,
        exponent: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        no_terms(reduction)
        self.features = OfTwoModules(
            student_feature_module_path,
            student_feature_module_io,
            teacher_feature_module_path,
            teacher_feature_module_io,
        )
        self.logits = OfTwoModules(
            student_linear_module_path,
            student_linear_module_io,
            teacher_linear_module_path,
            teacher_linear_module_io,
        )
        self.exponent = exponent
        self.temperature = temperature
        self.reduction = reduction

    def forward(
        self, student_io_dict: Outputs, teacher_io_dict: Outputs, *args: Any, **kwargs: Any
    ) -> Tensor:
        """A scalar."""
        student, teacher = self.features.outputs(student_io_dict, teacher_io_dict)
        difference = _common.wide(student) - _common.wide(teacher)
        of_features = difference.abs().pow(self.exponent).sum().log()
        of_logits = _common.kl_div(
            *self.logits.outputs(student_io_dict, teacher_io_dict),
            temperature=self.temperature,
            scale_t2=False,
            reduction=self.reduction,
        )
        return 2 * of_features + of_logits

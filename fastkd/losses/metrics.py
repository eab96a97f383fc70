"""How far a student's distributions are from its teacher's, for logs and evaluation."""

from typing import NamedTuple

from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.losses import checks, logits, rows
from fastkd.ops.metrics import metrics
from fastkd.parameters import Metrics
from fastkd.reference import metrics as reference


class DistillationMetrics(NamedTuple):
    """The result of `distillation_metrics`: of each row one number, never with a gradient.

    p is the teacher's softened distribution, q the student's.

    Attributes:
        student_log_sum_exp: `log(sum(exp(student / T)))`.
        teacher_log_sum_exp: the same of the teacher, at its temperature.
        student_entropy: `-sum(q * log q)`, in nats.
        teacher_entropy: `-sum(p * log p)`, in nats.
        student_argmax: the class with the largest logit, int64.
        teacher_argmax: the same of the teacher.
        forward_kl: `sum(p * (log p - log q))`, without a factor T².
        reverse_kl: `sum(q * (log q - log p))`, without a factor T².
        overlap: `sum(min(p, q))`, which is 1 less the total variation.
    """

    student_log_sum_exp: Tensor
    teacher_log_sum_exp: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_argmax: Tensor
    teacher_argmax: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    overlap: Tensor


@checks.keywords
def distillation_metrics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    mask: Tensor | None = None,
    num_classes: int | None = None,
    dim: int = -1,
    backend: Backend | None = None,
) -> DistillationMetrics:
    r"""Compare the student's and the teacher's softened distributions, row by row.

    With `q = softmax(student/T)` and `p = softmax(teacher/T)` along `dim`, it returns log-sum-exps,
    entropies, arg-maxima, both KL divergences and the overlap `sum(min(p, q))`, from one read of
    each side. The overlap is the rate at which speculative decoding accepts the student's tokens.
    Nothing has a gradient: `soft_target_loss` is for training.

    Args:
        student_logits: unnormalised scores of any shape with at least one dimension, in float32,
            float16, bfloat16 or float64, in any memory layout. `-inf` excludes a class.
        teacher_logits: the same shape and device as `student_logits`; the dtype may differ, and
            with `num_classes` the size along `dim`, too.
        temperature: T, above 0. Default: 1.0.
        teacher_temperature: the teacher's T, above 0. Default: None, the student's.
        mask: booleans of the rows' shape, that of the logits without `dim`. A row of False is not
            read, so that it may hold NaN; it has 0 in every field, and -1 in the arg-maxima.
            Default: None, every row counts.
        num_classes: the first so many classes of each side exist. What comes after them is padding,
            of which the sides may have different amounts, and is never read. Default: None, all
            classes exist.
        dim: the dimension of the classes: 1 for the `(N, C, H, W)` of segmentation, which is not
            copied. Default: -1, with one warning in the process for logits of 4 or more dimensions;
            the last dimension as a positive number, such as 3, does not warn.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A `DistillationMetrics`, a named tuple of tensors of the logits' shape without `dim`. The
        arg-maxima are int64: the lowest class of equal ones, and the first NaN where there is one,
        as `torch.argmax` has it. The others are float32 (float64 if an input is float64). An
        excluded class adds nothing to an entropy or to the overlap. `forward_kl` is `+inf` where
        the student excludes a class that the teacher does not, and `reverse_kl` where the teacher
        excludes one that the student does not. NaN or `+inf` in a row of one side makes that side's
        log-sum-exp and entropy NaN, and so the KL divergences and the overlap. A side that excludes
        every class does the same, but for its log-sum-exp, which is `-inf`.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or a keyword is given by position.
        ValueError: shapes or devices differ, or an argument is out of its range.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student = torch.randn(4, 16, 1000)
        >>> teacher = torch.randn(4, 16, 1024)  # its head is padded
        >>> metrics = fastkd.distillation_metrics(student, teacher, num_classes=1000)
        >>> metrics.overlap.shape
        torch.Size([4, 16])
        >>> agreement = (metrics.student_argmax == metrics.teacher_argmax).float().mean()

    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2014, for the
    softened distributions; Leviathan, Kalman & Matias, "Fast Inference from Transformers via
    Speculative Decoding", ICML 2023, section 3.2, for the overlap.
    """
    checks.floating(("student_logits", student_logits), ("teacher_logits", teacher_logits))
    checks.same_device("student_logits", student_logits, "teacher_logits", teacher_logits)
    # A derivative in forward mode ends here, too.
    student, teacher = student_logits.detach(), teacher_logits.detach()
    if student.ndim == 0:
        raise ValueError("logits must have at least one dimension, got shape ()")
    axis = checks.dimension("dim", dim, student.ndim)
    student, teacher = _existing(student, teacher, axis, num_classes)
    logits.check_last_dim(student, dim)
    temperature = checks.number("temperature", temperature, above=0)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        teacher_temperature = checks.number("teacher_temperature", teacher_temperature, above=0)
    if mask is not None:
        rows.check_mask(student, mask, axis)
    chosen = select("distillation_metrics", (student, teacher), backend, (mask,))
    parameters = Metrics(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        dim=axis,
        backend=chosen,
    )
    run = reference.distillation_metrics if chosen == "reference" else metrics
    values, argmax = run(student, teacher, mask, parameters)
    found, classes = values.unbind(), argmax.unbind()
    return DistillationMetrics(*found[:4], *classes, *found[4:])


def _existing(
    student: Tensor, teacher: Tensor, dim: int, num_classes: int | None
) -> tuple[Tensor, Tensor]:
    """Views of the classes that exist."""
    if num_classes is None:
        checks.same_shape("student_logits", student, "teacher_logits", teacher)
        if student.shape[dim] == 0:
            raise ValueError(
                f"logits must have at least one class along dim {dim}, got {tuple(student.shape)}"
            )
        return student, teacher
    logits.check_same_rows(student, "teacher_logits", teacher, dim)
    count = logits.check_num_classes(num_classes, [x.shape[dim] for x in (student, teacher)])
    if count is None:
        return student, teacher
    return student.narrow(dim, 0, count), teacher.narrow(dim, 0, count)

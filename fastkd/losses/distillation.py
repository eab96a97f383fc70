"""Soft targets and hard labels together (Hinton et al. 2014), of one or several teachers."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.logits import SIDES, Student, Teacher, TopK
from fastkd.losses import checks, linear_head, logits, over_ranks, rows, temperatures, top_k
from fastkd.losses.inplace import check_inplace
from fastkd.losses.run import run
from fastkd.parameters import SoftTarget
from fastkd.reference import distillation as reference


class DistillationParts(NamedTuple):
    """The result of `distillation_loss(..., return_parts=True)`, each part reduced as the loss is.

    Attributes:
        loss: `hard_weight * hard + soft_weight * soft`, differentiable.
        hard: the cross-entropy with the labels, unweighted and detached.
        soft: `T^2 * KL`, or another divergence times T², unweighted and detached.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor


@overload
def distillation_loss(
    student_logits: Student,
    teacher_logits: Teacher,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    dim: int = ...,
    divergence: str = ...,
    beta: float = ...,
    num_classes: int | None = ...,
    mask: Tensor | None = ...,
    row_weight: Tensor | None = ...,
    normalizer: float | Tensor | None = ...,
    inplace: bool = ...,
    chunk_size: int | None = ...,
    group: "torch.distributed.ProcessGroup | None" = ...,
    teacher_weights: Iterable[float] | None = ...,
    return_parts: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...


@overload
def distillation_loss(
    student_logits: Student,
    teacher_logits: Teacher,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    teacher_temperature: float | Tensor | None = ...,
    soft_weight: float = ...,
    hard_weight: float = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    reduction: str = ...,
    dim: int = ...,
    divergence: str = ...,
    beta: float = ...,
    num_classes: int | None = ...,
    mask: Tensor | None = ...,
    row_weight: Tensor | None = ...,
    normalizer: float | Tensor | None = ...,
    inplace: bool = ...,
    chunk_size: int | None = ...,
    group: "torch.distributed.ProcessGroup | None" = ...,
    teacher_weights: Iterable[float] | None = ...,
    return_parts: Literal[True],
    backend: Backend | None = ...,
) -> DistillationParts: ...


@over_ranks.keywords
def distillation_loss(
    student_logits: Student,
    teacher_logits: Teacher,
    labels: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    teacher_temperature: float | Tensor | None = None,
    soft_weight: float = 0.9,
    hard_weight: float = 0.1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    dim: int = -1,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    chunk_size: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    teacher_weights: Iterable[float] | None = None,
    return_parts: bool = False,
    backend: Backend | None = None,
) -> Tensor | DistillationParts:
    r"""Compute soft targets and hard labels together, from one read of the logits.

    `hard_weight * CE(student, labels) + soft_weight * T^2 * KL(softmax(teacher/T) ‖
    softmax(student/T))`, both averaged over the rows whose label is not `ignore_index`;
    `divergence` names others in the place of KL. The cross-entropy is at temperature 1. The module
    is `fastkd.nn.DistillationLoss`; without labels, see `soft_target_loss`.

    Args:
        student_logits: unnormalised scores of any shape with at least one dimension, in float32,
            float16, bfloat16 or float64, in any memory layout. `-inf` excludes a class. Or a
            `fastkd.LinearHead`, whose logits never exist as a whole.
        teacher_logits: the same shape (but see `num_classes`) and device as `student_logits`; the
            dtype may differ. It receives its gradient if it requires one. A sequence (any iterable)
            of up to 64 such tensors is an ensemble, with the target `p = sum(w *
            softmax(teacher/T))`: the mean of probabilities, not of logits.
            `fastkd.Probabilities(p)` or `fastkd.LogProbabilities(log_p)` holds a teacher's
            probabilities in the place of its logits; they are used as they are.
            `fastkd.TopK(values, indices)` holds the k classes of each row that a teacher kept, and
            a `fastkd.LinearHead` stands for the logits that it would compute.
        labels: classes in any integer dtype, of the logits' shape without `dim`, on the logits'
            device. int64 labels are not copied.
        temperature: T, above 0, of the soft term only. A tensor without dimensions, or of the
            rows' shape (the logits' without `dim`), gives one for all rows or one for each, and
            receives its gradient, that of T² included, if it requires one. It is floating, on the
            logits' device. Default: 4.0.
        teacher_temperature: the teacher's own T, of the same kinds; several teachers share it.
            T² stays the student's. Default: None, the student's.
        soft_weight: the weight of the soft term; 0 switches it off. Usual: 0.9 on CIFAR-100, 0.5
            on ImageNet. Default: 0.9.
        hard_weight: the weight of the cross-entropy; 0 switches it off. The weights are
            independent: they need not sum to 1. Default: 0.1.
        ignore_index: rows with this label contribute nothing and count for nothing, in both terms.
            Default: -100.
        label_smoothing: in [0, 1]; the hard target is `(1 - label_smoothing) * one_hot +
            label_smoothing / K`. Default: 0.0.
        reduction: `"batchmean"` for the sum over the number of rows that count, `"sum"` over these
            rows, or `"none"` for one loss per row, which is 0 where the row is ignored. `"mean"`
            is refused: a cross-entropy's is over rows, that of `torch.nn.KLDivLoss` over rows ×
            classes. Default: `"batchmean"`.
        dim: the dimension of the classes: 1 for the `(N, C, H, W)` of segmentation, which is not
            copied. Default: -1, with one warning in the process where logits of 4 or more
            dimensions have labels that fit `dim=1` as well; the last dimension as a positive
            number, such as 3, does not warn.
        divergence: of the soft term, between the teacher's distribution P and the student's Q:
            `"forward_kl"` for KL(P‖Q), `"reverse_kl"` for KL(Q‖P), `"jsd"` for the generalised
            Jensen-Shannon divergence `beta KL(P‖M) + (1 − beta) KL(Q‖M)` with `M = beta P +
            (1 − beta) Q`, `"tvd"` for the total variation `Σ|P − Q| / 2`, `"skew_kl"` for
            `KL(P‖beta P + (1 − beta) Q)`, or `"skew_reverse_kl"` for `KL(Q‖beta Q + (1 − beta) P)`.
            Default: `"forward_kl"`.
        beta: in [0, 1], of `"jsd"` and the skew divergences. `"jsd"` is forward KL at 0 and reverse
            KL at 1: a convention, not a limit. A skew divergence is the plain one at 0 and nothing
            at 1. The other divergences have no beta, and refuse any but the default. Default: 0.5.
        num_classes: how many classes exist, the first so many along `dim` of either side. What
            follows is padding, in which the sides may differ: it is not read, and its gradient is
            0. Default: None, all classes exist, and both sides have as many.
        mask: booleans of the labels' shape. A row of False is a row whose label is `ignore_index`,
            whatever its label is. Default: None.
        row_weight: real numbers of the labels' shape, on the logits' device, which multiply the
            losses of rows; the count that `"batchmean"` divides by stays as it is. They receive
            their gradient if they require one, and backward then reads the logits again; otherwise
            a row of weight 0 is not read. Default: None.
        normalizer: a positive number, or a tensor of one on the logits' device, in the place of the
            number of rows in `"batchmean"`: the tokens of all accumulated batches, or of all ranks.
            A tensor is not waited for, and gets no gradient. Default: None, the rows that count.
        inplace: write the student's gradient over the student's logits in forward, so that a step
            needs no memory for it. Nothing may need the logits afterwards: a use in the graph
            raises in backward, a use without gradient reads the gradient. The logits must be no
            leaf and no view, nothing but the student may learn, and the loss must be one number.
            float16 and bfloat16 gradients are rounded before `grad_output`
            multiplies them. Without a gradient to compute, and in compiled code, nothing is
            overwritten. Default: False.
        chunk_size: the rows of a `LinearHead` that have logits at a time, as in `soft_target_loss`.
            Default: None, by the memory that is free.
        group: a `torch.distributed` process group over whose ranks the classes are split, in the
            order of ranks and in parts of any size. Each rank passes its part of either side's
            logits, or of a head's weight and bias, and all of the other tensors; labels and
            `num_classes` count the classes of all ranks. Every rank gets the same loss, and its
            part of the gradient, after an exchange of a few numbers a row. Every rank must make the
            call; where one raises, all do. It takes no part in `inplace` and not in one compiled
            graph. DTensors that are sharded on the classes need no group. Default: None, the logits
            have all classes.
        teacher_weights: the ensemble's w, one number of at least 0 for each teacher and not all 0,
            in a sequence or a NumPy array; they are divided by their sum. A teacher of weight 0 is
            not read. Default: None, all teachers weigh the same.
        return_parts: return a `DistillationParts` in place of the loss. Default: False.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A scalar; with `reduction="none"` a tensor of the labels' shape. In float32 (float64 if an
        input is float64). 0, with a zero gradient, if every row is ignored. With `return_parts` the
        tuple `(loss, hard, soft)` of such tensors.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or a keyword is given by position.
        ValueError: shapes or devices differ, an argument is out of its range, or a label is
            neither a class nor `ignore_index`. On a GPU a check of the labels would synchronise the
            stream: there the kernels make the loss and the row's gradient NaN, and with the
            reference torch's own device-side assertion reports it.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student = torch.randn(64, 100, requires_grad=True)
        >>> teacher, labels = torch.randn(64, 100), torch.randint(100, (64,))
        >>> loss = fastkd.distillation_loss(student, teacher, labels, temperature=4.0)
        >>> loss.backward()
        >>> parts = fastkd.distillation_loss(student, teacher, labels, return_parts=True)
        >>> parts._fields
        ('loss', 'hard', 'soft')

    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2014,
    section 2 (the weighted average of two objectives); `soft_target_loss` has the sources of the
    other divergences.
    """
    student_logits, teacher, heads = linear_head.sides_of(
        student_logits, teacher_logits, dim, chunk_size, inplace, group is not None
    )
    teacher_is = "logits"
    if isinstance(teacher, SIDES):
        teacher, teacher_is, teacher_temperature = logits.teacher_of(teacher, teacher_temperature)
    ranks: Any = group  # `Ranks` or None, which the decorator hands on
    axis, num_classes, teachers, weights, unused = logits.check_logits(
        student_logits, teacher, teacher_weights, dim, num_classes, ranks
    )
    divergence, beta = logits.check_divergence(divergence, beta)
    if isinstance(teacher, TopK):
        top_k.check_divergence(teacher, divergence)
    soft_weight = checks.number("soft_weight", soft_weight)
    hard_weight = checks.number("hard_weight", hard_weight)
    label_smoothing = checks.number("label_smoothing", label_smoothing, at_least=0, at_most=1)
    return_parts = checks.flag("return_parts", return_parts)
    ignore_index = checks.integer("ignore_index", ignore_index)
    rows.check_reduction(reduction)
    labels = logits.check_labels(student_logits, labels, ignore_index, axis)
    if mask is not None:
        rows.check_mask(student_logits, mask, axis)
        labels = labels.masked_fill(~mask, ignore_index)
    every = num_classes if ranks is None else ranks.classes
    reduce = rows.reduction_of(
        *(student_logits, reduction, normalizer, row_weight, labels, ignore_index, axis, every),
        heads is not None,
    )
    # The gradient of a weight is the row's loss, also where the weight is 0.
    if row_weight is not None and not row_weight.requires_grad:
        labels = rows.skipping(labels, row_weight, ignore_index)
    logits.check_last_dim(student_logits, dim, labels)
    tensors = student_logits, *teachers
    number, of_teacher, heat = temperatures.check(
        tensors, axis, temperature, teacher_temperature, True, labels, ignore_index
    )
    in_place = inplace is not False and check_inplace(
        inplace, student_logits, teachers, heat, reduction, row_weight
    )
    others = labels, row_weight, *heat
    if heads is not None:
        others += heads.tensors()
    hindrance = None
    if ranks is not None:
        hindrance = over_ranks.obstacle(teachers, teacher_is)
    chosen = select("distillation_loss", tensors, backend, others, hindrance, heads)
    target: Any = teachers
    if isinstance(teacher, TopK):
        classes = logits.count_classes(student_logits, axis, num_classes, ranks)
        target = top_k.slots(teacher, tensors, classes, of_teacher, heat, labels, ignore_index)
    # The compiled kernels look at the labels themselves, in a tenth of the time: same error.
    if chosen != "native" or ranks is not None or heads is not None:
        classes = logits.count_classes(student_logits, axis, num_classes, ranks)
        logits.check_label_range(labels, classes, ignore_index)
    parameters = SoftTarget(
        temperature=number,
        teacher_temperature=of_teacher,
        soft_weight=reduce.weight(soft_weight * (number * number)),
        hard_weight=reduce.weight(hard_weight),
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        labels_are_classes=True,
        divergence=divergence,
        beta=beta,
        reduction=reduce.by_kernels,
        dim=axis,
        weights=weights,
        num_classes=num_classes,
        backend=chosen,
        teacher_is=teacher_is,
        all_classes=0,
        softcap=0.0,
        teacher_softcap=0.0,
    )
    loss, *parts = run(
        reference.distillation_loss,
        *(student_logits, target, labels, parameters, heat, reduce, in_place, return_parts),
        heads,
        ranks,
    )
    loss = logits.tied(loss, unused)
    if not return_parts:
        return loss
    return DistillationParts(loss, *map(reduce.of_part, parts))

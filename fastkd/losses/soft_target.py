"""Soft targets (Hinton et al. 2014) of one or several teachers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.logits import SIDES, Student, Teacher, TopK
from fastkd.losses import checks, linear_head, logits, over_ranks, rows, temperatures, top_k
from fastkd.losses.inplace import check_inplace
from fastkd.losses.run import run
from fastkd.parameters import SoftTarget
from fastkd.reference import soft_target as reference

_REDUCTIONS = ("none", "sum", "mean", "batchmean")


@over_ranks.keywords
def soft_target_loss(
    student_logits: Student,
    teacher_logits: Teacher,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale_t2: bool = True,
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
    backend: Backend | None = None,
) -> Tensor:
    r"""Compute the divergence of the student's softened distribution from the teacher's.

    With `p = softmax(teacher/T)` and `q = softmax(student/T)` along `dim`, the loss of a row is
    `T^2 * sum(p * (log p - log q))` and its gradient `T * (q - p)`; `divergence` names others. A
    row is one distribution. The
    module is `fastkd.nn.SoftTargetLoss`; with labels, `distillation_loss` reads the logits once for
    both terms.

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
        temperature: T, above 0; papers on images use 4. A tensor without dimensions, or of the
            rows' shape (the logits' without `dim`), gives one for all rows or one for each, and
            receives its gradient, that of T² included, if it requires one. It is floating, on the
            logits' device. Default: 1.0.
        teacher_temperature: the teacher's own T, of the same kinds; several teachers share it.
            T² stays the student's. Default: None, the student's.
        scale_t2: multiply by T², which keeps the gradient's size comparable across temperatures.
            Default: True.
        reduction: `"batchmean"` for the sum over the number of rows, `"sum"`, `"mean"` for the sum
            over rows × classes (what `torch.nn.KLDivLoss` calls mean: K times smaller), or `"none"`
            for one loss per row. Rows are all positions: B·L of `(B, L, K)`, N·H·W of
            `(N, C, H, W)`. Default: `"batchmean"`.
        dim: the dimension of the classes: 1 for the `(N, C, H, W)` of segmentation, which is not
            copied. Default: -1, with one warning in the process for logits of 4 or more dimensions;
            the last dimension as a positive number, such as 3, does not warn.
        divergence: the divergence between the teacher's distribution P and the student's Q:
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
        mask: booleans of the rows' shape, that of the logits without `dim`: a row of False has no
            loss and a gradient of 0, is not counted, and is not read, so that it may hold NaN.
            Default: None, every row counts.
        row_weight: real numbers of the rows' shape, on the logits' device, which multiply the
            losses of rows; the count that `"batchmean"` and `"mean"` divide by stays as it is. They
            receive their gradient if they require one, and backward then reads the logits again;
            otherwise a row of weight 0 is not read. Default: None.
        normalizer: a positive number, or a tensor of one on the logits' device, in the place of the
            number of rows in `"batchmean"` and `"mean"`: the tokens of all accumulated batches, or
            of all ranks. A tensor is not waited for, and gets no gradient. Default: None, the rows
            that count.
        inplace: write the student's gradient over the student's logits in forward, so that a step
            needs no memory for it. Nothing may need the logits afterwards: a use in the graph
            raises in backward, a use without gradient reads the gradient. The logits must be no
            leaf and no view, nothing but the student may learn, and the loss must be one number.
            float16 and bfloat16 gradients are rounded before `grad_output`
            multiplies them. Without a gradient to compute, and in compiled code, nothing is
            overwritten. Default: False.
        chunk_size: the rows of a `LinearHead` that have logits at a time, at least 1. Default:
            None, at most 768 on a CPU and 2,048 on a GPU, and fewer where little memory is free;
            `fastkd.explain` tells how many. Chunks are as even as they can be.
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
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A scalar; with `reduction="none"` a tensor of the logits' shape without `dim`. In float32
        (float64 if an input is float64). 0 for an empty batch; `+inf` for a row in which the
        student excludes a class that a teacher does not (with reverse KL, the teachers one that the
        student does not; the other divergences are finite there); NaN for a row that holds NaN.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or a keyword is given by position.
        ValueError: shapes or devices differ, or an argument is out of its range.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student = torch.randn(64, 100, requires_grad=True)
        >>> teacher = torch.randn(64, 100)
        >>> fastkd.soft_target_loss(student, teacher, temperature=4.0).backward()
        >>> pixels = torch.randn(2, 19, 8, 8)
        >>> fastkd.soft_target_loss(pixels, pixels, dim=1, reduction="none").shape
        torch.Size([2, 8, 8])

    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2014,
    section 2; section 1 for ensembles, of which this takes the arithmetic mean. Agarwal et al.,
    "On-Policy Distillation of Language Models", 2024, for reverse KL and the generalised
    Jensen-Shannon divergence; Ko et al., "DistiLLM", 2024, for the skew divergences.
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
    logits.check_last_dim(student_logits, dim)
    divergence, beta = logits.check_divergence(divergence, beta)
    if isinstance(teacher, TopK):
        top_k.check_divergence(teacher, divergence)
    scale_t2 = checks.flag("scale_t2", scale_t2)
    checks.choice("reduction", reduction, _REDUCTIONS)
    marks = None if mask is None else rows.marks_of(student_logits, mask, axis)
    every = num_classes if ranks is None else ranks.classes
    reduce = rows.reduction_of(
        *(student_logits, reduction, normalizer, row_weight, marks, rows.MASKED, axis, every),
        heads is not None,
    )
    # The gradient of a weight is the row's loss, also where the weight is 0.
    if row_weight is not None and not row_weight.requires_grad:
        marks = rows.skipping(marks, row_weight, rows.MASKED)
    tensors = student_logits, *teachers
    number, of_teacher, heat = temperatures.check(
        tensors, axis, temperature, teacher_temperature, scale_t2, marks, rows.MASKED
    )
    in_place = inplace is not False and check_inplace(
        inplace, student_logits, teachers, heat, reduction, row_weight
    )
    others = marks, row_weight, *heat
    if heads is not None:
        others += heads.tensors()
    hindrance = None
    if ranks is not None:
        hindrance = over_ranks.obstacle(teachers, teacher_is)
    chosen = select("soft_target_loss", tensors, backend, others, hindrance, heads)
    target: Any = teachers
    if isinstance(teacher, TopK):
        classes = logits.count_classes(student_logits, axis, num_classes, ranks)
        target = top_k.slots(teacher, tensors, classes, of_teacher, heat, marks, rows.MASKED)
    parameters = SoftTarget(
        temperature=number,
        teacher_temperature=of_teacher,
        soft_weight=reduce.weight(number * number if scale_t2 else 1.0),
        hard_weight=0.0,
        label_smoothing=0.0,
        ignore_index=rows.MASKED,
        labels_are_classes=False,
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
    loss, *_ = run(
        lambda *inputs: (reference.soft_target_loss(*inputs),),
        *(student_logits, target, marks, parameters, heat, reduce, in_place, False),
        heads,
        ranks,
    )
    return logits.tied(loss, unused)

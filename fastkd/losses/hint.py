"""FitNets hints (Romero et al. 2015)."""

from collections.abc import Iterable

from torch import Tensor

from fastkd.dispatch import Backend, select
from fastkd.losses import checks
from fastkd.ops.hint import Parameters, hint
from fastkd.reference import hint as reference
from fastkd.reference.precision import compute_dtype

_REDUCTIONS = ("none", "sum", "mean", "batchmean")


def hint_loss(
    student: Tensor | Iterable[Tensor],
    teacher: Tensor | Iterable[Tensor],
    *,
    regressor_weight: Tensor | None = None,
    regressor_bias: Tensor | None = None,
    reduction: str = "batchmean",
    half: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    r"""Half the squared distance between the student's (guided) and the teacher's (hint) features.

    `½ ‖r(student) − teacher‖²`, summed over everything but the batch and averaged over the batch.
    `half=False, reduction="mean"` is `F.mse_loss`. The gradient of one element of `r(student)` is
    the difference, over the same divisor.

    Args:
        student: features `(B, C_s, *spatial)` of at least two dimensions, or a sequence (any
            iterable) of them; float32, float16, bfloat16 or float64, in any memory layout.
        teacher: as many features of the same shape and device (`C_t` channels where there is a
            regressor); dtype and layout may differ. They receive their gradient if they require
            one.
        regressor_weight: `(C_t, C_s)` or `(C_t, C_s, 1, 1)`: r is this 1×1 convolution, computed
            in float32 (float64 for float64 inputs). It receives its gradient and serves every
            pair of a sequence.
        regressor_bias: `(C_t,)`, with a weight only.
        reduction: `"batchmean"`, `"sum"`, `"mean"` over all elements, or `"none"` for one loss
            per sample: `(B,)`, and `(pairs, B)` for sequences. Pairs are summed.
        half: the paper's factor ½.
        backend: `"native"`, `"triton"` or `"reference"`; None picks the best one available.

    Returns:
        The loss in float32 (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices differ, sequences are of unequal length, a bias comes
            without a weight, or an argument is out of its range.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3.
    """
    students, teachers, is_sequence = checks.pairs(student, teacher)
    checks.choice("reduction", reduction, _REDUCTIONS)
    half = checks.flag("half", half)
    _check_features(students, teachers, regressor_weight, regressor_bias, is_sequence)
    if reduction == "none" and len({t.shape[0] for t in teachers}) > 1:
        raise ValueError(
            'reduction="none" needs the same batch size in every pair, '
            f"got {[t.shape[0] for t in teachers]}"
        )
    regressor = (regressor_weight, regressor_bias)
    chosen = select("hint_loss", (*students, *teachers), backend, regressor)
    if regressor_weight is not None:
        dtype = compute_dtype(*students, *teachers, regressor_weight)
        students = [reference.regress(s, regressor_weight, regressor_bias, dtype) for s in students]
    if chosen == "reference":
        losses = reference.hint_loss(students, teachers, reduction=reduction, half=half)
    else:
        parameters = Parameters(0.5 if half else 1.0, reduction, chosen)
        losses = hint(students, teachers, regressor_weight is not None, parameters)
    return losses if is_sequence or reduction != "none" else losses[0]


def _check_features(
    students: list[Tensor],
    teachers: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    is_sequence: bool,
) -> None:
    if weight is None and bias is not None:
        raise ValueError("regressor_bias needs a regressor_weight, got None")
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        suffix = f"[{index}]" if is_sequence else ""
        if student.ndim < 2:
            raise ValueError(
                f"student{suffix} must be (B, C, *spatial), got shape {tuple(student.shape)}"
            )
        if weight is None:
            checks.same_shape(f"student{suffix}", student, f"teacher{suffix}", teacher)
        else:
            _check_regressor(student, teacher, weight, bias, suffix)


def _check_regressor(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, suffix: str
) -> None:
    checks.floating(("regressor_weight", weight))
    checks.same_device(f"student{suffix}", student, "regressor_weight", weight)
    if teacher.ndim < 2 or student.shape[:1] + student.shape[2:] != (
        teacher.shape[:1] + teacher.shape[2:]
    ):
        raise ValueError(
            f"student{suffix} and teacher{suffix} must have the same batch and spatial sizes, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    expected = (teacher.shape[1], student.shape[1])
    if tuple(weight.shape) not in (expected, (*expected, 1, 1)):
        raise ValueError(
            f"regressor_weight must be (C_t, C_s) or (C_t, C_s, 1, 1) = {expected} here, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.floating(("regressor_bias", bias))
        checks.same_device(f"student{suffix}", student, "regressor_bias", bias)
        if bias.shape != (teacher.shape[1],):
            raise ValueError(
                f"regressor_bias must be (C_t,) = {(teacher.shape[1],)} here, "
                f"got {tuple(bias.shape)}"
            )

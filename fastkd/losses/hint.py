"""FitNets hints (Romero et al. 2015)."""

from collections.abc import Iterable

from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.losses import checks, pairs
from fastkd.ops.hint import hint
from fastkd.parameters import Hint
from fastkd.precision import compute_dtype
from fastkd.reference import hint as reference

_REDUCTIONS = ("none", "sum", "mean", "batchmean")


@checks.keywords
def hint_loss(
    student: Tensor | Iterable[Tensor],
    teacher: Tensor | Iterable[Tensor],
    *,
    regressor_weight: Tensor | None = None,
    regressor_bias: Tensor | None = None,
    pair_weights: Iterable[float] | None = None,
    reduction: str = "batchmean",
    half: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    r"""Compute half the squared distance between the student's and the teacher's features.

    `½ ‖r(student) − teacher‖²`, summed over everything but the batch and averaged over the batch.
    `half=False, reduction="mean"` is `F.mse_loss`. The gradient of one element of `r(student)` is
    the difference, over the same divisor. The module `fastkd.nn.HintLoss` owns the regressor r.

    Args:
        student: features `(B, C_s, *spatial)` of at least two dimensions, or a sequence (any
            iterable) of them: the pairs; float32, float16, bfloat16 or float64, in any memory
            layout.
        teacher: as many features of the same shape and device (`C_t` channels where there is a
            regressor); dtype and layout may differ. Batch sizes are equal within a pair, and
            between pairs with `reduction="none"`. They receive their gradient if they require one.
        regressor_weight: `(C_t, C_s)` or `(C_t, C_s, 1, 1)`: r is this 1×1 convolution, computed
            in float32 (float64 for float64 inputs). It receives its gradient and serves every
            pair of a sequence. Default: None, r is the identity.
        regressor_bias: `(C_t,)`, with a weight only. Default: None.
        pair_weights: one finite number for each pair, in a sequence or a NumPy array, which
            multiplies the pair's loss under every reduction. Default: None, 1 for each.
        reduction: `"batchmean"`, `"sum"`, `"mean"` over all elements of a pair, where pairs are
            summed; or `"none"` for one loss per sample. Default: `"batchmean"`.
        half: the paper's factor ½. Usual: False with `"mean"` and a weight of 100. Default: True.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A scalar; with `reduction="none"` `(B,)` for tensors, `(pairs, B)` for sequences. In float32
        (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes or devices differ, sequences are of unequal length, a bias comes
            without a weight, or an argument is out of its range.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student = torch.randn(8, 32, 16, 16, requires_grad=True)
        >>> teacher = torch.randn(8, 64, 16, 16)
        >>> weight = torch.randn(64, 32, requires_grad=True)
        >>> fastkd.hint_loss(student, teacher, regressor_weight=weight).backward()

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, equation 3.
    """
    students, teachers, is_sequence = pairs.check(student, teacher)
    weights = pairs.check_weights(pair_weights, len(students))
    checks.choice("reduction", reduction, _REDUCTIONS)
    half = checks.flag("half", half)
    _check_features(students, teachers, regressor_weight, regressor_bias, is_sequence)
    if reduction == "none":
        batches = [t.shape[0] for t in teachers]
        if any([batch != batches[0] for batch in batches]):
            raise ValueError(
                f'reduction="none" needs the same batch size in every pair, got {batches}'
            )
    regressor = (regressor_weight, regressor_bias)
    chosen = select("hint_loss", (*students, *teachers), backend, regressor)
    if regressor_weight is not None:
        dtype = compute_dtype(*students, *teachers, regressor_weight)
        students = [reference.regress(s, regressor_weight, regressor_bias, dtype) for s in students]
    consumes = regressor_weight is not None
    scale = 0.5 if half else 1.0

    def of_pairs(students: list[Tensor], teachers: list[Tensor], factor: float) -> Tensor:
        if chosen == "reference":
            return reference.hint_loss(
                students, teachers, reduction=reduction, scale=scale * factor
            )
        parameters = Hint(scale * factor, reduction, chosen)
        return hint(students, teachers, consumes, parameters)

    loss = pairs.total(of_pairs, students, teachers, weights)
    return loss if is_sequence or reduction != "none" else loss[0]


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

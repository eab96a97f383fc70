"""Relational knowledge distillation (Park et al. 2019)."""

from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.losses import checks
from fastkd.ops.rkd import rkd
from fastkd.parameters import Rkd
from fastkd.reference import rkd as reference


@checks.keywords
def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, backend: Backend | None = None
) -> Tensor:
    r"""Compute how the distances between the samples of a batch differ from the teacher's.

    `mean over i, j of Huber(d^S_ij − d^T_ij)` over all N² pairs, where `d_ij` is `‖x_i − x_j‖` over
    the mean of the positive distances, and `Huber(r)` is `r²/2` for `|r| <= delta` and
    `delta (|r| − delta/2)` beyond. Points that coincide have distance 0 and no gradient from one
    another. Computed in float64 between inputs and result (in float32 on devices without float64);
    extra memory is O(N²). Usual weight: 1 in the authors' code, 25 in RepDistiller. The module is
    `fastkd.nn.RKDDistanceLoss`; the other half of the method is `rkd_angle_loss`.

    Args:
        student: embeddings `(N, D)`, in float32, float16, bfloat16 or float64, in any layout.
        teacher: embeddings `(N, D')` of the same samples on the same device; D' and dtype may
            differ. It receives its gradient if it requires one.
        delta: where the Huber loss turns from a square into a line. Default: 1.0.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A scalar in float32 (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: inputs are not 2-D with equal N on one device, or delta is not above 0.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student, teacher = torch.randn(64, 32, requires_grad=True), torch.randn(64, 128)
        >>> distances = fastkd.rkd_distance_loss(student, teacher)
        >>> angles = fastkd.rkd_angle_loss(student, teacher)
        >>> (25 * distances + 50 * angles).backward()

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, equations 5 to 8.
    """
    _check(student, teacher)
    delta = checks.number("delta", delta, above=0)
    chosen = select("rkd_distance_loss", (student, teacher), backend)
    if chosen == "reference":
        return reference.rkd_distance_loss(student, teacher, delta=delta)
    return rkd(student, teacher, Rkd("distance", delta, chosen))


@checks.keywords
def rkd_angle_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, backend: Backend | None = None
) -> Tensor:
    r"""Compute how the angles between any three samples of a batch differ from the teacher's.

    `mean over i, j, k of Huber(c^S_ijk − c^T_ijk)` over all N³ triplets, where `c_ijk` is the
    cosine at `x_i` of the angle between `x_j − x_i` and `x_k − x_i`, or 0 where one of these is 0,
    and `Huber(r)` is `r²/2` for `|r| <= delta` and `delta (|r| − delta/2)` beyond. Computed in
    float64 between inputs and result (in float32 on devices without float64); the kernels' extra
    memory is O(N²), with no temporary of `N × N × D` or `N³`. Usual weight: 2 in the authors' code,
    50 in RepDistiller. The module is `fastkd.nn.RKDAngleLoss`; the other half of the method is
    `rkd_distance_loss`.

    Args:
        student: embeddings `(N, D)`, in float32, float16, bfloat16 or float64, in any layout.
        teacher: embeddings `(N, D')` of the same samples on the same device; D' and dtype may
            differ. It receives its gradient if it requires one.
        delta: where the Huber loss turns from a square into a line. Cosines differ by 2 at most.
            Default: 1.0.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A scalar in float32 (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: inputs are not 2-D with equal N on one device, or delta is not above 0.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student, teacher = torch.randn(64, 32, requires_grad=True), torch.randn(64, 8, 4, 4)
        >>> fastkd.rkd_angle_loss(student, teacher.flatten(1)).backward()

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, equations 9 and 10.
    """
    _check(student, teacher)
    delta = checks.number("delta", delta, above=0)
    chosen = select("rkd_angle_loss", (student, teacher), backend)
    if chosen == "reference":
        return reference.rkd_angle_loss(student, teacher, delta=delta)
    return rkd(student, teacher, Rkd("angle", delta, chosen))


def _check(student: Tensor, teacher: Tensor) -> None:
    checks.floating(("student", student), ("teacher", teacher))
    checks.same_device("student", student, "teacher", teacher)
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        flatten = "; .flatten(1) makes embeddings of feature maps"
        raise ValueError(
            "student and teacher must be embeddings (N, D) with the same N, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
            + (flatten if max(student.ndim, teacher.ndim) > 2 else "")
        )

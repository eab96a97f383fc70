"""Relational knowledge distillation (Park et al. 2019)."""

from torch import Tensor

from fastkd.dispatch import Backend, select
from fastkd.losses import checks
from fastkd.ops.rkd import Parameters, rkd
from fastkd.reference import rkd as reference


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, backend: Backend | None = None
) -> Tensor:
    r"""How the distances between the samples of a batch differ from the teacher's.

    `mean over i, j of Huber(d^S_ij − d^T_ij)` over all N² pairs, where `d_ij` is `‖x_i − x_j‖` over
    the mean of those that are positive, and `Huber(r)` is `r²/2` for `|r| <= delta` and
    `delta (|r| − delta/2)` beyond. Points that coincide have distance 0 and no gradient from one
    another. Computed in float64 between inputs and result (in float32 on devices without float64);
    extra memory is O(N²).

    Args:
        student: embeddings `(N, D)`, in float32, float16, bfloat16 or float64, in any layout.
        teacher: embeddings `(N, D')` of the same samples on the same device; D' and dtype may
            differ. It receives its gradient if it requires one.
        delta: where the Huber loss turns from a square into a line.
        backend: `"native"`, `"triton"` or `"reference"`; None picks the best one available.

    Returns:
        The loss, a scalar in float32 (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the inputs are no matrices with as many rows on one device, or delta is not
            above 0.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, equations 5 to 8.
    """
    _check(student, teacher)
    delta = checks.number("delta", delta, above=0)
    chosen = select("rkd_distance_loss", (student, teacher), backend)
    if chosen == "reference":
        return reference.rkd_distance_loss(student, teacher, delta=delta)
    return rkd(student, teacher, Parameters("distance", delta, chosen))


def rkd_angle_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, backend: Backend | None = None
) -> Tensor:
    r"""How the angles between any three samples of a batch differ from the teacher's.

    `mean over i, j, k of Huber(c^S_ijk − c^T_ijk)` over all N³ triplets, where `c_ijk` is the
    cosine at `x_i` of the angle between `x_j − x_i` and `x_k − x_i`, or 0 where one of these is 0,
    and `Huber(r)` is `r²/2` for `|r| <= delta` and `delta (|r| − delta/2)` beyond. Computed in
    float64 between inputs and result (in float32 on devices without float64); the kernels' extra
    memory is O(N²), with no temporary of `N × N × D` or `N³`.

    Args:
        student: embeddings `(N, D)`, in float32, float16, bfloat16 or float64, in any layout.
        teacher: embeddings `(N, D')` of the same samples on the same device; D' and dtype may
            differ. It receives its gradient if it requires one.
        delta: where the Huber loss turns from a square into a line. Cosines differ by 2 at most.
        backend: `"native"`, `"triton"` or `"reference"`; None picks the best one available.

    Returns:
        The loss, a scalar in float32 (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the inputs are no matrices with as many rows on one device, or delta is not
            above 0.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Source: Park et al., "Relational Knowledge Distillation", CVPR 2019, equations 9 and 10.
    """
    _check(student, teacher)
    delta = checks.number("delta", delta, above=0)
    chosen = select("rkd_angle_loss", (student, teacher), backend)
    if chosen == "reference":
        return reference.rkd_angle_loss(student, teacher, delta=delta)
    return rkd(student, teacher, Parameters("angle", delta, chosen))


def _check(student: Tensor, teacher: Tensor) -> None:
    checks.floating(("student", student), ("teacher", teacher))
    checks.same_device("student", student, "teacher", teacher)
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be embeddings (N, D) with the same N, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )

"""Similarity-preserving distillation (Tung & Mori 2019)."""

from torch import Tensor

from fastkd.dispatch import Backend, select
from fastkd.losses import checks
from fastkd.ops.similarity import similarity
from fastkd.reference import similarity as reference


def similarity_preserving_loss(
    student: Tensor, teacher: Tensor, *, backend: Backend | None = None
) -> Tensor:
    r"""How the similarities between the samples of a batch differ from the teacher's.

    `‖Q_S − Q_T‖_F² / B²`, where Q is the Gram matrix `X Xᵀ` of the samples' flattened features with
    each row over its L2 norm (or over 1e-12 where that is larger). A row of zeros stays one, and
    has no gradient. The Gram matrix is torch's matrix product in float32, also for half precision
    and under autocast (float64 for float64 inputs); on a GPU torch's setting decides whether that
    is TF32.

    Args:
        student: features `(B, *any)`, in float32, float16, bfloat16 or float64, in any memory
            layout.
        teacher: features `(B, *any)` of the same samples on the same device; all but B may differ,
            the dtype too. It receives its gradient if it requires one.
        backend: `"native"`, `"triton"` or `"reference"`; None picks the best one available.

    Returns:
        The loss, a scalar in float32 (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: the inputs have fewer than two dimensions, or differ in batch size or device.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Source: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equations 1 to
        4.
    """
    checks.floating(("student", student), ("teacher", teacher))
    checks.same_device("student", student, "teacher", teacher)
    if min(student.ndim, teacher.ndim) < 2 or len(student) != len(teacher):
        raise ValueError(
            "student and teacher must be features (B, *any) with the same B, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    chosen = select("similarity_preserving_loss", (student, teacher), backend)
    if chosen == "reference":
        return reference.similarity_preserving_loss(student, teacher)
    return similarity(student, teacher, chosen)

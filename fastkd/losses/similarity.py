"""Similarity-preserving distillation (Tung & Mori 2019)."""

from collections.abc import Iterable

from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.losses import checks, pairs
from fastkd.ops.similarity import similarity
from fastkd.reference import similarity as reference


@checks.keywords
def similarity_preserving_loss(
    student: Tensor | Iterable[Tensor],
    teacher: Tensor | Iterable[Tensor],
    *,
    pair_weights: Iterable[float] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Compute how the similarities between the samples of a batch differ from the teacher's.

    `‖Q_S − Q_T‖_F² / B²`, where Q is the Gram matrix `X Xᵀ` of the samples' flattened features with
    each row over its L2 norm (or over 1e-12 where that is larger). A row of zeros stays one, and
    has no gradient. The Gram matrix is torch's matrix product in float32, also for half precision
    and under autocast (float64 for float64 inputs); on a GPU torch's setting decides whether that
    is TF32. Usual weight: 3000. The module is `fastkd.nn.SimilarityPreservingLoss`.

    Args:
        student: features `(B, *any)`, or a sequence (any iterable) of them: the pairs, which are
            summed; float32, float16, bfloat16 or float64, in any memory layout.
        teacher: as many features `(B, *any)` of the same samples on the same device; all but B may
            differ within a pair, the dtype too. They receive their gradient if they require one.
        pair_weights: one finite number for each pair, in a sequence or a NumPy array, which
            multiplies the pair's loss under every reduction. Default: None, 1 for each.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A scalar in float32 (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: sequences are of unequal length, the inputs of a pair have fewer than two
            dimensions or differ in batch size, devices differ, or an argument is out of its range.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student = torch.randn(64, 16, 8, 8, requires_grad=True)
        >>> teacher = torch.randn(64, 64, 4, 4)
        >>> (3000 * fastkd.similarity_preserving_loss(student, teacher)).backward()

    Source: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equations 1 to
        4.
    """
    students, teachers, is_sequence = pairs.check(student, teacher)
    weights = pairs.check_weights(pair_weights, len(students))
    for index, (one, other) in enumerate(zip(students, teachers, strict=True)):
        if min(one.ndim, other.ndim) < 2 or len(one) != len(other):
            first, second = pairs.names(is_sequence, index)
            raise ValueError(
                f"{first} and {second} must be features (B, *any) with the same B, "
                f"got {tuple(one.shape)} and {tuple(other.shape)}"
            )
    chosen = select("similarity_preserving_loss", (*students, *teachers), backend)

    if not is_sequence and weights is None:
        return _loss(students[0], teachers[0], chosen)

    def of_pair(students: list[Tensor], teachers: list[Tensor], factor: float) -> Tensor:
        loss = _loss(students[0], teachers[0], chosen)
        return loss if weights is None else loss * factor

    # One kernel serves one pair.
    return pairs.total(of_pair, students, teachers, weights or [1.0] * len(students))


def _loss(student: Tensor, teacher: Tensor, backend: Backend) -> Tensor:
    if backend == "reference":
        return reference.similarity_preserving_loss(student, teacher)
    return similarity(student, teacher, backend)

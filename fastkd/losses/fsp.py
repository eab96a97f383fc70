"""The flow of solution procedure between layers (Yim et al. 2017)."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.losses import checks, pairs
from fastkd.ops import fsp
from fastkd.ops.hint import hint
from fastkd.parameters import Hint
from fastkd.precision import compute_dtype
from fastkd.reference import fsp as reference

Pairs = Iterable[Tensor] | Iterable[Iterable[Tensor]]


@checks.keywords
def fsp_loss(
    student: Pairs,
    teacher: Pairs,
    *,
    pair_weights: Iterable[float] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Compute how the student's features flow from one layer to another, against the teacher's.

    `‖G_T − G_S‖_F²` summed over all entries of the FSP matrix, averaged over the batch and summed
    over pairs of layers, where `G = F₁ᵀ F₂ / (h·w)` of one sample is `(C₁, C₂)`. Where the two
    layers of a network differ in height (or width), the larger one is max-pooled to the smaller, as
    `F.adaptive_max_pool2d` does. The products are torch's, in float32 also for half precision and
    under autocast (float64 for float64 inputs); on a GPU torch's setting decides whether that is
    TF32. The literature has no common weight; the sum over the matrix's entries is C₁·C₂ times
    their mean. The module is `fastkd.nn.FSPLoss`.

    Args:
        student: two feature maps `(first, second)` of the student, `(B, C₁, H, W)` and
            `(B, C₂, H', W')`, as a list, a tuple or any iterable; or an iterable of such pairs, as
            `list(zip(f, f[1:]))` makes of a list f of feature maps. float32, float16, bfloat16 or
            float64, in any memory layout.
        teacher: as many of the teacher, on the same device, with the student's B, C₁ and C₂;
            heights, widths and dtypes may differ. They receive their gradient if they require one.
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
        ValueError: there is no pair, the sides do not have as many, or batch sizes, channels,
            dimensions or devices do not fit; a feature map is empty but for its batch; an argument
            is out of its range.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> shapes = (16, 32), (32, 16), (64, 8)
        >>> student = [torch.randn(8, c, s, s, requires_grad=True) for c, s in shapes]
        >>> teacher = [torch.randn(8, c, s, s) for c, s in shapes]
        >>> pairs = list(zip(student, student[1:])), list(zip(teacher, teacher[1:]))
        >>> fastkd.fsp_loss(*pairs).backward()

    Source: Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network
        Minimization and Transfer Learning", CVPR 2017, equations 1 and 2.
    """
    students, teachers = _pairs("student", student), _pairs("teacher", teacher)
    if len(students) != len(teachers):
        raise ValueError(
            "student and teacher must have the same number of pairs, "
            f"got {len(students)} and {len(teachers)}"
        )
    weights = pairs.check_weights(pair_weights, len(students))
    for (name, one), (other_name, other) in zip(students, teachers, strict=True):
        checks.same_device("student[0]", students[0][1][0], name, one[0])
        checks.same_device(name, one[0], other_name, other[0])
        shapes = [[x.shape[:2] for x in pair] for pair in (one, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} and {other_name} must have the same batch size and channels, got "
                f"{_shapes(one)} and {_shapes(other)}"
            )
    sides = [pair for _, pair in students], [pair for _, pair in teachers]
    tensors = tuple(x for side in sides for pair in side for x in pair)
    chosen = select("fsp_loss", tensors, backend)
    dtype = compute_dtype(*tensors)
    pool = fsp.max_pool if fsp.has_kernels(chosen, tensors) else reference.max_pool
    flows, targets = ([reference.flow(pair, dtype, pool) for pair in side] for side in sides)

    def of_pairs(flows: list[Tensor], targets: list[Tensor], factor: float) -> Tensor:
        if chosen == "reference":
            return reference.fsp_loss(flows, targets, scale=factor)
        return hint(flows, targets, True, Hint(factor, "batchmean", chosen))

    return pairs.total(of_pairs, flows, targets, weights)


def _pairs(side: str, value: Any) -> list[tuple[str, reference.Pair]]:
    """The pairs of one network, each with what the user calls it."""
    items = checks.items(value)
    if items is None:
        raise TypeError(
            f"{side} must be a pair (first, second) of feature maps or a sequence of such pairs, "
            f"got {type(value).__name__}"
        )
    if not items:
        raise ValueError(f"{side} must hold at least one pair (first, second), got none")
    pairs = [checks.items(item) for item in items]
    named = [(f"{side}[{i}]", pair) for i, pair in enumerate(pairs) if pair is not None]
    if len(named) < len(items):
        return [(side, _pair(side, items))]
    return [(name, _pair(name, pair)) for name, pair in named]


def _pair(name: str, value: Sequence[Any]) -> reference.Pair:
    if len(value) != 2:
        raise ValueError(
            f"{name} must be a pair (first, second) of feature maps, got {len(value)} of them; "
            "of a flat list f of feature maps, list(zip(f, f[1:])) makes the pairs of neighbours"
        )
    first, second = value
    checks.floating((f"{name}[0]", first), (f"{name}[1]", second))
    checks.same_device(f"{name}[0]", first, f"{name}[1]", second)
    if first.ndim != 4 or second.ndim != 4 or len(first) != len(second):
        raise ValueError(
            f"{name} must be two feature maps (B, C, H, W) with the same B, got "
            f"{_shapes((first, second))}"
        )
    if 0 in (*first.shape[1:], *second.shape[1:]):
        raise ValueError(
            f"{name} must have at least one channel and one position, got "
            f"{_shapes((first, second))}"
        )
    return first, second


def _shapes(pair: Sequence[Tensor]) -> str:
    return " and ".join(str(tuple(x.shape)) for x in pair)

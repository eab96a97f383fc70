"""Teachers that kept k classes, and a student whose classes are split: the sums of a shard."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.reduction import arguments, constants
from fastkd.kernels.triton.rows import load, locate, look_up, tile_of_rows, upstream_of
from fastkd.kernels.triton.rows import plan as plan_rows
from fastkd.kernels.triton.softmax import shift
from fastkd.kernels.triton.temperatures import temperatures_of
from fastkd.kernels.triton.tiles import launch
from fastkd.kernels.triton.top_k_rows import SUMS, are_many, first_pass
from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype


@triton.jit(
    do_not_specialize=["ignore_index", "rows", "slots", "first_class"],
    do_not_specialize_on_alignment=["indices", "labels", "sums"],
)
def shard_sums(
    student,
    indices,  # of slots' classes among those of all shards
    labels,  # one a row, or None
    temperatures,  # of rows, or nothing
    sums,  # of each row what `load_sums` loads
    slots,  # of a row
    first_class,  # the number of the first class among all
    ignore_index,
    rate: tl.float64,
    soft: tl.float64,
    hard: tl.float64,
    smoothing: tl.float64,
    rows,
    units,
    sizes,
    row_strides,
    class_strides,
    COMPUTE: tl.constexpr,
    HAS_HARD: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    LISTED_ONLY: tl.constexpr,
    ARE_MANY: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """The sums of a tile of rows."""
    classes = units * UNIT
    inner, outer, row, is_row = tile_of_rows(rows, sizes, ROWS, SIDE_BY_SIDE)
    column = tl.arange(0, CLASSES)[None, :]
    _, counts, _ = look_up(labels, row, is_row, ignore_index, classes)
    rates, _, _ = temperatures_of(rate, soft, temperatures, row, counts, COMPUTE)
    at = student + locate(inner, outer, sizes, row_strides[0], UNIT)
    stride = class_strides[0]
    held = ()
    if WHOLE:
        held = (load(at, column, stride, counts & (column < classes), COMPUTE),)  # type: ignore[assignment]
    pivot = shift(tl.load(at, mask=counts, other=0).to(COMPUTE))
    slots_at = indices + row.to(tl.int64) * slots
    found, pivoted = first_pass(
        *(held, at, stride, counts, column, classes, pivot, slots_at, slots, first_class),
        *(rates[0], HAS_HARD, SMOOTHS, LISTED_ONLY, ARE_MANY),
    )
    total = tl.zeros([ROWS, 1], tl.float64)
    if SMOOTHS:
        total = tl.sum(pivoted, 1, keep_dims=True).to(tl.float64)
        total = tl.where(counts, total + pivot.to(tl.float64) * classes, 0)
    at = sums + row.to(tl.int64) * SUMS
    for i in tl.static_range(3):
        tl.store(at + i, found[i].to(tl.float64), mask=is_row)
    tl.store(at + 3, total, mask=is_row)


def top_k_sums(
    student: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    sums: Tensor,
    listed_only: bool,
    first: int,
    p: SoftTarget,
    temperatures: Sequence[Tensor] = (),
) -> None:
    """Fill the sums of rows over the classes of a shard, which begins with the class `first`.

    They are the maximum and the sums of exponentials, at T and at 1, of the classes that no slot
    lists, and the sum of all logits, scaled, where labels are smoothed. With `listed_only` the
    maximum and both sums are those of all classes at temperature 1.
    """
    if listed_only:
        p, temperatures = p._replace(temperature=1.0), ()
    dtype = compute_dtype(student)
    plan = plan_rows(student.shape, (student.stride(),), upstream_of(None, student), p.dim, dtype)
    labels = labels if labels is None else labels.contiguous()
    known = constants(plan, labels, temperatures, dtype, p)
    slots = indices.shape[1]
    launch(
        shard_sums,
        plan.programs,
        student,
        *(student, indices, labels, tuple(temperatures), sums, slots, first),
        *arguments(plan, labels, p),
        SMOOTHS=labels is not None and p.labels_are_classes and p.label_smoothing > 0,
        LISTED_ONLY=listed_only,
        ARE_MANY=are_many(slots, known["CLASSES"], student, p),
        WHOLE=student.shape[p.dim] <= known["CLASSES"],
        **known,
    )

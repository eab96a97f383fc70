"""Runs a loss on logits by the implementation that was chosen for it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fastkd.losses import linear_head, over_ranks
from fastkd.losses.rows import Reduction
from fastkd.ops.soft_target import soft_target
from fastkd.ops.soft_target_inplace import soft_target_
from fastkd.ops.top_k import top_k, top_k_
from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype
from fastkd.ranks import Ranks
from fastkd.reference.top_k import Slots


def run(
    reference: Callable[..., tuple[Tensor, ...]],
    student: Tensor,
    teachers: Sequence[Tensor] | Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    reduce: Reduction,
    in_place: bool,
    with_parts: bool,
    heads: linear_head.Sides | None,
    ranks: Ranks | None,
) -> tuple[Tensor, ...]:
    """The loss, and its parts where they are wanted as kernels find them."""
    if ranks is not None:
        inputs: Any = student, teachers, labels, p, temperatures, reduce, ranks, heads, with_parts
        return over_ranks.run(reference, *inputs)
    if heads is not None:
        sides = heads, student, teachers
        return linear_head.run(reference, *sides, labels, p, temperatures, reduce, with_parts)
    by_kernels: Any = top_k if isinstance(teachers, Slots) else soft_target
    if p.backend == "reference" or in_place:
        by_reference = partial(_by_reference, reference, reduce, teachers, labels, p, temperatures)
        if not in_place:
            return by_reference(student)
    elif reduce.scalar is None and reduce.row_weight is None:
        return by_kernels(student, teachers, labels, p, temperatures, with_parts)
    factor = reduce.factor(compute_dtype(student, *teachers))
    inputs = student, teachers, labels, p, temperatures, with_parts, factor
    if in_place:
        instead: Any = top_k_ if isinstance(teachers, Slots) else soft_target_
        return instead(*inputs, by_reference)
    loss, *parts = by_kernels(*inputs)
    return loss if factor is not None else reduce.of(loss), *parts


def _by_reference(
    reference: Callable[..., tuple[Tensor, ...]],
    reduce: Reduction,
    teachers: Sequence[Tensor] | Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    student: Tensor,
) -> tuple[Tensor, ...]:
    loss, *parts = reference(student, teachers, labels, p, temperatures)
    return reduce.of(loss), *parts

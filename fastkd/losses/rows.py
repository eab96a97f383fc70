"""Which rows of a loss on logits count, and what the sum of their losses is divided by."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.losses import checks

MASKED = -1  # in place of the label of a row that does not count


def check_mask(logits: Tensor, mask: Any, dim: int) -> None:
    """It is booleans, one for each row."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must hold booleans, True for rows that count, got {mask.dtype}")
    checks.same_device("student_logits", logits, "mask", mask)
    rows = logits.shape[:dim] + logits.shape[dim + 1 :]
    if mask.shape != rows:
        raise ValueError(
            f"mask must have the logits' shape without dim {dim}, {tuple(rows)}, "
            f"got {tuple(mask.shape)}"
        )


def marks_of(logits: Tensor, mask: Any, dim: int) -> Tensor:
    """Labels that tell which rows count, and nothing else: MASKED where they do not."""
    check_mask(logits, mask, dim)
    return mask.to(torch.int64) + MASKED


class Divisor(NamedTuple):
    """What a sum is divided by: a number, which the weights of the terms take, and a tensor.

    `reduction` is the one that the kernels are asked for.
    """

    reduction: str
    number: float = 1.0
    scalar: Tensor | None = None

    def of(self, total: Tensor) -> Tensor:
        """A sum that has been divided by the number, divided by the tensor as well."""
        return total if self.scalar is None else total / self.scalar.to(total.dtype)

    def of_part(self, total: Tensor) -> Tensor:
        """A sum whose terms have no weights, divided by both."""
        return self.of(total if self.number == 1 else total / self.number)


_COUNTED = {reduction: Divisor(reduction) for reduction in ("none", "sum", "mean", "batchmean")}


def divisor_of(logits: Tensor, reduction: str, normalizer: Any, dim: int) -> Divisor:
    """Of a checked reduction. Without a normalizer the kernels count the rows themselves."""
    if normalizer is None:
        return _COUNTED[reduction]
    if reduction not in ("mean", "batchmean"):
        raise ValueError(
            "normalizer takes the place of the number of rows, by which "
            f"reduction={reduction!r} does not divide"
        )
    classes = float(logits.shape[dim]) if reduction == "mean" else 1.0
    if not isinstance(normalizer, Tensor):
        return Divisor("sum", classes * checks.number("normalizer", normalizer, above=0))
    if normalizer.ndim > 0 or normalizer.dtype == torch.bool or normalizer.is_complex():
        raise ValueError(
            "normalizer must be a number or a tensor of one, without dimensions, "
            f"got {normalizer.dtype} of shape {tuple(normalizer.shape)}"
        )
    checks.same_device("student_logits", logits, "normalizer", normalizer)
    return Divisor("sum", classes, normalizer.detach())

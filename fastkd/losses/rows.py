"""Which rows of a loss on logits count, how much, and how their losses are reduced."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastkd.losses import checks

MASKED = -1  # in place of the label of a row that does not count


def check_reduction(reduction: str) -> None:
    """It is one that means the same for cross-entropies and divergences."""
    if reduction == "mean":
        raise ValueError(
            'reduction="mean" has two meanings here: a cross-entropy\'s is over rows, that of '
            'torch.nn.KLDivLoss over rows × classes; "batchmean" divides both terms by the rows '
            "that count"
        )
    checks.choice("reduction", reduction, ("none", "sum", "batchmean"))


def shape_of(logits: Tensor, dim: int) -> torch.Size:
    """One for each row: the logits' shape without the classes."""
    return logits.shape[:dim] + logits.shape[dim + 1 :]


def _check_rows(name: str, of_rows: Any, logits: Tensor, dim: int) -> None:
    """It is a tensor with one number for each row, on the logits' device."""
    if not isinstance(of_rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(of_rows).__name__}")
    checks.same_device("student_logits", logits, name, of_rows)
    shape = shape_of(logits, dim)
    if of_rows.shape != shape:
        raise ValueError(
            f"{name} must have the logits' shape without dim {dim}, {tuple(shape)}, "
            f"got {tuple(of_rows.shape)}"
        )


def check_mask(logits: Tensor, mask: Any, dim: int) -> None:
    """It is booleans, one for each row."""
    _check_rows("mask", mask, logits, dim)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must hold booleans, True for rows that count, got {mask.dtype}")


def marks_of(logits: Tensor, mask: Any, dim: int) -> Tensor:
    """Labels that tell which rows count, and nothing else: MASKED where they do not."""
    check_mask(logits, mask, dim)
    return mask.to(torch.int64) + MASKED


def skipping(labels: Tensor | None, row_weight: Tensor, ignored: int) -> Tensor:
    """The labels, `ignored` where a row's weight is 0."""
    is_off = row_weight == 0
    return (
        is_off.to(torch.int64) * ignored if labels is None else labels.masked_fill(is_off, ignored)
    )


# Not a NamedTuple: within compiled code torch 2.8 makes none that holds tensors.
@dataclasses.dataclass(frozen=True)
class Reduction:
    """How losses of rows become the result: what kernels do, and then what is left to torch.

    Attributes:
        by_kernels: the reduction that kernels are asked for; `"none"` where rows have weights, and
            where they come in chunks.
        number: what the weights of the terms are divided by.
        scalar: what the result is divided by, on the device.
        row_weight: what multiplies the loss of each row.
        sums: whether the losses of rows, weighted or not, are added up.
    """

    by_kernels: str
    number: float = 1.0
    scalar: Tensor | None = None
    row_weight: Tensor | None = None
    sums: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """All but the values of tensors."""
        return self.number, self.scalar is None, self.row_weight is None, self.sums

    def weight(self, of_term: float) -> float:
        """What kernels multiply a term by, whose weight this is."""
        # torch.compile finds no bounds for the quotient of two numbers whose values it does not
        # know.
        return of_term * (1 / self.number)

    def of(self, found: Tensor) -> Tensor:
        """The result, from what kernels found with weights that were divided by the number."""
        if self.row_weight is not None:
            found = found * self.row_weight.to(found.dtype)
        found = found.sum() if self.sums else found
        return found if self.scalar is None else found / self.scalar.to(found.dtype)

    def factor(self, dtype: torch.dtype) -> Tensor | None:
        """By which kernels multiply the gradient, so that forward can compute it.

        The result is then the sum of what they find times this. None where `of` makes it: there is
        nothing to multiply by, each row's loss is wanted, or the weights receive a gradient.
        """
        if self.row_weight is None:
            return None if self.scalar is None else 1 / self.scalar.to(dtype)
        if not self.sums or self.row_weight.requires_grad:
            return None
        factor = self.row_weight.to(dtype)
        return factor if self.scalar is None else factor / self.scalar.to(dtype)

    def of_part(self, found: Tensor) -> Tensor:
        """The result of a part, which has no weight that could have been divided; detached."""
        return self.of(found if self.number == 1 else found / self.number).detach()


_BY_KERNELS = {
    reduction: Reduction(reduction) for reduction in ("none", "sum", "mean", "batchmean")
}


def reduction_of(
    logits: Tensor,
    reduction: str,
    normalizer: Any,
    row_weight: Any,
    labels: Tensor | None,
    ignored: int,
    dim: int,
    num_classes: int | None,
    by_rows: bool,
) -> Reduction:
    """Of a checked one. The labels are `ignored` for rows that do not count.

    If `by_rows`, kernels are asked for the loss of each row.
    """
    if normalizer is None and row_weight is None and not by_rows:
        return _BY_KERNELS[reduction]
    divides = reduction in ("mean", "batchmean")
    number, scalar = 1.0, None
    if reduction == "mean":
        number = float(logits.shape[dim] if num_classes is None else num_classes)
    if normalizer is not None:
        if not divides:
            raise ValueError(
                "normalizer takes the place of the number of rows, by which "
                f"reduction={reduction!r} does not divide"
            )
        if isinstance(normalizer, Tensor):
            scalar = _checked_scalar(logits, normalizer)
        else:
            number *= checks.number("normalizer", normalizer, above=0)
    elif divides and labels is not None:
        scalar = (labels != ignored).sum().clamp(min=1)
    elif divides:
        number *= max(shape_of(logits, dim).numel(), 1)
    if row_weight is None and not by_rows:
        return Reduction("sum", number, scalar)
    sums = reduction != "none"
    if row_weight is None:
        return Reduction("none", number, scalar, sums=sums)
    _check_rows("row_weight", row_weight, logits, dim)
    if row_weight.dtype == torch.bool or row_weight.is_complex():
        raise TypeError(f"row_weight must hold real numbers, got {row_weight.dtype}")
    return Reduction("none", number, scalar, row_weight, sums)


def _checked_scalar(logits: Tensor, normalizer: Tensor) -> Tensor:
    if normalizer.ndim > 0 or normalizer.dtype == torch.bool or normalizer.is_complex():
        raise ValueError(
            "normalizer must be a number or a tensor of one, without dimensions, "
            f"got {normalizer.dtype} of shape {tuple(normalizer.shape)}"
        )
    checks.same_device("student_logits", logits, "normalizer", normalizer)
    return normalizer.detach()

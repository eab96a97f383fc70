"""The divergences between the softmaxes p and q of two sides, each two functions and a name."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Sides(NamedTuple):
    """Rows of classes, and what is known of each of them.

    `lift` is a factor of p and q, one number for all rows. The logarithm of p / q is multiplied by
    `unit`.
    """

    student: Tensor  # logits
    teachers: Sequence[Tensor]
    log_ratio: Tensor  # NaN where both sides exclude a class
    shares: Sequence[Tensor]  # of each teacher in p, whose weights these have for sums
    weights: Sequence[float]
    q: Callable[[], Tensor]
    lift: Tensor | float
    unit: float

    @property
    def p(self) -> Tensor:
        return self.shares[0] if len(self.shares) == 1 else torch.stack([*self.shares]).sum(0)

    @property
    def excluded(self) -> Tensor:
        """The classes that every teacher excludes."""
        return torch.stack([t == -torch.inf for t in self.teachers]).all(0)


class Divergence(NamedTuple):
    """`rows` is the divergence of each row, differentiable; `slopes` what it gains by p.

    The slopes of a class may lack what is the same for all classes of a row.
    """

    rows: Callable[[Sides], Tensor]
    slopes: Callable[[Sides], Tensor]


def _forward_kl(sides: Sides) -> Tensor:
    """`sum(p * log(p / q))`."""
    ratio, p = _forward_kl_slopes(sides), sides.p
    # A class that only the student excludes is infinite, even where p underflows: 0 * inf is NaN.
    infinite = (ratio == torch.inf) & (p == 0)
    rows = torch.zeros_like(p).masked_fill(infinite, torch.inf).sum(-1)
    for share, weight in zip(sides.shares, sides.weights, strict=True):
        counted = ratio.masked_fill(share == 0, 0)
        # The sum of a teacher's share is constant, so its mean may be taken off the ratio: what is
        # left in backward are the differences that its gradient consists of, and no larger terms
        # that cancel.
        with torch.no_grad():
            mean = (share * counted).sum(-1, keepdim=True) / (weight * sides.lift)
            mean = mean.masked_fill(~mean.isfinite(), 0)
        rows = rows + (share * (counted - mean)).sum(-1) + weight * sides.lift * mean.squeeze(-1)
    return rows


def _forward_kl_slopes(sides: Sides) -> Tensor:
    """`log(p / q)`; a class that every teacher excludes contributes 0."""
    return sides.log_ratio.masked_fill(sides.excluded, 0)


DIVERGENCES = {"forward_kl": Divergence(_forward_kl, _forward_kl_slopes)}

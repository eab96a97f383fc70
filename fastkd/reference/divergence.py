"""The divergences between the softmaxes p and q of two sides, each two functions and a name."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.reference.classes import HERE, Classes
from fastkd.reference.temperatures import of_rows, over

# More than the logarithm of the ratio of any two numbers that a float can be.
_FAR = 2000.0


class Sides(NamedTuple):
    """Rows of classes, and what is known of each of them.

    `lift` is a factor of p and q, one number for all rows. The logarithm of p / q is multiplied by
    `unit`. `teachers` are logits, or the logarithms of p where that is used as it is: then it need
    not sum to 1, and p is not `normalized`.
    """

    student: Tensor  # logits
    teachers: Sequence[Tensor]
    log_ratio: Tensor  # NaN where both sides exclude a class
    shares: Sequence[Tensor]  # of each teacher in p, whose weights these have for sums
    log_parts: Callable[[], Sequence[Tensor]]  # of what each share is of p
    weights: Sequence[float]
    q: Callable[[], Tensor]
    lift: Tensor | float
    unit: float | Tensor
    beta: float
    normalized: bool
    classes: Classes  # what adds up a row's

    @property
    def p(self) -> Tensor:
        return self.shares[0] if len(self.shares) == 1 else torch.stack([*self.shares]).sum(0)

    @property
    def excluded(self) -> Tensor:
        """The classes that every teacher excludes."""
        return torch.stack([t == -torch.inf for t in self.teachers]).all(0)


class Divergence(NamedTuple):
    """`rows` is the divergence of each row, differentiable, and `to_teachers` its gradients.

    Both are multiplied by the sides' unit, and the gradients by T. So are `slopes`, the derivative
    by p of what the classes add up, and `of_logarithms`, that by log p: p times the slopes.
    """

    rows: Callable[[Sides], Tensor]
    to_teachers: Callable[[Sides], Sequence[Tensor]]
    slopes: Callable[[Sides], Tensor]
    of_logarithms: Callable[[Sides], Tensor]

    def to_stated(self, sides: Sides, teacher_is: str) -> Tensor:
        """The gradient of a p that is used as it is: 0 where a class is excluded."""
        by = self.slopes if teacher_is == "probabilities" else self.of_logarithms
        return by(sides).masked_fill(sides.excluded, 0)


def _by_slopes(slopes: Callable[[Sides], Tensor]) -> Callable[[Sides], Sequence[Tensor]]:
    """The gradients of the teachers' logits by a divergence's derivative by p.

    That may lack what is the same for all classes of a row.
    """

    def to_teachers(sides: Sides) -> Sequence[Tensor]:
        found = slopes(sides)
        return [
            share * (found - sides.classes.total(share * found, keepdim=True) / weight)
            for share, weight in zip(sides.shares, sides.weights, strict=True)
        ]

    return to_teachers


def _with_slopes(rows: Callable[[Sides], Tensor], slopes: Callable[[Sides], Tensor]) -> Divergence:
    return Divergence(rows, _by_slopes(slopes), slopes, lambda sides: sides.p * slopes(sides))


def _forward_kl(sides: Sides) -> Tensor:
    """`sum(p * log(p / q))`."""
    ratio, p = _forward_kl_logarithms(sides), sides.p
    # A class that only the student excludes is infinite, even where p underflows: 0 * inf is NaN.
    rows = infinite(ratio, p, sides.classes)
    if not sides.normalized:
        return rows + sides.classes.total(p * ratio.masked_fill(p == 0, 0))
    for share, weight in zip(sides.shares, sides.weights, strict=True):
        rows = rows + _weighed(sides, share, ratio, weight * sides.lift)
    return rows


def _forward_kl_logarithms(sides: Sides) -> Tensor:
    """`log(p / q)`; a class that every teacher excludes contributes 0."""
    return sides.log_ratio.masked_fill(sides.excluded, 0)


def _forward_kl_slopes(sides: Sides) -> Tensor:
    return sides.log_ratio + sides.unit


def _reverse_kl(sides: Sides) -> Tensor:
    """`sum(q * log(q / p))`; a class that the student excludes contributes 0."""
    ratio, q = (-sides.log_ratio).masked_fill(sides.student == -torch.inf, 0), sides.q()
    return (
        infinite(ratio, q, sides.classes) + _weighed(sides, q, ratio, sides.lift) + _nan_of(sides)
    )


def _reverse_kl_to_teachers(sides: Sides) -> Sequence[Tensor]:
    """By `-q / p` times the shares, also where these underflow."""
    q = sides.q() * -sides.unit
    gains = [q * part.exp().masked_fill(sides.excluded, 0) for part in sides.log_parts()]
    return [
        gain - share * (sides.classes.total(gain, keepdim=True) / weight)
        for gain, share, weight in zip(gains, sides.shares, sides.weights, strict=True)
    ]


def _reverse_kl_slopes(sides: Sides) -> Tensor:
    return _reverse_kl_of_logarithms(sides) / sides.p


def _reverse_kl_of_logarithms(sides: Sides) -> Tensor:
    return -sides.q() * sides.unit


def _nan_of(sides: Sides) -> Tensor:
    """NaN, also as a gradient to both sides, of rows in which one holds NaN; 0 of the others."""
    p, q = (sides.classes.total(x) / sides.lift for x in (sides.p, sides.q()))
    return 0 * (p * q)


def infinite(ratio: Tensor, probability: Tensor, classes: Classes = HERE) -> Tensor:
    """Infinity of the rows with an infinite class whose probability is 0; 0 of the others."""
    is_infinite = (ratio == torch.inf) & (probability == 0)
    return classes.total(torch.zeros_like(ratio).masked_fill(is_infinite, torch.inf))


def _weighed(sides: Sides, probability: Tensor, ratio: Tensor, total: Tensor | float) -> Tensor:
    """The sum of ratios, weighed by probabilities that have this total."""
    counted = ratio.masked_fill(probability == 0, 0)
    # The sum of probabilities is constant, so their mean may be taken off the ratio: what is left
    # in backward are the differences that its gradient consists of, and no larger terms that
    # cancel.
    with torch.no_grad():
        mean = sides.classes.total(probability * counted, keepdim=True) / total
        mean = mean.masked_fill(~mean.isfinite(), 0)
    return sides.classes.total(probability * (counted - mean)) + total * mean.squeeze(-1)


def _log_ratio(sides: Sides) -> Tensor:
    """`log(p / q)` that is finite, also where one side or both exclude a class."""
    # Where the mean of several teachers underflows there is no logarithm of it.
    no_p, no_q = sides.p == 0, sides.student == -torch.inf
    ratio = sides.log_ratio.masked_fill(no_p & ~no_q, -torch.inf).masked_fill(no_p & no_q, 0)
    return over(ratio, sides.unit).clamp(-_FAR, _FAR)


def _to_mixture(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`log(p / m)` and `log(q / m)` with `m = beta * p + (1 - beta) * q`, of `log(p / q)`."""
    p_is_larger = (log_ratio > 0).to(log_ratio.dtype)
    q_is_larger = 1 - p_is_larger
    # m over the larger one, from what the smaller one lacks of it: near p = q no digit is lost.
    smaller = log_ratio * (q_is_larger - p_is_larger)
    # Where expm1 is nearly -1 it has lost the digits of its derivative.
    lacks = torch.where(smaller > -1, smaller.expm1(), smaller.exp() - 1)
    lacks = (p_is_larger * (1 - beta) + q_is_larger * beta) * lacks
    log_m = lacks.clamp(min=torch.finfo(lacks.dtype).eps - 1).log1p()
    return q_is_larger * log_ratio - log_m, -p_is_larger * log_ratio - log_m


def _jsd(sides: Sides) -> Tensor:
    """`beta * KL(p, m) + (1 - beta) * KL(q, m)` with `m = beta * p + (1 - beta) * q`."""
    of_p, of_q = _to_mixture(_log_ratio(sides), sides.beta)
    classes = sides.beta * (sides.p * of_p) + (1 - sides.beta) * (sides.q() * of_q)
    return sides.classes.total(classes) * of_rows(sides.unit) + _nan_of(sides)


def _jsd_slopes(sides: Sides) -> Tensor:
    return sides.beta * _to_mixture(_log_ratio(sides), sides.beta)[0] * sides.unit


def _tvd(sides: Sides) -> Tensor:
    """`sum(|p - q|) / 2`."""
    found = sides.classes.total((sides.p - sides.q()).abs())
    return found * (of_rows(sides.unit) / 2) + _nan_of(sides)


def _tvd_slopes(sides: Sides) -> Tensor:
    return (sides.p - sides.q()).sign() * (sides.unit / 2)


def _skew_kl(sides: Sides) -> Tensor:
    """`KL(p, beta * p + (1 - beta) * q)`."""
    of_p, _ = _to_mixture(_log_ratio(sides), sides.beta)
    return _to_skewed(sides.p, of_p, sides.q(), sides)


def _skew_kl_slopes(sides: Sides) -> Tensor:
    of_p, of_q = _to_mixture(_log_ratio(sides), sides.beta)
    return (of_p + (1 - sides.beta) * of_q.exp()) * sides.unit


def _skew_reverse_kl(sides: Sides) -> Tensor:
    """`KL(q, beta * q + (1 - beta) * p)`."""
    of_q, _ = _to_mixture(-_log_ratio(sides), sides.beta)
    return _to_skewed(sides.q(), of_q, sides.p, sides)


def _skew_reverse_kl_slopes(sides: Sides) -> Tensor:
    of_q, _ = _to_mixture(-_log_ratio(sides), sides.beta)
    return (sides.beta - 1) * of_q.exp() * sides.unit


def _to_skewed(of: Tensor, log_ratio: Tensor, other: Tensor, sides: Sides) -> Tensor:
    """`KL(of, m)` of `log(of / m)`, with `m = beta * of + (1 - beta) * other`.

    Of logits `of - m` is taken off, so that no class has a negative term: its sum is 0.
    """
    classes = of * log_ratio
    if sides.normalized:
        with torch.no_grad():
            surplus = (1 - sides.beta) * (of - other)
        classes = classes - surplus
    return sides.classes.total(classes) * of_rows(sides.unit) + _nan_of(sides)


DIVERGENCES = {
    "forward_kl": _with_slopes(_forward_kl, _forward_kl_slopes)._replace(
        to_teachers=_by_slopes(_forward_kl_logarithms)
    ),
    "reverse_kl": Divergence(
        _reverse_kl, _reverse_kl_to_teachers, _reverse_kl_slopes, _reverse_kl_of_logarithms
    ),
    "jsd": _with_slopes(_jsd, _jsd_slopes),
    "tvd": _with_slopes(_tvd, _tvd_slopes),
    "skew_kl": _with_slopes(_skew_kl, _skew_kl_slopes),
    "skew_reverse_kl": _with_slopes(_skew_reverse_kl, _skew_reverse_kl_slopes),
}

"""Divergences of what is given as probabilities or their logarithms, without a softmax.

Both sides are used as they are: no row needs to sum to 1. Torch computes them, a chunk of rows at a
time in float32, and again in backward, so that the gradient alone is as large as what is given.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.autograd import savable
from fastkd.compat._common import wide
from fastkd.precision import compute_dtype

# Numbers of either side in a chunk: what a formula makes of so many stays in caches, and is more
# than a GPU needs to start for.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}
# Beyond it a class has no part in the mixture that float32 or float64 could show.
_LARGEST_LOG_RATIO = 80.0


class Formula(NamedTuple):
    """The terms of a divergence, and their derivatives by the student's numbers."""

    terms: Callable[[Tensor, Tensor], Tensor]
    slopes: Callable[[Tensor, Tensor], Tensor]


def compute(formula: Formula, student: Tensor, teacher: Tensor, *, summed: bool) -> Tensor:
    """The terms of `(rows, V)`, or the sum of each row; the teacher receives no gradient."""
    if student.ndim != 2 or student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(f"both sides must have one shape (BT, V), got {shapes}")
    found: Tensor = _Terms.apply(formula, summed, student, teacher.detach())
    return found


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, formula: Formula, summed: bool, student: Tensor, teacher: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*savable(student, teacher))
        ctx.formula, ctx.summed = formula, summed
        shape = student.shape[:-1] if summed else student.shape
        found = student.new_empty(shape, dtype=compute_dtype(student, teacher))
        for rows in _chunks(student):
            terms = formula.terms(wide(student[rows]), wide(teacher[rows]))
            found[rows] = terms.sum(-1) if summed else terms
        return found

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        student, teacher = ctx.saved_tensors
        factor = grad_output[..., None] if ctx.summed else grad_output
        gradient = torch.empty_like(student)
        for rows in _chunks(student):
            slopes = ctx.formula.slopes(wide(student[rows]), wide(teacher[rows]))
            # A row that does not count may hold NaN.
            gradient[rows] = (slopes * factor[rows]).masked_fill(factor[rows] == 0, 0)
        return None, None, gradient, None


def _chunks(x: Tensor) -> Iterator[slice]:
    """Of rows. A compiler fuses a formula, and needs none."""
    count = len(x)
    step = max(count, 1)
    if not torch.compiler.is_compiling():
        numbers = _CHUNK.get(x.device.type, _CHUNK["cuda"])
        step = max(numbers * count // max(x.numel(), 1), 1)
    for start in range(0, count, step):
        yield slice(start, start + step)


def _weighted(p: Tensor, log_ratio: Tensor) -> Tensor:
    """Where p is 0 the term is 0, also if the ratio is infinite or NaN."""
    return (p * log_ratio).masked_fill(p == 0, 0)


def kl(eps: float) -> Formula:
    """Of log q and p: `p (log max(p, eps) − log q)`."""
    return Formula(lambda x, p: _weighted(p, p.clamp(min=eps).log() - x), lambda _, p: -p)


# Of log q and log p.
KL_OF_LOGS = Formula(lambda x, y: _weighted(y.exp(), y - x), lambda _, y: -y.exp())
_REVERSE_KL = Formula(
    lambda x, y: _weighted(x.exp(), x - y), lambda x, y: _weighted(x.exp(), x - y + 1)
)
# Of p and q.
TVD = Formula(lambda p, q: 0.5 * (p - q).abs(), lambda p, q: 0.5 * (p - q).sign())


def jsd(beta: float) -> Formula:
    """Of log q and log p: `beta p log(p/m) + (1 − beta) q log(q/m)`, and a KL for beta 0 or 1."""
    if beta == 0:
        return KL_OF_LOGS
    if beta == 1:
        return _REVERSE_KL
    own = functools.partial(_of_student, beta)
    return Formula(lambda x, y: own(x, y) + _of_student(1 - beta, y, x), own)


def _of_student(beta: float, x: Tensor, y: Tensor) -> Tensor:
    """`(1 − beta) q log(q/m)`, of `m/q = 1 + beta (p/q − 1)`, also by log q its derivative."""
    log_ratio = (y - x).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return _weighted((1 - beta) * x.exp(), -(beta * log_ratio.expm1()).log1p())

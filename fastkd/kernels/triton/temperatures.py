"""The temperatures of a call: one number, another one of the teacher, or tensors of one per row."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.divergence import INFINITY, LOGIT_SCALE, SCALE
from fastkd.parameters import SoftTarget

_LIMITS = torch.finfo(torch.float32)
_AT_1 = 1 / math.log(2) / LOGIT_SCALE
_RATE_AT_1 = tl.constexpr(_AT_1)
_LEAST_RATE, _MOST_RATE = tl.constexpr(_LIMITS.tiny), tl.constexpr(_LIMITS.max)
# A quarter of what is finite: the student's difference is subtracted.
_MOST_32 = tl.constexpr(_LIMITS.max / 4)
_MOST_64 = tl.constexpr(torch.finfo(torch.float64).max / 4)


def rate_of(temperature: float) -> float:
    """log₂(e) / T, of scaled logits.

    Where all logits count the same, or the largest alone, 0 or infinity would make NaN.
    """
    return min(max(_AT_1 / temperature, _LIMITS.tiny), _LIMITS.max)


def operand(temperatures: Sequence[Tensor], p: SoftTarget) -> tuple[Tensor | float, ...]:
    """What kernels take: nothing for one number, which they have; two numbers; or three tensors.

    Two numbers are the rate of the teacher's: Triton takes no float64 in a tuple, and it is the sum
    of two float32.
    """
    if temperatures or p.teacher_temperature == p.temperature:
        return tuple(temperatures)
    rate = rate_of(p.teacher_temperature)
    high = torch.tensor(rate, dtype=torch.float32).item()
    return high, rate - high


@triton.jit
def temperatures_of(rate, soft, temperatures, row, counts, COMPUTE: tl.constexpr):
    """The rates of rows, the factor of the divergence's gradient, and the root of the T² in it.

    Rates are the student's, the teacher's, and the second over the first, or None where the sides
    have the same. There is a root where rows have temperatures of their own; it is 1, as these are,
    where a row does not count.
    """
    if len(temperatures) == 3:
        student = tl.load(temperatures[0] + row, mask=counts, other=1).to(tl.float64)
        teacher = tl.load(temperatures[1] + row, mask=counts, other=1).to(tl.float64)
        root = tl.load(temperatures[2] + row, mask=counts, other=1)
        soft = (soft * (root * (root / student))).to(COMPUTE)
        return _rates(_rate(student), _rate(teacher), COMPUTE), soft, root
    else:
        soft = tl.full([1, 1], soft, COMPUTE)
        of_student = tl.full([1, 1], rate, COMPUTE)
        if len(temperatures) == 2:
            high = tl.full([1, 1], temperatures[0], tl.float64)
            low = tl.full([1, 1], temperatures[1], tl.float64)
            return _rates(of_student, high + low, COMPUTE), soft, None
        else:
            return (of_student, of_student, None), soft, None


@triton.jit
def _within(x, least, most):
    """A NaN stays one; `tl.clamp` to a range around 0 does not compile for float64."""
    return tl.where(x < least, least, tl.where(x > most, most, x))


@triton.jit
def _rate(temperature):
    at_1 = tl.full([1, 1], _RATE_AT_1, tl.float64)
    return _within(at_1 / temperature, _LEAST_RATE, _MOST_RATE)


@triton.jit
def _rates(student, teacher, COMPUTE: tl.constexpr):
    student, teacher = student.to(COMPUTE), teacher.to(COMPUTE)
    ratio = teacher.to(tl.float64) / student.to(tl.float64)
    return student, teacher, _within(ratio, 0, _MOST_RATE).to(COMPUTE)


@triton.jit
def at_student(difference, ratio):
    """A difference of the teacher's logits, brought to the student's temperature.

    What is finite stays so: a class of no probability has no term, and 0 · inf would be NaN.
    """
    if ratio is None:
        return difference
    else:
        most = _MOST_64 if difference.dtype == tl.float64 else _MOST_32
        by = _within(difference * ratio, -most, most)
        return tl.where(difference == -INFINITY, difference, by)


@triton.jit
def product(gradient, difference):
    """Of a class that has a gradient and is not excluded."""
    nothing = (gradient == 0) | (difference == -INFINITY)
    return tl.where(nothing, 0, gradient * difference)


@triton.jit
def store_gradients(
    to_temperatures, rows, row, is_row, lives, temperatures, weight, of_student, of_teacher, kl
):
    """Those of rows' temperatures, of one kind after another.

    From sums of the products of logits with their gradients, and the divergence, all scaled, and
    the weight of q − p. Of a term that is off nothing shows, whatever the temperatures are.
    """
    student = tl.load(temperatures[0] + row, mask=lives, other=1)
    teacher = tl.load(temperatures[1] + row, mask=lives, other=1)
    root = tl.load(temperatures[2] + row, mask=lives, other=1)
    of_root = kl * weight * (2 * student / root)
    seen = lives & (weight != 0)
    at = to_temperatures + row.to(tl.int64)
    step = tl.cast(rows, tl.int64)
    tl.store(at, tl.where(seen, -(of_student / student) / SCALE, 0), mask=is_row)
    tl.store(at + step, tl.where(seen, -(of_teacher / teacher) / SCALE, 0), mask=is_row)
    tl.store(at + 2 * step, tl.where(seen, of_root / SCALE, 0), mask=is_row)

"""The temperatures of both sides in NumPy float64, and the derivatives by them.

With z = s/T_s, y = t/T_t and L = W D(softmax(y), softmax(z)), where W is T_s^2 or 1,
dL/dT_s = W' D - W/T_s^2 sum(dD/dz s) and dL/dT_t = -W/T_t^2 sum(dD/dy t). Nothing here comes from
fastkd.
"""

import numpy as np


def of_rows(temperature, teacher_temperature, shape):
    """Both, one for each row, with a dimension for the classes."""
    teacher = temperature if teacher_temperature is None else teacher_temperature
    return tuple(np.broadcast_to(x, shape)[..., None].astype(float) for x in (temperature, teacher))


def weighed_sum(slope, logits, magnitudes):
    """`sum(slope * logits)` of slopes whose sum is 0, so that a maximum can be subtracted."""
    slope = np.where(np.isinf(logits), 0, slope)
    shifted = np.where(slope == 0, 0, logits - logits.max(-1, keepdims=True))
    return (slope * (np.abs(shifted) if magnitudes else shifted)).sum(-1)


def derivatives(rows, slopes, logits, of_rows, weight, scale_t2, magnitudes):
    """By the temperatures of the rows: the student's, and the teacher's.

    `rows` is T_s D, `slopes` are dD/dz and dD/dy of each teacher, and `weight` is W / T_s.
    """
    student, teacher = (t[..., 0] for t in of_rows)
    sign = 1 if magnitudes else -1
    of_teachers = [
        weighed_sum(slope, x, magnitudes) for slope, x in zip(slopes[1:], logits[1:], strict=True)
    ]
    by_student = sign * weight / student * weighed_sum(slopes[0], logits[0], magnitudes)
    if scale_t2:
        by_student = by_student + 2 * weight * rows / student
    return by_student, sign * weight * student / teacher**2 * sum(of_teachers)


def of_arguments(found, temperature, teacher_temperature):
    """Of those that are arrays; the teacher's counts towards the student's where it has none."""
    by_student, by_teacher = found
    if teacher_temperature is None:
        by_student = by_student + by_teacher
    for given, gradient in ((temperature, by_student), (teacher_temperature, by_teacher)):
        if isinstance(given, np.ndarray):
            yield gradient.sum() if given.ndim == 0 else gradient

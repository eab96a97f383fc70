"""Excluded classes, NaN, infinities, peaks and huge logits, in every form that a kernel has."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_soft_target, logits
from extremes import FORMS, arranged

import fastkd

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    return request.param


def pair(rows, form, dtype=torch.float32, scale=3.0):
    """Student and teacher to write extremes into, with the classes last."""
    return tuple(logits(rows, form[0], dtype=dtype, scale=scale) for _ in range(2))


def check(tensors, form, backend, **keywords):
    check_soft_target(*arranged(tensors, form), backend, dim=form[1], **keywords)


def losses(tensors, form, backend):
    return fastkd.soft_target_loss(
        *arranged(tensors, form), reduction="none", dim=form[1], backend=backend
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_that_the_teacher_excludes(backend, form, dtype):
    student, teacher = tensors = pair(7, form, dtype)
    teacher[:, ::3] = -math.inf
    student[:3, ::6] = -math.inf
    # All but one class, and whole blocks at the start, in the middle or at the end of a row.
    teacher[3], teacher[3, 7] = -math.inf, 0.0
    teacher[4, :-9], student[4, :-9] = -math.inf, -math.inf
    teacher[5, 9:], student[5, 9:] = -math.inf, -math.inf
    teacher[6, 9:-9], student[6, 9:-9] = -math.inf, -math.inf
    check(tensors, form, backend, temperature=2.0, reduction="none")
    check(tensors, form, backend, temperature=2.0, grad_output=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_that_only_the_student_excludes(backend, form, dtype):
    student, _ = tensors = pair(6, form, dtype)
    student[2, 5], student[4, -1], student[5, 3:-3] = -math.inf, -math.inf, -math.inf
    loss = losses(tensors, form, backend)
    assert loss.isinf().tolist() == [False, False, True, False, True, True]
    check(tensors, form, backend, reduction="none", temperature=2.0, teachers=False)
    assert (
        fastkd.soft_target_loss(*arranged(tensors, form), dim=form[1], backend=backend) == math.inf
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excluded_class_of_underflowing_probability(backend, form, dtype):
    """exp(-1000) is 0, the probability is not: the divergence is infinite and never NaN."""
    student, teacher = tensors = pair(2, form, dtype)
    teacher[:, 1:] -= 1000
    student[0, -1] = -math.inf
    check(tensors, form, backend, reduction="none", teachers=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("column", [0, 17, -1])
def test_nan_and_positive_infinity_make_a_nan_row(backend, form, value, side, column):
    tensors = pair(5, form)
    tensors[side][3, column] = value
    # Excluded where the other side is NaN or +inf, too: that must not hide it.
    tensors[1 - side][3, 20] = -math.inf
    assert losses(tensors, form, backend).isnan().tolist() == [False, False, False, True, False]
    mean = fastkd.soft_target_loss(*arranged(tensors, form), dim=form[1], backend=backend)
    assert mean.isnan()


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_class_that_the_teacher_excludes(backend, form, side):
    tensors = pair(2, form)
    tensors[1][1, 20] = -math.inf
    tensors[side][1, 20] = math.nan
    assert losses(tensors, form, backend).isnan().tolist() == [False, True]


@pytest.mark.parametrize("side", [0, 1])
def test_row_without_any_class_is_nan(backend, form, side):
    tensors = pair(2, form)
    tensors[side][0] = -math.inf
    assert losses(tensors, form, backend).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_row_has_a_nan_gradient_and_spares_the_others(backend, form, dtype):
    student, teacher = tensors = pair(32, form, dtype)
    student[1, 3], teacher[2, 4] = math.nan, math.nan
    check(tensors, form, backend, reduction="none")


# Where p is nearly 1 the teacher's gradient p (log p/q - KL) cancels to nothing, and no relative
# tolerance is meaningful: from here on the student's is asked for. (Elsewhere so many rows, or so
# small logits, are drawn that most rows are not peaked.)


@pytest.mark.parametrize("peak", [50.0, 200.0, 5000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_peaked_logits(backend, form, dtype, peak):
    """Probabilities of one side or both underflow."""
    student, teacher = tensors = pair(6, form, dtype)
    student[:4, 3] += peak
    teacher[2:, -3] += peak
    teacher[5, 9] += 2 * peak
    check(tensors, form, backend, reduction="none", teachers=False)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(backend, form, dtype, temperature):
    tensors = pair(9, form, dtype, scale=1e4)
    check(tensors, form, backend, temperature=temperature, teachers=False)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_offset(backend, form, temperature, offset):
    """Classes that compete far from 0: dividing by T first would round away their difference."""
    tensors = [x + offset for x in pair(64, form)]
    check(tensors, form, backend, temperature=temperature)

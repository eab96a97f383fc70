"""Metrics of excluded classes, NaN, infinities, ties, peaks and huge logits."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_metrics, logits
from extremes import FORMS, arranged

import fastkd

pytestmark = pytest.mark.parametrize("form", FORMS, ids=str)


def drawn(rows, form, dtype=torch.float32, scale=3.0):
    """Student and teacher to write extremes into, with the classes last."""
    return tuple(logits(rows, form[0], dtype=dtype, scale=scale) for _ in range(2))


def check(tensors, form, backend, **keywords):
    check_metrics(*arranged(tensors, form), backend, dim=form[1], **keywords)


def metrics(tensors, form, backend):
    return fastkd.distillation_metrics(*arranged(tensors, form), dim=form[1], backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_excluded_classes(backend, form, dtype):
    """By the teacher alone, the student alone, both; in few places, and in whole blocks."""
    one, other = drawn(9, form, dtype)
    one[0, ::3] = -math.inf
    other[1, ::3] = -math.inf
    one[2, ::2] = other[2, ::2] = -math.inf
    one[3, : form[0] // 2] = other[3, form[0] // 2 :] = -math.inf
    one[4, 1:] = other[4, :-1] = -math.inf
    one[5, 1:] = other[5, 1:] = -math.inf
    one[6, -1] = -math.inf
    one[7, form[0] // 3 :] = other[7, form[0] // 3 :] = -math.inf
    check((one, other), form, backend)
    check((other, one), form, backend, temperature=2.0, teacher_temperature=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_class_that_is_excluded_where_the_other_side_underflows(backend, form, dtype):
    one, other = drawn(4, form, dtype)
    one[::2, 3], other[::2, 3] = -math.inf, -1e6
    check((one, other), form, backend)
    check((other, one), form, backend)
    assert (metrics((one, other), form, backend).forward_kl[::2] == math.inf).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.nan])
def test_values_that_spread(backend, form, value):
    """To their own row, and there to what depends on their side."""
    student, teacher = drawn(9, form)
    student[1, 5] = value
    teacher[3, -1] = value
    student[5, 0] = teacher[5, 7] = value
    student[7, 3], student[7, 4:] = value, -math.inf
    check((student, teacher), form, backend)
    found = metrics((student, teacher), form, backend)
    assert found.forward_kl.isnan().tolist() == [False, True] * 4 + [False]
    assert found.teacher_entropy.isnan().nonzero().flatten().tolist() == [3, 5]


def test_rows_that_are_excluded_as_a_whole(backend, form):
    student, teacher = drawn(4, form)
    student[0] = -math.inf
    teacher[1] = -math.inf
    student[2] = teacher[2] = -math.inf
    check((student, teacher), form, backend)
    found = metrics((student, teacher), form, backend)
    assert found.student_log_sum_exp[0] == -math.inf
    assert found.overlap.isnan().tolist() == [True, True, True, False]


def test_ties(backend, form):
    """The lowest of the largest classes, wherever they are; the first NaN before all."""
    rows = 12
    for draw in range(3):
        student, teacher = (torch.zeros(rows, form[0]) for _ in range(2))
        for x in (student, teacher):
            places = torch.randint(form[0], (rows, 3))
            x.scatter_(1, places, 2.0)
        if draw == 2:
            student.scatter_(1, torch.randint(form[0], (rows, 2)), math.nan)
        check((student, teacher), form, backend)
    check((torch.zeros(3, form[0]), torch.full((3, form[0]), -2.5)), form, backend)


@pytest.mark.parametrize("offset", [1e3, -1e5, 1e6])
def test_large_offsets(backend, form, offset):
    student, teacher = drawn(5, form)
    check((student + offset, teacher - offset), form, backend, temperature=2.0)
    check((student + offset, teacher), form, backend, teacher_temperature=3.0)


@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_huge_logits(backend, form, size):
    """Any two finite logits have a finite difference, and a finite row has no NaN."""
    for low, high in [(-size, size), (size / 2, size), (-size, -size / 2)]:
        student, teacher = (torch.where(torch.rand(6, form[0]) < 0.5, low, high) for _ in range(2))
        student[0], teacher[0] = low, high
        student[1, 1:] = low
        check((student, teacher), form, backend, temperature=1.0)
        check((student, teacher), form, backend, temperature=4.0)
    found = metrics((student, teacher), form, backend)
    assert not any(value.isnan().any() for value in found)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_peaks(backend, form, scale):
    check(drawn(8, form, scale=scale), form, backend)
    check(drawn(8, form, torch.bfloat16, scale=scale), form, backend, teacher_temperature=7.0)

"""Excluded classes, masks, NaN and peaks, of the divergences other than forward KL."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, logits
from divergences import BOUNDED, FEW, name_of
from extremes import FORMS, arranged

import fastkd

every_form = pytest.mark.parametrize("form", FORMS, ids=str)
bounded = pytest.mark.parametrize("keywords", BOUNDED, ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", FEW, ids=name_of)


def pair(rows, form, dtype=torch.float32, scale=3.0):
    """Student and teacher to write extremes into, with the classes last."""
    return tuple(logits(rows, form[0], dtype=dtype, scale=scale) for _ in range(2))


def check(tensors, form, backend, **keywords):
    check_soft_target(*arranged(tensors, form), backend, dim=form[1], **keywords)


def losses(tensors, form, backend, **keywords):
    return fastkd.soft_target_loss(
        *arranged(tensors, form), reduction="none", dim=form[1], backend=backend, **keywords
    )


def excluded(form, dtype):
    """Classes that a side excludes alone, and together with the other."""
    student, teacher = pair(8, form, dtype)
    teacher[0, ::3], student[1, ::3] = -math.inf, -math.inf
    teacher[2, ::3], student[2, ::6] = -math.inf, -math.inf
    # Whole blocks at the start, in the middle or at the end of a row.
    teacher[3, :-9], student[4, :-9] = -math.inf, -math.inf
    teacher[5, 9:], student[5, 9:] = -math.inf, -math.inf
    teacher[6, 9:-9], student[6, 5:-12] = -math.inf, -math.inf
    # All but one class, of which each side has another.
    teacher[7], teacher[7, 7] = -math.inf, 0.0
    student[7], student[7, 9] = -math.inf, 1.0
    return student, teacher


@pytest.mark.parametrize("dtype", DTYPES)
@bounded
@every_form
def test_excluded_classes(backend, form, keywords, dtype):
    tensors = excluded(form, dtype)
    check(tensors, form, backend, temperature=2.0, reduction="none", **keywords)
    check(tensors, form, backend, temperature=2.0, grad_output=3.0, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@every_form
def test_classes_that_the_student_excludes_from_reverse_kl(backend, form, dtype):
    student, teacher = tensors = pair(5, form, dtype)
    student[0, ::3] = -math.inf
    student[1, ::3], teacher[1, ::6] = -math.inf, -math.inf
    student[2, :-9], teacher[2, :-9] = -math.inf, -math.inf
    student[3, 9:-9] = -math.inf
    student[4], student[4, 7] = -math.inf, 0.0
    check(tensors, form, backend, temperature=2.0, reduction="none", divergence="reverse_kl")
    check(tensors, form, backend, temperature=2.0, grad_output=3.0, divergence="reverse_kl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_form
def test_classes_that_only_the_teacher_excludes_from_reverse_kl(backend, form, dtype):
    student, teacher = tensors = pair(6, form, dtype)
    student[4:, 1:] -= 1000  # where q underflows it is infinite, too
    teacher[2, 5], teacher[3, 3:-3], teacher[4, -1] = -math.inf, -math.inf, -math.inf
    loss = losses(tensors, form, backend, divergence="reverse_kl")
    assert loss.isinf().tolist() == [False, False, True, True, True, False]
    # The teacher's gradient is finite: it is p - q.
    s, t = arranged([student, teacher], form)
    t.requires_grad_()
    fastkd.soft_target_loss(
        s, t, dim=form[1], backend=backend, divergence="reverse_kl", reduction="sum"
    ).backward()
    expected = t.detach().double().softmax(form[1]) - s.double().softmax(form[1])
    error = (t.grad.double() - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("column", [0, 17, -1])
@some_divergences
@every_form
def test_nan_and_positive_infinity_make_a_nan_row(backend, form, keywords, value, side, column):
    tensors = pair(5, form)
    tensors[side][3, column] = value
    tensors[1 - side][3, column] = -math.inf
    found = losses(tensors, form, backend, **keywords)
    assert found.isnan().tolist() == [False, False, False, True, False]
    student, teacher = arranged(tensors, form)
    for x in (student, teacher):
        x.requires_grad_()
    loss = fastkd.soft_target_loss(
        student, teacher, dim=form[1], backend=backend, reduction="sum", **keywords
    )
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, [student, teacher]):
        is_nan = gradient.movedim(form[1], -1).isnan()
        is_nan[3, column] = True  # excluded by a side
        assert is_nan.all(1).tolist() == is_nan.any(1).tolist() == [*[False] * 3, True, False]


@pytest.mark.parametrize("side", [0, 1])
@some_divergences
@every_form
def test_row_without_any_class_is_nan(backend, form, keywords, side):
    tensors = pair(2, form)
    tensors[side][0] = -math.inf
    assert losses(tensors, form, backend, **keywords).isnan().tolist() == [True, False]


@pytest.mark.parametrize("peak", [50.0, 200.0, 5000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_form
def test_peaked_logits(backend, form, keywords, dtype, peak):
    """Probabilities of one side or both underflow; gradients of both sides are finite."""
    student, teacher = tensors = pair(6, form, dtype)
    student[:4, 3] += peak
    teacher[2:, -3] += peak
    teacher[5, 9] += 2 * peak
    check(tensors, form, backend, reduction="none", teachers=False, **keywords)
    student, teacher = (x.requires_grad_() for x in arranged(tensors, form))
    loss = fastkd.soft_target_loss(student, teacher, dim=form[1], backend=backend, **keywords)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [student, teacher]))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keywords", FEW[1:], ids=name_of)
@every_form
def test_finite_masks(backend, form, keywords, dtype, temperature):
    student, teacher = tensors = pair(4, form, dtype, scale=30.0)
    least = torch.finfo(dtype).min
    student[0, ::3] = least
    teacher[1, ::3] = least / 2
    student[2, ::3], teacher[2, ::2] = least, least
    student[3, :-1], student[3, -1] = least, -least
    keywords = {**keywords, "temperature": temperature}
    check(tensors, form, backend, reduction="none", teachers=False, **keywords)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("offset", [1e4, -1e4])
@some_divergences
@every_form
def test_large_offset(backend, form, keywords, offset, temperature):
    tensors = [x + offset for x in pair(16, form)]
    if keywords["divergence"] != "tvd":
        check(tensors, form, backend, temperature=temperature, **keywords)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@some_divergences
@every_form
def test_ignored_rows_may_hold_anything(backend, form, keywords, poison):
    tensors = pair(6, form)
    labels = torch.tensor([1, -100, 2, 4, -100, 5])
    for x in tensors:
        x[1], x[4, 2] = poison, poison
    student, teacher = arranged(tensors, form)
    check_distillation(student, teacher, labels, backend, dim=form[1], **keywords)


@some_divergences
def test_a_weight_of_0_switches_the_divergence_off(backend, keywords):
    student, teacher = logits(9, 40), logits(9, 40)
    teacher[0], teacher[1, 3] = math.nan, -math.inf
    labels = torch.arange(9)
    check_distillation(
        student, teacher, labels, backend, soft_weight=0.0, hard_weight=1.0, **keywords
    )

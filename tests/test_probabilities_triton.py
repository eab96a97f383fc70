"""Teachers that state probabilities in Triton's kernels: where tiles end, and rows in blocks."""

import math

import pytest
import torch
from agreement_logits import GIVEN, check_distillation, check_soft_target
from conftest import BACKENDS
from divergences import FEW, name_of
from extremes import arranged
from probabilities import KINDS, sides
from temperatures import of_kind
from triton_calls import around

import fastkd

if "triton" not in BACKENDS:
    pytest.skip("triton is not under test", allow_module_level=True)

from fastkd.kernels.triton.rows import SIDE_BY_SIDE, WHOLE

every_kind = pytest.mark.parametrize("teacher_is", KINDS)
every_form = pytest.mark.parametrize("form", [(WHOLE + 3, -1), (70, 0)], ids=str)
some_divergences = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)


def none_of(teacher_is):
    """What is stated of a class that is excluded."""
    return 0.0 if teacher_is == "probabilities" else -math.inf


@pytest.mark.parametrize("classes", around(32, 1024, WHOLE // 2, WHOLE, WHOLE + WHOLE // 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@some_divergences
@every_kind
def test_ends_of_rows(teacher_is, keywords, dtype, classes):
    """What is loaded beyond a row is no probability."""
    student, teacher = sides(teacher_is, 2, classes, dtype, dtype, temperature=4.0)
    labels = torch.tensor([classes - 1, max(classes - 2, 0)])
    keywords = {**keywords, "teacher_is": teacher_is, "label_smoothing": 0.1}
    check_distillation(student, teacher, labels, "triton", **keywords)


@pytest.mark.parametrize("classes", around(1, SIDE_BY_SIDE, 2 * SIDE_BY_SIDE)[2:])
@some_divergences
@every_kind
def test_ends_of_classes_apart(teacher_is, keywords, classes):
    heat = of_kind("rows", (105, classes))
    pair = sides(teacher_is, 105, classes, torch.float32, torch.float32, **heat)
    pair = [x.reshape(3, 35, classes).transpose(1, 2).contiguous() for x in pair]
    heat = {name: t.reshape(3, 35) for name, t in heat.items()}
    keywords = {**keywords, **heat, "teacher_is": teacher_is, "dim": 1}
    check_soft_target(*pair, "triton", torch.randn(3, 35), reduction="none", **keywords)
    check_soft_target(*pair, "triton", row_weight=torch.rand(3, 35), **keywords)


@pytest.mark.parametrize("classes", [20, 70, 5000])
@some_divergences
@every_kind
def test_maxima_that_grow_from_block_to_block(teacher_is, keywords, classes):
    """And fall; whole blocks are excluded before any mass is found, and after."""
    rising = torch.linspace(-70, 0, classes)
    student, teacher = sides(teacher_is, 4, classes, torch.float32, torch.float32)
    is_log = teacher_is == "log_probabilities"
    teacher = teacher.clamp(max=0) + rising if is_log else teacher * rising.exp()
    student[1], teacher[1] = student[1].flip(0), teacher[1].flip(0)
    student[2] += rising
    excluded = classes // 2 + 3
    if keywords.get("divergence") == "reverse_kl":
        student[2, :excluded], student[3, -excluded:] = -math.inf, -math.inf
    teacher[2, :excluded], teacher[3, -excluded:] = none_of(teacher_is), none_of(teacher_is)
    keywords = {**keywords, "teacher_is": teacher_is, "teachers": False, "temperature": 2.0}
    for dim in (1, 0):
        pair = arranged((student, teacher), (classes, dim))
        check_soft_target(*pair, "triton", 3.0, dim=dim, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@some_divergences
@every_form
@every_kind
def test_masses_far_from_1(teacher_is, form, keywords, dtype):
    student, teacher = sides(teacher_is, 5, form[0], dtype, dtype)
    factor = torch.tensor([1e-12, 1e-3, 1, 1e3, 1e12], dtype=dtype)[:, None]
    teacher = teacher * factor if teacher_is == "probabilities" else teacher + factor.log()
    keywords = {**keywords, "teacher_is": teacher_is, "reduction": "none", "dim": form[1]}
    for row in range(5):
        pair = arranged((student[row : row + 1], teacher[row : row + 1]), form)
        check_soft_target(*pair, "triton", **keywords)


@some_divergences
@every_form
def test_subnormal_probabilities(form, keywords):
    student, teacher = sides("probabilities", 3, form[0], torch.float32, torch.float32)
    teacher[:, ::3] = 1e-40 * torch.rand(3, len(range(0, form[0], 3)))
    teacher[1, 1::3], teacher[2] = 1e-45, 3e-39
    student[:, ::5] = -90.0
    keywords = {**keywords, "teacher_is": "probabilities", "dim": form[1]}
    check_soft_target(*arranged((student, teacher), form), "triton", **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_form
@every_kind
def test_rows_without_mass(teacher_is, form, dtype):
    student, teacher = sides(teacher_is, 3, form[0], dtype, dtype)
    teacher[1] = none_of(teacher_is)
    for keywords in [{}, *FEW[1:]]:
        keywords = {**keywords, "teacher_is": teacher_is, "dim": form[1]}
        check_soft_target(*arranged((student, teacher), form), "triton", 3.0, **keywords)
    student, teacher = arranged((student, teacher), form)
    loss = fastkd.soft_target_loss(
        student, GIVEN[teacher_is](teacher), divergence="reverse_kl", reduction="none",
        dim=form[1], backend="triton",
    )  # fmt: skip
    assert loss.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [-0.25, math.nan, math.inf])
@some_divergences
@every_form
def test_rows_that_hold_no_probabilities(form, keywords, value):
    """They show in the last block as in the first, and in no other row."""
    for at in (0, form[0] - 1):
        student, teacher = sides("probabilities", 3, form[0], torch.float32, torch.float32)
        teacher[1, at] = value
        student, teacher = arranged((student, teacher), form)
        student.requires_grad_()
        losses = fastkd.soft_target_loss(
            student, fastkd.Probabilities(teacher), reduction="none", dim=form[1],
            backend="triton", **keywords,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(losses.sum(), student)
        rows = gradient.movedim(form[1], -1).isfinite().all(-1)
        assert losses.isfinite().tolist() == rows.tolist() == [True, False, True]


@some_divergences
@every_form
@every_kind
def test_in_the_students_place(teacher_is, form, keywords):
    student, teacher = sides(teacher_is, 3, form[0], torch.float32, torch.float32)
    student, teacher = arranged((student, teacher), form)
    found = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        loss = fastkd.soft_target_loss(
            leaf * 1, GIVEN[teacher_is](teacher), inplace=inplace, dim=form[1],
            backend="triton", **keywords,
        )  # fmt: skip
        found.append((loss, *torch.autograd.grad(2 * loss, leaf)))
    torch.testing.assert_close(*found, rtol=0, atol=0)

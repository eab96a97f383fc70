"""Teachers that state their probabilities or the logarithms of these, against the oracle."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import GIVEN, check_distillation, check_soft_target, logits, some_labels
from divergences import DIVERGENCES, FEW, name_of
from extremes import FORMS, arranged
from probabilities import KINDS, sides
from temperatures import of_kind

import fastkd

every_kind = pytest.mark.parametrize("teacher_is", KINDS)
every_form = pytest.mark.parametrize("form", FORMS, ids=str)
every_divergence = pytest.mark.parametrize("keywords", [{}, *DIVERGENCES], ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
@every_divergence
@every_kind
def test_temperatures(backend, teacher_is, keywords, dtype, temperature):
    student, teacher = sides(teacher_is, 9, 100, dtype, dtype, temperature=temperature)
    keywords = {**keywords, "teacher_is": teacher_is, "temperature": temperature}
    check_soft_target(student, teacher, backend, **keywords)
    check_soft_target(student, teacher, backend, -3.0, scale_t2=False, **keywords)


@pytest.mark.parametrize("kind", ["scalar", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_kind
def test_temperatures_that_learn(backend, teacher_is, keywords, dtype, kind):
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    heat = of_kind(kind, (9, 100), precise)
    student, teacher = sides(teacher_is, 9, 100, dtype, dtype, **heat)
    keywords = {**keywords, **heat, "teacher_is": teacher_is}
    check_soft_target(student, teacher, backend, **keywords)
    check_soft_target(student, teacher, backend, torch.randn(9), reduction="none", **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_kind
def test_reductions(backend, teacher_is, keywords, dtype, reduction):
    student, teacher = sides(teacher_is, 9, 40, dtype, torch.float32, temperature=2.0)
    upstream = torch.randn(9) if reduction == "none" else 3.7
    keywords = {**keywords, "teacher_is": teacher_is, "temperature": 2.0, "reduction": reduction}
    check_soft_target(student, teacher, backend, upstream, **keywords)
    mask = torch.rand(9) < 0.5
    check_soft_target(student, teacher, backend, upstream, mask=mask, **keywords)
    check_soft_target(student, teacher, backend, upstream, row_weight=torch.rand(9), **keywords)


@pytest.mark.parametrize("classes", [2, 17, 1000, 1025, 4200])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_kind
def test_class_counts_and_dims(backend, teacher_is, keywords, dtype, classes):
    student, teacher = sides(teacher_is, 9, classes, dtype, dtype)
    keywords = {**keywords, "teacher_is": teacher_is}
    check_soft_target(student, teacher, backend, **keywords)
    columns = student.t().contiguous(), teacher.t().contiguous()
    check_soft_target(*columns, backend, 3.0, dim=0, **keywords)
    images = [x.reshape(3, 3, classes).movedim(-1, 1) for x in (student, teacher)]
    check_soft_target(*images, backend, dim=1, reduction="none", **keywords)
    if classes > 2:
        check_soft_target(student, teacher, backend, num_classes=classes - 2, **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_kind
def test_with_labels(backend, teacher_is, keywords, dtype, smoothing):
    student, teacher = sides(teacher_is, 9, 40, dtype, dtype, temperature=4.0)
    labels = some_labels(9, classes=40)
    keywords = {**keywords, "teacher_is": teacher_is, "label_smoothing": smoothing}
    check_distillation(student, teacher, labels, backend, 3.0, **keywords)
    check_distillation(student, teacher, labels, backend, reduction="none", **keywords)
    check_distillation(student, teacher, labels, backend, soft_weight=0.0, **keywords)
    check_distillation(student, teacher, labels, backend, hard_weight=0.0, **keywords)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@every_kind
def test_peaked_rows_of_a_language_model(backend, teacher_is, divergence):
    student, teacher = sides(teacher_is, 2, 151936, torch.bfloat16, torch.bfloat16, scale=2.0)
    student[0, 7] += 30
    teacher[1] = 0.0 if teacher_is == "probabilities" else -30.0
    teacher[1, 40000] = 1.0 if teacher_is == "probabilities" else 0.0
    if divergence == "reverse_kl" and teacher_is == "probabilities":
        teacher[1] += 2.0**-20
    keywords = {"divergence": divergence, "teacher_is": teacher_is, "teachers": False}
    check_soft_target(student, teacher, backend, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_form
@every_kind
def test_excluded_classes(backend, teacher_is, form, keywords, dtype):
    """By the teacher, which contributes 0 there, by both, in whole blocks, and in whole rows."""
    student, teacher = sides(teacher_is, 6, form[0], dtype, dtype)
    zero = 0.0 if teacher_is == "probabilities" else -math.inf
    teacher[0, ::3] = zero
    teacher[1, ::3], student[1, ::6] = zero, -math.inf
    teacher[2, :-9], teacher[3, 9:], teacher[4] = zero, zero, zero
    if keywords.get("divergence") == "reverse_kl":
        # What the teacher alone excludes would be infinite.
        is_excluded = teacher == zero
        is_excluded[4, 9:] = False
        student = student.masked_fill(is_excluded, -math.inf)
        teacher[4, 9:] = 0.5
    keywords = {**keywords, "teacher_is": teacher_is, "dim": form[1]}
    check_soft_target(*arranged((student, teacher), form), backend, 3.0, **keywords)


@every_form
@every_kind
def test_infinite_rows(backend, teacher_is, form):
    student, teacher = sides(teacher_is, 4, form[0], torch.float32, torch.float32)
    student[1, 5] = -math.inf
    teacher[2, 5] = 0.0 if teacher_is == "probabilities" else -math.inf
    teacher[3] = teacher[2, 5]
    tensors = arranged((student, teacher), form)
    tensors[1] = GIVEN[teacher_is](tensors[1])
    others = {"reduction": "none", "dim": form[1], "backend": backend}
    forward = fastkd.soft_target_loss(*tensors, **others)
    assert forward.isinf().tolist() == [False, True, False, False]
    assert forward[3] == 0
    reverse = fastkd.soft_target_loss(*tensors, divergence="reverse_kl", **others)
    assert reverse.isinf().tolist() == [False, False, True, True]
    for divergence in ("jsd", "tvd", "skew_kl", "skew_reverse_kl"):
        assert fastkd.soft_target_loss(*tensors, divergence=divergence, **others).isfinite().all()


@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@some_divergences
@every_kind
def test_masses_far_from_1(backend, teacher_is, keywords, dtype, classes):
    """Nothing is normalised."""
    student, teacher = sides(teacher_is, 9, classes, dtype, dtype)
    factor = torch.tensor([1e-12, 1e-6, 1e-3, 0.1, 1, 10, 1e3, 1e6, 1e12], dtype=dtype)[:, None]
    teacher = teacher * factor if teacher_is == "probabilities" else teacher + factor.log()
    keywords = {**keywords, "teacher_is": teacher_is, "reduction": "none"}
    for row in range(9):
        one = student[row : row + 1], teacher[row : row + 1]
        check_soft_target(*one, backend, **keywords)


@pytest.mark.parametrize(("divergence", "factor", "expected"), [
    ("forward_kl", 0.5, 0.5 * math.log(0.5)),
    ("reverse_kl", 2.0, -math.log(2.0)),
    ("jsd", 2.0, math.log(2 / 1.5) + math.log(1 / 1.5) / 2),
    ("tvd", 2.0, 0.5),
    ("skew_kl", 0.5, 0.5 * math.log(0.5 / 0.75)),
    ("skew_reverse_kl", 2.0, -math.log(1.5)),
])  # fmt: skip
@every_form
@every_kind
def test_divergences_may_be_negative(backend, teacher_is, form, divergence, factor, expected):
    """Of the student's own distribution, times a factor."""
    student = logits(5, form[0])
    teacher = student.log_softmax(-1) + math.log(factor)
    teacher = teacher.exp() if teacher_is == "probabilities" else teacher
    student, teacher = arranged((student, teacher), form)
    loss = fastkd.soft_target_loss(
        student, GIVEN[teacher_is](teacher), divergence=divergence, dim=form[1], backend=backend
    )
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("classes", [40, 1100])
@every_divergence
def test_subnormal_probabilities(backend, keywords, classes):
    """They are small, and not 0: with reverse KL their logarithms count.

    What the reference has for their own gradients lacks digits that subnormal numbers do not hold.
    """
    student, teacher = sides("probabilities", 9, classes, torch.float32, torch.float32)
    teacher[:, ::3] = 1e-40 * (0.1 + torch.rand(9, len(range(0, classes, 3))))
    teacher[:, 1] = 1e-45
    student[:, ::5] = -90.0
    teachers = backend != "reference"
    for teacher_is in KINDS:
        keywords = {**keywords, "teacher_is": teacher_is, "teachers": teachers}
        check_soft_target(student, teacher, backend, **keywords)
        teacher = teacher.double().log().float()


@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@some_divergences
def test_logarithms_that_underflow(backend, keywords, dtype, classes):
    student, teacher = sides("log_probabilities", 9, classes, dtype, dtype)
    teacher[:, 3:9], teacher[2, 10:], teacher[3, 20:] = -500.0, -1e5, -1e30
    teacher[4] -= 300.0
    if keywords.get("divergence") == "reverse_kl":
        student[3, 20:] = -math.inf
        keywords = {**keywords, "teachers": False}
    check_soft_target(student, teacher, backend, teacher_is="log_probabilities", **keywords)


@pytest.mark.parametrize("value", [-0.25, math.nan, math.inf])
@some_divergences
@every_form
@every_kind
def test_rows_that_hold_no_probabilities(backend, teacher_is, form, keywords, value):
    student, teacher = sides(teacher_is, 5, form[0], torch.float32, torch.float32)
    if teacher_is == "log_probabilities" and value == -0.25:
        value = math.nan  # as a logarithm it is as good as any
    teacher[3, form[0] // 2] = value
    student, teacher = arranged((student, teacher), form)
    student.requires_grad_()
    losses = fastkd.soft_target_loss(
        student, GIVEN[teacher_is](teacher), reduction="none", dim=form[1], backend=backend,
        **keywords,
    )  # fmt: skip
    assert losses.isfinite().tolist() == [True, True, True, False, True]
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    rows = gradient.movedim(form[1], -1).isfinite().all(-1).tolist()
    assert rows == [True, True, True, False, True]
    if value != math.inf:
        assert losses[3].isnan()
        assert gradient.movedim(form[1], -1)[3].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@some_divergences
@every_kind
def test_masked_rows_may_hold_anything(backend, teacher_is, keywords, value):
    student, teacher = sides(teacher_is, 4, 40, torch.float32, torch.float32)
    teacher[1], student[2] = value, math.nan
    mask = torch.tensor([True, False, False, True])
    check = {"teacher_is": teacher_is, "mask": mask, **keywords}
    clean = student.clone(), teacher.clone()
    clean[0][2], clean[1][1] = 0.0, 0.5
    found = []
    for s, t in ((student, teacher), clean):
        s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
        side = GIVEN[teacher_is](t)
        loss = fastkd.soft_target_loss(s, side, mask=mask, backend=backend, **keywords)
        found.append((loss, *torch.autograd.grad(loss, (s, t))))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    check_soft_target(*clean, backend, **check)


@some_divergences
def test_probabilities_of_logits_are_the_logits(backend, keywords):
    """At temperature 1 and with rows that sum to 1, but for the teacher's gradient."""
    student, teacher = logits(9, 100).requires_grad_(), logits(9, 100)

    def gradient(teacher):
        loss = fastkd.soft_target_loss(
            student, teacher, temperature=2.0, backend=backend, **keywords
        )
        return loss, *torch.autograd.grad(loss, student)

    expected = gradient(2 * teacher)
    torch.testing.assert_close(gradient(fastkd.Probabilities(teacher.softmax(-1))), expected)
    torch.testing.assert_close(gradient(fastkd.LogProbabilities(teacher.log_softmax(-1))), expected)


@pytest.mark.parametrize("classes", [40, 1100])
@some_divergences
@every_kind
def test_inplace(backend, teacher_is, keywords, classes):
    student, teacher = sides(teacher_is, 9, classes, torch.float32, torch.float32)
    found = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        loss = fastkd.soft_target_loss(
            leaf * 1, GIVEN[teacher_is](teacher), inplace=inplace, backend=backend, **keywords
        )
        found.append((loss, *torch.autograd.grad(3 * loss, leaf)))
    torch.testing.assert_close(*found)


def test_parts(backend):
    student, teacher = sides("probabilities", 9, 40, torch.float32, torch.float32)
    labels = some_labels(9, classes=40)
    side = fastkd.Probabilities(teacher)
    parts = fastkd.distillation_loss(student, side, labels, return_parts=True, backend=backend)
    kept = labels != -100
    soft = fastkd.soft_target_loss(student, side, temperature=4.0, mask=kept, backend=backend)
    hard = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(parts.soft, soft)
    torch.testing.assert_close(parts.hard, hard)
    torch.testing.assert_close(parts.loss, 0.9 * soft + 0.1 * hard)

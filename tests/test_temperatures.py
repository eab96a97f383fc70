"""Temperatures that are tensors, or that differ between the sides, against the oracle."""

import math

import oracle
import pytest
import torch
from agreement import DTYPES, array, assert_loss
from agreement_logits import check_distillation, check_soft_target, logits, some_labels
from divergences import DIVERGENCES, FEW, name_of, sides
from temperatures import BAD, KINDS, of_kind
from torch.autograd import gradcheck, gradgradcheck

import fastkd

every_kind = pytest.mark.parametrize("kind", KINDS)
every_divergence = pytest.mark.parametrize("keywords", [{}, *DIVERGENCES], ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)


def precise(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@every_divergence
@every_kind
def test_kinds(backend, kind, keywords, dtype):
    heat = of_kind(kind, (9, 100), precise(dtype))
    student, teacher = sides(9, 100, dtype, dtype, **heat)
    check_soft_target(student, teacher, backend, **heat, **keywords)
    check_soft_target(student, teacher, backend, -3.0, scale_t2=False, **heat, **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@some_divergences
@every_kind
def test_reductions(backend, kind, keywords, reduction):
    heat = of_kind(kind, (9, 40))
    student, teacher = sides(9, 40, torch.float32, torch.bfloat16, **heat)
    keywords = {**keywords, **heat, "reduction": reduction}
    upstream = torch.randn(9) if reduction == "none" else 3.7
    check_soft_target(student, teacher, backend, upstream, **keywords)
    mask = torch.rand(9) < 0.5
    check_soft_target(student, teacher, backend, upstream, mask=mask, **keywords)


@pytest.mark.parametrize("classes", [2, 17, 1000, 1025, 4200])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_class_counts_and_dims(backend, keywords, dtype, classes):
    heat = of_kind("rows and rows", (9, classes), precise(dtype))
    student, teacher = sides(9, classes, dtype, dtype, **heat)
    check_soft_target(student, teacher, backend, **heat, **keywords)
    columns = student.t().contiguous(), teacher.t().contiguous()
    check_soft_target(*columns, backend, 3.0, dim=0, **heat, **keywords)
    images = [x.reshape(3, 3, classes).movedim(-1, 1) for x in (student, teacher)]
    heat = {name: t.reshape(3, 3) for name, t in heat.items()}
    check_soft_target(*images, backend, dim=1, reduction="none", **heat, **keywords)


@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_kind
def test_several_teachers(backend, kind, keywords, dtype, classes):
    heat = of_kind(kind, (9, classes), precise(dtype))
    student, *teachers = sides(9, classes, *[dtype] * 4, **heat)
    check_soft_target(student, teachers, backend, **heat, **keywords)
    if keywords.get("divergence") != "tvd":  # of whose kinks `sides` knows with equal weights
        keywords = {**keywords, "teacher_weights": [1, 0, 2]}
        check_soft_target(student, teachers, backend, **heat, **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
@every_kind
def test_with_labels(backend, kind, keywords, dtype, smoothing):
    heat = of_kind(kind, (9, 40), precise(dtype))
    student, teacher = sides(9, 40, dtype, dtype, **heat)
    labels = some_labels(9, classes=40)
    keywords = {**keywords, **heat, "label_smoothing": smoothing}
    check_distillation(student, teacher, labels, backend, 3.0, **keywords)
    check_distillation(student, teacher, labels, backend, reduction="none", **keywords)
    check_distillation(student, teacher, labels, backend, soft_weight=0.0, **keywords)


@some_divergences
@every_kind
def test_parts(backend, kind, keywords):
    student, teacher = logits(9, 40).requires_grad_(), logits(9, 40)
    labels = some_labels(9, classes=40)
    keywords = {**keywords, **of_kind(kind, student.shape)}
    for reduction in ("batchmean", "none"):
        keywords["reduction"] = reduction
        parts = fastkd.distillation_loss(
            student, teacher, labels, return_parts=True, backend=backend, **keywords
        )
        arrays = {k: array(v) if torch.is_tensor(v) else v for k, v in keywords.items()}
        expected, _ = oracle.distillation(*map(array, (student, teacher, labels)), **arrays)
        for part, value in zip(parts, expected, strict=True):
            assert_loss(part, value, (student, teacher), size=16.0)


@some_divergences
def test_one_temperature_for_all_is_the_number(backend, keywords):
    student, teacher = logits(9, 40).requires_grad_(), logits(9, 40).requires_grad_()
    expected = fastkd.soft_target_loss(
        student, teacher, temperature=2.0, backend=backend, **keywords
    )
    expected = expected, *torch.autograd.grad(expected, (student, teacher))
    two = torch.tensor(2.0)
    for heat in ((two, None), (two.expand(9), None), (2, two), (2, 2), (two, 2.0)):
        loss = fastkd.soft_target_loss(
            student, teacher, temperature=heat[0], teacher_temperature=heat[1], backend=backend,
            **keywords,
        )  # fmt: skip
        found = loss, *torch.autograd.grad(loss, (student, teacher))
        torch.testing.assert_close(found, expected)


def test_a_temperature_in_any_dtype(backend):
    """Its gradient has the same one."""
    student, teacher = logits(9, 40), logits(9, 40)
    for dtype in DTYPES:
        heat = torch.full((9,), 2.0, dtype=dtype, requires_grad=True)
        loss = fastkd.soft_target_loss(student, teacher, temperature=heat, backend=backend)
        loss.backward()
        assert loss.dtype == torch.float32
        assert heat.grad.dtype == dtype
        assert heat.grad.all()


@every_divergence
def test_only_the_temperature_learns(backend, keywords):
    student, teacher = logits(9, 40), logits(9, 40)
    heat = torch.tensor(2.0, requires_grad=True)

    def gradient(backend, **heat):
        loss = fastkd.soft_target_loss(student, teacher, backend=backend, **heat, **keywords)
        return torch.autograd.grad(loss, next(x for x in heat.values() if torch.is_tensor(x)))

    for one in ({"temperature": heat}, {"teacher_temperature": heat, "temperature": 3}):
        torch.testing.assert_close(gradient(backend, **one), gradient("reference", **one))


@some_divergences
def test_the_same_temperature_for_both_by_name(backend, keywords):
    """Its gradients add up."""
    student, teacher = logits(9, 40), logits(9, 40)
    heat = torch.tensor(2.0, requires_grad=True)
    found = []
    for own in (None, heat):
        loss = fastkd.soft_target_loss(
            student, teacher, temperature=heat, teacher_temperature=own, backend=backend, **keywords
        )
        found.append(torch.autograd.grad(loss, heat))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [1e4, -1e6])
@every_kind
def test_large_offsets(backend, kind, offset, dtype, classes):
    student, teacher = ((logits(9, classes) + x).to(dtype) for x in (offset, -offset))
    heat = of_kind(kind, student.shape, precise(dtype))
    check_soft_target(student, teacher, backend, **heat)
    check_soft_target(student, teacher, backend, divergence="reverse_kl", **heat)


@pytest.mark.parametrize("classes", [40, 1100])
@some_divergences
@every_kind
def test_excluded_classes(backend, kind, keywords, classes):
    """By the side that may exclude them: gradients of temperatures have no 0 times infinity."""
    heat = of_kind(kind, (9, classes))
    student, teacher = sides(9, classes, torch.float32, torch.float32, **heat)
    teacher[:, 3:9] = -math.inf
    if keywords.get("divergence") == "reverse_kl":
        student, teacher = teacher, student
    check_soft_target(student, teacher, backend, **heat, **keywords)


@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("mask", [-1e30, -3e38])
@pytest.mark.parametrize("heat", [(4.0, 0.25), (0.25, 4.0), (100.0, 0.01)])
def test_finite_masks(backend, heat, mask, classes):
    """A logit that leaves float32's range at the student's temperature is finite all the same."""
    student, teacher = logits(9, classes), logits(9, classes)
    teacher[:, 3:9] = mask
    student[:, 5:7] = mask
    teacher[2, :-1] = mask
    temperatures = dict(zip(("temperature", "teacher_temperature"), heat, strict=True))
    rows = {name: torch.full((9,), t) for name, t in temperatures.items()}
    for one in (temperatures, rows):
        check_soft_target(student, teacher, backend, **one)
        check_soft_target(student, teacher, backend, divergence="jsd", **one)


@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("keywords", [{}, {"divergence": "jsd"}], ids=str)
def test_finite_masks_far_beyond_the_range(backend, keywords, classes):
    """Also where they are scaled. Probabilities at such temperatures leave no gradient but one."""
    student, teacher = logits(9, classes), logits(9, classes)
    teacher[:, 3:9] = student[:, 5:7] = -3e38
    for heat in ((1e5, 1e-4), (torch.full((9,), 1e5), torch.full((9,), 1e-4))):
        temperatures = dict(zip(("temperature", "teacher_temperature"), heat, strict=True))
        check_soft_target(student, teacher, backend, teachers=False, **temperatures, **keywords)


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_rows(backend, kind):
    student, teacher = logits(9, 40), logits(9, 40)
    student[3, 5] = -math.inf
    keywords = {**of_kind(kind, student.shape), "reduction": "none", "backend": backend}
    loss = fastkd.soft_target_loss(student, teacher, **keywords)
    assert loss[3] == math.inf
    assert loss.isfinite().sum() == 8
    teacher[3, 5] = -math.inf
    assert fastkd.soft_target_loss(student, teacher, **keywords).isfinite().all()


@some_divergences
def test_temperatures_of_masked_rows_may_be_anything(backend, keywords):
    student, teacher = logits(4, 40).requires_grad_(), logits(4, 40).requires_grad_()
    mask = torch.tensor([True, False, True, False])
    found = []
    for other in (math.nan, 1.0):
        heat = torch.tensor([1.0, other, 2.0, -other]).requires_grad_()
        own = torch.tensor([3.0, -other, 2.0, other]).requires_grad_()
        loss = fastkd.soft_target_loss(
            student, teacher, temperature=heat, teacher_temperature=own, mask=mask,
            backend=backend, **keywords,
        )  # fmt: skip
        found.append((loss, *torch.autograd.grad(loss, (student, teacher, heat, own))))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert not found[0][3][~mask].any()


DERIVATIVES = [{}, {"reduction": "none", "dim": 1}, {"scale_t2": False}]


@pytest.mark.parametrize("others", DERIVATIVES, ids=str)
@pytest.mark.parametrize("teachers", [1, 2])
@some_divergences
def test_derivatives(backend, keywords, teachers, others):
    inputs = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(1 + teachers)]
    dim = others.get("dim", -1)
    inputs += of_kind("rows and scalar", inputs[0].shape, torch.float64, dim).values()
    inputs = [x.requires_grad_() for x in inputs]

    def loss(s, *others_of_it):
        *t, heat, own = others_of_it
        return fastkd.soft_target_loss(
            s, t, temperature=heat, teacher_temperature=own, backend=backend, **keywords, **others
        )

    assert gradcheck(loss, inputs)
    if backend == "reference":
        assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["temperature", "teacher_temperature"])
def test_values_out_of_range(backend, name, value):
    x = torch.randn(3, 5)
    for heat in (torch.tensor(value), torch.tensor([1.0, value, 2.0])):
        with pytest.raises(ValueError, match=f"{name} must be finite and > 0, got"):
            fastkd.soft_target_loss(x, x, backend=backend, **{name: heat})
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got"):
        fastkd.soft_target_loss(x, x, backend=backend, **{name: value})


WRONG = [
    (torch.ones(4), ValueError, r"without dim 1, \(3,\), got \(4,\)"),
    (torch.ones(3, 1), ValueError, r"got \(3, 1\)"),
    (torch.ones(3, dtype=torch.int64), TypeError, "must be float32, float16, .*, got torch.int64"),
    (torch.ones((), device="meta"), ValueError, "must be on the same device"),
    ("2", TypeError, "must be a number, got str"),
    ([1.0, 1.0, 1.0], TypeError, "must be a number, got list"),
]


@pytest.mark.parametrize(("value", "error", "words"), WRONG, ids=str)
@pytest.mark.parametrize("name", ["temperature", "teacher_temperature"])
def test_errors(name, value, error, words):
    x = torch.randn(3, 5)
    with pytest.raises(error, match=f"{name} .*{words}|student_logits and {name} {words}"):
        fastkd.soft_target_loss(x, x, **{name: value})
    with pytest.raises(error, match=words):
        fastkd.distillation_loss(x, x, torch.tensor([0, 1, 2]), **{name: value})


def test_empty_batch(backend):
    x, heat = torch.randn(0, 5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    loss = fastkd.soft_target_loss(x, x.detach(), temperature=heat, backend=backend)
    loss.backward()
    assert loss == 0
    assert heat.grad == 0

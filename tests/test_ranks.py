"""Classes that are split over ranks, which are threads here: any backend, against the oracle."""

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, edge_labels, logits, some_labels
from divergences import DIVERGENCES, FEW, name_of
from divergences import sides as apart
from probabilities import KINDS, sides
from split import Threads, whole
from temperatures import of_kind

import fastkd

every_divergence = pytest.mark.parametrize("keywords", [{}, *DIVERGENCES], ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)
SIZES = [1, 2, 3, 4]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@every_divergence
def test_divergences(backend, split, keywords, dtype, size):
    split(size)
    pair = apart(9, 100, dtype, dtype, temperature=2.0)
    check_soft_target(*pair, backend, temperature=2.0, **keywords)
    pair, upstream = apart(9, 100, dtype, dtype), torch.randn(9)
    check_soft_target(*pair, backend, upstream, reduction="none", **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32,) * 2])
@some_divergences
def test_rows_that_count(backend, split, keywords, dtypes, reduction):
    """Masked rows may hold NaN; weights learn."""
    split(3)
    student, teacher = apart(9, 40, *dtypes, temperature=3.0)
    mask = torch.rand(9) < 0.6
    student[~mask], teacher[~mask] = math.nan, math.inf
    upstream = torch.randn(9) if reduction == "none" else 3.7
    keywords = {"mask": mask, "reduction": reduction, "temperature": 3.0, **keywords}
    check_soft_target(student, teacher, backend, upstream, **keywords)
    weight = torch.rand(9)
    weight[0] = 0
    check_soft_target(student, teacher, backend, upstream, row_weight=weight, **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_labels(backend, split, keywords, dtype, smoothing):
    """Also at the borders of shards."""
    cuts = [5, 0, 30, 5]
    split(4, cuts)
    labels = torch.tensor([0, 4, 5, -100, 34, 35, 39, 20, 6])
    keywords = {"label_smoothing": smoothing, **keywords}
    pair = apart(9, 40, dtype, torch.float32, temperature=4.0)
    check_distillation(*pair, labels, backend, **keywords)
    keywords["temperature"], keywords["reduction"] = 1.0, "none"
    pair = apart(9, 40, dtype, torch.float32)
    check_distillation(*pair, labels, backend, torch.randn(9), **keywords)


@pytest.mark.parametrize("kind", ["scalar", "rows", "rows and number"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@some_divergences
def test_temperatures_that_learn(backend, split, keywords, dtype, kind):
    split(3)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    heat = of_kind(kind, (9, 40), precise)
    student, teacher = apart(9, 40, dtype, dtype, **heat)
    keywords = {**heat, **keywords}
    check_soft_target(student, teacher, backend, **keywords)
    labels = some_labels(9, classes=40)
    check_distillation(student, teacher, labels, backend, label_smoothing=0.1, **keywords)


@pytest.mark.parametrize("classes", [1, 2, 17, 1025, 4200])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_class_counts_and_dims(backend, split, keywords, dtype, classes):
    split(3)
    student, teacher = apart(6, classes, dtype, dtype, temperature=2.0)
    keywords = {**keywords, "temperature": 2.0}
    check_soft_target(student, teacher, backend, **keywords)
    columns = student.t().contiguous(), teacher.t().contiguous()
    check_soft_target(*columns, backend, 3.0, dim=0, **keywords)
    images = [x.reshape(2, 3, classes).movedim(-1, 1) for x in (student, teacher)]
    labels = edge_labels(6, classes).view(2, 3)
    check_distillation(*images, labels, backend, dim=1, reduction="none", **keywords)


@pytest.mark.parametrize("stored", [(40, 40), (40, 48), (56, 41)])
@some_divergences
def test_padded_classes(backend, split, keywords, stored):
    """Which a shard may have some of, or nothing else."""
    for size in SIZES[1:]:
        split(size)
        pair = apart(5, 33, torch.float32, torch.float32, temperature=2.0)
        more = zip(pair, stored, (math.nan, math.inf), strict=True)
        student, teacher = [F.pad(x, (0, size - 33), value=filled) for x, size, filled in more]
        of_call = {**keywords, "num_classes": 33, "temperature": 2.0}
        check_soft_target(student, teacher, backend, **of_call)
        labels = torch.tensor([0, 32, 16, -100, 31])
        check_distillation(student, teacher, labels, backend, label_smoothing=0.1, **of_call)


@pytest.mark.parametrize("dtype", DTYPES)
@every_divergence
def test_excluded_classes(backend, split, keywords, dtype):
    """Some, and all that a rank has, of one side and of both."""
    split(3, [10, 20, 10])
    student, teacher = apart(6, 40, dtype, dtype)
    student[0, ::3] = teacher[0, ::3] = -math.inf
    teacher[1, :10] = -math.inf
    student[2, :10] = -math.inf  # infinite for a KL divergence of one direction
    student[3, 10:30] = teacher[3, 10:30] = -math.inf
    student[4, :30] = teacher[4, :30] = -math.inf
    keywords = {**keywords, "reduction": "none"}
    check_soft_target(student, teacher, backend, torch.randn(6), teachers=False, **keywords)


@every_divergence
def test_peaked_rows(backend, split, keywords):
    """One class has nearly all of the mass, on one rank or on both."""
    split(2)
    for scale in (1e2, 1e4):
        student, teacher = logits(9, 64, scale=scale), logits(9, 64, scale=scale)
        teacher[:4] = student[:4] + 1e-2 * torch.randn(4, 64)
        check_soft_target(student, teacher, backend, teachers=False, **keywords)


@some_divergences
def test_infinite_rows(backend, split, keywords):
    """NaN on one rank is NaN on all, also where that rank has nothing else."""
    split(3, [1, 29, 10])
    student, teacher = logits(8, 40), logits(8, 40)
    student[0, 3], teacher[1, 15] = math.nan, math.nan
    student[2, 39], teacher[3, 0] = math.inf, math.inf
    student[4] = -math.inf
    student[6, 0], teacher[7, 0] = math.nan, math.nan
    student.requires_grad_()
    keywords = {**keywords, "reduction": "none", "backend": backend}
    loss = fastkd.soft_target_loss(student, teacher, **keywords)
    assert loss.isnan().tolist() == [True] * 5 + [False, True, True]
    (gradient,) = torch.autograd.grad(loss.nan_to_num().sum(), student)
    assert gradient[5].isfinite().all()


@pytest.mark.parametrize("teacher_is", KINDS)
@every_divergence
def test_probabilities(split, keywords, teacher_is):
    """Whose kernels refuse; so does an ensemble's."""
    split(3)
    student, teacher = sides(teacher_is, 9, 40, torch.float32, torch.float32)
    keywords = {**keywords, "teacher_is": teacher_is}
    check_soft_target(student, teacher, "reference", temperature=2.0, **keywords)
    labels = some_labels(9, classes=40)
    check_distillation(student, teacher, labels, "reference", label_smoothing=0.1, **keywords)


@every_divergence
def test_several_teachers(split, keywords):
    split(3)
    dtypes = torch.float32, torch.float32, torch.bfloat16
    student, *teachers = apart(9, 40, *dtypes, temperature=2.0)
    keywords = {**keywords, "teacher_weights": [1, 3], "temperature": 2.0}
    check_soft_target(student, teachers, "reference", **keywords)
    check_distillation(student, teachers, some_labels(9, classes=40), "reference", **keywords)


def test_ensembles_and_probabilities_are_for_the_reference(kernel_backend):
    student, p = logits(3, 10), fastkd.Probabilities(logits(3, 10).softmax(-1))
    for teacher in (p, [student, student]):
        with pytest.raises(
            fastkd.BackendUnavailableError,
            match="ensembles and probabilities are for the reference",
        ):
            whole("soft_target_loss", Threads(2))(student, teacher, backend=kernel_backend)


@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 10)])
def test_no_rows(backend, split, shape):
    split(2)
    check_soft_target(logits(*shape), logits(*shape), backend)


def test_every_row_ignored(backend, split):
    split(2)
    labels = torch.full((3,), -100)
    check_distillation(logits(3, 10), logits(3, 10), labels, backend, label_smoothing=0.1)


@some_divergences
def test_parts(backend, split, keywords):
    student, teacher = logits(9, 40).requires_grad_(), logits(9, 40)
    labels = some_labels(9, classes=40)
    keywords = {**keywords, "return_parts": True, "backend": backend, "normalizer": 7}
    expected = fastkd.distillation_loss(student, teacher, labels, **keywords)
    split(3)
    found = fastkd.distillation_loss(student, teacher, labels, **keywords)
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert not found.hard.requires_grad
    assert not found.soft.requires_grad


@some_divergences
def test_a_weight_of_0_switches_its_term_off(backend, split, keywords):
    split(2)
    student, teacher = logits(4, 10), logits(4, 10)
    labels = torch.tensor([1, 2, 3, 4])
    keywords = {**keywords, "backend": backend}
    teacher[0, 0] = math.nan
    loss = fastkd.distillation_loss(student, teacher, labels, soft_weight=0.0, **keywords)
    hard = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(loss, 0.1 * hard)

"""The reductions of soft targets with hard labels, against the oracle."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from agreement import DTYPES, array, assert_loss
from agreement_logits import check_distillation, logits

import fastkd

REDUCTIONS = ["none", "sum", "batchmean"]
# Long rows, rows of a vector's lanes, and rows that lie side by side.
SHAPES = [((9, 1500), -1), ((37, 20), -1), ((2, 19, 3, 5), 1), ((7, 6), 0)]


def draw(shape, dim, dtype=torch.float32, ignored=0.3):
    rows = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
    labels = torch.randint(shape[dim], rows).masked_fill(torch.rand(rows) < ignored, -100)
    return logits(*shape, dtype=dtype), logits(*shape, dtype=dtype), labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(backend, dtype, shape, dim, reduction, smoothing):
    student, teacher, labels = draw(shape, dim, dtype)
    keywords = {"reduction": reduction, "dim": dim, "label_smoothing": smoothing}
    upstream = torch.randn(labels.shape) if reduction == "none" else 3.7
    check_distillation(student, teacher, labels, backend, **keywords)
    check_distillation(student, teacher, labels, backend, upstream, **keywords)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_teachers(backend, dtype, shape, dim, reduction):
    student, teacher, labels = draw(shape, dim, dtype)
    teachers = [teacher, logits(*shape), logits(*shape, dtype=dtype)]
    upstream = torch.randn(labels.shape) if reduction == "none" else 3.7
    keywords = {"reduction": reduction, "dim": dim, "teacher_weights": [1, 2, 0.5]}
    check_distillation(student, teachers, labels, backend, upstream, **keywords)


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_parts_follow_the_reduction(backend, shape, dim, reduction, weights, teachers):
    student, teacher, labels = draw(shape, dim)
    teacher = [teacher, logits(*shape)][:teachers]
    keywords = {"reduction": reduction, "dim": dim, "label_smoothing": 0.1}
    keywords |= {"soft_weight": weights[0], "hard_weight": weights[1]}
    student.requires_grad_()
    parts = fastkd.distillation_loss(
        student, teacher, labels, return_parts=True, backend=backend, **keywords
    )
    expected, _ = oracle.distillation(
        array(student), [*map(array, teacher)], array(labels), **keywords
    )
    assert [part.requires_grad for part in parts] == [True, False, False]
    size = 17.0 * (labels.numel() if reduction == "sum" else 1)
    for part, value in zip(parts, expected, strict=True):
        assert_loss(part, value, (student,), size)
    alone = fastkd.distillation_loss(student, teacher, labels, backend=backend, **keywords)
    assert torch.equal(alone, parts.loss)


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("dim", [-1, 0])
def test_an_ignored_row_is_0_whatever_it_holds(backend, dim, teachers):
    sides = [logits(6, 10) for _ in range(1 + teachers)]
    labels = torch.tensor([1, -100, 2, 4, -100, 5])
    for poison in (math.nan, math.inf, -math.inf):
        for x in sides:
            x[1], x[4, 2] = poison, poison
        moved = [x.t().contiguous() if dim == 0 else x for x in sides]
        student, *others = (x.clone().requires_grad_() for x in moved)
        parts = fastkd.distillation_loss(
            student, others, labels, reduction="none", dim=dim, return_parts=True, backend=backend
        )
        for part in parts:
            assert part.isfinite().all()
            assert not part[labels == -100].any()
        parts.loss.sum().backward()
        for x in (student, *others):
            assert not x.grad.select(1 + dim, 1).any()
            assert x.grad.isfinite().all()


def test_an_infinite_row_spares_the_others(backend):
    student, teacher, labels = draw((5, 12), -1, ignored=0.0)
    student[2, 3] = -math.inf
    check_distillation(
        student, teacher, labels, backend, torch.randn(5), reduction="none", teachers=False
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_hard_term_is_torch_s(backend, reduction):
    student, teacher, labels = draw((2, 7, 4, 5), 1)
    actual = fastkd.distillation_loss(
        student, teacher, labels, soft_weight=0.0, hard_weight=1.0, dim=1, reduction=reduction,
        backend=backend,
    )  # fmt: skip
    name = "mean" if reduction == "batchmean" else reduction
    expected = F.cross_entropy(student.double(), labels, reduction=name).float()
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 10), (0, 10), (2, 0, 10)])
def test_all_ignored_and_empty(backend, shape, reduction):
    student, teacher = logits(*shape), logits(*shape)
    student[:1], teacher[:1] = math.nan, math.inf
    labels = torch.full(shape[:-1], -100)
    check_distillation(student, teacher, labels, backend, reduction=reduction)


@pytest.mark.parametrize("level", [-1e30, -1e10, 1e6, 1e12, 1e30])
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_level_of_the_logits_does_not_count(backend, dtype, shape, dim, level):
    """The logarithm of a row's sum is not added to a large logit before another is subtracted."""
    student, teacher, labels = draw(shape, dim, dtype)
    student = torch.full_like(student, level)
    keywords = {"soft_weight": 0.0, "hard_weight": 1.0, "dim": dim, "reduction": "none"}
    for teachers in (teacher, [teacher, teacher]):
        check_distillation(student, teachers, labels, backend, teachers=False, **keywords)

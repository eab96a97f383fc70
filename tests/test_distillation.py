"""Soft targets and hard labels together, against the oracle."""

import math

import layouts
import oracle
import pytest
import torch
import torch.nn.functional as F
from agreement import DTYPES, array, assert_loss
from agreement_logits import check_distillation, check_soft_target, edge_labels, logits, some_labels

import fastkd


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperatures_and_smoothing(backend, dtype, smoothing, temperature):
    student, teacher = logits(128, 100, dtype=dtype), logits(128, 100, dtype=dtype)
    labels = some_labels(128, classes=100)
    check_distillation(
        student, teacher, labels, backend, temperature=temperature, label_smoothing=smoothing
    )


@pytest.mark.parametrize(
    "weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (-0.5, 2.0), (3.0, -1.0), (1e3, 1e-3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights(backend, dtype, weights):
    student, teacher = logits(16, 50, dtype=dtype), logits(16, 50, dtype=dtype)
    soft, hard = weights
    labels = some_labels(16, classes=50)
    check_distillation(student, teacher, labels, backend, soft_weight=soft, hard_weight=hard)


@pytest.mark.parametrize("shape", [(5, 1), (5, 7), (5, 300), (5, 1100), (16, 5, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_terms_that_are_off(backend, dtype, shape):
    """Not even the NaN of a student that excludes every class."""
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    student[1] = -math.inf
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    keywords = {"soft_weight": 0.0, "hard_weight": 0.0, "dim": 1}
    check_distillation(student, teacher, labels, backend, **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_weight_0_switches_an_infinite_term_off(backend, weights, smoothing):
    student, teacher = logits(4, 10), logits(4, 10)
    # Both terms are infinite here, the cross-entropy through row 0 and the divergence through 1.
    student[0, 3], teacher[0, 3], student[1, 7] = -math.inf, -math.inf, -math.inf
    labels = torch.tensor([3, 1, 2, -100])
    soft, hard = weights
    keywords = {"soft_weight": soft, "hard_weight": hard, "label_smoothing": smoothing}
    check_distillation(student, teacher, labels, backend, teachers=not soft, **keywords)


def test_soft_weight_0_does_not_look_at_the_teacher(backend):
    student, teacher = logits(4, 10), logits(4, 10)
    teacher[1, 3], teacher[2, 4] = math.nan, math.inf
    labels = torch.tensor([3, 1, 2, -100])
    check_distillation(student, teacher, labels, backend, soft_weight=0.0, hard_weight=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_excluded_classes(backend, dtype):
    student, teacher = logits(6, 40, dtype=dtype), logits(6, 40, dtype=dtype)
    student[:3, ::4] = -math.inf
    teacher[:, ::2] = -math.inf
    check_distillation(student, teacher, torch.tensor([1, 3, 5, 0, 2, 4]), backend)
    # An excluded label is infinitely wrong, and so is smoothing over an excluded class.
    check_distillation(student, teacher, torch.tensor([0, 3, 5, 0, 2, 4]), backend)
    check_distillation(
        student, teacher, torch.tensor([1, 3, 5, 0, 2, 4]), backend, label_smoothing=0.1
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dim", [-1, 0])
def test_the_label_itself_is_excluded(backend, dim, smoothing):
    """Infinitely wrong, also where smoothing leaves the label no more than any other class."""
    student, teacher = logits(4, 4), logits(4, 4)
    student.fill_diagonal_(-math.inf)
    check_distillation(
        student, teacher, torch.arange(4), backend,
        dim=dim, label_smoothing=smoothing, teachers=False,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [1, 2, 31, 33, 256, 257, 1000, 1025, 4097, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_counts(backend, dtype, classes):
    rows = 3 if classes > 5000 else 21
    student, teacher = logits(rows, classes, dtype=dtype), logits(rows, classes, dtype=dtype)
    labels = torch.randint(classes, (rows,))
    labels[0], labels[1], labels[2] = 0, classes - 1, -100
    check_distillation(student, teacher, labels, backend, temperature=2.0)
    if classes > 1:
        check_distillation(student, teacher, labels, backend, label_smoothing=0.1, teachers=False)


@pytest.mark.parametrize("grad_output", [3.7, 1 / 3, 65536.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output(backend, dtype, grad_output):
    student, teacher = (logits(256, 100, dtype=dtype) for _ in range(2))
    check_distillation(student, teacher, some_labels(256, classes=100), backend, grad_output)


@pytest.mark.parametrize("layout", layouts.GENERAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_dims(backend, dtype, layout):
    for shape, dim in [((9, 37), -1), ((2, 5, 3, 4), 1), ((5, 3, 7), 0)]:
        student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
        rows = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
        labels = some_labels(*rows, classes=shape[dim])
        check_distillation(layout(student), teacher, labels, backend, dim=dim)
        check_distillation(student, layout(teacher), labels, backend, dim=dim)


def test_strided_labels(backend):
    student, teacher = logits(2, 9, 33), logits(2, 9, 33)
    labels = some_labels(9, 4, classes=33).t()[::2]
    check_distillation(student, teacher, labels, backend, temperature=2.0)
    check_distillation(student, teacher, labels[:1].expand(2, 9), backend, temperature=2.0)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_mixed_dtypes(backend, student_dtype, teacher_dtype):
    student, teacher = logits(8, 65, dtype=student_dtype), logits(8, 65, dtype=teacher_dtype)
    check_distillation(student, teacher, some_labels(8, classes=65), backend)


@pytest.mark.parametrize("kept", ["", "0", "6", "34", "0356"])
@pytest.mark.parametrize("classes", [40, 700, 2500])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_between_others(backend, teacher_dtype, classes, kept):
    student, teacher = logits(7, classes), logits(7, classes, dtype=teacher_dtype)
    labels = torch.full((7,), -100)
    for row in map(int, kept):
        labels[row] = torch.randint(classes, ())
    check_distillation(student, teacher, labels, backend, temperature=2.0)


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("ignore_index", [-100, 3, 0, -1, 9, 2**40])
def test_ignored_rows_may_hold_anything(backend, ignore_index, dim):
    for poison in (math.nan, math.inf, -math.inf):
        pair = logits(6, 10), logits(6, 10)
        labels = torch.tensor([1, ignore_index, 2, 4, ignore_index, 5])
        for x in pair:
            x[1], x[4, 2] = poison, poison
        pair = [x.t().contiguous() if dim == 0 else x for x in pair]
        keywords = {"ignore_index": ignore_index, "dim": dim}
        check_distillation(*pair, labels, backend, **keywords)
        leaves = [x.clone().requires_grad_() for x in pair]
        fastkd.distillation_loss(*leaves, labels, backend=backend, **keywords).backward()
        assert all((x.grad.select(1 + dim, row) == 0).all() for x in leaves for row in (1, 4))


@pytest.mark.parametrize("side", [0, 1])
def test_nan_in_a_kept_row(backend, side):
    pair = logits(6, 10), logits(6, 10)
    pair[side][3, 2] = math.nan
    labels = torch.tensor([1, 2, 3, 4, -100, 5])
    assert fastkd.distillation_loss(*pair, labels, backend=backend).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 10), (0, 10), (2, 0, 10)])
def test_all_ignored_and_empty(backend, dtype, shape):
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    student[:1], teacher[:1] = math.nan, math.inf
    labels = torch.full(shape[:-1], -100)
    parts = fastkd.distillation_loss(student, teacher, labels, return_parts=True, backend=backend)
    assert [part.item() for part in parts] == [0.0, 0.0, 0.0]
    check_distillation(student, teacher, labels, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.0, 1.0), (1.0, 0.0)])
def test_parts(backend, dtype, weights):
    student, teacher = logits(16, 100, dtype=dtype), logits(16, 100, dtype=dtype)
    student.requires_grad_()
    labels = some_labels(16, classes=100)
    keywords = {"soft_weight": weights[0], "hard_weight": weights[1], "label_smoothing": 0.1}
    parts = fastkd.distillation_loss(
        student, teacher, labels, return_parts=True, backend=backend, **keywords
    )
    expected, _ = oracle.distillation(array(student), array(teacher), array(labels), **keywords)
    assert isinstance(parts, fastkd.DistillationParts)
    assert parts.loss.requires_grad
    assert not parts.hard.requires_grad
    assert not parts.soft.requires_grad
    for part, value in zip(parts, expected, strict=True):
        assert_loss(part, value, (student, teacher), size=16.0)


def test_coincides_with_torch(backend):
    student, teacher = logits(16, 7, 5, 5), logits(16, 7, 5, 5)
    labels = some_labels(16, 5, 5, classes=7)
    actual = fastkd.distillation_loss(
        student, teacher, labels, soft_weight=0.0, hard_weight=1.0, label_smoothing=0.1, dim=1,
        backend=backend,
    )  # fmt: skip
    expected = F.cross_entropy(student, labels, label_smoothing=0.1)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


def test_without_labels_to_ignore_it_is_the_weighted_sum(backend):
    student, teacher, labels = logits(16, 30), logits(16, 30), torch.randint(30, (16,))
    actual = fastkd.distillation_loss(
        student, teacher, labels, temperature=3.0, soft_weight=0.7, hard_weight=2.0,
        backend=backend,
    )  # fmt: skip
    soft = fastkd.soft_target_loss(student, teacher, temperature=3.0, backend=backend)
    expected = 0.7 * soft + 2 * F.cross_entropy(student, labels)
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("shape", [(5, 20, 7, 7), (7, 30, 3, 3), (3, 900, 5, 5), (40, 9, 1, 2)])
def test_rows_side_by_side_in_short_runs(backend, shape, dtypes):
    student, teacher = (logits(*shape, dtype=dtype) for dtype in dtypes)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels[0] = -100
    keywords = {"dim": 1, "temperature": 2.0}
    check_distillation(student, teacher, labels, backend, **keywords)
    turned = layouts.channels_last(teacher)
    check_distillation(student, turned, labels, backend, **keywords, teachers=False)
    check_distillation(turned, student, labels, backend, **keywords, teachers=False)


@pytest.mark.parametrize("dim", [0, 3, 7])
def test_many_axes(backend, dim):
    """Axes of which no two are one stretch in both tensors."""
    shape = [2, 3, 2, 2, 3, 2, 2, 2]
    shape[dim] = 5
    evens_first = sorted(range(8), key=lambda axis: (axis % 2, axis))
    student, teacher = logits(*shape), logits(*[shape[axis] for axis in evens_first])
    teacher = teacher.permute(*[evens_first.index(axis) for axis in range(8)])
    labels = torch.randint(5, [size for axis, size in enumerate(shape) if axis != dim])
    check_soft_target(student, teacher, backend, dim=dim, temperature=2.0)
    check_distillation(teacher, student, labels, backend, dim=dim, temperature=2.0)


@pytest.mark.parametrize("distance", [2**30 + 64, 2**30 + 65])
@pytest.mark.parametrize("shape", [(4, 20), (4, 300), (4, 2100)])
def test_offsets_beyond_32_bits(backend, shape, distance):
    """Over 2³¹ elements from the first to the last, of rows that are apart or of classes."""
    far = layouts.far_apart(logits(*shape, dtype=torch.bfloat16), distance)
    near = logits(*shape, dtype=torch.bfloat16)
    turned = near.t().contiguous()
    for student, teacher in [
        *((far, near), (near, far), (far.t(), near.t()), (near.t(), far.t())),
        *((far.t(), turned), (turned, far.t())),
    ]:
        labels = edge_labels(*student.shape)
        check_distillation(student, teacher, labels, backend, temperature=2.0)
        check_soft_target(student.t(), teacher.t(), backend, dim=0, temperature=2.0)


@pytest.mark.parametrize("classes", [3, 7, 1100])
def test_smoothing_of_large_equal_logits(backend, classes):
    """Beside such logits nothing may be left of rounding their mean."""
    student = torch.full((5, classes), -1e30)
    labels = torch.arange(5) % classes
    check_distillation(
        student, logits(5, classes), labels, backend, label_smoothing=0.1, teachers=False
    )

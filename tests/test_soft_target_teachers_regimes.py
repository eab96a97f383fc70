"""Several teachers at the sizes and strides where a kernel takes another form or its work ends."""

import math

import layouts
import pytest
import torch
from agreement import array, assert_loss
from agreement_logits import check_distillation, check_soft_target, edge_labels, logits
from oracle import distillation

import fastkd

pytestmark = pytest.mark.gpu_sizes

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SIDES = [(F32, F32, F32), (BF16, BF16, BF16), (F32, BF16, F16)]

# Classes of each form on GPUs: a warp with one vector a thread and with several, a block, a larger
# one.
FORMS = (200, 900, 4000, 9001)
# And of a cluster, or what comes in its place.
LONG_FORMS = (*FORMS[2:], 40003)


def draw(rows, classes, dtypes):
    student, *teachers = (logits(rows, classes, dtype=dtype) for dtype in dtypes)
    return student, teachers


@pytest.mark.parametrize("dtypes", SIDES)
@pytest.mark.parametrize("most", [256, 1024, 6144, 8192, 12288])
def test_class_counts_around_a_form(backend, most, dtypes):
    for classes in (most - 1, most, most + 1):
        rows = 3 if most > 1024 else 9
        student, teachers = draw(rows, classes, dtypes)
        labels = edge_labels(rows, classes)
        labels[1] = -100
        check_distillation(
            student, teachers, labels, backend, temperature=1.0 + classes % 2, teachers=False
        )


@pytest.mark.with_clusters
@pytest.mark.parametrize("classes", [16384, 16385, 40003, 98309, 262144])
def test_rows_of_clusters(backend, classes):
    for dtypes in SIDES[1:]:
        student, teachers = draw(2, classes, dtypes)
        labels = edge_labels(2, classes)
        check_distillation(student, teachers, labels, backend, label_smoothing=0.1, teachers=False)


@pytest.mark.parametrize("dtypes", [*SIDES, (F64, F32, F64)])
def test_rows_that_no_block_holds(backend, dtypes):
    """Unless there are clusters."""
    student, teachers = draw(2, 16395, dtypes)
    check_soft_target(student, teachers, backend, reduction="none", teachers=False)


@pytest.mark.parametrize("dtypes", SIDES)
@pytest.mark.parametrize("classes", [250, 1021, 3001])
def test_rows_that_begin_at_each_alignment(backend, classes, dtypes):
    student, teachers = draw(3, classes, dtypes)
    labels = edge_labels(3, classes)
    # By how far apart the rows are: all at one alignment, or each at another.
    for starts, gap in [((1, 1, 1), 24), ((3, 0, 3), 24), ((0, 5, 2), 9)]:
        width = classes + gap + -classes % 16
        sides = [
            layouts.beginning_at(x, start, width)
            for x, start in zip((student, *teachers), starts, strict=True)
        ]
        check_distillation(sides[0], sides[1:], labels, backend, temperature=3.0, teachers=False)


@pytest.mark.parametrize("layout", [layouts.stepped, layouts.flat, layouts.expanded])
@pytest.mark.parametrize("classes", FORMS[1:])
def test_classes_that_are_apart(backend, classes, layout):
    student, teachers = draw(3, classes, SIDES[2])
    labels = edge_labels(3, classes)
    teachers[1] = layout(teachers[1])
    check_distillation(student, teachers, labels, backend, teachers=False)
    check_distillation(layout(student), teachers, labels, backend, teachers=False)


@pytest.mark.parametrize("dtypes", [*SIDES, (F64, F32, F64)])
@pytest.mark.parametrize("shape", [(2, 19, 65), (3, 5, 6, 7), (1, 70, 33)])
def test_rows_side_by_side(backend, shape, dtypes):
    student, *teachers = (logits(*shape, dtype=dtype) for dtype in dtypes)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels[0, 1] = -100
    keywords = {"dim": 1, "temperature": 2.0, "teachers": False}
    check_distillation(student, teachers, labels, backend, label_smoothing=0.1, **keywords)
    check_soft_target(student, teachers, backend, reduction="none", **keywords)
    teachers[0] = layouts.channels_last(teachers[0])
    check_distillation(student, teachers, labels, backend, 3.0, **keywords)


def test_more_labels_than_each_block_counts(backend):
    student, teachers = draw(8200, 3, SIDES[0])
    labels = torch.randint(3, (8200,))
    labels[::7] = -100
    check_distillation(student, teachers, labels, backend, teachers=False)


@pytest.mark.parametrize("classes", FORMS)
def test_parts_and_ignored_rows(backend, classes):
    """The first row, the last one, and one after the other."""
    student, teachers = draw(7, classes, SIDES[0])
    labels = edge_labels(7, classes)
    labels[[0, 2, 3, 6]] = -100
    student[3], teachers[0][2] = math.nan, math.inf
    arrays = array(student), [array(t) for t in teachers], array(labels)
    expected, _ = distillation(*arrays, temperature=3.0, label_smoothing=0.2)
    for requires_grad in (False, True):
        parts = fastkd.distillation_loss(
            student.detach().requires_grad_(requires_grad), teachers, labels, temperature=3.0,
            label_smoothing=0.2, return_parts=True, backend=backend,
        )  # fmt: skip
        for part, value in zip(parts, expected, strict=True):
            assert_loss(part, value, (student, *teachers), size=9.0)
    check_distillation(student, teachers, labels, backend, temperature=3.0, teachers=False)


@pytest.mark.parametrize("classes", FORMS)
def test_rows_that_are_not_finite(backend, classes):
    """Each row another one, so that what is wrong with one shows in no other."""
    student, teachers = draw(9, classes, SIDES[0])
    excluded, infinite = -math.inf, math.inf
    one, other = 3, classes - 2
    teachers[0][0, one] = excluded
    for x in (student, *teachers):
        x[1, one] = excluded
        x[2, : classes // 2] = excluded
    student[3, other] = excluded
    student[4, other], teachers[0][4, other], teachers[1][4, other] = excluded, excluded, -1e30
    teachers[1][5, one] = math.nan
    teachers[0][6, other] = infinite
    student[7, one] = teachers[0][7, one] = teachers[1][7, one] = excluded
    student[7, other] = math.nan
    teachers[0][8] = excluded
    upstream = torch.randn(9)
    check_soft_target(
        student, teachers, backend, upstream, reduction="none", temperature=2.0, teachers=False
    )


@pytest.mark.parametrize("dtypes", SIDES)
@pytest.mark.parametrize("classes", LONG_FORMS)
def test_shares_of_a_row_that_are_excluded(backend, classes, dtypes):
    """A quarter of a row is what some blocks, warps or threads have."""
    student, teachers = draw(6, classes, dtypes)
    quarter = classes // 4
    for x in (teachers[0], teachers[1], student):
        x[0, -quarter:] = x[1, :-3] = -math.inf
        x[2, 0], x[2, quarter], x[2, -1] = (-math.inf,) * 3
    teachers[0][3, :quarter] = teachers[1][3, -quarter:] = -math.inf
    teachers[0][4, 5:] = teachers[1][5, 1:] = -math.inf
    labels = torch.tensor([0, classes - 1, 1, quarter - 1, -100, 0])
    check_distillation(student, teachers, labels, backend, temperature=2.0, teachers=False)
    check_soft_target(student, teachers, backend, reduction="none", teachers=False)


@pytest.mark.parametrize("shift", [300.0, -300.0, 1e4])
@pytest.mark.parametrize("classes", LONG_FORMS)
def test_shares_of_a_row_far_from_each_other(backend, classes, shift):
    """What one part of the row amounts to is nothing, relative to the maximum of another."""
    student, teachers = draw(3, classes, SIDES[0])
    third = classes // 3
    teachers[0][0, :third] += shift
    teachers[1][0, -third:] += shift
    for x in (student, teachers[1]):
        x[1, third:-third] += shift
        x[2, :-third] += shift
    labels = torch.tensor([0, third, classes - 1])
    check_distillation(student, teachers, labels, backend, temperature=2.0, teachers=False)


@pytest.mark.parametrize("classes", LONG_FORMS)
def test_logits_beyond_the_short_arithmetic(backend, classes):
    """Some rows of a call: large offsets, differences that float32 hardly holds, or both."""
    student, teachers = draw(5, classes, SIDES[0])
    student[1] += 1e8
    teachers[0][1] -= 1e8
    student[2] *= 1e36
    teachers[1][3] *= 1e36
    teachers[0][4, classes // 2 :] += 3e6
    check_soft_target(student, teachers, backend, reduction="none", teachers=False)
    check_soft_target(student, teachers, backend, temperature=2.0, teachers=False)


def test_many_long_rows(backend):
    """So many that the losses of each block's rows are computed in several parts."""
    # A block of Triton's has one of them, however many there are.
    rows = 30 if backend == "triton" else 300
    student, teachers = draw(rows, 3100, SIDES[1])
    labels = edge_labels(rows, 3100)
    labels[2::7] = -100
    check_soft_target(student, teachers, backend, reduction="none", teachers=False)
    check_distillation(student, teachers, labels, backend, temperature=3.0, teachers=False)


@pytest.mark.parametrize("classes", [300, 6000])
def test_same_bits_again(kernel_backend, classes):
    """In another schedule where one can be chosen; and a grad_output does not change which."""
    student, teachers = draw(13, classes, SIDES[2])
    labels = edge_labels(13, classes)

    def run():
        leaf = student.detach().requires_grad_()
        loss = fastkd.distillation_loss(leaf, teachers, labels, backend=kernel_backend)
        return loss, *torch.autograd.grad(3 * loss, leaf)

    first, second = run(), run()
    assert all(map(torch.equal, first, second))

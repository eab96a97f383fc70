"""Logits at the sizes and strides where a kernel takes another form or a unit of its work ends."""

import inspect
import math

import layouts
import pytest
import shim
import torch
from agreement_logits import (
    check_distillation,
    check_parts,
    check_soft_target,
    edge_labels,
    logits,
    pair,
)

import fastkd
from fastkd.kernels import native
from fastkd.ops.soft_target_operators import STATISTICS
from fastkd.parameters import SoftTarget

pytestmark = pytest.mark.gpu_sizes

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (F32, BF16)]

# Most classes of a form on GPUs, by pairs of dtypes: of a warp, a block and a larger one; and of a
# large block in a cluster of 2, 4, 8 or 16, of which those of 16 bits have two forms.
SMALL_MOST = dict(
    zip(DTYPE_PAIRS, [(1024, 8192, 16384), (1024, 8192, 16384), (768, 6144, 12288)], strict=True)
)
CLUSTERS = (2, 4, 8, 16)
LARGE_BLOCKS = [
    *[((F32, F32), 16384), ((BF16, BF16), 16384)],
    *[((BF16, BF16), 20480), ((F32, BF16), 12288)],
]
# Classes of each form, the last one of which streams them.
SMALL_FORMS, LARGE_FORMS = (200, 900, 5000, 12000), (30000, 60000, 120000, 330000)
FORMS = SMALL_FORMS + LARGE_FORMS

every_form = pytest.mark.parametrize("classes", FORMS)
every_pair = pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
every_form_of_some_pair = pytest.mark.parametrize(
    ("classes", "dtypes"),
    [(classes, dtypes) for classes in SMALL_FORMS for dtypes in DTYPE_PAIRS]
    + [(classes, DTYPE_PAIRS[index % 3]) for index, classes in enumerate(LARGE_FORMS)],
)


def rows_of(classes):
    """More than are worked on at a time: warps, blocks and clusters come to a second row."""
    return 35 if classes < 2000 else 5 if classes < 50000 else 3


@pytest.mark.parametrize(
    ("most", "dtypes"),
    [(most, pair) for pair in DTYPE_PAIRS for most in (256, *SMALL_MOST[pair])],
)
def test_class_counts_around_a_form_of_small_rows(backend, most, dtypes):
    for classes in (most - 8, most - 1, most, most + 1, most + 8):
        tensors = pair(rows_of(classes), classes, dtypes)
        labels = edge_labels(len(tensors[0]), classes)
        labels[3] = -100
        check_soft_target(*tensors, backend, temperature=2.0, teachers=False)
        check_distillation(*tensors, labels, backend, temperature=1.0, teachers=False)
        check_distillation(*tensors, labels, backend, temperature=3.0, teachers=False)


@pytest.mark.with_clusters
@pytest.mark.parametrize(
    ("most", "dtypes"),
    [(blocks * most, pair) for pair, most in LARGE_BLOCKS for blocks in CLUSTERS],
)
def test_class_counts_around_a_form_of_large_rows(backend, most, dtypes):
    for index, classes in enumerate((most - 8, most - 1, most, most + 1, most + 8)):
        tensors = pair(2, classes, dtypes)
        if index % 2:
            check_soft_target(*tensors, backend, temperature=2.0, teachers=False)
        else:
            labels = edge_labels(2, classes)
            check_distillation(*tensors, labels, backend, temperature=3.0, teachers=False)


@pytest.mark.parametrize("dtypes", [(F16, F16), (BF16, F32), (F64, F64), (F16, F64)])
@pytest.mark.parametrize("classes", [257, 1025, 8193, 65537])
def test_other_dtypes(backend, classes, dtypes):
    tensors = pair(5, classes, dtypes)
    labels = edge_labels(5, classes)
    check_distillation(*tensors, labels, backend, temperature=3.0, teachers=classes < 65537)


@every_pair
@pytest.mark.parametrize("most", [128 * 4, 128 * 8])
def test_gradients_of_both_sides_around_a_unit(backend, most, dtypes):
    for classes in (most - 1, most, most + 1, 2 * most + 1):
        tensors = pair(5, classes, dtypes)
        labels = edge_labels(5, classes)
        check_soft_target(*tensors, backend, logits(5), temperature=2.0, reduction="none")
        check_distillation(*tensors, labels, backend, -2.0, temperature=2.0, label_smoothing=0.1)


def test_gradients_of_both_sides_of_a_large_row(backend):
    tensors = pair(2, 131073)
    check_distillation(*tensors, edge_labels(2, 131073), backend, temperature=2.0)


@every_pair
@pytest.mark.parametrize("classes", [250, 1021, 3001, 9001])
def test_rows_that_begin_at_each_alignment(backend, classes, dtypes):
    student, teacher = pair(rows_of(classes) // 2, classes, dtypes)
    labels = edge_labels(len(student), classes)
    # By how far apart the rows are: all at one alignment, or each at another.
    for first, other, gap in [(1, 1, 24), (7, 7, 17), (3, 0, 24), (0, 5, 9), (2, 6, 31)]:
        width = classes + gap + -classes % 16
        sides = (
            layouts.beginning_at(student, first, width),
            layouts.beginning_at(teacher, other, width),
        )
        keywords = {"temperature": 3.0, "label_smoothing": 0.1}
        check_parts(*sides, labels, backend, **keywords)
        check_distillation(*sides, labels, backend, teachers=first == 7, **keywords)


@every_form_of_some_pair
def test_odd_class_counts(backend, classes, dtypes):
    """Rows one after the other, of which each begins at another alignment in all tensors."""
    classes += 3
    tensors = pair(4, classes, dtypes)
    labels = edge_labels(4, classes, torch.randint(8, ()).item())
    check_distillation(*tensors, labels, backend, temperature=2.0, teachers=False)
    check_soft_target(*tensors, backend, temperature=2.0, teachers=False)


@every_form
def test_classes_that_are_apart(backend, classes):
    student, teacher = pair(2, classes, (F32, BF16))
    labels = edge_labels(2, classes)
    keywords = {"temperature": 2.0, "label_smoothing": 0.1, "teachers": classes < 1000}
    check_distillation(layouts.stepped(student), teacher, labels, backend, **keywords)
    check_distillation(student, layouts.stepped(teacher), labels, backend, **keywords)


@every_form
def test_one_row_for_all(backend, classes):
    student, teacher = pair(rows_of(classes), classes)
    labels = edge_labels(len(student), classes)
    check_distillation(layouts.expanded(student), teacher, labels, backend, teachers=False)
    check_soft_target(student, layouts.expanded(teacher), backend, teachers=False)


@pytest.mark.parametrize(("smoothing", "temperature"), [(0.0, 1.0), (0.1, 3.0), (1.0, 1.0)])
@every_form
def test_parts_with_and_without_a_gradient(backend, classes, smoothing, temperature):
    tensors = pair(2, classes, (BF16, BF16))
    labels = edge_labels(2, classes)
    check_parts(*tensors, labels, backend, temperature=temperature, label_smoothing=smoothing)


@every_form
def test_losses_of_rows(backend, classes):
    tensors = pair(rows_of(classes), classes)
    check_soft_target(*tensors, backend, reduction="none", temperature=2.0, teachers=False)


IGNORED = {
    "the first": slice(0, 1),
    "the last": slice(-1, None),
    "every other": slice(0, None, 2),
    "the others": slice(1, None, 2),
    "all but one": slice(0, -1),
    "all": slice(None),
}


@pytest.mark.parametrize("ignored", IGNORED.values(), ids=IGNORED)
@every_form
def test_ignored_rows(backend, classes, ignored):
    rows = min(rows_of(classes), 5)
    student, teacher = pair(rows, classes)
    labels = edge_labels(rows, classes)
    labels[ignored] = -100
    student[ignored], teacher[ignored, -1] = math.nan, math.inf
    check_distillation(student, teacher, labels, backend, temperature=2.0, teachers=False)


@every_form_of_some_pair
def test_shares_of_a_row_that_are_excluded(backend, classes, dtypes):
    """A quarter of a row is what some blocks, warps or threads have."""
    student, teacher = pair(6, classes, dtypes)
    quarter = classes // 4
    quarters = [slice(i * quarter, (i + 1) * quarter) for i in range(4)]
    teacher[0, quarters[0]] = -math.inf
    teacher[1, quarters[3]] = student[1, quarters[3]] = -math.inf
    teacher[2, quarter:] = student[2, quarter:] = -math.inf
    teacher[3, :-3] = student[3, :-3] = -math.inf
    teacher[4, 5:] = -math.inf
    labels = torch.tensor([0, 1, quarter - 1, classes - 1, classes - 2, 0])
    check_distillation(student, teacher, labels, backend, temperature=2.0, teachers=False)
    check_soft_target(student, teacher, backend, temperature=2.0, reduction="none", teachers=False)
    student[5, quarters[2]] = -math.inf
    check_soft_target(student, teacher, backend, temperature=2.0, teachers=False)


@pytest.mark.parametrize("shift", [300.0, -300.0])
@every_form
def test_shares_of_a_row_far_from_each_other(backend, classes, shift):
    """What one part of the row amounts to is nothing, relative to the maximum of another."""
    student, teacher = pair(3, classes, (BF16, F32))
    third = classes // 3
    student[0, :third] += shift
    teacher[1, -third:] += shift
    student[2, third:-third] += shift
    teacher[2, third:-third] += shift
    labels = torch.tensor([0, third, classes - 1])
    check_distillation(student, teacher, labels, backend, temperature=2.0, teachers=False)


@every_form
def test_excluded_class_of_underflowing_probability(backend, classes):
    """The divergence is infinite and never NaN, whether the class's share of the row has the
    maximum or another one does."""
    student, teacher = pair(3, classes)
    teacher[:, 1:] -= 1000
    student[0, -1] = student[1, 1] = -math.inf
    check_soft_target(student, teacher, backend, reduction="none", teachers=False)
    check_soft_target(student, teacher, backend, teachers=False)


@pytest.mark.parametrize("classes", [5000, 30000])
def test_logits_beyond_the_short_arithmetic(backend, classes):
    """Some rows of a call: large offsets, differences that float32 hardly holds, or both."""
    student, teacher = pair(5, classes)
    student[1] += 1e8
    teacher[1] -= 1e8
    student[2] *= 1e36
    teacher[3] *= 1e36
    check_soft_target(student, teacher, backend, reduction="none", teachers=False)
    check_soft_target(student, teacher, backend, temperature=2.0, teachers=False)


def test_many_long_rows(backend):
    """So many that the losses of each block's rows are computed in several parts."""
    tensors = pair(400, 3100, (BF16, BF16))
    labels = edge_labels(400, 3100)
    labels[2::7] = -100
    check_soft_target(*tensors, backend, reduction="none", temperature=2.0, teachers=False)
    check_distillation(*tensors, labels, backend, temperature=3.0, teachers=False)


@pytest.mark.parametrize(("side", "value"), [(0, math.nan), (1, math.nan), (0, math.inf)])
@every_form
def test_nan_in_one_share_of_a_row(backend, classes, side, value):
    tensors = pair(3, classes)
    tensors[side][1, 3 * classes // 4] = value
    losses = fastkd.soft_target_loss(*tensors, reduction="none", backend=backend)
    assert losses.isnan().tolist() == [False, True, False]
    check_soft_target(*tensors, backend, temperature=2.0, teachers=False)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("rows", [8191, 8192, 8193, 9001])
def test_many_labels(backend, rows, dim):
    tensors = [x.t().contiguous() if dim == 0 else x for x in pair(rows, 3)]
    labels = torch.randint(3, (rows,))
    labels[torch.rand(rows) < 0.4] = -100
    keywords = {"dim": dim, "temperature": 2.0}
    check_distillation(*tensors, labels, backend, teachers=False, **keywords)
    check_parts(*tensors, labels, backend, **keywords)
    labels[:-1] = -100
    check_parts(*tensors, labels, backend, **keywords)


@pytest.mark.parametrize("dtype", [F32, BF16])
@every_form
def test_repeated_calls_are_bitwise_equal(kernel_backend, classes, dtype):
    rows = rows_of(classes)
    student, teacher = pair(rows, classes, (dtype, dtype))
    labels = edge_labels(rows, classes)
    labels[1] = -100
    student.requires_grad_()
    first = None
    for seed in range(3):
        shim.set_schedule(seed)
        loss = fastkd.distillation_loss(
            student, teacher, labels, temperature=2.0, label_smoothing=0.1, backend=kernel_backend
        )
        results = [loss.detach(), *torch.autograd.grad(loss, student)]
        first = first or results
        assert all(map(torch.equal, results, first))


# Elsewhere such a label is an error before a kernel sees it.
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("wrong", [-1, "classes", 2**32 + 1])
@every_form
def test_labels_that_are_no_class(classes, wrong, dim):
    student, teacher = (x.t().contiguous() if dim == 0 else x for x in pair(3, classes))
    labels = edge_labels(3, classes)
    labels[1] = classes if wrong == "classes" else wrong
    p = SoftTarget(
        temperature=2.0,
        teacher_temperature=2.0,
        soft_weight=1.0,
        hard_weight=0.5,
        label_smoothing=0.1,
        ignore_index=-100,
        labels_are_classes=True,
        divergence="forward_kl",
        beta=0.5,
        reduction="none",
        dim=dim,
        weights=(1.0,),
        num_classes=None,
        backend="native",
        teacher_is="logits",
        all_classes=0,
        softcap=0.0,
        teacher_softcap=0.0,
    )
    loss, gradient = student.new_empty(3), torch.empty_like(student)
    statistics = student.new_empty(3 * STATISTICS + 1)
    forward = inspect.unwrap(native.soft_target_forward)
    forward(student, [teacher], labels, loss, None, statistics, gradient, p)
    again = torch.empty_like(student)
    ones = torch.ones(3)
    native.soft_target_backward(ones, student, [teacher], labels, statistics, again, None, p)
    wanted = [False, True, False]
    assert loss.isnan().tolist() == wanted
    for x in (gradient, again):
        rows = x.movedim(dim, -1)
        assert rows.isnan().all(-1).tolist() == rows.isnan().any(-1).tolist() == wanted

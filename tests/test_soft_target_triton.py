"""Soft targets in Triton's kernels: where tiles end, and what launchers promise besides losses."""

import math

import layouts
import oracle
import pytest
import torch
from agreement import DTYPES, array, assert_gradient, assert_loss
from agreement_logits import check_distillation, check_soft_target, logits
from conftest import BACKENDS
from extremes import rising
from triton_calls import HARD, SUM, around

from fastkd.ops.soft_target_operators import STATISTICS
from fastkd.precision import compute_dtype
from fastkd.reference.scaled import LOGIT_SCALE

if "triton" not in BACKENDS:
    pytest.skip("triton is not under test", allow_module_level=True)

from fastkd.kernels.triton import reduction, soft_target
from fastkd.kernels.triton.rows import SEVERAL, SIDE_BY_SIDE, WHOLE, plan


def forward(student, teacher, labels=None, p=SUM, gradient=None, parts=None):
    """The loss and the statistics; and the gradient and the parts, if there are any to fill."""
    dtype = compute_dtype(student, teacher)
    rows = student.shape[: p.dim] + student.shape[p.dim + 1 :]
    loss = torch.empty(rows if p.reduction == "none" else (), dtype=dtype)
    statistics = torch.empty(math.prod(rows) * STATISTICS + 1, dtype=dtype)
    soft_target.soft_target_forward(
        student, [teacher], labels, loss, parts, statistics, gradient, p
    )
    return loss, statistics


def expected_gradients(student, teacher, grad_output=1.0):
    """Of SUM, to the student and to the teacher."""
    grad_output = array(torch.as_tensor(grad_output, dtype=torch.float64))
    return oracle.soft_target(
        array(student), array(teacher), grad_output, temperature=2.0, reduction="sum"
    )[1]


@pytest.mark.parametrize("classes", around(32, 512, 1024, WHOLE // 2, WHOLE, WHOLE + WHOLE // 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ends_of_rows(dtype, classes):
    student, teacher = (logits(2, classes, dtype=dtype) for _ in range(2))
    labels = torch.tensor([classes - 1, max(classes - 2, 0)])
    check_distillation(student, teacher, labels, "triton", label_smoothing=0.1, temperature=2.0)


@pytest.mark.parametrize("classes", around(1, SIDE_BY_SIDE, 2 * SIDE_BY_SIDE)[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_of_classes_apart(dtype, classes):
    student, teacher = (logits(3, classes, 35, dtype=dtype) for _ in range(2))
    labels = torch.randint(classes, (3, 35))
    labels[0, :2] = classes - 1
    check_distillation(student, teacher, labels, "triton", dim=1, label_smoothing=0.1)


@pytest.mark.parametrize("rows", [1, *around(SEVERAL // 32, SEVERAL // 16)[:-1]])
@pytest.mark.parametrize("classes", [10, 32])
def test_ends_of_tiles_of_rows(rows, classes):
    for dim, shape in [(1, (rows, classes)), (0, (classes, rows)), (1, (3, classes, rows))]:
        student, teacher = logits(*shape), logits(*shape)
        check_soft_target(student, teacher, "triton", reduction="none", dim=dim, temperature=2.0)


@pytest.mark.parametrize("classes", [20, 70, 5000])
def test_maxima_that_grow_from_block_to_block(classes):
    """And fall: whatever was summed before is brought to the new maximum, or is nothing to it."""
    student, teacher = rising(classes)
    student[2, :9], teacher[2, :9] = -math.inf, -math.inf
    labels = torch.tensor([0, classes - 1, classes // 2, 1])
    for sides, dim in [((student, teacher), 1), ((student.t(), teacher.t()), 0)]:
        pair = [x.contiguous() for x in sides]
        keywords = {"label_smoothing": 0.1, "dim": dim, "temperature": 2.0, "teachers": False}
        check_distillation(*pair, labels.masked_fill(labels == 0, 2), "triton", **keywords)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("classes", [70, 5000])
def test_infinite_rows_stay_so_whatever_becomes_of_their_mass(classes, dim):
    """The student excludes a class that the teacher's later maxima leave nothing of."""
    student, teacher = logits(3, classes), logits(3, classes)
    teacher[:, -1] += 1000
    student[1, 3] = -math.inf
    pair = [x if dim == 1 else x.t().contiguous() for x in (student, teacher)]
    check_soft_target(*pair, "triton", dim=dim, reduction="none", teachers=False)


@pytest.mark.parametrize("classes", [5, 40])
def test_students_that_overlap(classes):
    teacher = logits(3, 4, classes)
    for strides in [(1, 1, 1), (3, 0, 2), (0, 0, 0), (0, 1, 6), (2, 1, 0), (1, 0, 4)]:
        student = logits(4 * classes * 6).as_strided((3, 4, classes), strides)
        for dim in (1, 2):
            check_soft_target(student, teacher, "triton", dim=dim, temperature=2.0)
            check_soft_target(teacher, student, "triton", dim=dim, temperature=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [33, 1000, 4104])
def test_rows_that_start_anywhere(dtype, classes):
    """Accesses are as wide as the alignment that all rows of all tensors have."""
    for step in (1, 2, 4, 8):
        width = classes + step
        student, teacher = (logits(2, width, dtype=dtype)[:, step:] for _ in range(2))
        gradient = torch.empty(2, width + 8, dtype=dtype)[:, 8 : 8 + classes]
        loss, _ = forward(student, teacher, gradient=gradient)
        value, (to_student, _) = oracle.soft_target(
            array(student), array(teacher), temperature=2.0, reduction="sum"
        )
        assert_loss(loss, value, (student, teacher), size=8.0)
        assert_gradient(gradient, to_student)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 70, 5000])
def test_gradients_in_the_students_place(dtype, classes):
    student, teacher = logits(3, classes, dtype=dtype), logits(3, classes)
    expected = expected_gradients(student, teacher)[0]
    if classes <= WHOLE:
        forward(student, teacher, gradient=student)
    else:
        _, statistics = forward(student, teacher)
        soft_target.soft_target_backward(
            torch.ones(()), student, [teacher], None, statistics, student, None, SUM
        )
    assert_gradient(student, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 5000])
def test_nothing_to_do_in_place(dtype, classes):
    """Nothing is read either: gradients of NaN would be NaN."""
    student, teacher = logits(3, classes, dtype=dtype), logits(3, classes)
    _, statistics = forward(student, teacher)
    nothing = torch.full((3, classes), math.nan)
    gradient = logits(3, classes, dtype=dtype)
    before = gradient.clone()
    for upstream in (torch.ones(()), torch.ones((), dtype=torch.float64)):
        soft_target.soft_target_backward(
            upstream, nothing.to(dtype), [nothing], None, torch.full_like(statistics, math.nan),
            gradient, None, SUM, upstream,
        )  # fmt: skip
        assert torch.equal(gradient, before)
    soft_target.soft_target_backward(
        torch.tensor(3.0),
        *(student, [teacher], None, statistics, gradient, None, SUM),
        in_place=torch.tensor(3.0),
    )
    assert_gradient(gradient, expected_gradients(student, teacher, 3.0)[0])


def test_gradients_that_are_not_wanted():
    student, teacher = logits(3, 40), logits(3, 40)
    _, statistics = forward(student, teacher)
    expected = expected_gradients(student, teacher, 2.0)
    for wanted in ((True, False), (False, True), (True, True)):
        to = [torch.empty(3, 40) if one else None for one in wanted]
        soft_target.soft_target_backward(
            torch.tensor(2.0), student, [teacher], None, statistics, *to, SUM
        )
        for gradient, one in zip(to, expected, strict=True):
            if gradient is not None:
                assert_gradient(gradient, one)


def test_only_what_is_wanted_is_launched(monkeypatch):
    """Rows are counted where a gradient is divided by them, and summed where there is a sum."""
    launched = []

    def launch(kernel, *args, **constants):
        launched.append(kernel.__name__)

    for module in (reduction, soft_target):
        monkeypatch.setattr(module, "launch", launch)
    student, labels = logits(3, 4), torch.zeros(3, dtype=torch.int64)
    for args, p, kernels in [
        ((None, torch.empty(()), None), SUM, "logits_forward finalize"),
        ((None, torch.empty(3), None), SUM._replace(reduction="none"), "logits_forward"),
        ((labels, torch.empty(()), None), HARD, "logits_forward finalize"),
        ((labels, torch.empty(()), student), HARD, "count logits_forward finalize"),
    ]:
        launched.clear()
        labels_or_none, loss, gradient = args
        soft_target.soft_target_forward(
            student, [student], labels_or_none, loss, None, None, gradient, p
        )
        assert launched == kernels.split()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output_of_any_dtype_and_strides(dtype):
    student, teacher = logits(4, 7, 5), logits(4, 7, 5)
    p = SUM._replace(reduction="none")
    _, statistics = forward(student, teacher, p=p)
    for upstream in (
        logits(5, 4, dtype=dtype).t(),
        layouts.stepped(logits(4, 5, dtype=dtype)),
        torch.ones((), dtype=dtype).expand(4, 5),
        logits(4, 1, dtype=dtype).expand(4, 5),
    ):
        to = torch.empty_like(student), torch.empty_like(teacher)
        soft_target.soft_target_backward(upstream, student, [teacher], None, statistics, *to, p)
        _, expected = oracle.soft_target(
            array(student), array(teacher), array(upstream),
            temperature=2.0, reduction="none", dim=1,
        )  # fmt: skip
        for gradient, one in zip(to, expected, strict=True):
            assert_gradient(gradient, one)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize("wrong", [-1, 10**4, 2**31, -(2**40), 2**62])
def test_labels_that_are_no_classes(wrong, classes, smoothing):
    """Such a row is NaN, whatever the label; no memory is touched for it, and no other row."""
    student, teacher = logits(4, classes), logits(4, classes)
    labels = torch.tensor([1, wrong, -100, 2])
    p = HARD._replace(reduction="none", label_smoothing=smoothing)
    loss, statistics = forward(student, teacher, labels, p)
    assert loss.isnan().tolist() == [False, True, False, False]
    cross_entropies = statistics[:-1].view(4, STATISTICS)[:, 6]
    assert cross_entropies.isnan().tolist() == [False, True, False, False]
    gradient, again = torch.empty_like(student), torch.empty_like(student)
    loss, statistics = forward(student, teacher, labels, p._replace(reduction="sum"), gradient)
    soft_target.soft_target_backward(
        torch.ones(()), student, [teacher], labels, statistics, again, None,
        p._replace(reduction="sum"),
    )  # fmt: skip
    assert loss.isnan()
    for g in (gradient, again):
        assert g.isnan().all(1).tolist() == [False, True, False, False]
        assert g[[0, 2, 3]].isfinite().all()
    # Of a term that is off nothing shows.
    off = p._replace(hard_weight=0.0, reduction="sum")
    loss, _ = forward(student, teacher, labels, off, gradient)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [10, 5000])
def test_statistics_and_parts(classes):
    """Ignored rows have none, and do not count."""
    student, teacher = logits(5, classes), logits(5, classes)
    labels = torch.tensor([1, -100, 3, -100, 0])
    parts = torch.empty(2)
    loss, statistics = forward(student, teacher, labels, HARD, parts=parts)
    rows, (hard, soft) = statistics[:-1].view(5, STATISTICS), parts
    assert statistics[-1] == 3
    assert (rows[[1, 3]] == 0).all()
    torch.testing.assert_close(rows[:, 0], student.amax(1).where(labels >= 0, 0))
    torch.testing.assert_close(rows[:, 5].sum() / 3 / LOGIT_SCALE * 4, soft)
    torch.testing.assert_close(rows[:, 6].sum() / 3 / LOGIT_SCALE, hard)
    torch.testing.assert_close(loss, 0.9 * soft + 0.1 * hard)


@pytest.mark.parametrize("kept", [0, 1, 7])
def test_counts_of_labels(kept):
    """A program counts a stretch; several leave their counts to be added up."""
    for rows in around(reduction._LABELS):
        labels = torch.full((rows,), -100)
        labels[torch.randperm(rows, device="cpu")[:kept]] = torch.arange(kept)
        labels[-1:] = -100
        labels[-1] = 5
        expected = int((labels != -100).sum())
        assert reduction.count_kept(labels, torch.empty(1), -100) == expected


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("classes", [5, 3001])
def test_offsets_beyond_31_bits(tmp_path, classes, dim):
    """Rows or classes 2³⁰ elements apart, in memory of which hardly a page is touched."""
    shape, strides, length = (3, 2, 5), (2**30, 7, 1), 2**31 + 64
    if dim == 1:
        shape, strides = (2, 3, 5), (7, 2**30, 1)
    elif classes > 5:
        shape, strides, length = (3, 1, classes), (2**30, 1, 1), 2**31 + classes
    if torch.get_default_device().type == "cpu":
        file = str(tmp_path / "sparse")
        memory = torch.from_file(file, shared=True, size=length, dtype=torch.float16)
    else:
        memory = torch.empty(length, dtype=torch.float16)
    student = memory.as_strided(shape, strides).copy_(logits(*shape))
    teacher = logits(*shape)
    labels = torch.full([size for d, size in enumerate(shape) if d != dim], shape[dim] - 1)
    check_distillation(student, teacher, labels, "triton", dim=dim)
    _, statistics = forward(student, teacher, p=SUM._replace(dim=dim))
    expected = oracle.soft_target(
        array(student), array(teacher), temperature=2.0, reduction="sum", dim=dim
    )[1][0]
    before = student.clone()
    forward(before, teacher, p=SUM._replace(dim=dim), gradient=student)
    assert_gradient(student, expected)
    student.copy_(before)
    soft_target.soft_target_backward(
        torch.ones(()), before, [teacher], None, statistics, student, None, SUM._replace(dim=dim)
    )
    assert_gradient(student, expected)


def test_one_kernel_for_any_batch_size():
    """Tiles, which kernels are compiled for, have the same shape."""
    for classes in (5, 100, 1000, 5000):
        for dim in (1, 2):
            tiles = set()
            for batch in (2, 3, 64, 100):
                shape = (batch, classes, 7) if dim == 1 else (batch, 7, classes)
                x = torch.empty(shape, device="meta")
                strides = (x.stride(),) * 3
                tiles.add(str(plan(x.shape, strides, (0, 0), dim, x.dtype).tile))
            assert len(tiles) == 1

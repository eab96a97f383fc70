"""Metrics of rows of logits, against the oracle, in every dtype, layout and size."""

import itertools
import math

import layouts
import oracle_metrics
import pytest
import torch
from agreement import DTYPES, array
from agreement_logits import check_metrics, logits, pair

import fastkd

TEMPERATURES = [(1.0, None), (0.5, None), (4.0, None), (2.0, 0.5), (1.0, 4.0)]


def keywords_of(temperatures):
    return dict(zip(("temperature", "teacher_temperature"), temperatures, strict=True))


def padded(x, classes, dim=-1):
    """With so many classes more, which are NaN."""
    shape = [*x.shape]
    shape[dim] += classes
    wide = x.new_full(shape, math.nan)
    wide.narrow(dim, 0, x.shape[dim]).copy_(x)
    return wide


def test_the_oracle_is_what_torch_computes():
    student, teacher = pair(7, 30, (torch.float64, torch.float64))
    found, _ = oracle_metrics.distillation_metrics(
        array(student), array(teacher), temperature=2.0, teacher_temperature=3.0
    )
    q, p = (
        torch.distributions.Categorical(logits=x / t)
        for x, t in ((student, 2.0), (teacher, 3.0))
    )  # fmt: skip
    of_torch = {
        "student_log_sum_exp": (student / 2).logsumexp(-1),
        "teacher_log_sum_exp": (teacher / 3).logsumexp(-1),
        "student_entropy": q.entropy(),
        "teacher_entropy": p.entropy(),
        "student_argmax": student.argmax(-1),
        "teacher_argmax": teacher.argmax(-1),
        "forward_kl": torch.distributions.kl_divergence(p, q),
        "reverse_kl": torch.distributions.kl_divergence(q, p),
        "overlap": 1 - (p.probs - q.probs).abs().sum(-1) / 2,
    }
    assert [*found] == [*of_torch]
    for name, value in of_torch.items():
        torch.testing.assert_close(torch.from_numpy(found[name]), value.cpu())


@pytest.mark.parametrize("dtypes", [*itertools.product(DTYPES, DTYPES)], ids=str)
def test_dtypes(backend, dtypes):
    for temperatures in TEMPERATURES:
        for classes in (40, 1100):
            check_metrics(*pair(9, classes, dtypes), backend, **keywords_of(temperatures))


@pytest.mark.parametrize("temperatures", [*TEMPERATURES, (0.01, None), (1e4, None), (1e3, 0.1)])
def test_temperatures(backend, temperatures):
    for dtype in DTYPES:
        check_metrics(*pair(5, 300, (dtype, dtype)), backend, **keywords_of(temperatures))


@pytest.mark.parametrize(
    "classes", [1, 2, 3, 7, 8, 16, 31, 33, 100, 127, 257, 1000, 1023, 1025, 4097, 10007, 32000]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_counts(backend, classes, dtype):
    check_metrics(*pair(3, classes, (dtype, dtype)), backend, temperature=2.0)


@pytest.mark.parametrize("classes", [50257, 128256, 151936])
def test_vocabularies(backend, classes):
    """Of language models, whose logits are in half precision."""
    student, teacher = pair(2, classes, (torch.bfloat16, torch.bfloat16))
    check_metrics(student, teacher, backend)
    check_metrics(student, teacher.float(), backend, temperature=2.0, teacher_temperature=1.0)


@pytest.mark.parametrize("layout", layouts.GENERAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts_and_dims(backend, layout, dtype):
    for shape, dim in [((9, 37), -1), ((2, 5, 3, 4), 1), ((33, 30), 0), ((7,), 0), ((3, 4, 70), 1)]:
        student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
        check_metrics(layout(student), teacher, backend, dim=dim)
        check_metrics(student, layout(teacher), backend, dim=dim, temperature=2.0)
        check_metrics(layout(student), layout(teacher), backend, dim=dim)


@pytest.mark.parametrize("first", range(9))
def test_rows_that_begin_anywhere(backend, first):
    for dtype in DTYPES:
        student, teacher = pair(5, 601, (dtype, dtype))
        check_metrics(
            layouts.beginning_at(student, first, 640),
            layouts.beginning_at(teacher, 3, 677),
            backend,
        )


@pytest.mark.parametrize("paddings", [(0, 0), (3, 0), (0, 64), (24, 1)], ids=str)
@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_classes_that_exist(backend, paddings, dim):
    """The sides are padded differently, and what pads them may be NaN."""
    for classes in (1, 37, 1500):
        shape = [3, 4, 5]
        shape[dim] = classes
        dtypes = torch.bfloat16, torch.float32
        sides = [logits(*shape, dtype=dtype) for dtype in dtypes]
        wide = [padded(x, by, dim) for x, by in zip(sides, paddings, strict=True)]
        keywords = {"dim": dim, "temperature": 2.0}
        check_metrics(*wide, backend, num_classes=classes, **keywords)
        narrow = fastkd.distillation_metrics(*sides, backend=backend, **keywords)
        found = fastkd.distillation_metrics(*wide, backend=backend, num_classes=classes, **keywords)
        torch.testing.assert_close(found, narrow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_masks(backend, share):
    """A masked row may hold NaN."""
    for shape, dim in [((12, 40), -1), ((3, 9, 4), 1), ((2, 3, 1100), -1)]:
        rows = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
        mask = torch.rand(rows) < share
        student, teacher = logits(*shape), logits(*shape, dtype=torch.float16)
        student.movedim(dim, -1)[~mask] = math.nan
        teacher.movedim(dim, -1)[~mask] = math.inf
        check_metrics(student, teacher, backend, mask=mask, dim=dim)
        # A mask that is not contiguous.
        stepped = torch.stack([mask, ~mask], -1)[..., 0]
        check_metrics(student, teacher, backend, mask=stepped, dim=dim, temperature=3.0)


def test_a_mask_and_padding(backend):
    mask = torch.arange(6).reshape(2, 3) % 2 == 0
    student, teacher = padded(logits(2, 3, 50), 14), padded(logits(2, 3, 50), 6)
    teacher[~mask] = math.nan
    check_metrics(student, teacher, backend, mask=mask, num_classes=50, teacher_temperature=2.0)


def test_all_but_the_last_token(backend):
    check_metrics(logits(3, 9, 50)[:, :-1], logits(3, 10, 50)[:, 1:-1], backend)


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (0, 3, 1)])
def test_empty_batches(backend, shape):
    student, teacher = torch.randn(shape), torch.randn(shape)
    check_metrics(student, teacher, backend)
    check_metrics(student, teacher, backend, mask=torch.ones(shape[:-1], dtype=torch.bool))


def test_one_row(backend):
    check_metrics(logits(500), logits(500), backend)
    check_metrics(logits(500), logits(500), backend, mask=torch.tensor(False))


def test_equal_sides(backend):
    """They overlap as a whole, but for rounding, and never by more."""
    for classes in (1, 10, 1000, 5000):
        x = logits(20, classes)
        check_metrics(x, x.clone(), backend, temperature=3.0)
        found = fastkd.distillation_metrics(x, x.clone(), backend=backend)
        assert (found.overlap <= 1).all()
        assert (found.forward_kl >= 0).all()
        assert (found.reverse_kl >= 0).all()


def test_many_rows(backend):
    check_metrics(*pair(1500, 20), backend)
    check_metrics(logits(20, 1500), logits(20, 1500), backend, dim=0)

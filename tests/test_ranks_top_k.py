"""Teachers that kept k classes, and classes that are split over ranks: against the oracle.

The ranks are threads. Each has all slots, and its part of the student's classes.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import DTYPES
from agreement_logits import some_labels
from divergences import DIVERGENCES, name_of
from split import Threads, whole
from temperatures import KINDS, of_kind
from top_k import FOR_ALL, PAIRS, TAILS, check_top_k, kept, sides

import fastkd

ALL_PAIRS = [{"tail": tail} for tail in TAILS] + [
    {"tail": tail, **keywords} for tail in FOR_ALL for keywords in DIVERGENCES
]
SIZES = [1, 2, 4]

every_pair = pytest.mark.parametrize("keywords", PAIRS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("values_are", ["logits", "log_probs"])
@every_dtype
@pytest.mark.parametrize("keywords", ALL_PAIRS, ids=name_of)
def test_divergences(backend, split, keywords, dtype, values_are, size):
    split(size)
    keywords = {**keywords, "values_are": values_are}
    check_top_k(*sides(9, 60, 7, (dtype, dtype), **keywords), backend, **keywords)
    keywords["temperature"] = 2.0
    tensors = sides(9, 60, 7, (dtype, dtype), **keywords)
    check_top_k(*tensors, backend, torch.randn(9), reduction="none", **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@every_dtype
@every_pair
def test_labels(backend, split, keywords, dtype, smoothing):
    """Listed or not, also at the borders of shards and where a rank has no class."""
    split(4, [5, 0, 30, 5])
    labels = torch.tensor([0, 4, 5, -100, 34, 35, 39, 20, 6])
    keywords = {**keywords, "label_smoothing": smoothing, "temperature": 4.0}
    tensors = sides(9, 40, 6, (dtype, dtype), **keywords)
    labels[6:] = tensors[2][6:, 2]
    check_top_k(*tensors, backend, 3.0, labels, **keywords)
    check_top_k(*tensors, backend, None, labels, soft_weight=0.0, **keywords)
    check_top_k(*tensors, backend, None, labels, hard_weight=0.0, **keywords)
    keywords = {**keywords, "temperature": 1.0, "reduction": "none"}
    tensors = sides(9, 40, 6, (dtype, dtype), **keywords)
    weights = {"row_weight": torch.rand(9), "mask": torch.arange(9) != 4}
    check_top_k(*tensors, backend, torch.randn(9), labels, **weights, **keywords)


@pytest.mark.parametrize("kind", KINDS)
@every_dtype
@every_pair
def test_temperatures_that_learn(backend, split, keywords, dtype, kind):
    split(3)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    keywords = {**keywords, **of_kind(kind, (9, 60), precise)}
    tensors = sides(9, 60, 7, (dtype, dtype), **keywords)
    check_top_k(*tensors, backend, torch.randn(9), reduction="none", **keywords)
    labels = some_labels(9, classes=60)
    check_top_k(*tensors, backend, labels=labels, label_smoothing=0.1, **keywords)
    check_top_k(*tensors, backend, labels=labels, soft_weight=0.0, **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32,) * 2])
@every_pair
def test_rows_that_count(backend, split, keywords, dtypes, reduction):
    """Masked rows may hold NaN; weights learn."""
    split(3)
    keywords = {**keywords, "temperature": 3.0, "reduction": reduction}
    student, values, indices, lse = sides(9, 40, 5, dtypes, **keywords)
    mask = torch.rand(9) < 0.6
    student[~mask], values[~mask] = math.nan, math.inf
    upstream, keywords["mask"] = torch.randn(9) if reduction == "none" else 3.7, mask
    check_top_k(student, values, indices, lse, backend, upstream, **keywords)
    weight = torch.rand(9)
    weight[0] = 0
    tensors = student, values, indices, lse
    check_top_k(*tensors, backend, upstream, row_weight=weight, **keywords)
    if reduction in ("mean", "batchmean"):
        check_top_k(*tensors, backend, upstream, normalizer=7.0, **keywords)


@pytest.mark.parametrize("classes", [2, 17, 1025, 4200])
@every_dtype
@every_pair
def test_class_counts_and_dims(backend, split, keywords, dtype, classes):
    split(3)
    k = int(torch.randint(1, min(classes, 40) + 1, ()))
    student, *slots = sides(6, classes, k, (dtype, dtype), **keywords)
    check_top_k(student, *slots, backend, **keywords)
    check_top_k(student.t().contiguous(), *slots, backend, 3.0, dim=0, **keywords)
    images = student.view(2, 3, classes).movedim(-1, 1)
    of_images = [x if x is None else x.view(2, 3, *x.shape[1:]) for x in slots]
    labels, keywords = some_labels(2, 3, classes=classes), {**keywords, "reduction": "none"}
    check_top_k(images, *of_images, backend, torch.randn(2, 3), labels, dim=1, **keywords)


@pytest.mark.parametrize("size", SIZES[1:])
@every_dtype
@every_pair
def test_padded_classes(backend, split, keywords, dtype, size):
    """Which a shard may have some of, or nothing else."""
    split(size)
    student, *slots = sides(5, 33, 4, (dtype, dtype), **keywords)
    student = F.pad(student, (0, 9), value=math.nan)
    check_top_k(student, *slots, backend, 3.0, num_classes=33, **keywords)
    labels = torch.tensor([0, 32, 16, -100, 31])
    of_call = {**keywords, "num_classes": 33, "label_smoothing": 0.1}
    check_top_k(student, *slots, backend, None, labels, **of_call)


@every_dtype
@every_pair
def test_padding_and_duplicates(backend, split, keywords, dtype):
    """Slots of nothing, rows of these alone, and two slots of one class."""
    split(3)
    student, values, indices, lse = sides(7, 50, 8, (dtype, dtype), **keywords)
    values[0, ::2], indices[1, 1::3], indices[2, :7] = -torch.inf, -1, -100
    values[3], indices[4] = -torch.inf, -1
    indices[5, 4:], values[5, 4:] = indices[5, :4], values[5, :4] - 1
    indices[6] = 49
    check_top_k(student, values, indices, lse, backend, 3.0, **keywords)
    labels = indices[:, 1].long().clamp(min=0)
    check_top_k(student, values, indices, lse, backend, 3.0, labels, **keywords)


@every_dtype
@every_pair
def test_every_class_is_listed(backend, split, keywords, dtype):
    split(3, [4, 1, 5])
    tensors = sides(6, 10, 10, (dtype, dtype), **keywords)
    check_top_k(*tensors, backend, 3.0, **keywords)
    labels = some_labels(6, classes=10)
    check_top_k(*tensors, backend, 3.0, labels, label_smoothing=0.1, **keywords)


@pytest.mark.parametrize("other", DTYPES)
@every_dtype
@pytest.mark.parametrize("tail", TAILS)
def test_mixed_dtypes(backend, split, tail, dtype, other):
    split(2)
    tensors = sides(6, 50, 5, (dtype, other), tail=tail)
    labels = some_labels(6, classes=50)
    check_top_k(*tensors, backend, 3.0, labels, label_smoothing=0.1, tail=tail)


@every_pair
def test_excluded_classes(backend, split, keywords):
    """By the student: what a rank has all of, listed and not."""
    split(3, [10, 20, 10])
    student, values, indices, lse = sides(4, 40, 6, (torch.float32,) * 2, **keywords)
    indices[:] = torch.tensor([3, 15, 17, 12, 33, 38])
    student[0, :10], student[1, 20:30] = -math.inf, -math.inf
    student[2, 10:12], student[3, 34:38] = -math.inf, -math.inf
    keywords = {**keywords, "reduction": "none", "teachers": False}
    check_top_k(student, values, indices, lse, backend, torch.randn(4), **keywords)


@every_dtype
@pytest.mark.parametrize("tail", ["renormalize", "renormalize_both"])
def test_large_logits(backend, split, tail, dtype):
    """A constant of a row, of either side, is no part of the loss; nor is its size."""
    split(3)
    student, values, indices, _ = sides(6, 300, 6, (dtype, dtype), tail=tail)
    labels = some_labels(6, classes=300)
    check_top_k(student + 1000, values - 2000, indices, None, backend, 3.0, labels, tail=tail)
    if dtype in (torch.float32, torch.float64):
        student[0], student[1], values[2, 1] = -3e38, 3e38, 1e38
        student[3, indices[3].max() + 1 :] = torch.finfo(torch.float32).min
        check_top_k(student, values, indices, None, backend, temperature=4.0, tail=tail)


@pytest.mark.parametrize("has_labels", [False, True])
@every_pair
def test_infinite_rows(backend, split, keywords, has_labels):
    """NaN on one rank is NaN on all, if anything that is compared is."""
    split(3, [10, 20, 10])
    student, values, indices, lse = sides(7, 40, 6, (torch.float32,) * 2, **keywords)
    indices[:] = torch.tensor([3, 15, 17, 12, 33, 38])
    student[0, 15], values[1, 2], student[2, 38] = math.nan, math.nan, math.inf
    student[3], student[4, :10] = -math.inf, -math.inf
    student[4, 0], student[5, 20] = math.nan, math.nan
    student.requires_grad_()
    teacher = kept(values, indices, lse, tail=keywords["tail"])
    call = {name: x for name, x in keywords.items() if name != "tail"}
    call = {**call, "reduction": "none", "backend": backend}
    if has_labels:
        loss = fastkd.distillation_loss(student, teacher, torch.arange(7), **call)
    else:
        loss = fastkd.soft_target_loss(student, teacher, **call)
    is_over_slots = keywords["tail"] == "renormalize_both"
    seen = 4 if is_over_slots and not has_labels else 6  # the others hold NaN beside the slots
    assert loss[:seen].isnan().all()
    assert loss[6].isfinite()
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient[:3].isnan().any(1).all()
    assert gradient[6].isfinite().all()


@every_pair
def test_parts(backend, split, keywords):
    student, values, indices, lse = sides(9, 40, 6, (torch.float32,) * 2, **keywords)
    others = {name: x for name, x in keywords.items() if name != "tail"}
    teacher = kept(values, indices, lse, tail=keywords["tail"])
    labels = some_labels(9, classes=40)
    call = {**others, "return_parts": True, "backend": backend, "normalizer": 7}
    student.requires_grad_()
    expected = fastkd.distillation_loss(student, teacher, labels, **call)
    split(3)
    found = fastkd.distillation_loss(student, teacher, labels, **call)
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert not found.hard.requires_grad
    assert not found.soft.requires_grad


@every_pair
def test_repeats_are_equal(backend, keywords):
    """To the last bit, on every rank, which `whole` looks at; without a gradient, too."""
    student, values, indices, lse = sides(9, 400, 9, (torch.float32,) * 2, **keywords)
    others = {name: x for name, x in keywords.items() if name != "tail"}
    loss = whole("soft_target_loss", Threads(4))
    leaves = student.requires_grad_(), values.requires_grad_()
    teacher = kept(values, indices, lse, tail=keywords["tail"])
    found = []
    for _ in range(3):
        value = loss(student, teacher, backend=backend, **others)
        found.append((value, *torch.autograd.grad(value, leaves)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    with torch.no_grad():
        assert torch.equal(loss(student, teacher, backend=backend, **others), value)


@every_pair
def test_a_retained_graph(backend, keywords):
    """Any grad_output, more than once."""
    student, values, indices, lse = sides(9, 40, 6, (torch.float32,) * 2, **keywords)
    others = {name: x for name, x in keywords.items() if name != "tail"}
    leaves = student.requires_grad_(), values.requires_grad_()
    teacher = kept(values, indices, lse, tail=keywords["tail"])
    value = whole("soft_target_loss", Threads(2), [13, 27])(
        student, teacher, backend=backend, **others
    )
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves, torch.tensor(2.0))
    torch.testing.assert_close(second, tuple(2 * g for g in first))


@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 10)])
def test_no_rows(backend, split, shape):
    split(2)
    slots = torch.randn(*shape[:-1], 4), torch.zeros(*shape[:-1], 4, dtype=torch.int64)
    loss = fastkd.soft_target_loss(torch.randn(shape), kept(*slots), backend=backend)
    assert loss == 0


def test_every_row_ignored(backend, split):
    split(2)
    tensors = sides(3, 10, 4, (torch.float32,) * 2)
    labels = torch.full((3,), -100)
    check_top_k(*tensors, backend, labels=labels, label_smoothing=0.1)

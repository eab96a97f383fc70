"""Teachers that kept k classes of each row, against the oracle."""

import pytest
import torch
from agreement import DTYPES
from agreement_logits import some_labels
from divergences import DIVERGENCES, name_of
from layouts import GENERAL
from temperatures import KINDS, of_kind
from top_k import FOR_ALL, PAIRS, TAILS, check_top_k, sides

VALUES = ("logits", "log_probs")
ALL_PAIRS = [{"tail": tail} for tail in TAILS] + [
    {"tail": tail, **keywords} for tail in FOR_ALL for keywords in DIVERGENCES
]

every_pair = pytest.mark.parametrize("keywords", PAIRS, ids=name_of)
every_kind = pytest.mark.parametrize("values_are", VALUES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@every_dtype
@every_kind
@pytest.mark.parametrize("keywords", ALL_PAIRS, ids=name_of)
def test_temperatures(backend, keywords, values_are, dtype, temperature):
    keywords = {**keywords, "values_are": values_are, "temperature": temperature}
    tensors = sides(9, 60, 7, (dtype, dtype), **keywords)
    check_top_k(*tensors, backend, **keywords)
    check_top_k(*tensors, backend, -3.0, scale_t2=False, **keywords)
    if values_are == "logits":
        keywords["teacher_temperature"] = 1.7
        check_top_k(*sides(9, 60, 7, (dtype, dtype), **keywords), backend, **keywords)


@pytest.mark.parametrize("kind", KINDS)
@every_dtype
@every_pair
def test_temperatures_that_learn(backend, keywords, dtype, kind):
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    keywords = {**keywords, **of_kind(kind, (9, 60), precise)}
    tensors = sides(9, 60, 7, (dtype, dtype), **keywords)
    check_top_k(*tensors, backend, **keywords)
    check_top_k(*tensors, backend, torch.randn(9), reduction="none", **keywords)
    check_top_k(*tensors, backend, labels=some_labels(9, classes=60), **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@every_dtype
@every_pair
def test_reductions(backend, keywords, dtype, reduction):
    keywords = {**keywords, "temperature": 2.0, "reduction": reduction}
    tensors = sides(9, 40, 5, (dtype, torch.float32), **keywords)
    upstream = torch.randn(9) if reduction == "none" else 3.7
    check_top_k(*tensors, backend, upstream, **keywords)
    check_top_k(*tensors, backend, upstream, mask=torch.rand(9) < 0.5, **keywords)
    check_top_k(*tensors, backend, upstream, row_weight=torch.rand(9), **keywords)
    if reduction in ("mean", "batchmean"):
        check_top_k(*tensors, backend, upstream, normalizer=7.0, **keywords)


@pytest.mark.parametrize("classes", [2, 17, 300, 1000, 1025, 4200])
@every_dtype
@every_pair
def test_class_counts(backend, keywords, dtype, classes):
    k = int(torch.randint(1, min(classes, 40) + 1, ()))
    tensors = sides(5, classes, k, (dtype, dtype), **keywords)
    check_top_k(*tensors, backend, **keywords)
    if classes > 2:
        student, values, indices, lse = tensors
        few = indices.clamp(max=classes - 3)
        check_top_k(student, values, few, lse, backend, 3.0, num_classes=classes - 2, **keywords)


@pytest.mark.parametrize("k", [1, 2, 31, 40])
@every_dtype
@every_kind
@every_pair
def test_kept_classes(backend, keywords, values_are, dtype, k):
    keywords = {**keywords, "values_are": values_are}
    check_top_k(*sides(7, 40, k, (dtype, dtype), **keywords), backend, 3.0, **keywords)


@pytest.mark.parametrize("layout", GENERAL, ids=lambda layout: layout.__name__)
@every_dtype
@pytest.mark.parametrize("tail", TAILS)
def test_layouts(backend, tail, dtype, layout):
    student, values, indices, lse = sides(6, 50, 5, (dtype, dtype), tail=tail)
    lse = None if lse is None else layout(lse[:, None])[:, 0]
    strided = values if layout.__name__ in ("expanded", "flat") else layout(values)
    backwards = indices.flip(1).contiguous().flip(1)
    student = layout(student)
    check_top_k(student, strided, backwards, lse, backend, 3.0, tail=tail)


@every_dtype
@every_pair
def test_dims(backend, keywords, dtype):
    """The slots are last, wherever the student's classes are."""
    student, values, indices, lse = sides(6, 50, 5, (dtype, dtype), **keywords)
    shape = (2, 3)
    values, indices = values.reshape(*shape, 5), indices.reshape(*shape, 5)
    lse = None if lse is None else lse.reshape(shape)
    images = student.reshape(*shape, 50).movedim(-1, 1)
    for images_of in (images, images.contiguous()):
        others = {"dim": 1, "reduction": "none", **keywords}
        check_top_k(images_of, values, indices, lse, backend, torch.randn(shape), **others)
    labels = some_labels(*shape, classes=50)
    check_top_k(images, values, indices, lse, backend, labels=labels, dim=1, **keywords)
    columns = student.t().contiguous()
    slots = values.reshape(6, 5), indices.reshape(6, 5)
    lse = None if lse is None else lse.reshape(6)
    check_top_k(columns, *slots, lse, backend, dim=0, **keywords)


@pytest.mark.parametrize("other", DTYPES)
@every_dtype
@pytest.mark.parametrize("tail", TAILS)
def test_mixed_dtypes(backend, tail, dtype, other):
    tensors = sides(6, 50, 5, (dtype, other), tail=tail)
    check_top_k(*tensors, backend, 3.0, tail=tail)
    check_top_k(*tensors, backend, labels=some_labels(6, classes=50), tail=tail)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@every_dtype
@every_pair
def test_with_labels(backend, keywords, dtype, smoothing):
    classes = 40 if torch.rand(()) < 0.5 else 1500
    keywords = {**keywords, "label_smoothing": smoothing, "temperature": 4.0}
    tensors = sides(9, classes, 6, (dtype, dtype), **keywords)
    labels = some_labels(9, classes=classes)
    labels[:3] = tensors[2][:3, 2]  # a label that is listed
    check_top_k(*tensors, backend, 3.0, labels, **keywords)
    check_top_k(*tensors, backend, None, labels, reduction="none", **keywords)
    check_top_k(*tensors, backend, None, labels, soft_weight=0.0, **keywords)
    check_top_k(*tensors, backend, None, labels, hard_weight=0.0, **keywords)
    keywords = {**keywords, "temperature": 1.0}
    tensors = sides(9, classes, 6, (dtype, dtype), **keywords)
    weights = {"row_weight": torch.rand(9), "mask": torch.arange(9) != 4}
    check_top_k(*tensors, backend, 3.0, labels, **weights, **keywords)


@every_dtype
@every_pair
def test_padding(backend, keywords, dtype):
    """Slots of -inf or of a negative class, and rows of them alone."""
    student, values, indices, lse = sides(6, 50, 8, (dtype, dtype), **keywords)
    values[0, ::2], indices[1, 1::3], indices[2, :7] = -torch.inf, -1, -100
    values[3], indices[4] = -torch.inf, -1
    check_top_k(student, values, indices, lse, backend, 3.0, **keywords)
    labels = some_labels(6, classes=50)
    check_top_k(student, values, indices, lse, backend, labels=labels, **keywords)


@every_dtype
@every_pair
def test_two_slots_of_one_class(backend, keywords, dtype):
    student, values, indices, lse = sides(6, 50, 8, (dtype, dtype), **keywords)
    values[:, 4:] = values[:, :4] - 1
    indices[:, 4:] = indices[:, :4]
    indices[0], indices[1, 2:5] = 7, 49
    check_top_k(student, values, indices, lse, backend, 3.0, **keywords)
    labels = indices[:, 1].long()
    check_top_k(student, values, indices, lse, backend, labels=labels, **keywords)


@every_dtype
@every_pair
def test_more_slots_than_classes(backend, keywords, dtype):
    """Every class, twice or with padding: then there is no rest."""
    student, values, indices, lse = sides(6, 10, 10, (dtype, dtype), **keywords)
    more = torch.cat([values, torch.full_like(values, -torch.inf)], 1)
    twice = torch.cat([indices, indices], 1)
    check_top_k(student, more, twice, lse, backend, 3.0, **keywords)
    less = torch.tensor(2.0).log()
    more = torch.cat([values, values], 1) - (less if keywords["tail"] == "bucket" else 0)
    check_top_k(student, more, twice, lse, backend, 3.0, **keywords)

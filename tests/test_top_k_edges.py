"""Peaks, excluded classes, NaN and what is no class, of teachers that kept k classes."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import logits, some_labels
from divergences import name_of
from top_k import FOR_ALL, PAIRS, TAILS, check_top_k, kept, sides

import fastkd

every_pair = pytest.mark.parametrize("keywords", PAIRS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
SIZES = [40, 2500]


def losses(tensors, backend, tail, **keywords):
    student, *teacher = tensors
    side = kept(*teacher, tail=tail)
    return fastkd.soft_target_loss(student, side, reduction="none", backend=backend, **keywords)


@pytest.mark.parametrize("classes", SIZES)
@every_dtype
@every_pair
def test_peaked_students(backend, keywords, dtype, classes):
    """A listed class has all of the mass, or one that is not, or both have nearly all."""
    student, values, indices, lse = sides(5, classes, 6, (dtype, dtype), **keywords)
    rows = torch.arange(5)
    others = torch.tensor([sorted({*range(20)} - {*row})[0] for row in indices.tolist()])
    student[rows[:2], indices[:2, 3].long()] += 60
    student[rows[2:4], others[2:4]] += 60
    student[4, indices[4, 0].long()] = student[4, others[4]] = 80
    check_top_k(student, values, indices, lse, backend, 3.0, **keywords)


@every_dtype
def test_the_rest_of_a_peaked_student_has_its_digits(backend, dtype):
    """What a float32 has no digits for beside 1: a rest of e^-60, whose logarithm is weighed."""
    student, values, indices, lse = sides(4, 700, 5, (dtype, dtype), tail="bucket")
    student.scatter_(1, indices.long(), 60.0)
    check_top_k(student, values, indices, lse, backend, tail="bucket")
    check_top_k(student, values, indices, lse, backend, tail="bucket", divergence="reverse_kl")


@every_dtype
@every_pair
def test_peaked_teachers(backend, keywords, dtype):
    student, values, indices, lse = sides(5, 60, 6, (dtype, dtype), **keywords)
    values[0, 2] += 60
    values[1] -= 60
    lse = None if lse is None else torch.logaddexp(lse, values.float().logsumexp(-1).to(lse.dtype))
    check_top_k(student, values, indices, lse, backend, 3.0, **keywords)


@pytest.mark.parametrize("classes", SIZES)
@every_dtype
@every_pair
def test_classes_that_the_student_excludes(backend, keywords, dtype, classes):
    """Some, or all, of those that no slot lists; a listed one makes a KL divergence infinite."""
    student, values, indices, lse = sides(4, classes, 6, (dtype, dtype), **keywords)
    listed = torch.zeros_like(student, dtype=torch.bool).scatter(1, indices.long(), True)
    for row, step in ((0, 3), (1, 2)):
        excluded = ~listed[row]
        excluded[::step] = False
        student[row, excluded] = -math.inf
    check_top_k(student, values, indices, lse, backend, 3.0, **keywords)
    student[2, indices[2, 1].long()] = -math.inf
    student[3, ~listed[3]] = -math.inf
    if keywords.get("divergence") in ("jsd", "tvd", "skew_kl", "skew_reverse_kl", "reverse_kl"):
        check_top_k(student, values, indices, lse, backend, 3.0, **keywords)
    else:
        found = losses((student, values, indices, lse), backend, **keywords)
        infinite = [False, False, True, keywords["tail"] == "bucket"]
        assert found.isinf().tolist() == infinite
        leaf = student.requires_grad_()
        losses((leaf, values, indices, lse), backend, **keywords).sum().backward()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("where", ["student", "values", "lse"])
@every_pair
def test_nan_makes_a_nan_row(backend, keywords, where):
    tensors = sides(4, 40, 6, (torch.float32,) * 2, **keywords)
    student, values, indices, lse = tensors
    if where == "lse" and lse is None:
        where = "values"
    if where == "student":
        student[1, indices[1, 2].long()] = math.nan
        if keywords["tail"] != "renormalize_both":  # which does not read others
            student[2, (indices[2, 0] + 1) % 40] = math.nan
    elif where == "values":
        values[1:3, 2] = math.nan
    else:
        lse[1:3] = math.nan
    read_all = where != "student" or keywords["tail"] != "renormalize_both"
    expected = [False, True, read_all, False]
    assert losses(tensors, backend, **keywords).isnan().tolist() == expected
    leaf = student.requires_grad_()
    losses((leaf, values, indices, lse), backend, **keywords).sum().backward()
    assert leaf.grad.isnan().any(1).tolist() == expected


@every_pair
def test_students_that_exclude_every_class(backend, keywords):
    tensors = sides(2, 40, 6, (torch.float32,) * 2, **keywords)
    tensors[0][0] = -math.inf
    assert losses(tensors, backend, **keywords).isnan().tolist() == [True, False]


@every_dtype
@every_pair
def test_masked_rows_hold_anything(backend, keywords, dtype):
    student, values, indices, lse = sides(6, 40, 6, (dtype, dtype), **keywords)
    mask = torch.tensor([True, False, True, False, True, False])
    values[~mask], indices[~mask] = math.nan, 100_000
    student[1], student[3] = math.nan, -math.inf
    if lse is not None:
        lse[~mask] = math.nan
    check_top_k(student, values, indices, lse, backend, 3.0, mask=mask, **keywords)
    labels = some_labels(6, classes=40, ignored=0.0).masked_fill(~mask, -100)
    check_top_k(student, values, indices, lse, backend, labels=labels, **keywords)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    heat = torch.full((6,), 1.7, dtype=precise)
    heat[~mask] = torch.tensor([math.nan, 0.0, -1.0], dtype=precise)
    keywords = {**keywords, "temperature": heat, "mask": mask}
    check_top_k(student, values, indices, lse, backend, 3.0, **keywords)


@every_dtype
@every_pair
def test_rows_of_weight_0_are_not_read(backend, keywords, dtype):
    student, values, indices, lse = sides(4, 40, 6, (dtype, dtype), **keywords)
    student[1], values[2] = math.nan, math.nan
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0])
    check_top_k(student, values, indices, lse, backend, 3.0, row_weight=weight, **keywords)


@every_dtype
@every_pair
def test_weights_of_rows_that_learn(backend, keywords, dtype):
    """Their gradient is the row's loss, of one of padding alone and of weight 0 as well."""
    student, values, indices, lse = sides(4, 40, 6, (dtype, dtype), **keywords)
    indices[2] = -1
    weight = torch.tensor([0.5, 0.0, 1.0, -2.0], requires_grad=True)
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"}
    rows = losses((student, values, indices, lse), backend, tail, **others)
    leaf = student.requires_grad_()
    side = kept(values, indices, lse, tail=tail)
    loss = fastkd.soft_target_loss(leaf, side, row_weight=weight, backend=backend, **others)
    found = torch.autograd.grad(loss, (weight, leaf))
    torch.testing.assert_close(found[0], rows.to(weight.dtype) / 4)
    assert found[1].isfinite().all()
    assert not found[1][1:3].any()


@every_pair
def test_terms_that_are_switched_off(backend, keywords):
    """Nothing of them is left, NaN neither: of one, and of both."""
    student, values, indices, lse = sides(4, 40, 6, (torch.float32,) * 2, **keywords)
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"} | {"backend": backend}
    labels = torch.arange(4)
    values[1, 2] = math.nan
    leaf = student.requires_grad_()
    side = kept(values, indices, lse, tail=tail)
    for hard in (0.5, 0.0):
        loss = fastkd.distillation_loss(
            leaf, side, labels, soft_weight=0.0, hard_weight=hard, **others
        )
        expected = hard * torch.nn.functional.cross_entropy(leaf, labels)
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(x, leaf)[0] for x in (loss, expected)]
        torch.testing.assert_close(*gradients)
    student.data[1, 3] = math.nan
    loss = fastkd.distillation_loss(leaf, side, labels, soft_weight=0.0, hard_weight=0.0, **others)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_not_read_may_be_nan(backend, tail):
    """Padded classes, and with both sides renormalised what no slot lists."""
    student, values, indices, lse = sides(4, 40, 6, (torch.float32,) * 2, tail=tail)
    indices = indices % 30
    student[:, 30:] = math.nan
    if tail == "renormalize_both":
        listed = torch.zeros_like(student, dtype=torch.bool).scatter(1, indices.long(), True)
        student = student.masked_fill(~listed, math.nan)
    check_top_k(student, values, indices, lse, backend, 3.0, num_classes=30, tail=tail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_pair
def test_probabilities_that_sum_to_more_than_1(backend, keywords, dtype):
    """As rounded ones do: the bucket counts as 1e-7 then, and everything is finite."""
    keywords = {**keywords, "values_are": "log_probs"}
    student, values, indices, _ = sides(4, 40, 6, (dtype, dtype), **keywords)
    values = (values.double().softmax(-1) * 1.01).log().to(dtype)
    check_top_k(student, values, indices, None, backend, 3.0, **keywords)


@pytest.mark.parametrize("index", [40, 2**31 - 1, 2**31, 2**40 + 3])
def test_an_index_that_is_no_class(backend, index):
    student, values, indices, _ = sides(4, 40, 6, (torch.float32,) * 2)
    indices = indices.long()
    indices[2, 1] = index
    if student.device.type == "cpu":
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 39\], or be negative"):
            losses((student, values, indices), backend, tail="renormalize")
    elif backend != "reference":  # there torch's own assertion reports it
        found = losses((student, values, indices), backend, tail="renormalize")
        assert found.isnan().tolist() == [False, False, True, False]


def test_an_index_beyond_the_classes_that_exist(backend):
    student, values, indices, _ = sides(4, 40, 6, (torch.float32,) * 2)
    indices = indices % 30
    side = kept(values, indices)
    fastkd.soft_target_loss(student, side, num_classes=30, backend=backend)
    indices[0, 0] = 30
    if student.device.type == "cpu":
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 29\]"):
            fastkd.soft_target_loss(student, side, num_classes=30, backend=backend)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("tail", FOR_ALL)
def test_a_language_model(backend, tail, divergence):
    keywords = {"tail": tail, "divergence": divergence}
    tensors = sides(2, 151936, 64, (torch.bfloat16,) * 2, scale=2.0, **keywords)
    check_top_k(*tensors, backend, teachers=False, **keywords)


@every_dtype
def test_large_offsets_cancel(backend, dtype):
    """A constant of a row, of either side, is no part of the loss."""
    student, values, indices, _ = sides(4, 300, 6, (dtype, dtype))
    for tail in ("renormalize", "renormalize_both"):
        check_top_k(student + 1000, values - 2000, indices, None, backend, 3.0, tail=tail)


def test_logits_near_the_largest_numbers(backend):
    student, values = logits(4, 40), logits(4, 6)
    indices = torch.stack([torch.randperm(40)[:6] for _ in range(4)])
    listed = torch.zeros_like(student, dtype=torch.bool).scatter(1, indices, True)
    student[0, ~listed[0]], student[1] = torch.finfo(torch.float32).min, -3e38
    student[2], values[2, 1] = 3e38, 1e38
    for tail in ("renormalize", "renormalize_both"):
        check_top_k(student, values, indices, None, backend, temperature=4.0, tail=tail)

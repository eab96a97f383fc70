"""Weights of rows, and normalizers on the device, in the gradient that forward computes."""

import divergences
import numpy as np
import oracle_rows
import pytest
import torch
from agreement import DTYPES, check, leaf
from agreement_logits import check_distillation, check_soft_target, logits, some_labels
from conftest import DEVICE

import fastkd


def weights(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("classes", [1, 10, 40, 300, 1100, 5000, 40000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_any_length(backend, dtype, classes):
    student, teacher = logits(5, classes, dtype=dtype), logits(5, classes, dtype=dtype)
    keywords = {"row_weight": weights(5), "temperature": 2.0}
    check_soft_target(student, teacher, backend, grad_output=1.7, **keywords)


@pytest.mark.parametrize("shape, dim", [((2, 19, 8, 8), 1), ((30, 70), 0), ((3, 200, 40), 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns(backend, dtype, shape, dim):
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    row_weight = weights(*shape[:dim], *shape[dim + 1 :])
    check_soft_target(student, teacher, backend, dim=dim, row_weight=row_weight)


@pytest.mark.parametrize("classes", [40, 1100, 20000])
def test_several_teachers(backend, classes):
    student, *teachers = (logits(5, classes) for _ in range(4))
    check_soft_target(student, teachers, backend, row_weight=weights(5), temperature=2.0)


@pytest.mark.parametrize("classes", [40, 1100, 20000])
def test_rows_without_vectors(backend, classes):
    """Of odd strides, and classes that lie apart."""
    student, teacher = logits(9, 2 * classes + 1)[:, ::2], logits(9, classes + 2)[:, 1:]
    check_soft_target(student[:, :-1], teacher[:, :classes], backend, row_weight=weights(9))


@pytest.mark.parametrize("classes", [40, 1100, 20000])
def test_with_labels(backend, classes):
    student, teacher = logits(9, classes), logits(9, classes)
    labels = some_labels(9, classes=classes)
    keywords = {"row_weight": weights(9), "label_smoothing": 0.1}
    check_distillation(student, teacher, labels, backend, **keywords)


@pytest.mark.parametrize("keywords", divergences.FEW, ids=divergences.name_of)
@pytest.mark.parametrize("classes", [40, 20000])
def test_other_divergences(backend, keywords, classes):
    sides = divergences.sides(5, classes, torch.float32, torch.float32, temperature=2.0)
    check_soft_target(*sides, backend, row_weight=weights(5), temperature=2.0, **keywords)


@pytest.mark.parametrize("weighs", [False, True])
@pytest.mark.parametrize("classes", [40, 1100, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_normalizer(backend, dtype, classes, weighs):
    student, teacher = logits(5, classes, dtype=dtype), logits(5, classes, dtype=dtype)
    keywords = {"row_weight": weights(5)} if weighs else {}
    normalizer = torch.tensor(7.0, device=DEVICE)

    def loss(*sides):
        return fastkd.soft_target_loss(*sides, normalizer=normalizer, backend=backend, **keywords)

    def total(*sides, grad_output, **others):
        return oracle_rows.soft_target(
            *sides, np.asarray(grad_output) / 7, reduction="sum", **keywords, **others
        )

    def expected(*sides, grad_output):
        value, gradients = total(*sides, grad_output=grad_output)
        return value / 7, gradients

    def terms(*sides, grad_output):
        return total(*sides, grad_output=np.abs(grad_output), magnitudes=True)[1]

    check(loss, expected, (student, teacher), grad_output=1.7, size=5 / 7, terms=terms)


@pytest.mark.parametrize("keyword", ["row_weight", "normalizer"])
def test_backward_reads_no_logits(backend, keyword):
    if backend == "reference":
        pytest.skip("torch's own operations read them")
    student, teacher = logits(9, 40), logits(9, 40)
    keywords = {"row_weight": {"row_weight": weights(9).to(DEVICE)}}.get(
        keyword, {"normalizer": torch.tensor(7.0, device=DEVICE)}
    )
    gradients = []
    for is_lost in (False, True):
        learning, other = leaf(student.clone()), teacher.clone()
        loss = fastkd.soft_target_loss(learning, other, backend=backend, **keywords)
        if is_lost:
            with torch.no_grad():
                other.fill_(torch.nan)
        loss.backward()
        gradients.append(learning.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_that_is_kept(backend, dtype):
    student, teacher = leaf(logits(9, 40, dtype=dtype)), logits(9, 40, dtype=dtype)
    loss = fastkd.soft_target_loss(student, teacher, row_weight=weights(9), backend=backend)
    first, again, twice = (
        torch.autograd.grad(loss, student, torch.full_like(loss, by), retain_graph=True)[0]
        for by in (1.0, 1.0, 2.0)
    )
    assert torch.equal(first, again)
    torch.testing.assert_close(2 * first, twice)

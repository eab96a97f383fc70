"""Similarity-preserving distillation against the oracle."""

import math

import agreement
import layouts
import pytest
import torch
from agreement import DTYPES
from agreement_features import distinct, features
from agreement_relations import check_similarity

import fastkd


@pytest.fixture(autouse=True)
def promised(monkeypatch):
    monkeypatch.setitem(agreement.LOSS_TOLERANCE, torch.float32, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 3), (2, 5)), ((5, 3), (5, 2, 3)), ((17, 4, 3, 3), (17, 8, 2, 2)), ((67, 40), (67, 300))],
)
def test_shapes(backend, student, teacher, dtype):
    sides = distinct(
        lambda: [features(*shape, dtype=dtype) for shape in (student, teacher)],
        fastkd.similarity_preserving_loss,
        lambda s, _: 1 / len(s),
    )
    check_similarity(*sides, backend)


@pytest.mark.parametrize("grad_output", [3.7, 65536.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output(backend, dtype, grad_output):
    check_similarity(features(9, 8, dtype=dtype), features(9, 6), backend, grad_output)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_mixed_dtypes(backend, student_dtype, teacher_dtype):
    check_similarity(
        features(7, 5, dtype=student_dtype), features(7, 9, dtype=teacher_dtype), backend
    )


@pytest.mark.parametrize("layout", layouts.FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, layout, dtype):
    student, teacher = layout(features(6, 4, 3, 5, dtype=dtype)), features(6, 4, 7)
    check_similarity(student, teacher, backend)
    check_similarity(teacher, student, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_zeros(backend, dtype):
    student, teacher = features(9, 5, dtype=dtype), features(9, 7, dtype=dtype)
    student[2], student[5], teacher[5], teacher[6] = 0, 0, 0, 0
    check_similarity(student, teacher, backend)
    nothing = torch.zeros_like(student).requires_grad_()
    loss = fastkd.similarity_preserving_loss(nothing, teacher, backend=backend)
    assert not torch.autograd.grad(loss, nothing)[0].any()


def test_similarities_below_eps(backend):
    student, teacher = features(6, 5), features(6, 7)
    student[:4] *= 1e-10
    check_similarity(student, teacher, backend)


def test_half_precision_beyond_its_squares(backend):
    """A Gram matrix of these in float16 is infinite."""
    student, teacher = (300 + features(8, 64)).half(), (300 * features(8, 64)).half()
    assert (student @ student.T).isinf().all()
    check_similarity(student, teacher, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sample_is_similar_to_itself(backend, dtype):
    leaves = [features(1, 3, dtype=dtype).requires_grad_() for _ in range(2)]
    loss = fastkd.similarity_preserving_loss(*leaves, backend=backend)
    assert 0 <= loss < 1e-12
    assert all(g.abs().max() < 1e-5 for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("shape", [(0, 4), (0, 0, 3), (5, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(backend, shape, dtype):
    """Without features there are rows of zeros; the teacher's slopes are then roundings of 0."""
    student, teacher = features(*shape, dtype=dtype), features(shape[0], 5, dtype=dtype)
    leaf = student.requires_grad_()
    loss = fastkd.similarity_preserving_loss(leaf, teacher, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(1 / max(len(leaf), 1)).to(loss) * bool(len(leaf)))
    assert torch.autograd.grad(loss, leaf)[0].shape == shape


def test_under_autocast(backend):
    results = []
    student, teacher = features(6, 5, 4, 3), features(6, 12, 4, 3)
    for enabled in (False, True):
        leaf = student.clone().requires_grad_()
        with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = fastkd.similarity_preserving_loss(leaf, teacher, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    assert all(map(torch.equal, *results))


def test_a_sample_that_is_not_finite(backend):
    student, teacher = features(6, 3).requires_grad_(), features(6, 3)
    for value in (math.nan, math.inf):
        changed = student.clone()
        changed[2, 1] = value
        loss = fastkd.similarity_preserving_loss(changed, teacher, backend=backend)
        assert loss.isnan()
        assert torch.autograd.grad(loss, student)[0].isnan().any()

"""Soft targets against the oracle."""

import math

import layouts
import pytest
import torch
import torch.nn.functional as F
from agreement import DTYPES
from agreement_logits import check_soft_target, logits

import fastkd

REDUCTIONS = ["none", "sum", "mean", "batchmean"]
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_and_temperatures(backend, dtype, reduction, temperature):
    student, teacher = logits(128, 100, dtype=dtype), logits(128, 100, dtype=dtype)
    check_soft_target(student, teacher, backend, temperature=temperature, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_t2(backend, dtype):
    student, teacher = logits(16, 100, dtype=dtype), logits(16, 100, dtype=dtype)
    check_soft_target(student, teacher, backend, temperature=4.0, scale_t2=False)


@pytest.mark.parametrize(
    "classes", [1, 2, 31, 33, 255, 256, 257, 1000, 1024, 1025, 2048, 4097, 151936]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_counts(backend, dtype, classes):
    rows = 3 if classes > 5000 else 21
    student, teacher = logits(rows, classes, dtype=dtype), logits(rows, classes, dtype=dtype)
    check_soft_target(student, teacher, backend, temperature=2.0)


@pytest.mark.parametrize("grad_output", [3.7, 1 / 3, 65536.0, 0.0, -1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output(backend, dtype, grad_output):
    student, teacher = (logits(256, 100, dtype=dtype) for _ in range(2))
    check_soft_target(student, teacher, backend, grad_output, temperature=4.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_half_gradients_survive_a_loss_scale(backend, dtype):
    """The gradient at 1 underflows in float16, the one at 65536 does not."""
    student, teacher = (logits(64, 4097, dtype=dtype) for _ in range(2))
    check_soft_target(student, teacher, backend, 65536.0, reduction="mean")


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output_of_each_row(backend, dtype):
    student, teacher = (logits(5, 6, 33, dtype=dtype) for _ in range(2))
    check_soft_target(student, teacher, backend, logits(5, 6), temperature=2.0, reduction="none")


@pytest.mark.parametrize("shape", [(7,), (2, 19, 6, 5), (3, 4, 5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dim(backend, dtype, reduction, shape):
    for dim in range(-len(shape), len(shape)):
        student, teacher = (logits(*shape, dtype=dtype, scale=1.0) for _ in range(2))
        check_soft_target(student, teacher, backend, temperature=2.0, reduction=reduction, dim=dim)


@pytest.mark.parametrize("layout", layouts.GENERAL)
@pytest.mark.parametrize("other", [layouts.contiguous, layouts.sliced, layouts.reversed_dims])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(backend, dtype, layout, other):
    for shape, dim in [((9, 37), -1), ((2, 5, 3, 4), 1), ((3, 5, 70), 0)]:
        student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
        check_soft_target(layout(student), other(teacher), backend, temperature=2.0, dim=dim)
        check_soft_target(
            other(student), layout(teacher), backend, temperature=2.0, dim=dim, teachers=False
        )


def test_shifted_language_model_logits(backend):
    student, teacher = logits(2, 9, 33), logits(2, 9, 40)
    check_soft_target(student[:, :-1], teacher[:, 1:, :33], backend, temperature=2.0)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_mixed_dtypes(backend, student_dtype, teacher_dtype):
    student, teacher = logits(8, 65, dtype=student_dtype), logits(8, 65, dtype=teacher_dtype)
    check_soft_target(student, teacher, backend, temperature=2.0)


def test_equal_logits_have_no_loss(backend):
    same = logits(8, 1000)
    student = same.clone().requires_grad_()
    loss = fastkd.soft_target_loss(student, same, temperature=4.0, backend=backend)
    loss.backward()
    assert abs(loss.item()) <= 2e-6 * 16
    assert student.grad.norm() <= 3e-6 * 4 / math.sqrt(8)


@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 7), (4, 0, 7)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(backend, dtype, reduction, shape):
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    check_soft_target(student, teacher, backend, reduction=reduction, temperature=2.0)


def test_coincides_with_torch(backend):
    student, teacher = logits(16, 100), logits(16, 100)
    log_q = (student / 4).log_softmax(-1)
    for name in REDUCTIONS:
        expected = F.kl_div(log_q, (teacher / 4).softmax(-1), reduction=name) * 16
        actual = fastkd.soft_target_loss(
            student, teacher, temperature=4.0, reduction=name, backend=backend
        )
        expected = expected.sum(-1) if name == "none" else expected
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_autocast_changes_nothing(backend):
    student, teacher = logits(8, 50), logits(8, 50)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        check_soft_target(student, teacher, backend, temperature=2.0)


def test_loss_is_never_negative(backend):
    student = logits(64, 1000)
    teacher = student + 1e-3 * torch.randn_like(student)
    loss = fastkd.soft_target_loss(student, teacher, reduction="none", backend=backend)
    assert (loss > -2e-6).all()

"""Hints against the oracle."""

import math

import layouts
import pytest
import torch
import torch.nn.functional as F
from agreement import DTYPES
from agreement_features import check_hint, features

import fastkd

REDUCTIONS = ["none", "sum", "mean", "batchmean"]
SHAPES = [(5, 33), (3, 16, 7), (3, 16, 5, 6), (2, 5, 3, 4, 3)]


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_reductions(backend, dtype, shape, reduction, half):
    student, teacher = features(*shape, dtype=dtype), features(*shape, dtype=dtype)
    check_hint(student, teacher, backend, reduction=reduction, half=half)
    if reduction == "none":
        upstream = torch.randn(shape[0])
        check_hint(student, teacher, backend, grad_output=upstream, reduction=reduction, half=half)


@pytest.mark.parametrize("grad_output", [3.7, 1 / 3, 65536.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output(backend, dtype, grad_output):
    student, teacher = features(64, 100, dtype=dtype), features(64, 100, dtype=dtype)
    check_hint(student, teacher, backend, grad_output=grad_output, reduction="mean")


@pytest.mark.parametrize("size", [1, 31, 33, 1000, 4097, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(backend, dtype, size):
    check_hint(features(3, size, dtype=dtype), features(3, size, dtype=dtype), backend)


@pytest.mark.parametrize("student_layout", layouts.FEATURES)
@pytest.mark.parametrize("teacher_layout", layouts.FEATURES)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_layouts(backend, student_layout, teacher_layout, reduction):
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            student = student_layout(features(*shape, dtype=dtype))
            teacher = teacher_layout(features(*shape, dtype=dtype))
            check_hint(student, teacher, backend, reduction=reduction)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_mixed_dtypes(backend, student_dtype, teacher_dtype):
    student = features(3, 8, 6, 6, dtype=student_dtype)
    teacher = layouts.channels_last(features(3, 8, 6, 6, dtype=teacher_dtype))
    check_hint(student, teacher, backend)
    check_hint([student, teacher], [teacher, student], backend)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_pair_of_another_dtype(backend, reduction):
    for dtype in DTYPES:
        students = [features(3, 4, 5), features(3, 4, 5, dtype=dtype)]
        teachers = [features(3, 4, 5), features(3, 4, 5)]
        check_hint(students, teachers, backend, grad_output=2.0, reduction=reduction)
        check_hint(teachers, students, backend, grad_output=2.0, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences(backend, dtype, reduction):
    students = [features(3, 16, 8, 8, dtype=dtype), features(3, 32, dtype=dtype)]
    teachers = [features(3, 16, 8, 8, dtype=dtype), features(3, 32, dtype=dtype)]
    check_hint(students, teachers, backend, reduction=reduction)
    upstream = torch.randn(2, 3) if reduction == "none" else -2.5
    check_hint(students, teachers, backend, grad_output=upstream, reduction=reduction)


def test_pairs_may_differ_in_batch_size(backend):
    students, teachers = ([features(3, 4), features(5, 6)] for _ in range(2))
    check_hint(students, teachers, backend)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("is_convolution", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_regressor(backend, dtype, is_convolution, with_bias, reduction):
    weight = features(12, 5, dtype=dtype)
    weight = weight[:, :, None, None] if is_convolution else weight
    bias = features(12, dtype=dtype) if with_bias else None
    for spatial in [(), (7,), (4, 3)]:
        student, teacher = features(6, 5, *spatial, dtype=dtype), features(6, 12, *spatial)
        teacher = teacher.to(dtype)
        check_hint(student, teacher, backend, weight, bias, reduction=reduction, half=False)


@pytest.mark.parametrize("layout", layouts.FEATURES)
def test_regressor_over_layouts_and_pairs(backend, layout):
    weight, bias = features(12, 5), features(12)
    students = [layout(features(6, 5, 4, 3)), features(6, 5, 7, 2)]
    teachers = [features(6, 12, 4, 3), layout(features(6, 12, 7, 2))]
    check_hint(students, teachers, backend, weight, bias, grad_output=3.7)


@pytest.mark.parametrize("regressor_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_regressor_of_another_dtype(backend, dtype, regressor_dtype):
    weight, bias = features(12, 5, dtype=regressor_dtype), features(12, dtype=regressor_dtype)
    student, teacher = features(6, 5, 4, 3, dtype=dtype), features(6, 12, 4, 3, dtype=dtype)
    check_hint(student, teacher, backend, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_regressor_of_a_retained_graph(backend, dtype):
    """The gradient lies where the regressor's output was, and each backward finds it unscaled."""
    student, teacher = features(3, 5, 4, 4, dtype=dtype), features(3, 8, 4, 4, dtype=dtype)
    leaves = [x.requires_grad_() for x in (student, features(8, 5), features(8))]
    loss = fastkd.hint_loss(
        student, teacher, regressor_weight=leaves[1], regressor_bias=leaves[2], backend=backend
    )
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    tripled = torch.autograd.grad(loss, leaves, torch.tensor(3.0).to(loss), retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for one, three, last in zip(once, tripled, again, strict=True):
        assert torch.equal(one, last)
        torch.testing.assert_close(three, 3 * one)


def test_regressor_is_a_1x1_convolution(backend):
    student, teacher = features(6, 5, 4, 3), features(6, 12, 4, 3)
    weight, bias = features(12, 5, 1, 1), features(12)
    expected = F.mse_loss(F.conv2d(student, weight, bias), teacher)
    actual = fastkd.hint_loss(
        student, teacher, regressor_weight=weight, regressor_bias=bias, half=False,
        reduction="mean", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=0)


def test_regressor_under_autocast(backend):
    student, teacher, weight = features(6, 5, 4, 3), features(6, 12, 4, 3), features(12, 5)
    results = []
    for enabled in (False, True):
        leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast(student.device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = fastkd.hint_loss(leaves[0], teacher, regressor_weight=leaves[1], backend=backend)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (3, 0, 3, 3), (3, 4, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(backend, dtype, reduction, shape):
    student, teacher = features(*shape, dtype=dtype), features(*shape, dtype=dtype)
    check_hint(student, teacher, backend, reduction=reduction)
    check_hint([student] * 2, [teacher] * 2, backend, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch_with_a_regressor(backend, dtype):
    student, teacher = features(0, 5, 3, 3, dtype=dtype), features(0, 4, 3, 3, dtype=dtype)
    check_hint(student, teacher, backend, features(4, 5, dtype=dtype), features(4, dtype=dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_coincides_with_torch(backend, reduction):
    student, teacher = features(6, 5, 4, 3), features(6, 5, 4, 3)
    expected = F.mse_loss(student, teacher, reduction="none").flatten(1).sum(1)
    expected = {
        "none": expected,
        "sum": expected.sum(),
        "batchmean": expected.mean(),
        "mean": F.mse_loss(student, teacher),
    }[reduction]
    actual = fastkd.hint_loss(student, teacher, half=False, reduction=reduction, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_differences_are_not_rounded_to_the_dtype(backend, dtype):
    """Half differences overflow float16, and small ones vanish beside large features."""
    student, teacher = features(3, 50, dtype=dtype), features(3, 50, dtype=dtype)
    student[0], teacher[0] = 6e4, -6e4
    student[1] += 2048
    check_hint(student, teacher, backend, reduction="none")


def test_nan_in_one_sample_spares_the_others(backend):
    student, teacher = features(4, 6, 4), features(4, 6, 4)
    student[2, 3, 1] = math.nan
    loss = fastkd.hint_loss(student, teacher, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, False]

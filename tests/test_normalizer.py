"""Losses that are divided by a number of rows from elsewhere, against the oracle's sums."""

import math

import numpy as np
import oracle
import pytest
import torch
from agreement import DTYPES, array, check
from agreement_logits import logits, some_labels
from conftest import DEVICE

import fastkd

# A number, NumPy's, and tensors of one.
NORMALIZERS = [
    7,
    2.5,
    np.float32(3),
    torch.tensor(7),
    torch.tensor(2.5, dtype=torch.float64),
    torch.tensor(3.0, dtype=torch.bfloat16),
]

of_each_kind = pytest.mark.parametrize("normalizer", NORMALIZERS, ids=lambda n: f"{type(n)}{n}")


def on_device(normalizer):
    return normalizer.to(DEVICE) if isinstance(normalizer, torch.Tensor) else normalizer


def divided(function, divisor):
    """The oracle's sum of rows, divided."""

    def expected(*arrays, grad_output):
        loss, gradients = function(*arrays, grad_output=np.asarray(grad_output) / divisor)
        return loss / divisor, gradients

    return expected


@of_each_kind
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets(backend, dtype, normalizer, reduction):
    student, teacher = logits(9, 40, dtype=dtype), logits(9, 40, dtype=dtype)
    keywords = {"temperature": 2.0, "mask": torch.arange(9) % 3 > 0}
    divisor = float(normalizer) * (40 if reduction == "mean" else 1)

    def loss(*sides):
        return fastkd.soft_target_loss(
            *sides, reduction=reduction, normalizer=on_device(normalizer), backend=backend,
            **keywords,
        )  # fmt: skip

    def total(*sides, **of_gradient):
        return oracle.soft_target(*sides, reduction="sum", **of_gradient, **keywords)

    def terms(*sides, grad_output):
        magnitudes = {"grad_output": np.abs(grad_output) / divisor, "magnitudes": True}
        return total(*sides, **magnitudes)[1]

    expected = divided(total, divisor)
    check(loss, expected, (student, teacher), grad_output=1.7, size=4 * 6 / divisor, terms=terms)


@of_each_kind
def test_with_labels(backend, normalizer):
    student, teacher, labels = logits(9, 40), logits(9, 40), some_labels(9, classes=40)
    labels[0] = 3
    keywords = {"temperature": 2.0, "label_smoothing": 0.1}
    expected, _ = oracle.distillation(
        *map(array, (student, teacher, labels)), reduction="sum", **keywords
    )
    for requires_grad in (False, True):
        parts = fastkd.distillation_loss(
            student.detach().requires_grad_(requires_grad), teacher, labels, return_parts=True,
            normalizer=on_device(normalizer), backend=backend, **keywords,
        )  # fmt: skip
        for part, value in zip(parts, expected, strict=True):
            torch.testing.assert_close(part.item(), float(value) / float(normalizer), rtol=1e-5,
                                       atol=0)  # fmt: skip
        assert [part.requires_grad for part in parts] == [requires_grad, False, False]

    def loss(*sides):
        return fastkd.distillation_loss(
            *sides, labels, normalizer=on_device(normalizer), backend=backend, **keywords
        )

    def total(student, teacher, **of_gradient):
        losses, gradients = oracle.distillation(
            student, teacher, array(labels), reduction="sum", **of_gradient, **keywords
        )
        return losses[0], gradients

    check(loss, divided(total, float(normalizer)), (student, teacher), size=4 * 9)


def test_accumulated_batches(backend):
    """Their gradients add up to that of all rows together."""
    student, teacher = logits(10, 40), logits(10, 40)

    def gradient(parts, **keywords):
        leaf = student.detach().requires_grad_()
        for rows in parts:
            fastkd.soft_target_loss(
                leaf[rows], teacher[rows], backend=backend, **keywords
            ).backward()
        return leaf.grad

    whole = gradient([slice(None)])
    torch.testing.assert_close(gradient([slice(0, 3), slice(3, None)], normalizer=10), whole)
    scalar = torch.tensor(10, device=DEVICE)
    torch.testing.assert_close(gradient([slice(0, 3), slice(3, None)], normalizer=scalar), whole)


def test_no_rows(backend):
    student = torch.randn(0, 5, requires_grad=True)
    loss = fastkd.soft_target_loss(student, student.detach(), normalizer=4, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 5)


def test_compiled_as_one_graph(backend):
    student, teacher = logits(12, 40), logits(12, 40)

    def step(leaf, normalizer):
        return fastkd.soft_target_loss(leaf, teacher, normalizer=normalizer, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for normalizer in (torch.tensor(5, device=DEVICE), 5, 6.0, 7.0):
        results = []
        for function in (compiled, step):
            leaf = student.detach().requires_grad_()
            loss = function(leaf, normalizer)
            results.append((loss, *torch.autograd.grad(loss, leaf)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"normalizer": 0}, ValueError, "normalizer must be a finite number > 0"),
        ({"normalizer": math.inf}, ValueError, "normalizer must be a finite number"),
        ({"normalizer": "all"}, TypeError, "normalizer"),
        ({"normalizer": torch.ones(3)}, ValueError, r"without dimensions, .* shape \(3,\)"),
        ({"normalizer": torch.tensor(True)}, ValueError, "got torch.bool"),
        ({"normalizer": 3, "reduction": "sum"}, ValueError, "reduction='sum' does not divide"),
        ({"normalizer": 3, "reduction": "none"}, ValueError, "reduction='none' does not divide"),
    ],
)
def test_bad_normalizers(keywords, error, message):
    student, teacher = logits(12, 40), logits(12, 40)
    with pytest.raises(error, match=message):
        fastkd.soft_target_loss(student, teacher, **keywords)
    with pytest.raises(error, match=message):
        fastkd.distillation_loss(student, teacher, some_labels(12, classes=40), **keywords)

"""Rows whose losses are multiplied by weights, against the oracle."""

import math

import divergences
import pytest
import torch
from agreement import DTYPES, leaf
from agreement_logits import check_distillation, check_soft_target, logits, some_labels
from conftest import DEVICE

import fastkd

REDUCTIONS = ("none", "sum", "mean", "batchmean")


def weights(*shape):
    """Of either sign, and 0."""
    found = torch.randn(shape)
    found.view(-1)[::4] = 0
    return found


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets(backend, dtype, reduction):
    student, teacher = logits(12, 40, dtype=dtype), logits(12, 40, dtype=dtype)
    keywords = {"row_weight": weights(12), "reduction": reduction, "temperature": 2.0}
    check_soft_target(student, teacher, backend, **keywords)
    check_soft_target(student, teacher, backend, grad_output=1.7, **keywords)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_mask_decides_what_is_counted(backend, reduction):
    student, teacher = logits(12, 40), logits(12, 40)
    mask = torch.arange(12) % 3 > 0
    student[~mask] = math.nan
    keywords = {"row_weight": weights(12), "mask": mask, "num_classes": 37}
    check_soft_target(student, teacher, backend, reduction=reduction, **keywords)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
def test_dtypes_of_weights(backend, dtype):
    student, teacher, row_weight = logits(12, 40), logits(12, 40), (3 * weights(12)).to(dtype)
    check_soft_target(student, teacher, backend, row_weight=row_weight)


def test_rows_of_any_shape(backend):
    for shape, dim in [((2, 5, 3, 4), 1), ((5, 30), 0), ((30,), 0)]:
        rows = [size for axis, size in enumerate(shape) if axis != dim]
        student, teacher = logits(*shape), logits(*shape)
        check_soft_target(student, teacher, backend, dim=dim, row_weight=weights(*rows))


def test_several_teachers(backend):
    student, *teachers = (logits(12, 40) for _ in range(4))
    check_soft_target(student, teachers, backend, row_weight=weights(12), temperature=2.0)


@pytest.mark.parametrize("keywords", divergences.FEW, ids=divergences.name_of)
def test_other_divergences(backend, keywords):
    sides = divergences.sides(12, 40, torch.float32, torch.float32, temperature=2.0)
    check_soft_target(*sides, backend, row_weight=weights(12), temperature=2.0, **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_with_labels(backend, reduction):
    student, teacher, labels = logits(12, 40), logits(12, 40), some_labels(12, classes=40)
    keywords = {"row_weight": weights(12), "reduction": reduction, "label_smoothing": 0.1}
    check_distillation(student, teacher, labels, backend, **keywords)


def test_parts_are_weighted(backend):
    student, teacher, labels = logits(12, 40), logits(12, 40), some_labels(12, classes=40)
    row_weight = weights(12).requires_grad_()
    keywords = {"temperature": 2.0, "return_parts": True, "backend": backend}
    rows = fastkd.distillation_loss(student, teacher, labels, reduction="none", **keywords)
    found = fastkd.distillation_loss(student, teacher, labels, row_weight=row_weight, **keywords)
    count = (labels != -100).sum().clamp(min=1)
    for part, of_rows in zip(found, rows, strict=True):
        torch.testing.assert_close(part, (of_rows * row_weight).sum() / count)
    assert [part.requires_grad for part in found] == [True, False, False]


@pytest.mark.parametrize("normalizer", [7.0, torch.tensor(7.0)], ids=str)
def test_a_normalizer(backend, normalizer):
    student, teacher, row_weight = logits(12, 40), logits(12, 40), weights(12)
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(DEVICE)
    keywords = {"row_weight": row_weight, "backend": backend}
    total = fastkd.soft_target_loss(student, teacher, reduction="sum", **keywords)
    found = fastkd.soft_target_loss(student, teacher, normalizer=normalizer, **keywords)
    torch.testing.assert_close(found, total / 7)
    labels = some_labels(12, classes=40)
    total = fastkd.distillation_loss(student, teacher, labels, reduction="sum", **keywords)
    found = fastkd.distillation_loss(student, teacher, labels, normalizer=normalizer, **keywords)
    torch.testing.assert_close(found, total / 7)


def test_weights_receive_the_losses_of_their_rows(backend):
    """Those of weight 0, too."""
    student, teacher, row_weight = logits(12, 40), logits(12, 40), leaf(weights(12))
    assert (row_weight == 0).any()
    keywords = {"temperature": 2.0, "backend": backend}
    rows = fastkd.soft_target_loss(student, teacher, reduction="none", **keywords)
    loss = fastkd.soft_target_loss(
        leaf(student), teacher, row_weight=row_weight, reduction="sum", **keywords
    )
    loss.backward()
    torch.testing.assert_close(row_weight.grad, rows)


def test_rows_of_weight_0_are_not_read(backend):
    """Where the weights do not learn."""
    student, teacher = logits(4, 40), logits(4, 40)
    student[1, 3] = -math.inf
    student[2] = math.nan
    row_weight = torch.tensor([1.0, 0, 0, 2])
    check_soft_target(student, teacher, backend, row_weight=row_weight)
    labels = torch.tensor([3, 10**6, 5, 7])
    check_distillation(student, teacher, labels, backend, row_weight=row_weight)
    mask = torch.tensor([True, True, False, True])
    check_soft_target(student, teacher, backend, row_weight=row_weight, mask=mask)
    row_weight[1] = 0.5
    loss = fastkd.soft_target_loss(student, teacher, row_weight=row_weight, backend=backend)
    assert loss == math.inf
    loss = fastkd.soft_target_loss(
        student, teacher, row_weight=leaf(row_weight), mask=mask, backend=backend
    )
    assert loss == math.inf


def test_no_rows(backend):
    student = torch.randn(0, 5, requires_grad=True)
    loss = fastkd.soft_target_loss(
        student, student.detach(), row_weight=torch.ones(0), backend=backend
    )
    loss.backward()
    assert loss.item() == 0
    assert student.grad.shape == (0, 5)


def test_modules(backend):
    student, teacher, labels = logits(12, 40), logits(12, 40), some_labels(12, classes=40)
    row_weight = weights(12)
    for module, function, inputs in [
        (fastkd.nn.SoftTargetLoss, fastkd.soft_target_loss, (student, teacher)),
        (fastkd.nn.DistillationLoss, fastkd.distillation_loss, (student, teacher, labels)),
    ]:
        found = module(backend=backend)(*inputs, row_weight=row_weight)
        assert torch.equal(found, function(*inputs, row_weight=row_weight, backend=backend))


def test_compiled_as_one_graph(backend):
    student, teacher, mask = logits(12, 40), logits(12, 40), torch.arange(12) % 2 == 0

    def step(leaf, row_weight):
        return fastkd.soft_target_loss(
            leaf, teacher, mask=mask, row_weight=row_weight, backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        torch.manual_seed(0)
        leaves = leaf(student), leaf(weights(12))
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("row_weight", "error", "message"),
    [
        ([1.0] * 12, TypeError, "row_weight must be a tensor, got list"),
        (torch.ones(12, dtype=torch.bool), TypeError, "real numbers, got torch.bool"),
        (torch.ones(12, dtype=torch.complex64), TypeError, "real numbers, got torch.complex64"),
        (torch.ones(12, 1), ValueError, r"row_weight must .* \(12,\), got \(12, 1\)"),
    ],
)
def test_bad_weights(row_weight, error, message):
    student, teacher = logits(12, 40), logits(12, 40)
    row_weight = row_weight.to(DEVICE) if isinstance(row_weight, torch.Tensor) else row_weight
    with pytest.raises(error, match=message):
        fastkd.soft_target_loss(student, teacher, row_weight=row_weight)
    with pytest.raises(error, match=message):
        labels = some_labels(12, classes=40)
        fastkd.distillation_loss(student, teacher, labels, row_weight=row_weight)

"""Rows that a mask leaves out, against the oracle of the rows that it keeps."""

import math

import divergences
import layouts
import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, logits, some_labels
from conftest import DEVICE

import fastkd

REDUCTIONS = ("none", "sum", "mean", "batchmean")
# Of 12 rows.
MASKS = {
    "all": torch.ones(12, dtype=torch.bool),
    "none": torch.zeros(12, dtype=torch.bool),
    "one": torch.arange(12) == 7,
    "half": torch.arange(12) % 2 == 0,
    "first and last": (torch.arange(12) < 2) | (torch.arange(12) > 8),
}

of_each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def poisoned(mask, *tensors):
    """The rows that are left out hold what must not show."""
    for x, value in zip(tensors, (math.nan, math.inf, -math.inf), strict=False):
        x[~mask] = value
    return tensors


@of_each_mask
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets(backend, mask, reduction, temperature):
    for dtype in DTYPES:
        student, teacher = poisoned(mask, logits(12, 40, dtype=dtype), logits(12, 40, dtype=dtype))
        check_soft_target(
            student, teacher, backend, mask=mask, reduction=reduction, temperature=temperature
        )


@of_each_mask
def test_several_teachers(backend, mask):
    student, *teachers = poisoned(mask, *(logits(12, 1100) for _ in range(3)))
    check_soft_target(student, teachers, backend, mask=mask, temperature=2.0)


@pytest.mark.parametrize("classes", [100, 5000, 40000])
def test_class_counts(backend, classes):
    mask = torch.tensor([True, False, False, True, True])
    student, teacher = poisoned(mask, logits(5, classes), logits(5, classes))
    check_soft_target(student, teacher, backend, mask=mask, temperature=2.0, teachers=False)
    check_soft_target(student, teacher, backend, mask=mask, reduction="none", teachers=False)


@pytest.mark.parametrize("layout", layouts.GENERAL)
def test_layouts_and_dims(backend, layout):
    for shape, dim in [((9, 37), -1), ((2, 5, 3, 4), 1), ((5, 30), 0)]:
        rows = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
        mask = torch.rand(rows) < 0.6
        student, teacher = logits(*shape), logits(*shape)
        student.movedim(dim, -1)[~mask] = math.nan
        check_soft_target(layout(student), teacher, backend, dim=dim, mask=mask)


def test_all_but_the_last_token(backend):
    """Logits of (batch, tokens, classes) are read through their strides."""
    student, teacher = logits(3, 9, 50)[:, :-1], logits(3, 9, 50)[:, :-1]
    mask = torch.rand(3, 9)[:, 1:] < 0.5
    check_soft_target(student, teacher, backend, mask=mask)


@pytest.mark.parametrize("keywords", divergences.FEW, ids=divergences.name_of)
def test_other_divergences(backend, keywords):
    mask = MASKS["half"]
    student, teacher = poisoned(
        mask, *divergences.sides(12, 40, torch.float32, torch.float32, temperature=2.0)
    )
    check_soft_target(student, teacher, backend, mask=mask, temperature=2.0, **keywords)


def test_a_class_0_that_the_student_excludes(backend):
    """Rows that count have no label, not even the first class."""
    student, teacher = logits(12, 20), logits(12, 20)
    student[:, 0] = teacher[:, 0] = -math.inf
    for temperature in (1.0, 2.0):
        check_soft_target(student, teacher, backend, mask=MASKS["half"], temperature=temperature)


@of_each_mask
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_with_labels(backend, mask, reduction):
    """A masked row is a row of the ignored label, whatever label it has."""
    student, teacher = poisoned(mask, logits(12, 40), logits(12, 40))
    labels = some_labels(12, classes=40)
    labels[3] = -100
    keywords = {"reduction": reduction, "temperature": 2.0, "label_smoothing": 0.1}
    ignored = labels.masked_fill(~mask, -100)
    check_distillation(student, teacher, ignored, backend, **keywords)
    anything = labels.masked_fill(~mask, 10**6)

    def run(labels, **keywords):
        leaf = student.detach().requires_grad_()
        loss = fastkd.distillation_loss(leaf, teacher, labels, backend=backend, **keywords)
        return loss, *torch.autograd.grad(loss.sum(), leaf)

    for found, expected in zip(
        run(anything, mask=mask, **keywords), run(ignored, **keywords), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_part_of_the_cross_entropy_alone(backend):
    """`hard_weight=0` leaves the part that is asked for what it is."""
    student, teacher, labels = logits(12, 40), logits(12, 40), some_labels(12, classes=40)
    mask = MASKS["half"]
    parts = fastkd.distillation_loss(
        student, teacher, labels, mask=mask, hard_weight=0.0, temperature=3.0, return_parts=True,
        backend=backend,
    )  # fmt: skip
    expected = torch.nn.functional.cross_entropy(student[mask], labels[mask])
    torch.testing.assert_close(parts.hard, expected)


def test_modules(backend):
    student, teacher, labels = logits(12, 40), logits(12, 40), some_labels(12, classes=40)
    mask = MASKS["half"]
    for module, function, inputs in [
        (fastkd.nn.SoftTargetLoss, fastkd.soft_target_loss, (student, teacher)),
        (fastkd.nn.DistillationLoss, fastkd.distillation_loss, (student, teacher, labels)),
    ]:
        found = module(temperature=2.0, backend=backend)(*inputs, mask=mask)
        assert torch.equal(found, function(*inputs, mask=mask, temperature=2.0, backend=backend))


def test_compiled_as_one_graph(backend):
    student, teacher, mask = logits(12, 40), logits(12, 40), MASKS["half"]

    def step(leaf, mask):
        return fastkd.soft_target_loss(leaf, teacher, mask=mask, temperature=2.0, backend=backend)

    def run(function):
        leaf = student.detach().requires_grad_()
        loss = function(leaf, mask)
        return loss, *torch.autograd.grad(loss, leaf)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True] * 12, TypeError, "mask must be a tensor, got list"),
        (torch.ones(12), TypeError, "True for rows that count, got torch.float32"),
        (torch.ones(12, 40, dtype=torch.bool), ValueError, r"\(12,\), got \(12, 40\)"),
    ],
)
def test_bad_masks(mask, error, message):
    student, teacher = logits(12, 40), logits(12, 40)
    mask = mask.to(DEVICE) if isinstance(mask, torch.Tensor) else mask
    with pytest.raises(error, match=message):
        fastkd.soft_target_loss(student, teacher, mask=mask)
    with pytest.raises(error, match=message):
        fastkd.distillation_loss(student, teacher, some_labels(12, classes=40), mask=mask)

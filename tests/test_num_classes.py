"""Padded vocabularies: classes that are stored and do not exist, against the oracle."""

import math

import divergences
import layouts
import numpy as np
import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, logits, some_labels

import fastkd


def padded(x, to, dim=-1):
    """Stored in more classes; what does not exist is NaN."""
    shape = list(x.shape)
    shape[dim] = to
    stored = x.new_full(shape, math.nan)
    stored.narrow(dim, 0, x.shape[dim]).copy_(x)
    return stored


@pytest.mark.parametrize("sizes", [(40, 48), (48, 40), (48, 41), (64, 64)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets(backend, dtype, reduction, sizes):
    student, teacher = (padded(logits(9, 40, dtype=dtype), to) for to in sizes)
    keywords = {"num_classes": 40, "reduction": reduction, "temperature": 2.0}
    check_soft_target(student, teacher, backend, **keywords)
    check_soft_target(student, teacher, backend, grad_output=1.7, **keywords)


@pytest.mark.parametrize(("classes", "stored"), [(1, 2), (100, 128), (1000, 1024), (5003, 5056)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_class_counts(backend, dtype, classes, stored):
    student = padded(logits(5, classes, dtype=dtype), stored)
    teacher = padded(logits(5, classes, dtype=dtype), stored + 8)
    check_soft_target(student, teacher, backend, num_classes=classes, temperature=2.0)


def test_a_language_model_s_vocabulary(backend):
    """151,643 tokens and 151,936 or 152,064 rows of the output matrix."""
    student = padded(logits(2, 151_643, dtype=torch.bfloat16, scale=8), 151_936)
    teacher = padded(logits(2, 151_643, dtype=torch.bfloat16, scale=8), 152_064)
    check_soft_target(student, teacher, backend, num_classes=151_643, teachers=False)


def test_several_teachers(backend):
    student, *teachers = (padded(logits(6, 40), to) for to in (41, 40, 64, 48))
    check_soft_target(student, teachers, backend, num_classes=40, temperature=2.0)


@pytest.mark.parametrize("layout", layouts.GENERAL)
def test_layouts_and_dims(backend, layout):
    for shape, dim in [((9, 37), -1), ((2, 5, 3, 4), 1), ((5, 30), 0)]:
        student, teacher = (padded(logits(*shape), shape[dim] + more, dim) for more in (3, 1))
        check_soft_target(layout(student), teacher, backend, dim=dim, num_classes=shape[dim])


@pytest.mark.parametrize("keywords", divergences.FEW, ids=divergences.name_of)
def test_other_divergences(backend, keywords):
    student, teacher = divergences.sides(12, 40, torch.float32, torch.float32, temperature=2.0)
    check_soft_target(
        padded(student, 48), padded(teacher, 44), backend, num_classes=40, temperature=2.0,
        **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_with_labels(backend, label_smoothing):
    student, teacher = padded(logits(9, 40), 48), padded(logits(9, 40), 40)
    labels = some_labels(9, classes=40)
    check_distillation(
        student, teacher, labels, backend, num_classes=40, label_smoothing=label_smoothing
    )


def test_labels_are_classes_that_exist(backend):
    student, teacher = logits(3, 10), logits(3, 10)
    labels = torch.tensor([0, 7, 6])
    if student.is_cpu:
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 6\]"):
            fastkd.distillation_loss(student, teacher, labels, num_classes=7, backend=backend)


def test_padding_costs_no_second_gradient(kernel_backend):
    """Forward's gradient is of the size that is stored, and is handed on as it is."""
    student = logits(9, 48).requires_grad_()
    loss = fastkd.soft_target_loss(student, logits(9, 48), num_classes=40, backend=kernel_backend)
    assert loss.grad_fn.saved_tensors[0].shape == student.shape
    place = loss.grad_fn.saved_tensors[0].data_ptr()
    loss.backward()
    assert student.grad.data_ptr() == place


def test_a_number_of_numpy_and_all_that_are_stored(backend):
    student, teacher = logits(9, 40), logits(9, 40)
    plain = fastkd.soft_target_loss(student, teacher, backend=backend)
    whole = fastkd.soft_target_loss(student, teacher, num_classes=np.int64(40), backend=backend)
    assert torch.equal(plain, whole)


def test_compiled_as_one_graph(backend):
    student, teacher = logits(12, 48), logits(12, 44)

    def step(leaf):
        return fastkd.soft_target_loss(leaf, teacher, num_classes=40, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        leaf = student.detach().requires_grad_()
        loss = function(leaf)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shapes", "num_classes", "error", "message"),
    [
        ([(12, 40), (12, 48)], None, ValueError, "must have the same shape"),
        (
            [(12, 40), (11, 48)],
            40,
            ValueError,
            r"but for the classes along dim -?1, got \(12, 40\) and",
        ),
        ([(12, 40), (1, 12, 48)], 40, ValueError, "same shape but for the classes"),
        ([(12, 40), (12, 48)], 41, ValueError, r"num_classes must lie in \[1, 40\].* got 41"),
        ([(12, 40), (12, 48)], 0, ValueError, r"num_classes must lie in \[1, 40\].* got 0"),
        ([(12, 40), (12, 48)], 40.0, TypeError, "num_classes must be an int"),
        ([(12, 40), (12, 48)], True, TypeError, "num_classes must be an int"),
    ],
)
def test_bad_arguments(shapes, num_classes, error, message):
    student, teacher = (logits(*shape) for shape in shapes)
    with pytest.raises(error, match=message):
        fastkd.soft_target_loss(student, teacher, num_classes=num_classes)
    with pytest.raises(error, match=message):
        labels = some_labels(12, classes=40)
        fastkd.distillation_loss(student, teacher, labels, num_classes=num_classes)

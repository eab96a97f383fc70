"""How losses on logits are compared with the oracle."""

import math

import numpy as np
import oracle_metrics
import oracle_rows
import torch
from agreement import array, assert_loss, check, leaf
from torch import float32

import fastkd

# What holds a teacher that states its probabilities.
GIVEN = {
    "probabilities": fastkd.Probabilities,
    "log_probabilities": fastkd.LogProbabilities,
}


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def pair(rows, classes, dtypes=(float32, float32)):
    return tuple(logits(rows, classes, dtype=dtype) for dtype in dtypes)


def some_labels(*shape, classes, ignored=0.3, ignore_index=-100):
    labels = torch.randint(classes, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, ignore_index)


def edge_labels(rows, classes, phase=0):
    """First and last classes of what a vector, a thread, a warp or a block takes."""
    ends = [size * 2**i - phase for size in (4, 3 * 2**10) for i in range(16)]
    ends = [x for end in ends for x in (end - 1, end) if 0 < x < classes - 1]
    chosen = torch.tensor(ends or [0])[torch.randint(len(ends) or 1, (rows,))]
    chosen[0], chosen[-1] = 0, classes - 1
    return chosen


def _size(
    shape, temperature=1.0, scale_t2=True, reduction="batchmean", dim=-1, mask=None,
    row_weight=None, **_,
):  # fmt: skip
    """T² of each row, reduced as the loss is: what a row's loss is rounded against."""
    rows = math.prod(shape) / shape[dim] if mask is None else max(mask.sum().item(), 1)
    per_row = float(torch.as_tensor(temperature).max()) ** 2 if scale_t2 else 1.0
    if row_weight is not None and row_weight.numel():
        per_row *= row_weight.abs().max().item()
    return per_row * {"sum": rows, "mean": 1 / shape[dim]}.get(reduction, 1)


def given(teacher, teacher_is="logits", **keywords):
    """A loss's teacher and keywords, of those that the oracle takes."""
    if teacher_is == "logits":
        return teacher, keywords
    del keywords["teacher_temperature"]
    return GIVEN[teacher_is](teacher), keywords


def mass(teacher, teacher_is="logits", dim=-1, **_):
    """The largest sum of a row's probabilities."""
    if teacher_is == "logits" or not teacher.numel():
        return 1.0
    p = teacher.double()
    p = p.exp() if teacher_is == "log_probabilities" else p
    return p.nan_to_num().sum(dim).max().item()


def _arguments(student, teacher, keywords):
    """The tensors of a call, and how the oracle takes them.

    These are the student, the teachers, and the temperatures that are tensors.
    """
    if "teacher_is" in keywords:
        keywords = {**keywords, "teacher_temperature": 1.0}
    teachers = teacher if isinstance(teacher, list) else [teacher]
    names = ("temperature", "teacher_temperature")
    names = [name for name in names if isinstance(keywords.get(name), torch.Tensor)]
    others = {name: value for name, value in keywords.items() if name not in names}
    count = len(teachers)

    def taken(tensors):
        of_teachers, heat = list(tensors[:count]), tensors[count:]
        of_teachers = of_teachers if isinstance(teacher, list) else of_teachers[0]
        return of_teachers, {**others, **dict(zip(names, heat, strict=True))}

    return (student, *teachers, *(keywords[name] for name in names)), taken


def check_soft_target(student, teacher, backend, grad_output=None, teachers=True, **keywords):
    """`teacher` may be a list, and temperatures tensors, whose gradients are checked as well.

    `teacher_is` tells that it is no logits.
    """
    tensors, taken = _arguments(student, teacher, keywords)

    def loss(s, *others):
        t, keywords = taken(others)
        t, keywords = given(t, **keywords)
        return fastkd.soft_target_loss(s, t, backend=backend, **keywords)

    def expected(s, *others, grad_output, magnitudes=False):
        t, keywords = taken(others)
        return oracle_rows.soft_target(s, t, grad_output, magnitudes=magnitudes, **keywords)

    check(
        loss,
        expected,
        tensors,
        grad_output=grad_output,
        size=_size(student.shape, **keywords) * max(mass(teacher, **keywords), 1),
        teachers=teachers,
        terms=lambda *arrays, grad_output: expected(
            *arrays, grad_output=np.abs(grad_output), magnitudes=True
        )[1],
    )


def check_distillation(
    student, teacher, labels, backend, grad_output=None, teachers=True, **keywords
):
    """As `check_soft_target`."""
    soft, hard = keywords.get("soft_weight", 0.9), keywords.get("hard_weight", 0.1)
    size = float(torch.as_tensor(keywords.get("temperature", 4.0)).max()) ** 2
    size = abs(soft) * size * max(mass(teacher, **keywords), 1) + abs(hard)
    if "row_weight" in keywords:
        size *= keywords["row_weight"].abs().max().item()
    if keywords.get("reduction") == "sum":
        size *= max((labels != keywords.get("ignore_index", -100)).sum().item(), 1)
    tensors, taken = _arguments(student, teacher, keywords)

    def loss(s, *others):
        t, keywords = taken(others)
        t, keywords = given(t, **keywords)
        return fastkd.distillation_loss(s, t, labels, backend=backend, **keywords)

    def expected(s, *others, grad_output, **weights):
        t, keywords = taken(others)
        parts, gradients = oracle_rows.distillation(
            s, t, array(labels), grad_output, **{**keywords, **weights}
        )
        return parts[0], gradients

    def terms(*arrays, grad_output):
        weights = {"soft_weight": abs(soft), "hard_weight": abs(hard), "magnitudes": True}
        return expected(*arrays, grad_output=np.abs(grad_output), **weights)[1]

    check(
        loss,
        expected,
        tensors,
        grad_output=grad_output,
        size=size,
        teachers=teachers,
        terms=terms,
    )


def check_parts(student, teacher, labels, backend, temperature, **keywords):
    """The parts of the distillation loss, without a gradient and with one."""
    keywords["temperature"] = temperature
    expected, _ = oracle_rows.distillation(*map(array, (student, teacher, labels)), **keywords)
    for requires_grad in (False, True):
        parts = fastkd.distillation_loss(
            leaf(student, requires_grad), teacher, labels, return_parts=True, backend=backend,
            **keywords,
        )  # fmt: skip
        for part, value in zip(parts, expected, strict=True):
            assert_loss(part, value, (student, teacher), size=temperature**2)


def check_metrics(student, teacher, backend, **keywords):
    found = fastkd.distillation_metrics(student, teacher, backend=backend, **keywords)
    on_host = {k: array(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    expected, sizes = oracle_metrics.distillation_metrics(array(student), array(teacher), **on_host)
    assert found._fields == tuple(expected)
    for name, value in found._asdict().items():
        assert not value.requires_grad
        if "argmax" in name:
            assert value.dtype == torch.int64
            np.testing.assert_array_equal(array(value), expected[name], err_msg=name)
        else:
            assert_loss(value, expected[name], (student, teacher), sizes.get(name, 1))

"""Logits of few classes in aligned rows, a warp each, at the sizes where that form ends."""

import layouts
import pytest
import torch
from agreement_logits import (
    check_distillation,
    check_parts,
    check_soft_target,
    edge_labels,
    logits,
    pair,
)

pytestmark = pytest.mark.gpu_sizes

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (F32, BF16), (F16, F16), (BF16, F32)]

# As many rows as the shim's chip holds at a time, four a block.
ROWS_AT_A_TIME = 16


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("rows", [1, 3, 4, 5, ROWS_AT_A_TIME, ROWS_AT_A_TIME + 1])
def test_few_classes(backend, rows, dtypes):
    """Around the sizes of a vector, of a lane's vectors and of the form."""
    for classes in (8, 100, 248, 256, 264, 1000, 1024, 1032):
        tensors = pair(rows, classes, dtypes)
        labels = edge_labels(rows, classes)
        labels[1::4] = -100
        check_soft_target(*tensors, backend, temperature=2.0, teachers=False)
        check_distillation(*tensors, labels, backend, temperature=1.0, teachers=False)
        check_distillation(
            *tensors, labels, backend, temperature=3.0, label_smoothing=0.1, teachers=False
        )


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_reductions_of_few_classes(backend, dtypes, reduction):
    """With the statistics for a backward that computes, and for a teacher that learns."""
    for rows, classes in [(15, 64), (9, 512)]:
        tensors = pair(rows, classes, dtypes)
        grad_output = logits(rows) if reduction == "none" else -2.0
        keywords = {"temperature": 2.0, "reduction": reduction}
        check_soft_target(*tensors, backend, grad_output, **keywords)
        if reduction == "mean":
            continue
        labels = edge_labels(rows, classes)
        labels[::3] = -100
        check_distillation(
            *tensors, labels, backend, grad_output, label_smoothing=0.1, teachers=False, **keywords
        )
        check_distillation(*tensors, labels, backend, soft_weight=0.0, teachers=False, **keywords)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_parts_of_few_classes(backend, dtypes, temperature):
    tensors = pair(15, 264, dtypes)
    labels = edge_labels(15, 264)
    labels[::3] = -100
    for smoothing in (0.0, 0.1):
        check_parts(*tensors, labels, backend, temperature=temperature, label_smoothing=smoothing)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_few_classes_in_padded_rows(backend, dtypes):
    """Rows that begin where an access of 16 bytes may, and the same an element later."""
    student, teacher = pair(12, 96, dtypes)
    labels = edge_labels(12, 96)
    for first in (0, 1):
        sides = (layouts.beginning_at(x, first, 128) for x in (student, teacher))
        check_distillation(*sides, labels, backend, temperature=2.0, teachers=False)

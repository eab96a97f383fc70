"""Logits whose rows lie side by side, around the classes that shared memory has room for."""

import pytest
import torch
from agreement_logits import check_distillation, check_soft_target, edge_labels, logits, pair

pytestmark = pytest.mark.gpu_sizes

F32, BF16 = torch.float32, torch.bfloat16
DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (F32, BF16)]

# What a GPU keeps of 32 rows side by side in shared memory, with two exponentials and with three.
KEPT_COLUMNS = (413, 583, 619, 875)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("classes", [5, 15, 16, 17, 33])
def test_rows_side_by_side(kernel_backend, classes, rows, dtypes):
    # Small ones: where p is nearly 1 nothing is left of the teacher's gradient but rounding.
    tensors = [logits(classes, rows, dtype=dtype, scale=1.0) for dtype in dtypes]
    labels = edge_labels(rows, classes)
    labels[1::5] = -100
    for temperature in (1.0, 3.0):
        check_distillation(
            *tensors, labels, kernel_backend, dim=0, temperature=temperature, label_smoothing=0.1
        )
    check_soft_target(*tensors, kernel_backend, logits(rows), dim=0, reduction="none")


@pytest.mark.parametrize("kept", KEPT_COLUMNS)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)])
def test_as_many_classes_side_by_side_as_there_is_room_for(backend, dtypes, kept):
    for classes in (kept, kept + 1):
        tensors = pair(classes, 70, dtypes)
        labels = edge_labels(70, classes)
        labels[1::3] = -100
        check_soft_target(*tensors, backend, dim=0, temperature=2.0, teachers=False)
        check_distillation(*tensors, labels, backend, dim=0, temperature=2.0, teachers=False)

"""What docs/numerics.md promises of the loss and of gradients, at every temperature.

At a large T, and between sides that nearly agree, q - p is a small difference of large terms.
"""

import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, logits

TEMPERATURES = [0.01, 0.1, 1.0, 5.0, 50.0, 1e3, 1e4]
CLASSES = [2, 10, 300, 4097, 32000]

every_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)
every_size = pytest.mark.parametrize("classes", CLASSES)
# How far the student's logits are from the teacher's, in standard deviations: 0, close, and the
# student's alone.
every_distance = pytest.mark.parametrize("distance", [0.0, 1e-3, 0.1, None])


def sides(classes, dtype, distance, teachers=1):
    rows = 2 if classes > 1000 else 5
    teacher, *others = (logits(rows, classes, dtype=torch.float64) for _ in range(teachers))
    if distance is None:
        student = logits(rows, classes, dtype=torch.float64)
    else:
        student = teacher + distance * torch.randn_like(teacher)
    return [x.to(dtype) for x in (student, teacher, *others)]


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("dtype", DTYPES)
@every_distance
@every_size
@every_temperature
def test_one_teacher(backend, temperature, classes, distance, dtype, dim):
    tensors = sides(classes, dtype, distance)
    if dim == 0:
        tensors = [x.t().contiguous() for x in tensors]
    check_soft_target(*tensors, backend, temperature=temperature, dim=dim)
    check_soft_target(*tensors, backend, temperature=temperature, dim=dim, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
@every_distance
@every_size
@every_temperature
def test_several_teachers(backend, temperature, classes, distance, dtype):
    student, *teachers = sides(classes, dtype, distance, teachers=3)
    check_soft_target(student, teachers, backend, temperature=temperature)


@pytest.mark.parametrize("hard_weight", [0.1, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@every_distance
@every_size
@every_temperature
def test_distillation(backend, temperature, classes, distance, dtype, hard_weight):
    student, teacher = sides(classes, dtype, distance)
    labels = torch.randint(classes, student.shape[:1])
    check_distillation(
        student, teacher, labels, backend, temperature=temperature, hard_weight=hard_weight
    )

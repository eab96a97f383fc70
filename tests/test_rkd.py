"""Relational distillation against the oracle."""

import importlib
import math
from pathlib import Path

import agreement
import layouts
import pytest
import torch
from agreement import DTYPES
from agreement_relations import RELATIONS, check_relation, points
from conftest import DEVICE

import fastkd

pytestmark = pytest.mark.parametrize("name", RELATIONS)


@pytest.fixture(autouse=True)
def promised(monkeypatch):
    """Closer than other losses: what is between inputs and results is float64."""
    for tolerance in (agreement.LOSS_TOLERANCE, agreement.GRADIENT_TOLERANCE):
        monkeypatch.setitem(tolerance, torch.float32, 1e-6)


# Around the vectors and the tiles of the kernels, in points and in coordinates.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "width", "other"),
    [(3, 2, 5), (4, 7, 2), (5, 300, 64), (15, 128, 3), (16, 129, 16), (17, 3, 257), (50, 33, 31)],
)
def test_sizes(backend, name, count, width, other, dtype):
    check_relation(
        name, points(count, width, dtype=dtype), points(count, other, dtype=dtype), backend
    )


@pytest.mark.parametrize("grad_output", [3.7, 65536.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output(backend, name, dtype, grad_output):
    check_relation(name, points(9, 8, dtype=dtype), points(9, 6), backend, grad_output)


@pytest.mark.parametrize("delta", [0.05, 0.5, 2, 100.0])
def test_delta(backend, name, delta):
    check_relation(name, points(12, 3), points(12, 2), backend, delta=delta)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_mixed_dtypes(backend, name, student_dtype, teacher_dtype):
    check_relation(
        name, points(7, 5, dtype=student_dtype), points(7, 9, dtype=teacher_dtype), backend
    )


# Points on a line have no angles but of 0 and 180 degrees, and a gradient of rounding errors.
@pytest.mark.parametrize("layout", [x for x in layouts.GENERAL if x is not layouts.flat])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, name, layout, dtype):
    student, teacher = layout(points(9, 6, dtype=dtype)), points(9, 4)
    check_relation(name, student, teacher, backend)
    check_relation(name, teacher, student, backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_points_that_coincide(backend, name, dtype):
    """On either side alone, and on both."""
    student, teacher = points(12, 5, dtype=dtype), points(12, 7, dtype=dtype)
    student[1] = student[0]
    student[5:8] = student[4]
    teacher[7] = teacher[4]
    teacher[10] = teacher[11]
    check_relation(name, student, teacher, backend)
    check_relation(name, student[:1].expand(12, 5), teacher, backend)


@pytest.mark.parametrize(
    ("dtype", "nearness"),
    [(torch.float32, 1e-3), (torch.float32, 1e-5), (torch.float64, 1e-3)],
)
def test_points_that_nearly_coincide(backend, name, dtype, nearness):
    """As two views of one image do: differences of Gram matrices would hold no digit of it."""
    student, teacher = points(24, 64, dtype=dtype), points(24, 32, dtype=dtype)
    for x in (student, teacher):
        x[12:] = x[:12] + nearness * torch.randn_like(x[12:])
    check_relation(name, student, teacher, backend)


def test_points_far_from_the_origin(backend, name):
    check_relation(name, points(16, 8) + 1000, points(16, 8) - 1000, backend)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_squares_beyond_float32(backend, name, scale):
    check_relation(name, points(8, 5) * scale, points(8, 5), backend)


def test_half_precision_beyond_its_squares(backend, name):
    student, teacher = 300 * points(8, 64), 300 * points(8, 64)
    check_relation(name, student.half(), teacher.half(), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2])
def test_too_few_points_for_a_relation(backend, name, count, dtype):
    """What there is, is the same for all: rounding decides the rest."""
    leaves = [points(count, 3, dtype=dtype).requires_grad_() for _ in range(2)]
    loss = getattr(fastkd, name)(*leaves, backend=backend)
    assert 0 <= loss < 1e-14
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("shapes", [[(0, 4), (0, 5)], [(0, 0), (0, 5)], [(5, 0), (5, 3)]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(backend, name, shapes, dtype):
    check_relation(name, *(points(*shape, dtype=dtype) for shape in shapes), backend)


def test_a_student_that_has_the_teacher_s_relations(backend, name):
    """Moved, turned and enlarged; loss and gradient are roundings of 0."""
    teacher = points(20, 4, dtype=torch.float64)
    turn = torch.linalg.qr(points(4, 4, dtype=torch.float64))[0]
    student = (3 * teacher @ turn + 5).requires_grad_()
    loss = getattr(fastkd, name)(student, teacher, backend=backend)
    assert loss < 1e-20
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-12


def test_a_point_that_is_not_finite(backend, name):
    for value in (math.nan, math.inf):
        student, teacher = points(6, 3), points(6, 3)
        student[2, 1] = value
        student.requires_grad_()
        loss = getattr(fastkd, name)(student, teacher, backend=backend)
        assert loss.isnan()
        assert torch.autograd.grad(loss, student)[0][2].isnan().any()


@pytest.mark.thorough
@pytest.mark.skipif(DEVICE != "cpu", reason="measures resident memory")
@pytest.mark.parametrize("kernel_backend", ["native"])
def test_memory_is_quadratic_in_the_points(kernel_backend, name, monkeypatch):
    """Differences would be 151 MB, cosines 57 MB, and the embeddings in float64 nearly 1 MB."""
    count, width = 192, 512
    student, teacher = points(count, width).requires_grad_(), points(count, width)

    def prepare():
        student.grad = None

    def step():
        getattr(fastkd, name)(student, teacher, backend=kernel_backend).backward()

    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    step()
    cpu = importlib.import_module("benchmarks.cpu").Cpu("system")
    # What else the process does can only add to it.
    measured = [cpu.peak_extra_bytes(prepare, step) for _ in range(3)]
    matrix = 8 * count**2
    assert None in measured or min(measured) < student.nbytes + 16 * matrix + (1 << 20)

"""Temperatures of their own in Triton's kernels, and logarithms of means, where tiles end."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, logits
from conftest import BACKENDS
from divergences import FEW, name_of, sides
from extremes import rising
from temperatures import of_kind
from triton_calls import SUM, around

if "triton" not in BACKENDS:
    pytest.skip("triton is not under test", allow_module_level=True)

from fastkd.kernels.triton import reduction, soft_target
from fastkd.kernels.triton.rows import SIDE_BY_SIDE, WHOLE
from fastkd.kernels.triton.temperatures import operand, rate_of

every_kind = pytest.mark.parametrize("kind", ["rows and rows", "numbers"])
some_divergences = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)


def precise(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("classes", around(32, 1024, WHOLE // 2, WHOLE, WHOLE + WHOLE // 2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@some_divergences
@every_kind
def test_ends_of_rows(kind, keywords, dtype, classes):
    heat = of_kind(kind, (2, classes), precise(dtype))
    student, teacher = sides(2, classes, dtype, dtype, **heat)
    labels = torch.tensor([classes - 1, max(classes - 2, 0)])
    keywords = {**keywords, **heat, "label_smoothing": 0.1}
    check_distillation(student, teacher, labels, "triton", **keywords)


@pytest.mark.parametrize("classes", around(1, SIDE_BY_SIDE, 2 * SIDE_BY_SIDE)[2:])
@some_divergences
@every_kind
def test_ends_of_classes_apart(kind, keywords, classes):
    heat = of_kind(kind, (105, classes))
    pair = sides(105, classes, torch.float32, torch.float32, **heat)
    pair = [x.reshape(3, 35, classes).transpose(1, 2).contiguous() for x in pair]
    heat = {name: t.reshape(3, 35) if torch.is_tensor(t) else t for name, t in heat.items()}
    check_soft_target(*pair, "triton", torch.randn(3, 35), dim=1, reduction="none", **heat)
    check_soft_target(*pair, "triton", dim=1, **heat, **keywords)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("classes", [20, 70, 5000])
@every_kind
def test_maxima_that_grow_from_block_to_block(kind, classes, divergence):
    """Each side's own sums are brought to its new maximum at its own temperature."""
    student, teacher = rising(classes)
    heat = of_kind(kind, student.shape)
    for dim in (1, 0):
        pair = [x if dim == 1 else x.t().contiguous() for x in (student, teacher)]
        check_soft_target(*pair, "triton", dim=dim, divergence=divergence, **heat)


@pytest.mark.parametrize("classes", [40, 5000])
@pytest.mark.parametrize("offset", [-3e38, 3e38])
def test_maxima_that_leave_the_range_at_the_other_temperature(offset, classes):
    student, teacher = logits(3, classes), logits(3, classes) + offset
    for heat in ((1e6, 1e-6), (1e-6, 1e6)):
        numbers = dict(zip(("temperature", "teacher_temperature"), heat, strict=True))
        rows = {name: torch.full((3,), t) for name, t in numbers.items()}
        for keywords in (numbers, rows):
            check_soft_target(student, teacher, "triton", scale_t2=False, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 70, WHOLE + 3])
@pytest.mark.parametrize("heat", [{}, {"kind": "rows and rows"}, {"kind": "numbers"}], ids=str)
def test_logarithms_of_means_that_underflow(heat, classes, dtype):
    """In reverse KL, of which the student has a part all the same, and where a teacher has none."""
    if heat:
        heat = of_kind(heat["kind"], (4, classes), precise(dtype))
    student, *teachers = (logits(4, classes, dtype=dtype) for _ in range(4))
    teachers[0][:, 3:6], teachers[1][:, 3:5], teachers[2][:, 3:6] = -300.0, -500.0, -math.inf
    teachers[0][2, :-2], teachers[1][2, :-3], teachers[2][2, :-1] = -1e30, -1e34, -math.inf
    keywords = {"divergence": "reverse_kl", "teacher_weights": [3, 1, 2], **heat}
    check_soft_target(student, teachers, "triton", torch.randn(4), reduction="none", **keywords)
    columns = [x.t().contiguous() for x in (student, *teachers)]
    check_soft_target(columns[0], columns[1:], "triton", 3.0, dim=0, **keywords)


def test_one_number_is_no_operand():
    """So kernels are what they would be without temperatures of their own."""
    assert operand((), SUM) == ()
    tensors = tuple(torch.ones(3) for _ in range(3))
    assert operand(tensors, SUM) == tensors
    for own in (1.0, 2.0000000001, 1e-30, 1e30):
        rates = operand((), SUM._replace(teacher_temperature=own))
        assert sum(rates) == pytest.approx(rate_of(own), rel=1e-14)


def test_one_kernel_for_any_temperature(monkeypatch):
    """What kernels are compiled for does not depend on the numbers."""
    found = set()
    x = torch.randn(3, 4)

    def launch(kernel, *args, **constants):
        found.add(str(sorted(constants.items(), key=str)))

    for module in (reduction, soft_target):
        monkeypatch.setattr(module, "launch", launch)
    p = SUM._replace(reduction="none")
    for own in (1.0, 3.0, 4.0):
        p = p._replace(teacher_temperature=own)
        soft_target.soft_target_forward(x, [x], None, torch.empty(3), None, None, None, p)
    assert len(found) == 1

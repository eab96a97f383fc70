"""Hints at the sizes and strides where a kernel goes another way or a unit of its work ends."""

import itertools

import layouts
import pytest
import torch
from agreement_features import check_hint, features

F32, BF16 = torch.float32, torch.bfloat16
DTYPE_PAIRS = [(F32, F32), (BF16, BF16), (F32, BF16), (torch.float16, F32)]


@pytest.mark.gpu_sizes
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("unit", [512, 1024, 4096])
def test_runs_that_end_around_a_unit(backend, unit, dtypes):
    for size in (unit - 1, unit, unit + 1, 2 * unit + 9):
        pair = [features(2, size, dtype=dtype) for dtype in dtypes]
        check_hint(*pair, backend)
        check_hint(*pair, backend, reduction="none")


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("gap", [16, 1])
def test_runs_with_gaps(backend, gap, dtypes):
    """Rows that begin where an access of 16 bytes may, and rows that do not."""
    for size in (15, 16, 49, 560):
        wide = [features(5, 3, size + gap, dtype=dtype) for dtype in dtypes]
        check_hint(wide[0][..., :size], wide[1][..., :size], backend)
        check_hint(wide[0][..., gap:], wide[1][..., :size], backend, reduction="none")


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("channels", [3, 4, 31, 32, 33, 70])
def test_one_side_channels_last(backend, channels, dtypes):
    for positions in [(1, 2), (2, 2), (3, 11), (5, 13)]:
        one, other = (features(2, channels, *positions, dtype=dtype) for dtype in dtypes)
        check_hint(layouts.channels_last(one), other, backend)
        check_hint(one, layouts.channels_last(other), backend, reduction="none")


@pytest.mark.parametrize("sizes", [(1, 129), (2, 64), (43, 3), (129, 1), (7, 128)])
def test_planes_that_lie_side_by_side_in_neither(backend, sizes):
    student, teacher = (features(3, *(2 * size for size in sizes)) for _ in range(2))
    check_hint(student[:, ::2, ::2], teacher[:, 1::2, 1::2], backend)
    check_hint(student[:, ::2, ::2], teacher[:, 1::2, 1::2], backend, reduction="none")


@pytest.mark.gpu_sizes
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("count", [4, 5, 70])
def test_many_pairs(backend, count, reduction):
    shapes = [(2, 3 + index % 5, 1 + index % 7, 2) for index in range(count)]
    students = [features(*shape) for shape in shapes]
    teachers = [layouts.channels_last(features(*shape)) for shape in shapes]
    check_hint(students, teachers, backend, grad_output=-0.5, reduction=reduction)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_many_axes(backend, reduction):
    """Axes of which no two are one stretch in both tensors."""
    shape = (2, 3, *[2] * 6)
    evens_first = sorted(range(8), key=lambda axis: (axis % 2, axis))
    student, teacher = features(*shape), features(*[shape[axis] for axis in evens_first])
    teacher = teacher.permute(*[evens_first.index(axis) for axis in range(8)])
    check_hint(student, teacher, backend, reduction=reduction)
    check_hint([student] * 3, [teacher] * 3, backend, reduction=reduction)


def test_expanded_features(backend):
    student, teacher = features(3, 1, 5, 1).expand(3, 40, 5, 6), features(3, 40, 5, 6)
    check_hint(student, teacher, backend)
    check_hint(teacher, student, backend, reduction="none")


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("distance", [2**30 + 64, 2**30 + 65])
@pytest.mark.parametrize("shape", [(4, 520), (4, 35), (4, 6, 35)])
def test_offsets_beyond_32_bits(backend, shape, distance, reduction):
    """Over 2³¹ elements from the first sample to the last."""
    student = layouts.far_apart(features(*shape, dtype=BF16), distance)
    teacher = features(*shape, dtype=BF16)
    turned = layouts.reversed_dims(teacher)
    for other in (teacher, turned):
        check_hint(student, other, backend, reduction=reduction)
        check_hint(other, student, backend, reduction=reduction)


def test_pairs_of_every_kind_in_one_call(backend):
    """Each dtype and layout beside each other, so that no pair's way is another's."""
    students, teachers = [], []
    for one, other in itertools.product([F32, torch.float16, BF16], repeat=2):
        students += [features(2, 40, 7, 5, dtype=one), features(2, 3, 2, dtype=one)]
        teachers += [layouts.channels_last(features(2, 40, 7, 5, dtype=other))]
        teachers += [features(2, 3, 2, dtype=other)]
    check_hint(students, teachers, backend, grad_output=3.0)
    check_hint(students, teachers, backend, reduction="none")

"""Hints in Triton's kernels: where tiles end, and what the launchers promise besides the loss."""

import itertools
import math

import layouts
import pytest
import torch
from agreement import DTYPES, array, assert_gradient
from agreement_features import check_hint, features
from conftest import BACKENDS

from fastkd.parameters import Hint
from fastkd.precision import compute_dtype

if "triton" not in BACKENDS:
    pytest.skip("triton is not under test", allow_module_level=True)

from fastkd.kernels.triton import hint, multiply, tiles

SUM = Hint(0.5, "sum", "triton")
T = tiles.TILE


def assert_difference(gradient, student, teacher, grad_output=1.0):
    assert_gradient(gradient, array((student.double() - teacher.double()) * grad_output))


@pytest.mark.parametrize("n", [1, T - 1, T, T + 1, 2 * T - 1, 2 * T + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_tiles(dtype, n):
    for shape in [(1, n), (n, 1)]:
        for reduction in ("mean", "none"):
            student, teacher = (features(*shape, dtype=dtype) for _ in range(2))
            check_hint(student, teacher, "triton", reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("channels", [15, 63, 64, 65])
@pytest.mark.parametrize("positions", [63, 64, 65, 129])
def test_ends_of_crossed_tiles(positions, channels, reduction):
    student, teacher = features(3, channels, positions), features(3, channels, positions)
    check_hint(layouts.channels_last(student), teacher, "triton", reduction=reduction)
    check_hint(student, layouts.channels_last(teacher), "triton", reduction=reduction)


@pytest.mark.parametrize("batch", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("n", [511, 512, 513, 1025])
def test_ends_of_tiles_of_samples(n, batch):
    """Eight samples share a tile, and a sample has one to three of them."""
    student, teacher = features(batch, n), features(batch, n)
    upstream = torch.randn(batch)
    check_hint(student, teacher, "triton", grad_output=upstream, reduction="none")


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape", [(3, 40, 7, 7), (70, 3, 7, 7), (2, 9, 33, 2), (600, 2, 2, 3)])
def test_short_runs(shape, reduction):
    student, teacher = features(*shape), features(*shape)
    for a, b in itertools.product((layouts.cropped, layouts.contiguous), repeat=2):
        check_hint(a(student), b(teacher), "triton", reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("ndim", [4, 5, 7])
def test_many_dimensions_in_any_order(ndim, reduction):
    """No two of them merge: beyond a tile's three, slices are counted."""
    shape = (3, 2, 4, 3, 2, 2, 2)[:ndim]
    for _ in range(2):
        pair = []
        for _ in range(2):
            order = torch.randperm(ndim, device="cpu").tolist()
            x = layouts.stepped(features(*[shape[d] for d in order]))
            pair.append(x.permute([order.index(d) for d in range(ndim)]))
        assert [x.shape for x in pair] == [shape, shape]
        check_hint(*pair, "triton", reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_students_that_overlap(reduction):
    teacher = features(5, 6, 7)
    for strides in [(1, 1, 1), (3, 0, 2), (0, 0, 0), (0, 1, 6), (2, 1, 4)]:
        student = features(100).as_strided((5, 6, 7), strides)
        check_hint(student, teacher, "triton", reduction=reduction)
        check_hint(teacher, student, "triton", reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_in_the_students_place(dtype):
    for layout in layouts.FEATURES[:-1]:
        student, teacher = layout(features(3, 70, 9, 9, dtype=dtype)), features(3, 70, 9, 9)
        before, loss = student.clone(), torch.empty((), dtype=compute_dtype(student))
        hint.hint_forward([student], [teacher], loss, [student], SUM)
        assert_difference(student, before, teacher)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_do_in_place(dtype):
    """Nothing is read either: gradients of NaN would be NaN."""
    nothing = torch.full((3, 3000), math.nan)
    gradient = features(3, 3000, dtype=dtype)
    before = gradient.clone()
    hint.hint_backward(torch.ones(()), [nothing.to(dtype)], [nothing], [gradient], SUM, True)
    assert torch.equal(gradient, before)
    student, teacher = features(3, 3000, dtype=dtype), features(3, 3000)
    hint.hint_backward(torch.tensor(3.0), [student], [teacher], [gradient], SUM, in_place=True)
    assert_difference(gradient, student, teacher, 3.0)


def test_gradients_that_are_not_wanted():
    students, teachers = [features(3, 4), features(3, 5)], [features(3, 4), features(3, 5)]
    wanted = [None, torch.empty(3, 5), torch.empty(3, 4), None]
    hint.hint_backward(torch.tensor(2.0), students, teachers, wanted, SUM)
    assert_difference(wanted[1], students[1], teachers[1], 2.0)
    assert_difference(wanted[2], teachers[0], students[0], 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output_of_any_dtype_and_strides(dtype):
    students, teachers = ([features(5, 4), features(5, 3)] for _ in range(2))
    p = Hint(0.5, "none", "triton")
    for upstream in (
        features(5, 2, dtype=dtype).t(),
        layouts.stepped(features(2, 5, dtype=dtype)),
        torch.ones((), dtype=dtype).expand(2, 5),
    ):
        gradients = [torch.empty_like(x) for x in (*students, *teachers)]
        hint.hint_backward(upstream, students, teachers, gradients, p)
        for j in range(2):
            per_sample = upstream[j, :, None].double()
            assert_difference(gradients[j], students[j], teachers[j], per_sample)
            assert_difference(gradients[2 + j], teachers[j], students[j], per_sample)


def test_offsets_beyond_31_bits(tmp_path):
    """Two samples 2³¹ elements apart, in memory of which hardly a page is touched."""
    shape, strides, length = (2, 3, 5), (2**31, 7, 1), 2**31 + 64
    if torch.get_default_device().type == "cpu":
        file = str(tmp_path / "sparse")
        memory = torch.from_file(file, shared=True, size=length, dtype=torch.float16)
    else:
        memory = torch.empty(length, dtype=torch.float16)
    student = memory.as_strided(shape, strides).copy_(features(*shape))
    teacher = features(*shape)
    check_hint(student, teacher, "triton")
    before = student.clone()
    hint.hint_forward([student], [teacher], torch.empty(()), [student], SUM)
    assert_difference(student, before, teacher)


def test_one_kernel_for_any_batch_size():
    """Tiles, which kernels are compiled for, have the same shape."""
    for by_sample in (False, True):
        for layout in (layouts.contiguous, layouts.channels_last, layouts.cropped):
            shapes = set()
            for batch in (2, 3, 64, 100):
                pair = layout(torch.empty(batch, 20, 7, 7)), torch.empty(batch, 20, 7, 7)
                shapes.add(str(tiles.plan([*pair, pair[0]], by_sample).shape))
            assert len(shapes) == 1


@pytest.mark.parametrize("layout", layouts.FEATURES[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hint_gradients_are_multiplied(dtype, layout):
    for shape in [(1,), (4097,), (3, 0, 2), (2, 5, 3, 4, 3), (3, 70, 9, 9)]:
        gradient = layout(torch.randn(shape).to(dtype)) if len(shape) > 1 else torch.randn(shape)
        before = gradient.clone()
        multiply.multiply([gradient], torch.tensor(1.0))
        assert torch.equal(gradient, before)
        for factor in (3.7, 0.0, math.inf):
            gradient.copy_(before)
            multiply.multiply([gradient], torch.tensor(factor))
            torch.testing.assert_close(gradient, before * factor, equal_nan=True)


def test_hint_gradients_are_multiplied_and_nothing_beside_them():
    memory = torch.randn(6, 50)
    before = memory.clone()
    multiply.multiply([memory[1:-1, 3:-3], memory[0, ::2]], torch.tensor(2.0, dtype=torch.float64))
    before[1:-1, 3:-3] *= 2
    before[0, ::2] *= 2
    assert torch.equal(memory, before)

"""Attention in Triton's kernels: where tiles end, and what the launchers promise besides losses."""

import math

import layouts
import numpy as np
import pytest
import torch
from agreement import DTYPES, array, assert_gradient
from agreement_features import check_map, check_transfer, features
from conftest import BACKENDS

import fastkd
from fastkd.parameters import Map, Transfer
from fastkd.precision import compute_dtype

if "triton" not in BACKENDS:
    pytest.skip("triton is not under test", allow_module_level=True)

from fastkd.kernels.triton import attention
from fastkd.kernels.triton.attention import _BLOCK, _CHANNELS, _CHANNELS_APART, _LOSSES, _walk

SUM = Map("sum_pow", 2.0, 1e-12, 1, "triton")
MAX = SUM._replace(kind="max_pow")
NORM = Transfer("norm", 2.0, 1.0, "sum")


def around(*sizes):
    return [size + by for size in sizes for by in (-1, 0, 1)]


def empty_map(x, dtype=torch.float32):
    return torch.empty(x.shape[0], math.prod(x.shape[2:]), dtype=dtype)


def slopes_of(x):
    """Slopes and argmax such as forward might have left."""
    slopes = torch.randn(x.shape[0], math.prod(x.shape[2:]), dtype=compute_dtype(x))
    return slopes, torch.randint(x.shape[1], slopes.shape, dtype=torch.int32)


def expected_gradient(x, slopes, argmax=None, grad_output=1.0):
    """Of `SUM`, or of `MAX` with argmax: exact for the slopes."""
    shape = (x.shape[0], 1, *x.shape[2:])
    scaled = array(slopes) * array(torch.as_tensor(grad_output)).reshape(-1, 1)
    scaled = scaled.reshape(shape)
    if argmax is None:
        return 2 * array(x) * scaled
    channels = np.arange(x.shape[1]).reshape(1, -1, *[1] * (x.ndim - 2))
    return np.where(channels == array(argmax).reshape(shape), scaled, 0.0)


@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
@pytest.mark.parametrize("channels", [*around(_CHANNELS_APART), *around(_CHANNELS), 600])
def test_ends_of_channels(channels, kind):
    """Of either layout, and of positions that are known to lie side by side or are counted."""
    for x in (features(2, channels, 5), features(2, channels, 32)):
        for layout in (layouts.contiguous, layouts.channels_last):
            check_map(layout(x), "triton", kind=kind, p=3.0)


@pytest.mark.parametrize("channels", [5, 40, 128])
@pytest.mark.parametrize("positions", [16, 31, 32, 33, 48, 112])
def test_ends_of_positions(positions, channels):
    for dtype in (torch.float32, torch.bfloat16):
        x = features(3, channels, positions, dtype=dtype)
        check_map(x, "triton")
        check_map(layouts.channels_last(x), "triton", kind="max_pow")


@pytest.mark.parametrize(
    ("distance", "order"), [("norm", 1.5), ("norm", 2.0), ("norm", math.inf), ("mse", 2.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_of_blocks_of_a_distance(dtype, distance, order):
    for positions in (_BLOCK // 2 + 1, _BLOCK, _BLOCK + 1):
        student = features(2, 1, positions, dtype=dtype)
        teacher = student.flip(2) + torch.rand(2, 2, positions)
        check_transfer(
            student, teacher, "triton", kind="max_pow", distance=distance, order=order
        )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 9])
def test_ends_of_samples_of_a_distance(batch):
    """Four samples share a program."""
    student, teacher = features(batch, 3, 200), features(batch, 4, 200)
    for reduction in ("mean", "none"):
        check_transfer(student, teacher, "triton", reduction=reduction)


def test_sums_of_many_samples():
    student, teacher = features(_LOSSES + 1, 1, 3), features(_LOSSES + 1, 2, 3)
    check_transfer([student, teacher], [teacher, student], "triton", distance="mse")


@pytest.mark.parametrize("channels", [3, 40, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_nan_wins(dtype, channels):
    x = features(2, channels, 20, dtype=dtype)
    x[0, 1:, 3] = math.nan
    x[0, 0, 3] = -math.inf
    x[1, [0, -1], 7] = math.nan
    x[1, [1, -1], 8] = torch.tensor([-math.inf, math.inf], dtype=dtype)
    for layout in (layouts.contiguous, layouts.channels_last):
        raw = torch.empty(2, 20, dtype=compute_dtype(x))
        argmax = torch.empty_like(raw, dtype=torch.int32)
        attention.attention_map_forward(layout(x), raw, argmax, MAX)
        expected = x.abs().max(1)
        assert torch.equal(argmax.long(), expected.indices)
        assert [int(argmax[at]) for at in [(0, 3), (1, 7), (1, 8)]] == [1, 0, 1]
        torch.testing.assert_close(raw, expected.values.to(raw.dtype) ** 2, equal_nan=True)


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last])
def test_ties_of_channels_of_other_blocks_go_to_the_lowest(layout):
    x = torch.randint(-3, 4, (2, 600, 20)).float()
    raw = torch.empty(2, 20)
    argmax = torch.empty_like(raw, dtype=torch.int32)
    attention.attention_map_forward(layout(x), raw, argmax, MAX)
    assert torch.equal(argmax.long(), x.abs().max(1).indices)


@pytest.mark.parametrize("ndim", [4, 5])
def test_many_dimensions_in_any_order(ndim):
    """No two of them merge."""
    shape = (3, 6, 4, 5, 2)[:ndim]
    for kind in ("sum_pow", "max_pow"):
        pair = []
        for _ in range(2):
            order = torch.randperm(ndim, device="cpu").tolist()
            x = layouts.stepped(features(*[shape[d] for d in order]))
            pair.append(x.permute([order.index(d) for d in range(ndim)]))
        check_transfer(*pair, "triton", torch.randn(3), kind=kind, reduction="none")
        check_transfer(*pair, "triton", kind=kind, channel_dim=2)


def test_features_that_overlap():
    teacher = features(3, 6, 7)
    for strides in [(1, 1, 1), (3, 0, 2), (0, 1, 6), (2, 1, 4), (0, 0, 1)]:
        student = features(100).as_strided((3, 6, 7), strides)
        for kind in ("sum_pow", "max_pow"):
            check_transfer(student, teacher, "triton", kind=kind)


@pytest.mark.parametrize("layout", layouts.FEATURES[:-1])
def test_gradients_and_nothing_beside_them(layout):
    """Nor are features of `max_pow` read, and zeros are written to all that is no argmax."""
    x = layout(features(3, 20, 7, 7))
    slopes, argmax = slopes_of(x)
    memory = torch.randn(5, 24, 9, 9)
    for kind, source, won in [(SUM, x, None), (MAX, torch.full_like(x, math.nan), argmax)]:
        before = memory.clone()
        gradient = memory[1:-1, 2:-2, 1:-1, 1:-1]
        attention.attention_backward(
            torch.ones(()), [source], [slopes], [] if won is None else [won], [gradient], kind
        )
        assert_gradient(gradient, expected_gradient(x, slopes, won))
        before[1:-1, 2:-2, 1:-1, 1:-1] = gradient
        assert torch.equal(memory, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output_of_any_dtype_and_strides(dtype):
    """Of students and then of teachers: each pair has its row."""
    sides = [features(5, 4, 3), features(5, 6, 2), features(5, 2, 3), features(5, 3, 2)]
    slopes, argmax = zip(*map(slopes_of, sides), strict=True)
    for upstream in (
        features(5, 2, dtype=dtype).t(),
        layouts.stepped(features(2, 5, dtype=dtype)),
        torch.ones((), dtype=dtype).expand(2, 5),
        torch.tensor(-1.5, dtype=dtype),
    ):
        for p, won in ((SUM, ()), (MAX, argmax)):
            gradients = [torch.empty_like(x) for x in sides]
            attention.attention_backward(upstream, sides, slopes, won, gradients, p)
            for j, x in enumerate(sides):
                row = upstream[j % 2] if upstream.ndim else upstream
                expected = expected_gradient(x, slopes[j], won[j] if won else None, row)
                assert_gradient(gradients[j], expected)


@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
def test_slopes_of_teachers_are_not_computed_unless_wanted(kind):
    """The student's are the same, and the teacher's map stays where it is."""
    student, teacher = features(3, 4, 5), features(3, 6, 5)
    found = []
    for sides in ([student], [student, teacher]):
        slopes = [empty_map(x) for x in sides]
        argmax = [empty_map(x).int() for x in sides] if kind == "max_pow" else []
        loss = torch.empty(())
        attention.attention_transfer_forward(
            [student], [teacher], loss, slopes, argmax, [], NORM, SUM._replace(kind=kind)
        )
        assert all(x.isfinite().all() for x in slopes)
        found.append((loss, slopes[0]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
def test_exponents_and_eps_beyond_float32(kind):
    x = torch.tensor([[[1.0, 0.5, 0.0], [0.25, -1.0, 0.0]]])
    if kind != "sum":
        check_map(x, "triton", kind=kind, p=1e30, normalize=False)
        raw = empty_map(x)
        p = SUM._replace(kind=kind, p=1e300)
        attention.attention_map_forward(x, raw, raw.int(), p)
        assert raw.tolist() == [[1, 1, 0]]
    for eps in (1e-300, 1e-40):
        # What the slope of a map of zeros would overflow by is multiplied by 0.
        for scale, teacher, beta in [(1e-30, x * 0, 1.0), (1e-41, x * 0, 1.0), (0.0, x, 1e3)]:
            student = (x * scale).requires_grad_()
            loss = fastkd.attention_transfer_loss(
                student, teacher, kind=kind, p=1.0, eps=eps, beta=beta, backend="triton"
            )
            loss.backward()
            assert loss.isfinite()
            assert student.grad.isfinite().all()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_31_bits(tmp_path, dim):
    """Samples, channels or positions 2³⁰ elements apart: hardly a page of it is touched."""
    shape, strides = (3, 3, 3), [20, 5, 1]
    strides[dim] = 2**30
    length = 2**31 + 64
    if torch.get_default_device().type == "cpu":
        file = str(tmp_path / "sparse")
        memory = torch.from_file(file, shared=True, size=length, dtype=torch.float16)
    else:
        memory = torch.empty(length, dtype=torch.float16)
    x = memory.as_strided(shape, strides).copy_(features(*shape))
    for kind in ("sum_pow", "max_pow"):
        check_transfer(x, features(*shape), "triton", kind=kind)
    before = x.clone()
    slopes, argmax = slopes_of(x)
    for p, won in ((MAX, argmax), (SUM, None)):
        attention.attention_backward(
            torch.ones(()), [before], [slopes], [] if won is None else [won], [x], p
        )
        assert_gradient(x, expected_gradient(before, slopes, won))


def test_launches(monkeypatch):
    """A map a side, a distance a pair, and a sum where there is one."""
    launched = []
    monkeypatch.setattr(
        attention, "launch", lambda kernel, *args, **constants: launched.append(kernel.__name__)
    )
    pair = "channel_map channel_map distance "
    for batch, pairs, reduction, kernels in [
        (1, 1, "mean", pair),
        (2, 1, "mean", pair + "add_up"),
        (2, 2, "sum", 2 * pair + "add_up"),
        (2, 2, "none", 2 * pair),
    ]:
        launched.clear()
        sides = [features(batch, 3, 4)] * pairs
        loss = torch.empty((pairs, batch) if reduction == "none" else ())
        attention.attention_transfer_forward(
            sides, sides, loss, [*map(empty_map, sides)], [], [],
            NORM._replace(reduction=reduction), SUM,
        )  # fmt: skip
        assert launched == kernels.split()


def test_one_kernel_for_any_batch_size(monkeypatch):
    """What kernels are compiled for is the same."""
    constants = []
    monkeypatch.setattr(
        attention, "launch", lambda kernel, *args, **more: constants.append((kernel.__name__, more))
    )
    for shape in [(20, 7, 7), (3, 56, 56), (512, 14, 14), (1, 9, 9)]:
        for layout in (layouts.contiguous, layouts.channels_last, layouts.cropped):
            found = set()
            for batch in (2, 3, 64, 100):
                constants.clear()
                x = torch.empty(batch, *shape, device="meta")
                x = layout(x) if layout is not layouts.cropped else x[..., 1:-1, 1:-1]
                slopes = [empty_map(x, torch.float32).to("meta")]
                loss = torch.empty((), device="meta")
                attention.attention_transfer_forward([x], [x], loss, slopes, [], [], NORM, SUM)
                for upstream in (loss, torch.empty(1, batch, device="meta")):
                    attention.attention_backward(
                        upstream, [x], slopes, [], [torch.empty_like(x)], SUM
                    )
                found.add(str(constants))
            assert len(found) == 1


def test_tiles_follow_what_lies_side_by_side():
    """Threads of a warp read neighbouring positions where channels lie apart, else channels."""
    for shape, layout, side_by_side, rows, channels in [
        ((2, 256, 56, 56), layouts.contiguous, True, 32, 128),
        ((2, 256, 7, 7), layouts.contiguous, False, 32, 128),
        ((2, 3, 56, 56), layouts.contiguous, True, 1024, 4),
        ((2, 256, 56, 56), layouts.channels_last, False, 16, 256),
        ((2, 64, 56, 56), layouts.channels_last, False, 64, 64),
    ]:
        x = layout(torch.empty(shape, device="meta"))
        tile = _walk(x.shape, x.stride(), 1, x.dtype).tile
        assert (tile["SIDE_BY_SIDE"], tile["ROWS"], tile["CHANNELS"]) == (
            side_by_side,
            rows,
            channels,
        )

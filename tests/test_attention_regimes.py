"""Features at the sizes and strides where a kernel goes another way or a unit of its work ends."""

import functools
import itertools
import math

import layouts
import numpy as np
import oracle
import pytest
import shim
import torch
from agreement import array, assert_gradient
from agreement_features import check_map, check_transfer, features

import fastkd
from fastkd.kernels import native
from fastkd.operators import kernels
from fastkd.ops import attention
from fastkd.parameters import Map

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
KINDS = ["sum", "sum_pow", "max_pow"]
SUM = Map("sum_pow", 2.0, 1e-12, 1, "native")
MAX = SUM._replace(kind="max_pow")

every_kind = pytest.mark.parametrize("kind", KINDS)


def beginning_at(x, first):
    """The same features in memory that begins at no access of 16 bytes."""
    memory = x.new_full((x.numel() + first,), math.nan)
    return memory[first:].view(x.shape).copy_(x)


def with_gaps(x, gap):
    """Samples that are further apart than they are long."""
    length = x[0].numel()
    memory = x.new_full((len(x), length + gap), math.nan)
    return memory[:, :length].view(x.shape).copy_(x)


def expanded_positions(x):
    """Channels side by side; the gradient's are not."""
    shape = (*x.shape[:2], math.prod(x.shape[2:]))
    return layouts.channels_last(x.flatten(2)[..., :1]).expand(shape)


def transposed(x):
    """As tokens, cut out of longer ones: channels side by side, positions with a gap."""
    wide = x.new_full((x.shape[0], *x.shape[2:], x.shape[1] + 16), math.nan)
    return wide[..., : x.shape[1]].copy_(x.movedim(1, -1)).movedim(-1, 1)


# Shapes, and the layout in which a kernel goes through them in one way. 16 bytes are 4 elements of
# float32 and 8 of half precision; a period is of 1, 2, 4 or 8 planes then.
PLANES = [
    (3, 5, 4, 4),
    (2, 300, 4, 4),
    (2, 256, 14, 14),
    (2, 256, 200),
    (2, 4096, 36),
    (3, 1, 40),
    (2, 3, 600),
]
PERIODS = [
    *((2, channels, 7, 7) for channels in (4, 8, 16, 24, 72)),
    *((2, channels, 13, 3) for channels in (8, 40)),
    *((3, channels, 10) for channels in (2, 4, 6, 8, 200)),
    *((2, channels, 12) for channels in (2, 3, 7)),
    *((2, 8, positions) for positions in (127, 129, 131)),
    (3, 4096, 3),
]
ELEMENTS = [(3, 3, 5), (2, 7, 7, 7), (2, 40, 3, 43), (2, 300, 2, 5, 7), (2, 2000, 33), (3, 1, 7)]
ROWS = [
    *((2, channels, 37) for channels in (4, 8, 64, 128)),
    *((2, channels, 7, 7) for channels in (512, 600)),
    (2, 4096, 3, 6),
    (2, 16, 700),
]
APART = [*((2, channels, 5, 7) for channels in (1, 2, 3, 33, 70)), (2, 515, 7, 5), (2, 4095, 17)]
# Layouts in which an element, a row or a plane follows the last one after a gap.
GAPS = [
    layouts.cropped,
    layouts.sliced,
    layouts.stepped,
    layouts.expanded,
    expanded_positions,
    transposed,
    functools.partial(with_gaps, gap=16),
    functools.partial(with_gaps, gap=1),
    functools.partial(beginning_at, first=1),
    functools.partial(beginning_at, first=8),
    lambda x: layouts.channels_last(x)[:, :, 1:-1],
    lambda x: x[:, :, 1:-1],
    lambda x: x[:, ::2],
    lambda x: beginning_at(layouts.channels_last(x).movedim(1, -1), 3).movedim(-1, 1),
]
SIZES = [
    *((shape, layouts.contiguous) for shape in PLANES + PERIODS + ELEMENTS),
    *((shape, layouts.channels_last) for shape in ROWS + APART),
]
WAYS = [
    *(pytest.param(*way, marks=pytest.mark.gpu_sizes) for way in SIZES),
    *itertools.product([(3, 8, 6, 8), (2, 40, 9, 5, 3)], GAPS),
]


def teacher_of(student, channels=3):
    return features(student.shape[0], channels, *student.shape[2:])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("shape", "layout"), WAYS)
def test_ways(backend, shape, layout, dtype):
    student = layout(features(*shape, dtype=dtype))
    teacher = teacher_of(student)
    for kind in ("sum_pow", "max_pow"):
        # With teachers the gradient is backward's; each kind has it in one dtype.
        in_backward = (kind == "max_pow") == (dtype == F32)
        check_transfer(student, teacher, backend, with_teachers=in_backward, kind=kind)


@pytest.mark.gpu_sizes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last])
@pytest.mark.parametrize("shape", [(3, 8, 7, 7), (2, 300, 36), (2, 33, 5, 7), (3, 40, 1)])
def test_maps(backend, shape, layout, kind):
    """Also of one position, and in the arithmetic of float64."""
    for dtype in (F32, F64, F16):
        x = layout(features(*shape, dtype=dtype))
        check_map(x, backend, kind=kind, normalize=False)


@pytest.mark.gpu_sizes
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize(("shape", "layout"), WAYS[::5])
def test_ties_and_nan_of_the_maximum(backend, shape, layout):
    """Wherever they meet: in a thread, in a warp, or in a block."""
    for dtype in (F32, BF16):
        x = torch.randint(-2, 3, shape).to(dtype)
        check_map(layout(x), backend, kind="max_pow", normalize=False)
        for value in (math.nan, -math.inf):
            x[torch.rand(shape) < 4 / shape[1]] = value
            check_map(layout(x), backend, kind="max_pow", normalize=False)


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize(("kind", "p"), [("sum", 1.0), ("sum_pow", 2.0), ("sum_pow", 2.7)])
@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last])
def test_nan_spares_other_features(kernel_backend, layout, kind, p):
    x = features(2, 8, 7, 7)
    x[0, 3, 1, 1], x[1, 5, 2, 2], x[1, 6, 3, 3] = math.nan, -math.inf, 0
    check_map(layout(x), kernel_backend, kind=kind, p=p, normalize=False)


DISTANCES = [("norm", 1.0), ("norm", 2.0), ("norm", 3.0), ("norm", math.inf), ("mse", 2.0)]


def apart(shape, dtype=F32):
    """A pair whose maps differ by far more than rounding, at each position."""
    one, other = ((1 + torch.rand(shape, dtype=F64)) * torch.randn(shape).sign() for _ in "st")
    is_strong = torch.rand(shape[0], 1, *shape[2:]) < 0.5
    return [
        torch.where(strong, x, x / 2).to(dtype)
        for strong, x in ((is_strong, one), (~is_strong, other))
    ]


@pytest.mark.gpu_sizes
@pytest.mark.parametrize(("distance", "order"), DISTANCES)
@pytest.mark.parametrize("positions", [4097, 8193])
def test_parts_of_a_map(kernel_backend, positions, distance, order):
    keywords = {"distance": distance, "order": order}
    check_transfer(*apart((2, 1, positions)), kernel_backend, kind="sum", **keywords)
    student, teacher = apart((2, 2, positions), BF16)
    student[0] = 0
    check_transfer(
        [student, features(2, 3, 5)],
        [teacher, features(2, 4, 5)],
        kernel_backend,
        torch.randn(2, 2),
        kind="max_pow",
        reduction="none",
        **keywords,
    )


@pytest.mark.gpu_sizes
@pytest.mark.parametrize("count", [5, 6, 50])
@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_pairs(backend, count, reduction, kind):
    shapes = [(2, 3 + index % 5, 5 + index % 7, 2) for index in range(count)]
    students = [features(*shape) for shape in shapes]
    teachers = [layouts.channels_last(features(*shape)) for shape in shapes]
    check_transfer(
        students,
        teachers,
        backend,
        torch.randn(count, 2) if reduction == "none" else -0.5,
        kind=kind,
        reduction=reduction,
    )


@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
@pytest.mark.parametrize(
    ("shape", "count"), [((2, 3, 4, 5), 1), ((2, 3, 2, 4, 3), 1), ((2, 2, *[2] * 6), 17)]
)
def test_many_axes(backend, shape, count, kind):
    """Axes of which no two are one stretch."""
    students, teachers = ([layouts.stepped(features(*shape)) for _ in range(count)] for _ in "st")
    check_transfer(students, teachers, backend, kind=kind)
    students[0] = students[0].contiguous()
    check_transfer(students, teachers, backend, 3.0, kind=kind)


@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
def test_pairs_of_every_kind_in_one_call(backend, kind):
    """Each dtype and layout beside each other, so that no pair's way is another's."""
    students, teachers = [], []
    for one, other in itertools.product([F32, F16, BF16], repeat=2):
        students += [
            features(2, 40, 7, 5, dtype=one),
            layouts.cropped(features(2, 3, 2, 3, dtype=one)),
        ]
        teachers += [layouts.channels_last(features(2, 16, 7, 5, dtype=other))]
        teachers += [features(2, 3, 2, 3, dtype=other)]
    check_transfer(students, teachers, backend, grad_output=3.0, kind=kind)
    check_transfer(students, teachers, backend, kind=kind, reduction="none")
    students[1], teachers[0] = students[1].double(), teachers[0].double()
    check_transfer(students, teachers, backend, kind=kind)


@pytest.mark.gpu_sizes
@pytest.mark.parametrize("batch", [1, 4096])
def test_batches(backend, batch):
    """Of more samples than a stream has counters for."""
    student, teacher = features(batch, 1, 8), features(batch, 2, 8)
    check_transfer(student, teacher, backend, with_teachers=batch == 1, kind="max_pow")


@every_kind
@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last, layouts.cropped])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_gradients_of_backward(backend, monkeypatch, dtype, layout, kind):
    """As on a GPU, where gradients never follow in forward."""
    monkeypatch.setattr(attention, "gradient_follows", lambda *_: False)
    student, teacher = layout(features(3, 24, 7, 7, dtype=dtype)), features(3, 3, 7, 7)
    for grad_output in (None, 1.0, -2.5):
        check_transfer(student, teacher, backend, grad_output, kind=kind)
    check_transfer([student, teacher], [teacher, student], backend, 0.5, kind=kind)


@every_kind
@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_backward_again(backend, monkeypatch, dtype, follows, kind):
    if not follows:
        monkeypatch.setattr(attention, "gradient_follows", lambda *_: False)
    student, teacher = features(3, 24, 7, 7, dtype=dtype).requires_grad_(), features(3, 3, 7, 7)
    loss = fastkd.attention_transfer_loss(student, teacher, kind=kind, backend=backend)
    for grad_output in (1.0, -3.0, 1.0):
        _, expected = oracle.attention_transfer(
            [array(student)], [array(teacher)], grad_output, kind=kind
        )
        upstream = torch.tensor(grad_output)
        (gradient,) = torch.autograd.grad(loss, student, upstream, retain_graph=True)
        assert_gradient(gradient, expected[0])


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last, layouts.cropped])
@every_kind
def test_repeated_calls_are_bitwise_equal(kernel_backend, kind, layout):
    students = [layout(features(3, 40, 7, 8)), features(3, 8, 4099)]
    teachers = [features(3, 9, 7, 8), features(3, 2, 4099)]
    for x in students:
        x.requires_grad_()
    first = None
    for seed in range(3):
        shim.set_schedule(seed)
        loss = fastkd.attention_transfer_loss(students, teachers, kind=kind, backend=kernel_backend)
        results = [loss.detach(), *torch.autograd.grad(loss, students)]
        first = first or results
        assert all(map(torch.equal, results, first))


def slopes_of(x):
    """Slopes and argmax such as forward might have left."""
    slopes = torch.randn(x.shape[0], math.prod(x.shape[2:]))
    return slopes, torch.randint(x.shape[1], slopes.shape, dtype=torch.int32)


def expected_gradient(x, slopes, argmax, grad_output):
    """Of `SUM`, or of `MAX` with argmax."""
    shape = (x.shape[0], 1, *x.shape[2:])
    scaled = array(slopes).reshape(shape) * grad_output
    if argmax is None:
        return 2 * array(x) * scaled
    channels = np.arange(x.shape[1]).reshape(1, -1, *[1] * (x.ndim - 2))
    return np.where(channels == array(argmax).reshape(shape), scaled, 0.0)


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last, layouts.cropped])
@pytest.mark.parametrize("shape", [(3, 8, 7, 7), (2, 40, 4, 9)])
def test_gradients_and_nothing_beside_them(shape, layout):
    """Nor are features of `max_pow` read, and zeros are written to all that is no argmax."""
    x = layout(features(*shape))
    slopes, argmax = slopes_of(x)
    kernel = kernels("native", "attention").attention_backward
    for p, source, won in [(SUM, x, None), (MAX, torch.full_like(x, math.nan), argmax)]:
        for first in (1, 2, 4):
            memory = torch.randn(shape[0], shape[1] + 5, shape[2] + 2, shape[3] + 8)
            before = memory.clone()
            inside = (..., slice(first, first + shape[1]), slice(1, -1), slice(4, -4))
            gradient = memory[inside]
            kernel(
                torch.tensor(3.0), [source], [slopes], [] if won is None else [won], [gradient], p
            )
            assert_gradient(gradient, expected_gradient(x, slopes, won, 3.0))
            before[inside] = gradient
            assert torch.equal(memory, before)


@pytest.mark.skipif(not shim.module(), reason="needs the shim")
def test_more_streams_than_there_are_counters_for(monkeypatch):
    shim.module().set_capturing(False)
    student, teacher = features(2, 3, 5), features(2, 2, 5)
    for stream in [*range(20)] * 2:
        monkeypatch.setattr(native, "place_of", lambda tensor, at=stream: (0, 16 * at))
        check_transfer(student, teacher, "native")

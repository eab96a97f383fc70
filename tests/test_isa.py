"""Each instruction set that runs here, at the sizes where its vectors and blocks end."""

import math

import probabilities
import pytest
import temperatures
import thresholds
import top_k
import torch
import torch.nn.functional as F
from agreement import DTYPES
from agreement_features import check_hint, check_map, check_transfer, features
from agreement_logits import check_distillation, check_metrics, check_soft_target, logits
from agreement_relations import RELATIONS, check_flow, check_relation, check_similarity, points
from conftest import BACKENDS
from divergences import FEW, name_of, sides
from layouts import channels_last, contiguous, cropped, sliced

import fastkd
from fastkd.kernels import compiled
from fastkd.ops import fsp

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")

# Around the vector widths in every dtype, unrolled or not, and the block sizes.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 1023, 1024, 1025]


def names():
    """Of this machine's, or of the best known one so that a missing module fails the tests."""
    module = compiled.load()
    return module.isas() if not isinstance(module, str) else ["avx512"]


@pytest.fixture(params=names())
def isa(request):
    module = compiled.load()
    assert not isinstance(module, str), module
    best = module.isa()
    module.set_isa(request.param)
    assert module.isa() == request.param
    yield request.param
    module.set_isa(best)


def test_the_best_is_in_use():
    assert compiled.load().isa() == compiled.load().isas()[0]


def test_the_baseline_runs_everywhere():
    assert compiled.load().isas()[-1] == "baseline"


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="mmx"):
        compiled.load().set_isa("mmx")


@pytest.mark.parametrize("temperature", [1e-35, 1e35])
def test_temperatures_at_the_ends_of_float32(isa, temperature):
    """The largest logit alone counts, or all count the same."""
    for size in SIZES:
        pair = [logits(16, size) for _ in range(2)]
        check_soft_target(*pair, "native", temperature=temperature, teachers=False)


@pytest.mark.parametrize("layout", [contiguous, sliced])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets(isa, dtype, layout):
    for size in SIZES:
        pair = [layout(logits(16, size, dtype=dtype)) for _ in range(2)]
        check_soft_target(*pair, "native", temperature=2.0)
        labels = torch.tensor([0, -100, size - 1, size // 2] * 4)
        check_distillation(*pair, labels, "native", teachers=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets_along_other_dims(isa, dtype):
    for size in SIZES[:-3]:
        pair = [logits(16, 5, size, dtype=dtype) for _ in range(2)]
        labels = torch.randint(5, (16, size))
        check_soft_target(*pair, "native", dim=1)
        for temperature in (1.0, 4.0):
            keywords = {"temperature": temperature, "label_smoothing": 0.1, "dim": 1}
            check_distillation(*pair, labels, "native", teachers=False, **keywords)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ensembles(isa, dtype):
    """Of rows, and of rows that lie side by side."""
    for shape in [shape for size in SIZES[1::3] for shape in ((16, size), (4, 5, size))]:
        student, *teachers = (sliced(logits(*shape, dtype=dtype)) for _ in range(4))
        keywords = {"dim": 1, "teacher_weights": [1, 2, 3], "temperature": 2.0}
        check_soft_target(student, teachers, "native", **keywords)
        labels = torch.randint(shape[1], (shape[0], *shape[2:]))
        labels[0] = -100
        check_distillation(
            student, teachers, labels, "native", teachers=False, label_smoothing=0.1, **keywords
        )


@pytest.mark.parametrize("keywords", FEW, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergences(isa, dtype, keywords):
    for size in SIZES[1::2]:
        pair = sides(16, size, dtype, dtype, temperature=2.0)
        check_soft_target(*pair, "native", temperature=2.0, **keywords)
        labels = torch.tensor([0, -100, size - 1, size // 2] * 4)
        check_distillation(*pair, labels, "native", temperature=2.0, teachers=False, **keywords)
        columns = [x.t().contiguous() for x in pair]
        check_soft_target(*columns, "native", temperature=2.0, dim=0, **keywords)


@pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperatures(isa, dtype, keywords):
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    for size in SIZES[1::2]:
        heat = temperatures.of_kind("rows and rows", (16, size), precise)
        pair = sides(16, size, dtype, dtype, **heat)
        check_soft_target(*pair, "native", **heat, **keywords)
        labels = torch.tensor([0, -100, size - 1, size // 2] * 4)
        check_distillation(*pair, labels, "native", **heat, **keywords)


@pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_is", probabilities.KINDS)
def test_probabilities(isa, teacher_is, dtype, keywords):
    keywords = {**keywords, "teacher_is": teacher_is, "temperature": 2.0}
    for size in SIZES[1::2]:
        pair = probabilities.sides(teacher_is, 16, size, dtype, dtype, temperature=2.0)
        check_soft_target(*pair, "native", **keywords)
        labels = torch.tensor([0, -100, size - 1, size // 2] * 4)
        check_distillation(*pair, labels, "native", **keywords)
    pair[1][:, ::5] = 1e-40 if teacher_is == "probabilities" else -90.0
    if keywords.get("divergence") != "reverse_kl":
        pair[1][3] = 0.0 if teacher_is == "probabilities" else -math.inf
    check_soft_target(*pair, "native", **keywords)


@pytest.mark.parametrize("keywords", top_k.PAIRS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k(isa, dtype, keywords):
    keywords = {**keywords, "temperature": 2.0}
    for size in SIZES[1::2]:
        tensors = top_k.sides(16, size, min(size, 9), (dtype, dtype), **keywords)
        top_k.check_top_k(*tensors, "native", **keywords)
        labels = torch.tensor([0, -100, size - 1, size // 2] * 4)
        top_k.check_top_k(*tensors, "native", labels=labels, label_smoothing=0.1, **keywords)


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(isa, dtype, layout, kind):
    for positions, channels in [*((size, 3) for size in SIZES[1:]), *((6, c) for c in SIZES)]:
        pair = [layout(features(8, channels, positions, dtype=dtype)) for _ in range(2)]
        check_transfer(*pair, "native", kind=kind)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.5, 2.7, 3.0, 3.5, 4.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_powers(isa, dtype, p):
    for layout in (contiguous, channels_last):
        x = layout(features(3, 17, 67, dtype=dtype))
        check_map(x, "native", p=p)
        check_map(x, "native", p=p, kind="max_pow")


@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hints(isa, dtype, layout):
    for size in SIZES:
        pair = [layout(features(3, size, 3, dtype=dtype)) for _ in range(2)]
        check_hint(*pair, "native")
        check_hint(*[x[:, :1] for x in pair], "native", reduction="none")


# Rows, planes and positions that begin at any alignment, and those that begin where a vector does.
STREAMED = [(17, 1013), (16, 1024)]
STREAMED_MAPS = [(5, 127, 7, 7), (3, 64, 16, 16)]
# A vector's elements take as many bytes in memory, half of them or a quarter.
STREAMED_DTYPES = [
    *((torch.float32, other) for other in (torch.float32, torch.float16, torch.float64)),
    *((torch.bfloat16, other) for other in (torch.bfloat16, torch.float64)),
    *((torch.float64, other) for other in (torch.float64, torch.float16)),
    (torch.float16, torch.float64),
]


@pytest.fixture
def streamed(isa):
    """Whatever a gradient takes, it is written past the cache."""
    thresholds.module().set_thresholds(**{**thresholds.DEFAULTS, "past_cache": 0})


@pytest.mark.parametrize("shape", STREAMED)
@pytest.mark.parametrize(("dtype", "teacher"), STREAMED_DTYPES)
def test_soft_targets_past_the_cache(streamed, dtype, teacher, shape):
    pair = [logits(*shape, dtype=one) for one in (dtype, teacher)]
    check_soft_target(*pair, "native", temperature=2.0)
    labels = torch.randint(shape[1], shape[:1])
    labels[::7] = -100
    check_distillation(*pair, labels, "native", teachers=False)
    check_soft_target(*[x.view(*shape, 1).mT for x in pair], "native", dim=-1)


@pytest.mark.parametrize(("dtype", "teacher"), STREAMED_DTYPES)
def test_ensembles_past_the_cache(streamed, dtype, teacher):
    student, *teachers = (logits(16, 1013, dtype=one) for one in (dtype, teacher, dtype))
    labels = torch.randint(1013, (16,))
    labels[::7] = -100
    check_distillation(student, teachers, labels, "native", teachers=False)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", STREAMED_MAPS)
@pytest.mark.parametrize(("dtype", "teacher"), STREAMED_DTYPES)
def test_maps_past_the_cache(streamed, dtype, teacher, shape, layout):
    """In double where the other side, or another pair, is."""
    pair = [layout(features(*shape, dtype=one)) for one in (dtype, teacher)]
    check_transfer(*pair, "native")
    check_hint(*pair, "native")
    other = [layout(features(*shape, dtype=dtype)) for _ in range(2)]
    check_hint([other[0], pair[0]], [other[1], pair[1]], "native")


# Calls that write more than 8 MiB of gradients.


@pytest.mark.at_defaults
def test_large_soft_targets(isa):
    check_soft_target(*(logits(73, 31013) for _ in range(2)), "native", teachers=False)


@pytest.mark.at_defaults
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_large_maps(isa, layout):
    pair = [layout(features(357, 127, 7, 7)) for _ in range(2)]
    check_transfer(*pair, "native", with_teachers=False)
    check_hint(*pair, "native")


@pytest.mark.parametrize("layout", [contiguous, channels_last, cropped])
def test_maps_with_nan(isa, layout):
    """The sample is NaN, of any order; the others are what they are. The first NaN wins."""
    pair = [layout(features(3, 19, 4, 5)) for _ in range(2)]
    pair[0][1, [7, 9], 2, 3] = torch.nan
    for order in (1.0, 2.0, 3.0, torch.inf):
        check_transfer(*pair, "native", order=order, with_teachers=False)
    pair[0].requires_grad_()
    found = []
    for backend in ("native", "reference"):
        losses = fastkd.attention_transfer_loss(
            *pair, kind="max_pow", reduction="none", backend=backend
        )
        found.append((losses, *torch.autograd.grad(losses.sum(), pair[0])))
    torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_one_sample_for_all_threads(isa, layout):
    thresholds.module().set_thresholds(per_thread=1)
    pair = [layout(features(1, 19, 9, 9)) for _ in range(2)]
    for kind in ("sum_pow", "max_pow"):
        check_transfer(*pair, "native", kind=kind)


def test_planes_apart_and_gradients_that_lie_otherwise(isa):
    """Of a part of each map's rows or channels, whose gradient is contiguous."""
    rows = [features(3, 5, 7, 6)[:, :, 1:5] for _ in range(2)]
    pixels = [channels_last(features(3, 21, 4, 6))[:, 2:19] for _ in range(2)]
    for pair in (rows, pixels):
        check_transfer(*pair, "native")
        check_hint(*pair, "native")


def test_maps_of_one_position(isa):
    """Normalised they are 1, without a gradient."""
    check_map(features(3, 19, 1), "native", normalize=False)


def test_a_temperature_that_softens_everything(isa):
    pair = [logits(5, 7) for _ in range(2)]
    loss = fastkd.soft_target_loss(*pair, temperature=1e38, scale_t2=False, backend="native")
    assert 0 <= loss < 1e-30


def test_conversions_are_exact(isa):
    """Every float16 and bfloat16 number, widened by the kernel: the loss is its square."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = every[every.isfinite() & (every.abs() < 1e18)][:, None]
        zeros = torch.zeros_like(x)
        loss = torch.ops.fastkd.hint_forward.default([x], [zeros], False, 1.0, "none", "native")[0]
        assert torch.equal(loss[0], x[:, 0].float().square())


def test_roundings_are_to_nearest_even(isa):
    """The student's gradient is the difference, rounded once."""
    for dtype in (torch.float16, torch.bfloat16):
        exact = torch.randn(4096).exp() * torch.randn(4096).sign()
        halves = exact.to(dtype).float()
        # Midway between two neighbours, and a hair to either side.
        midway = (halves + torch.nextafter(exact.to(dtype), torch.tensor(9e4, dtype=dtype))) / 2
        for t in (exact, midway, midway * (1 + 2e-7), midway * (1 - 2e-7)):
            student = torch.zeros(1, 4096, dtype=dtype).requires_grad_()
            loss = torch.ops.fastkd.hint_forward.default(
                [student.detach()], [-t[None]], True, 0.5, "sum", "native"
            )
            assert torch.equal(loss[1][0][0], t.to(dtype))


@pytest.mark.parametrize("size", [7e4, 1e39])
def test_what_float16_does_not_hold_is_infinite(isa, size):
    student = torch.zeros(1, 40, dtype=torch.float16, requires_grad=True)
    teacher = torch.full((1, 40), size, dtype=torch.float32 if size < 1e38 else torch.float64)
    fastkd.hint_loss(student, teacher, backend="native").backward()
    assert torch.equal(student.grad, torch.full((1, 40), -torch.inf, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relations(isa, dtype):
    for size in (3, 4, 5, 8, 9, 16, 17, 33):
        student, teacher = points(size, 7, dtype=dtype), points(size, 130, dtype=dtype)
        for name in RELATIONS:
            check_relation(name, student, teacher, "native")
        check_similarity(student, teacher, "native")


@pytest.mark.parametrize("layout", [contiguous, channels_last, sliced])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flows(isa, dtype, layout):
    """Lanes are columns, or channels where those lie side by side."""
    for size in SIZES[:-3]:
        shapes = [(5, 3, size), (2, 2, (size + 1) // 2), (5, 2, 3), (2, 2, 1)]
        if layout is channels_last:
            shapes = [(size, 3, 5), (2, 2, 3), (size, 4, 2), (2, 2, 1)]
        pairs = [layout(features(2, *shape, dtype=dtype)) for shape in shapes]
        check_flow([tuple(pairs[:2])], [tuple(pairs[2:])], "native")


def test_flows_of_one_channel(isa):
    """Whose stride is 1, as is that of a row's pixels."""
    sides = [[features(2, 6, 4, 1).movedim(-1, 1), features(2, 3, 3, 2)] for _ in range(2)]
    check_flow([tuple(sides[0])], [tuple(sides[1])], "native")


@pytest.mark.parametrize("value", [0.0, -torch.inf, torch.nan])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_first_of_equal_maxima_wins(isa, layout, value):
    shape = (2, 3, 5, 8)
    falling = -torch.arange(40.0).view(5, 8).expand(shape)
    features = layout(torch.full(shape, value))
    for size in ((3, 7), (5, 4), (1, 3)):
        _, first = F.adaptive_max_pool2d(falling, size, return_indices=True)
        pooled, argmax = fsp.forward(features, *size, True)
        assert torch.equal(argmax.long(), first)
        torch.testing.assert_close(pooled, torch.full_like(pooled, value), equal_nan=True)


def test_gradients_of_maxima_lie_as_the_features_do(isa):
    for layout in (contiguous, channels_last):
        features = layout(torch.randn(2, 3, 6, 4)).requires_grad_()
        pooled = fsp.max_pool(features, 3, 2, torch.float32)
        (gradient,) = torch.autograd.grad(pooled.sum(), features)
        assert gradient.stride() == features.stride()
        assert torch.equal(gradient != 0, torch.isin(features, pooled))


@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics(isa, dtype):
    for classes in SIZES:
        student, teacher = (logits(5, classes, dtype=dtype) for _ in range(2))
        check_metrics(sliced(student), teacher, "native", temperature=2.0)
        student[1:3, ::2], teacher[2:4, ::3] = -torch.inf, -torch.inf
        check_metrics(student, teacher, "native", teacher_temperature=0.7)

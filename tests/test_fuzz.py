"""Arguments at random: a call agrees with the oracle, or says what is wrong; it never crashes."""

import math
import os

import numpy as np
import oracle
import pytest
import temperatures
import thresholds
import torch
from agreement import array
from conftest import DEVICE, THRESHOLDS
from divergences import HAVE_KERNELS, is_reverse_kl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastkd

# What all tests below do together with one backend, and what is asked of them: by `make fuzz` more,
# which `--hypothesis-seed` alone then decides.
USUAL = 5 * 150 + 3 * 60 + 60 + 3 * 50
WANTED = int(os.environ.get("FASTKD_TEST_EXAMPLES") or USUAL)


def examples(usual):
    return settings(
        max_examples=max(1, usual * WANTED // USUAL),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        **({} if WANTED == USUAL else {"database": None}),
    )


DIVERGENCES = st.sampled_from(
    [
        *[("forward_kl", 0.5)] * 3,
        *[("reverse_kl", 0.5), ("tvd", 0.5), ("jsd", 0), ("jsd", 0.3), ("jsd", 1), ("tvd", 0.3)],
        *[("skew_kl", 0.1), ("skew_kl", 0.9), ("skew_reverse_kl", 0.0), ("skew_reverse_kl", 0.5)],
    ]
    if HAVE_KERNELS
    else [("forward_kl", 0.5)]
)
# A coarse net: how close a kernel must come is for the tests of each loss.
TOLERANCE = 1e-4

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
# What masks a class, -inf in half precision. The student's is such that it times a probability that
# float32 takes for 0 is nothing.
TEACHER_MASKS, STUDENT_MASK = (-1e36, -3.4e38), -1e30
SIZES = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 17, 33])
ODD = st.sampled_from(
    [math.nan, math.inf, -math.inf, -1, 0, 1e-30, 1e30, 10**400, True, None, "x", "", [], 1j, 7]
)


@st.composite
def tensors(draw, shape, dtypes=DTYPES, specials=(), stream=0):
    """Random numbers of a shape: permuted, cropped, stepped or expanded memory; some specials.

    Tensors of different streams differ even where Hypothesis draws the same seed for both.
    """
    ndim = len(shape)
    order = draw(st.permutations(range(ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(ndim)]
    starts = [draw(st.sampled_from([0, 0, 1])) for _ in range(ndim)]
    stretched = [draw(st.sampled_from([False] * 7 + [True])) for _ in range(ndim)]
    stored = [1 if s else n for n, s in zip(shape, stretched, strict=True)]
    room = [a + n * b for a, n, b in zip(starts, stored, steps, strict=True)]
    rng = np.random.default_rng([stream, draw(st.integers(0, 2**32 - 1))])
    numbers = np.array(rng.normal(size=[room[axis] for axis in order]))
    numbers *= draw(st.sampled_from([1, 5, 30]))
    for value in draw(st.lists(st.sampled_from(specials), max_size=3)) if specials else ():
        numbers.flat[rng.integers(0, max(numbers.size, 1), min(numbers.size, 3))] = value
    memory = torch.as_tensor(numbers).to(draw(st.sampled_from(dtypes)))
    inverse = sorted(range(ndim), key=list(order).__getitem__)
    index = tuple(slice(a, None, b) for a, b in zip(starts, steps, strict=True))
    view = memory.permute(inverse)[index][tuple(slice(0, n) for n in stored)]
    return view.expand(shape)


def started(data):
    """What draws an example's arguments, once its thresholds are drawn."""
    if DEVICE == "cpu" and THRESHOLDS != "default":
        seeds = st.integers(0, 2**32 - 1)
        thresholds.use(data.draw(seeds if THRESHOLDS == "lowered" else st.none() | seeds))
    return data.draw


def shapes(low=0, high=5):
    sizes = st.lists(SIZES, min_size=low, max_size=high)
    return sizes.map(tuple).filter(lambda shape: math.prod(shape) < 10_000)


def sometimes(draw, value, others):
    """Usually the value; every twentieth time another."""
    return draw(others) if draw(st.integers(0, 19)) == 0 else value


PAIR_WEIGHTS = st.none() | st.none() | st.lists(st.sampled_from([0, 0.5, -2]), max_size=3)


def draw_temperatures(draw, keywords, shape):
    """Sometimes tensors, or another one of the teacher."""
    if not temperatures.HAVE_KERNELS or draw(st.booleans()) or not shape:
        return {}
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return temperatures.of_kind(
        draw(st.sampled_from(temperatures.KINDS)), shape, dim=keywords["dim"]
    )


def arrays_of(keywords):
    """For the oracle, whose gradients of temperatures come last and are not looked at."""
    is_heat = temperatures.NAMES.__contains__
    return {k: array(x) if is_heat(k) and torch.is_tensor(x) else x for k, x in keywords.items()}


def odd_keywords(draw, keywords):
    return {name: sometimes(draw, value, ODD) for name, value in keywords.items()}


def outcome(function, leaves, **keywords):
    """`(loss, gradients)`, or the error; anything but the two promised errors is a failure."""
    try:
        with np.errstate(all="ignore"):
            loss = function(*leaves, **keywords)
    except (ValueError, TypeError) as error:
        return error
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    if not wanted:
        return loss, []
    return loss, list(torch.autograd.grad(loss, wanted, torch.full_like(loss, 2.0)))


def compare(function, backend, leaves, expected, **keywords):
    """The backend against the oracle; and against the reference where the call is an error."""
    actual = outcome(function, leaves, backend=backend, **keywords)
    if isinstance(actual, Exception):
        other = outcome(function, leaves, backend="reference", **keywords)
        assert (type(other), str(other)) == (type(actual), str(actual))
        return
    value, gradients = expected()
    weights = [float(keywords.get(name, 1.0)) for name in ("beta", "soft_weight", "hard_weight")]
    # Soft targets are multiplied by the temperature's square, and their gradient divided by it.
    temperature = largest(keywords.get("temperature", 1.0))
    own = keywords.get("teacher_temperature")
    of_teacher = temperature if own is None else largest(own)
    weights += [temperature, 1 / temperature, of_teacher, 1 / of_teacher]
    if max(map(abs, weights)) > 1e3:
        return  # 1e30 times a rounding error can be anything; that nothing crashed is the test
    # KL is right to a fraction of 1, and so is T² KL to one of T².
    scale = max(1.0, temperature**2)
    assert_near(actual[0], value, scale)
    wanted = [g for x, g in zip(leaves, gradients[: len(leaves)], strict=True) if x.requires_grad]
    if "divergence" in keywords and is_reverse_kl(keywords["divergence"], keywords["beta"]):
        # A student's gradient q (log q/p - D) is a difference of terms as large as D, which a mask
        # of the teacher makes huge; where another term is infinite the loss does not tell it.
        if not np.isfinite(value).all():
            return
        scale = np.max(np.abs(value) / temperature, initial=scale)
    for gradient, one in zip(actual[1], wanted, strict=True):
        # Where the oracle has none, the loss says so and any gradient will do.
        assert_near(torch.where(torch.as_tensor(one).isnan(), torch.nan, gradient), one, scale)


def largest(temperature):
    """Of all rows."""
    return max([float(x) for x in torch.as_tensor(temperature).flatten()], default=1.0)


def without_infinite(found, divergence, **_):
    """Where reverse KL is infinite a student has no gradient."""
    value, gradients = found
    if divergence != "forward_kl":
        gradients = [np.where(np.isfinite(g), g, np.nan) for g in gradients]
    return value, gradients


def assert_near(actual, expected, scale):
    rounded = array(torch.from_numpy(np.array(expected)).to(actual.dtype))
    scale = np.max(np.abs(rounded), initial=scale, where=np.isfinite(rounded))
    coarse = max(TOLERANCE, torch.finfo(actual.dtype).eps)
    np.testing.assert_allclose(array(actual), rounded, rtol=coarse, atol=TOLERANCE * scale)


@examples(150)
@given(st.data())
def test_soft_target_loss(backend, data):
    draw = started(data)
    shape = draw(shapes())
    specials = (math.nan, -math.inf, 1e4, 0.0)
    student = draw(tensors(shape, specials=(*specials, STUDENT_MASK))).requires_grad_()
    of_teacher = (*specials, *TEACHER_MASKS)
    teachers = [
        draw(tensors(sometimes(draw, shape, shapes()), specials=of_teacher, stream=1 + index))
        for index in range(draw(st.sampled_from([1, 1, 2, 3])))
    ]
    alone = len(teachers) == 1
    weights = st.none() if alone else st.sampled_from([None, [1, 0.5, 3][: len(teachers)]])
    keywords = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4, 20.0, np.float32(3)])),
        "scale_t2": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "batchmean"])),
        "dim": draw(st.integers(-len(shape), max(len(shape) - 1, 0))),
        "teacher_weights": draw(weights),
    }
    keywords["divergence"], keywords["beta"] = draw(DIVERGENCES)
    if shape and draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        rows = np.delete(shape, keywords["dim"])
        keywords["mask"] = torch.as_tensor(rng.random(rows) < draw(st.sampled_from([0.7, 0.1])))
    keywords |= draw_temperatures(draw, keywords, shape)
    keywords = odd_keywords(draw, keywords)
    if backend == "triton" and not alone and is_reverse_kl(**keywords):
        backend = "reference"
    compare(
        lambda s, *t, **k: fastkd.soft_target_loss(s, t[0] if alone else t, **k), backend,
        [student, *teachers],
        lambda: without_infinite(
            oracle.soft_target(
                array(student), [*map(array, teachers)], 2.0, **arrays_of(keywords)
            ),
            **keywords,
        ),
        **keywords,
    )  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU asserts, and is of no use afterwards")
@examples(150)
@given(st.data())
def test_distillation_loss(backend, data):
    draw = started(data)
    shape = draw(shapes(1))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    classes = shape[dim]
    rows = [n for axis, n in enumerate(shape) if axis != dim % len(shape)]
    specials = (-math.inf, 1e4, 0.0)
    student = draw(tensors(shape, specials=(*specials, STUDENT_MASK))).requires_grad_()
    teacher = draw(tensors(shape, specials=(*specials, *TEACHER_MASKS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    high = classes + sometimes(draw, 0, st.just(1))
    ignored = rng.random(rows) < 0.3
    labels = torch.as_tensor(np.where(ignored, -100, rng.integers(0, max(high, 1), rows)))
    labels = sometimes(draw, labels, st.sampled_from([labels.int(), labels[..., None], None]))
    keywords = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4, 20.0])),
        "soft_weight": draw(st.sampled_from([0.9, 0.5, -1])),
        "hard_weight": draw(st.sampled_from([0.1, 0.0, 2])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1])),
        "ignore_index": draw(st.sampled_from([-100, -100, -100, 1])),
        "reduction": draw(st.sampled_from(["batchmean", "sum", "none", "mean"])),
        "dim": dim,
    }
    keywords["divergence"], keywords["beta"] = draw(DIVERGENCES)
    keywords |= draw_temperatures(draw, keywords, shape)
    keywords = odd_keywords(draw, keywords)

    def expected():
        parts, gradients = oracle.distillation(
            array(student), array(teacher), array(labels), 2.0, **arrays_of(keywords)
        )
        return without_infinite((parts[0], gradients), **keywords)

    compare(
        lambda s, t, **k: fastkd.distillation_loss(s, t, labels, **k), backend,
        [student, teacher], expected, **keywords,
    )  # fmt: skip


MAPS = st.sampled_from([("sum", None), ("sum", 1), ("sum_pow", 2.7), ("sum_pow", None)]) | (
    st.sampled_from([("max_pow", 1.0), ("max_pow", 3), ("sum_pow", 1.5), ("max_pow", None)])
)


@examples(150)
@given(st.data())
def test_attention_map(backend, data):
    draw = started(data)
    shape = draw(shapes(2))
    x = draw(tensors(shape, sometimes(draw, DTYPES, st.just(ODD_DTYPES)), (0.0, math.nan)))
    if x.is_floating_point():
        x.requires_grad_()
    kind, p = draw(MAPS)
    axis = st.integers(-len(shape), len(shape) - 1).filter(lambda axis: axis % len(shape))
    keywords = {
        "kind": kind,
        "p": p,
        "normalize": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-12, 1.0])),
        "channel_dim": draw(axis),
    }
    keywords = odd_keywords(draw, keywords)
    compare(
        fastkd.attention_map, backend, [x],
        lambda: oracle.attention_map(array(x), 2.0, **keywords), **keywords,
    )  # fmt: skip


def attention_transfer(students, teachers, **keywords):
    """The oracle's, with NaN for gradients that rounding would decide.

    Those are the gradients of a map of one position, which is 1 whatever it holds, and of a norm
    where the maps nearly coincide, as all constant maps do.
    """
    students, teachers = [*map(array, students)], [*map(array, teachers)]
    if keywords["order"] == 10**400:  # more than a float holds is infinite
        keywords["order"] = math.inf
    value, gradients = oracle.attention_transfer(students, teachers, 2.0, **keywords)
    for index, x in enumerate(students):
        if x.size == len(x) * x.shape[keywords["channel_dim"]]:
            gradients[index] = np.full_like(gradients[index], np.nan)
    if keywords["distance"] == "mse":
        return value, gradients
    of_map = {name: keywords[name] for name in ("kind", "p", "eps", "channel_dim")}
    for index, pair in enumerate(zip(students, teachers, strict=True)):
        q_s, q_t = (oracle.attention_map(x, **of_map)[0] for x in pair)
        coincide = (np.abs(q_s - q_t) < 1e-5 * np.maximum(q_s, q_t)).any(1)
        gradients[index] = gradients[index].copy()
        gradients[index][coincide] = np.nan
    return value, gradients


@examples(150)
@given(st.data())
def test_attention_transfer_loss(backend, data):
    draw = started(data)
    pairs = draw(st.integers(1, 3))
    batch, channel_dim = draw(SIZES), draw(st.sampled_from([1, -1]))
    sides = [], []
    for _ in range(pairs):
        spatial = draw(st.lists(SIZES, min_size=1, max_size=3))
        # Equal maps have no gradient that rounding would not decide.
        for stream, side in enumerate(sides):
            channels = [draw(SIZES)]
            inner = [*channels, *spatial] if channel_dim == 1 else [*spatial, *channels]
            shape = sometimes(draw, (batch, *inner), shapes())
            side.append(draw(tensors(shape, specials=(0.0,), stream=stream)))
    students, teachers = sides
    for x in students:
        x.requires_grad_()
    kind, p = draw(MAPS)
    distance, order = draw(
        st.sampled_from([("norm", None), ("norm", 1), ("norm", 3.0), ("norm", math.inf)])
        | st.sampled_from([("mse", None), ("norm", 1.5), ("mse", 2)])
    )
    keywords = {
        "kind": kind,
        "p": p,
        "distance": distance,
        "order": order,
        "beta": draw(st.sampled_from([1.0, 10, -0.5])),
        "pair_weights": draw(PAIR_WEIGHTS),
        "reduction": draw(st.sampled_from(["none", "sum", "mean"])),
        "eps": 1e-3,
        "channel_dim": channel_dim,
    }
    keywords = odd_keywords(draw, keywords)
    compare(
        lambda *x, **k: fastkd.attention_transfer_loss(x[:pairs], x[pairs:], **k), backend,
        [*students, *teachers],
        lambda: attention_transfer(students, teachers, **keywords), **keywords,
    )  # fmt: skip


@examples(150)
@given(st.data())
def test_hint_loss(backend, data):
    draw = started(data)
    pairs = draw(st.integers(1, 3))
    in_channels, out_channels, batch = draw(SIZES), draw(SIZES), draw(SIZES)
    has_regressor = draw(st.booleans())
    weight = bias = None
    if has_regressor:
        shape = (out_channels, in_channels, *draw(st.sampled_from([(), (1, 1)])))
        weight = draw(tensors(sometimes(draw, shape, shapes())))
        bias = draw(st.none() | tensors(sometimes(draw, (out_channels,), shapes())))
    sides = [], []
    for _ in range(pairs):
        spatial = draw(st.lists(SIZES, max_size=3))
        for side, channels in zip(sides, (in_channels, out_channels), strict=True):
            channels = channels if has_regressor else in_channels
            shape = sometimes(draw, (batch, channels, *spatial), shapes())
            side.append(draw(tensors(shape, specials=(0.0, math.nan))))
    students, teachers = sides
    for x in students:
        x.requires_grad_()
    keywords = {
        "pair_weights": draw(PAIR_WEIGHTS),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "batchmean"])),
        "half": draw(st.booleans()),
    }
    keywords = odd_keywords(draw, keywords)

    def expected():
        extra = [None if x is None else array(x) for x in (weight, bias)]
        value, gradients = oracle.hint(
            [*map(array, students)], [*map(array, teachers)], *extra, 2.0, **keywords
        )
        return value, gradients[: 2 * pairs]

    compare(
        lambda *x, **k: fastkd.hint_loss(
            x[:pairs], x[pairs:], regressor_weight=weight, regressor_bias=bias, **k
        ),
        backend, [*students, *teachers], expected, **keywords,
    )  # fmt: skip


RELATIONS = {
    "rkd_distance_loss": oracle.rkd_distance,
    "rkd_angle_loss": oracle.rkd_angle,
    "similarity_preserving_loss": lambda *x, pair_weights: oracle.similarity(*x),
}


@pytest.mark.parametrize("name", RELATIONS)
@examples(60)
@given(st.data())
def test_relations(backend, name, data):
    draw = started(data)
    batch, matrices = draw(SIZES), name.startswith("rkd")
    sides = []
    for stream in range(2):
        shape = (batch, *draw(st.lists(SIZES, min_size=1, max_size=1 if matrices else 3)))
        shape = sometimes(draw, shape, shapes())
        sides.append(draw(tensors(shape, specials=(0.0, math.nan), stream=stream)))
    sides[0].requires_grad_()
    keywords = {"delta": draw(st.sampled_from([0.1, 1.0, 3]))} if matrices else {}
    keywords |= {} if matrices else {"pair_weights": None}
    keywords = odd_keywords(draw, keywords)

    def expected():
        value, gradients = RELATIONS[name](*map(array, sides), 2.0, **keywords)
        # What is the same for all, as points on a line are, has gradients that rounding decides.
        return value, [np.full_like(g, np.nan) for g in gradients]

    compare(getattr(fastkd, name), backend, sides, expected, **keywords)


@examples(60)
@given(st.data())
def test_fsp_loss(backend, data):
    draw = started(data)
    batch, channels = draw(SIZES), [draw(SIZES), draw(SIZES)]
    sides = []
    for stream in range(4):
        shape = (batch, channels[stream % 2], draw(SIZES), draw(SIZES))
        shape = sometimes(draw, shape, shapes())
        sides.append(draw(tensors(shape, specials=(0.0, 1e4), stream=stream)).requires_grad_())

    def flat(*x, **keywords):
        return fastkd.fsp_loss(x[:2], x[2:], **keywords)

    def expected():
        arrays = [*map(array, sides)]
        return oracle.fsp([arrays[:2]], [arrays[2:]], 2.0)

    compare(flat, backend, sides, expected, **odd_keywords(draw, {"pair_weights": None}))


@pytest.mark.parametrize("name", ["attention_transfer_loss", "hint_loss", "fsp_loss"])
@examples(50)
@given(
    st.recursive(
        st.sampled_from([None, 3, "x", torch.ones(2, 3, 4), torch.ones(()), math.nan]),
        lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
        max_leaves=6,
    ),
    st.data(),
)
def test_whatever_is_given_as_features(backend, name, student, data):
    teacher = data.draw(st.just(student) | st.just([student]) | st.none())
    result = outcome(getattr(fastkd, name), [student, teacher], backend=backend)
    assert isinstance(result, Exception) or result[0].isfinite()

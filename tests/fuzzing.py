"""What the tests of arguments at random share: what is drawn, and what is asked of a call.

A call agrees with the oracle, or says what is wrong; it never crashes.
"""

import math
import os

import numpy as np
import thresholds
import torch
from agreement import array
from conftest import DEVICE, THRESHOLDS
from divergences import is_reverse_kl
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# What all tests of test_fuzz*.py do together with one backend, and what is asked of them: by
# `make fuzz` more, which `--hypothesis-seed` alone then decides.
USUAL = 6 * 150 + 100 + 11 * 60 + 3 * 50
WANTED = int(os.environ.get("FASTKD_TEST_EXAMPLES") or USUAL)


def examples(usual):
    return settings(
        max_examples=max(1, usual * WANTED // USUAL),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        **({} if WANTED == USUAL else {"database": None}),
    )


# A coarse net: how close a kernel must come is for the tests of each loss.
TOLERANCE = 1e-4

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn]
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


def largest(temperature):
    """Of all rows."""
    return max([float(x) for x in torch.as_tensor(temperature).flatten()], default=1.0)


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


def assert_near(actual, expected, scale):
    rounded = array(torch.from_numpy(np.array(expected)).to(actual.dtype))
    scale = np.max(np.abs(rounded), initial=scale, where=np.isfinite(rounded))
    coarse = max(TOLERANCE, torch.finfo(actual.dtype).eps)
    np.testing.assert_allclose(array(actual), rounded, rtol=coarse, atol=TOLERANCE * scale)

"""Arguments at random: losses on features."""

import math

import numpy as np
import oracle
import pytest
import torch
from agreement import array
from fuzzing import (
    DTYPES,
    ODD_DTYPES,
    PAIR_WEIGHTS,
    SIZES,
    compare,
    examples,
    odd_keywords,
    outcome,
    shapes,
    sometimes,
    started,
    tensors,
)
from hypothesis import given
from hypothesis import strategies as st

import fastkd

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

"""Arguments at random: relations between samples and between layers."""

import math

import numpy as np
import oracle
import pytest
from agreement import array
from fuzzing import SIZES, compare, examples, odd_keywords, shapes, sometimes, started, tensors
from hypothesis import given
from hypothesis import strategies as st

import fastkd

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

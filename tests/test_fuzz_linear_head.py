"""Arguments at random: losses on linear heads, against float64 logits that exist as a whole.

The classes are split over ranks now and then.
"""

import itertools

import numpy as np
import pytest
import torch
from agreement_logits import GIVEN
from fuzzing import (
    assert_near,
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
from split import Threads, whole

import fastkd
from fastkd.logits import STATED
from fastkd.reference.linear_head import logits as logits_of

DTYPES = [torch.float32, torch.float64]
DIVERGENCES = st.sampled_from(
    [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3), ("tvd", 0.5)]
)
NUMBERS = {
    "scale": st.sampled_from([1.0, 0.3, -1, 0]),
    "softcap": st.sampled_from([None, None, 5.0, 1]),
}


def heads(draw, rows, classes, stream):
    width, dtype = draw(st.integers(1, 9)), [draw(st.sampled_from(DTYPES))]
    stored = [(*rows, width), (classes, width), *draw(st.sampled_from([[], [(classes,)]]))]
    drawn = [draw(tensors(s, dtype, stream=10 * stream + i)) for i, s in enumerate(stored)]
    drawn[1] = drawn[1] / 10
    numbers = {name: draw(values) for name, values in NUMBERS.items()}
    return drawn, lambda x: fastkd.LinearHead(*x, **numbers)


def sides(draw, rows, classes):
    """Tensors of each side, and what makes a side of them; one at least is a head."""
    kinds = draw(st.sampled_from(["head", "head", "logits", *GIVEN]))
    student = heads(draw, rows, classes, 1)
    if kinds == "head":
        return student, heads(draw, rows, sometimes(draw, classes, st.integers(1, 9)), 2)
    other = draw(tensors((*rows, classes), DTYPES, stream=30))
    if kinds in GIVEN:
        p = other.log_softmax(-1)
        return student, ([p if kinds.startswith("log") else p.exp()], lambda x: GIVEN[kinds](*x))
    other = ([other], lambda x: x[0])
    return draw(st.sampled_from([(student, other), (other, student)]))


@pytest.mark.parametrize("name", ["soft_target_loss", "distillation_loss"])
@examples(60)
@given(st.data())
def test_linear_heads(backend, name, data):
    draw = started(data)
    rows, classes = draw(shapes(high=3)), draw(st.integers(2, 40))
    (of_student, make_student), (of_teacher, make_teacher) = sides(draw, rows, classes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keywords = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4])),
        "reduction": draw(st.sampled_from(["none", "sum", "batchmean"])),
        "mask": draw(st.sampled_from([None, torch.as_tensor(rng.random(rows) < 0.6)])),
        "num_classes": draw(st.sampled_from([None, None, 2])),
        "row_weight": draw(st.sampled_from([None, torch.as_tensor(rng.integers(-1, 3, rows))])),
    }
    keywords["divergence"], keywords["beta"] = draw(DIVERGENCES)
    keywords = odd_keywords(draw, keywords)
    chunk_size = sometimes(
        draw, draw(st.sampled_from([None, 1, 2, 7, 10**6])), st.sampled_from([0, -1, 1.5, "1"])
    )
    labels = [torch.as_tensor(rng.integers(0, 2, rows))] if name == "distillation_loss" else []
    wanted = draw(st.integers(0, 3))
    tensors_of_both = [*of_student, *of_teacher]
    leaves = [
        x.detach().clone().requires_grad_(wanted > (i >= len(of_student)) + 1)
        for i, x in enumerate(tensors_of_both)
    ]

    function = getattr(fastkd, name)
    if not isinstance(make_teacher(of_teacher), STATED) and draw(st.booleans()):
        at = sorted(draw(st.lists(st.integers(0, classes), min_size=1, max_size=3)))
        cuts = [end - begin for begin, end in itertools.pairwise([0, *at, classes])]
        function = whole(name, Threads(len(cuts)), cuts)

    def loss(*tensors, **others):
        student = make_student(tensors[: len(of_student)])
        teacher = make_teacher(tensors[len(of_student) :])
        return function(student, teacher, *labels, **others)

    def of_logits(*tensors, **others):
        exact = [x.double() for x in tensors]
        pair = make_student(exact[: len(of_student)]), make_teacher(exact[len(of_student) :])
        pair = [
            logits_of(side, None, torch.float64, None) if isinstance(side, fastkd.LinearHead)
            else side
            for side in pair
        ]  # fmt: skip
        return getattr(fastkd, name)(*pair, *labels, **others)

    actual = outcome(loss, leaves, backend=backend, chunk_size=chunk_size, **keywords)
    if isinstance(actual, Exception):
        other = outcome(loss, leaves, backend="reference", chunk_size=chunk_size, **keywords)
        assert (type(other), str(other)) == (type(actual), str(actual))
        return
    value, gradients = outcome(of_logits, leaves, backend="reference", **keywords)
    if float(keywords["temperature"]) > 1e3 or float(keywords["temperature"]) < 1e-3:
        return  # 1e30 times a rounding error can be anything; that nothing crashed is the test
    scale = max(1.0, float(keywords["temperature"]) ** 2) * 30  # as large as logits are
    assert_near(actual[0], value.detach().numpy(), scale)
    for found, one in zip(actual[1], gradients, strict=True):
        assert_near(found, one.numpy(), scale)

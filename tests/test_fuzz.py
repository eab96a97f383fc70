"""Arguments at random: losses on logits."""

import math

import numpy as np
import oracle_rows
import probabilities
import pytest
import torch
from agreement import array
from agreement_logits import GIVEN, check_metrics
from conftest import DEVICE
from fuzzing import compare, examples, odd_keywords, shapes, sometimes, started, tensors
from fuzzing_logits import (
    DIVERGENCES,
    STUDENT_MASK,
    TEACHER_MASKS,
    arrays_of,
    draw_temperatures,
    of_rows,
    without_infinite,
)
from hypothesis import given
from hypothesis import strategies as st

import fastkd


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
        keywords |= of_rows(draw, rows)
    keywords |= draw_temperatures(draw, keywords, shape)
    keywords = odd_keywords(draw, keywords)
    compare(
        lambda s, *t, **k: fastkd.soft_target_loss(s, t[0] if alone else t, **k), backend,
        [student, *teachers],
        lambda: without_infinite(
            oracle_rows.soft_target(
                array(student), [*map(array, teachers)], 2.0, **arrays_of(keywords)
            ),
            **keywords,
        ),
        **keywords,
    )  # fmt: skip


@examples(60)
@given(st.data())
def test_probabilities(backend, data):
    draw = started(data)
    teacher_is = draw(st.sampled_from(probabilities.KINDS))
    is_log = teacher_is == "log_probabilities"
    shape = draw(shapes())
    student = draw(tensors(shape, specials=(math.nan, -math.inf, 1e4, 0.0))).requires_grad_()
    teacher = draw(tensors(sometimes(draw, shape, shapes()), stream=1))
    # Masses that a loss, which is compared with what it is made of, does not drown in.
    teacher = -teacher.abs() if is_log else teacher.sigmoid()
    holes = draw(st.sampled_from([None, -math.inf if is_log else 0.0, math.nan]))
    if holes is not None and teacher.numel():
        generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        teacher = teacher.masked_fill(torch.as_tensor(generator.random(teacher.shape) < 0.1), holes)
    keywords = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4, 20.0])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "batchmean"])),
        "dim": draw(st.integers(-len(shape), max(len(shape) - 1, 0))),
    }
    keywords["divergence"], keywords["beta"] = draw(DIVERGENCES)
    if shape and draw(st.booleans()):
        keywords |= of_rows(draw, np.delete(shape, keywords["dim"]))
    keywords = odd_keywords(draw, keywords)
    compare(
        lambda s, t, **k: fastkd.soft_target_loss(s, GIVEN[teacher_is](t), **k), backend,
        [student, teacher],
        lambda: without_infinite(
            oracle_rows.soft_target(
                array(student), array(teacher), 2.0, teacher_is=teacher_is,
                teacher_temperature=1.0, **arrays_of(keywords),
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
        **of_rows(draw, rows),
    }
    keywords["divergence"], keywords["beta"] = draw(DIVERGENCES)
    keywords |= draw_temperatures(draw, keywords, shape)
    keywords = odd_keywords(draw, keywords)

    def expected():
        parts, gradients = oracle_rows.distillation(
            array(student), array(teacher), array(labels), 2.0, **arrays_of(keywords)
        )
        return without_infinite((parts[0], gradients), **keywords)

    compare(
        lambda s, t, **k: fastkd.distillation_loss(s, t, labels, **k), backend,
        [student, teacher], expected, **keywords,
    )  # fmt: skip


@examples(150)
@given(st.data())
def test_distillation_metrics(backend, data):
    draw = started(data)
    shape = draw(shapes())
    dim = draw(st.integers(-len(shape), max(len(shape) - 1, 0)))
    specials = (math.nan, -math.inf, math.inf, 1e4, 0.0, STUDENT_MASK, *TEACHER_MASKS)
    sides, most = [], draw(st.sampled_from([0, 0, 1, 20]))
    for stream in range(2):
        padded = list(sometimes(draw, shape, shapes()))
        if len(padded) == len(shape) > 0:
            padded[dim] += most and draw(st.integers(0, most))
        sides.append(draw(tensors(tuple(padded), specials=specials, stream=stream)))
    keywords = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4, 20.0, np.float32(3)])),
        "teacher_temperature": draw(st.sampled_from([None, None, 0.3, 1, 7.0])),
        "num_classes": shape[dim] if shape and most else None,
        "dim": dim,
    }
    if shape and draw(st.booleans()):
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        rows = np.delete(shape, dim)
        keywords["mask"] = torch.as_tensor(rng.random(rows) < draw(st.sampled_from([0.7, 0.1])))
    keywords = odd_keywords(draw, keywords)
    try:
        fastkd.distillation_metrics(*sides, backend=backend, **keywords)
    except (ValueError, TypeError) as error:
        with pytest.raises(type(error)) as other:
            fastkd.distillation_metrics(*sides, backend="reference", **keywords)
        assert str(other.value) == str(error)
        return
    temperatures = [float(keywords["temperature"]), float(keywords["teacher_temperature"] or 1)]
    if 1e-3 < min(temperatures) and max(temperatures) < 1e3:  # that nothing crashed is the test
        check_metrics(*sides, backend, **keywords)

"""Arguments at random: losses over ranks, which are threads here and have any number of classes."""

import itertools
import math

import numpy as np
import oracle_rows
import oracle_top_k
import pytest
import torch
from agreement import array
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
from split import Threads, whole
from top_k import FOR_ALL, TAILS, TRUE

import fastkd

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the ranks are threads of this process")
both_losses = pytest.mark.parametrize("name", ["soft_target_loss", "distillation_loss"])


def over_ranks(draw, name, classes):
    """The loss of 1 to 4 ranks."""
    at = sorted(draw(st.lists(st.integers(0, classes), max_size=3)))
    cuts = [end - begin for begin, end in itertools.pairwise([0, *at, classes])]
    return whole(name, Threads(len(cuts)), cuts)


def keywords_of(draw, name, shape, dim):
    """The keywords and labels of a call."""
    rows = np.delete(shape, dim)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keywords = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4, 20.0])),
        "dim": dim,
        **of_rows(draw, rows),
    }
    keywords["divergence"], keywords["beta"] = draw(DIVERGENCES)
    if draw(st.booleans()):
        keywords["mask"] = torch.as_tensor(rng.random(rows) < draw(st.sampled_from([0.7, 0.1])))
    keywords |= draw_temperatures(draw, keywords, shape)
    if name == "soft_target_loss":
        keywords["scale_t2"] = draw(st.booleans())
        keywords["reduction"] = draw(st.sampled_from(["none", "sum", "mean", "batchmean"]))
        return keywords, []
    keywords |= {
        "reduction": draw(st.sampled_from(["none", "sum", "batchmean"])),
        "soft_weight": draw(st.sampled_from([0.9, 0.5, -1, 0.0])),
        "hard_weight": draw(st.sampled_from([0.1, 0.0, 2])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1])),
    }
    most = min(keywords["num_classes"] or shape[dim], shape[dim]) + sometimes(draw, 0, st.just(1))
    labels = np.where(rng.random(rows) < 0.3, -100, rng.integers(0, max(most, 1), rows))
    return keywords, [torch.as_tensor(labels)]


def heat_of(draw, keywords):
    """Temperatures that may learn, by name."""
    names = [n for n in ("temperature", "teacher_temperature") if torch.is_tensor(keywords.get(n))]
    learn = draw(st.booleans())
    return {n: keywords[n].detach().requires_grad_(learn) for n in names}


def of_oracle(name, keywords, labels):
    """What the oracles take of a call; a row that is masked is one that is ignored."""
    found = arrays_of(keywords)
    if name == "distillation_loss":
        kept = found.pop("mask", None)
        found["labels"] = np.where(True if kept is None else kept, array(labels[0]), -100)
    return found


@both_losses
@examples(60)
@given(st.data())
def test_logits(backend, name, data):
    draw = started(data)
    shape = draw(shapes(1))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    learns = draw(st.booleans())
    specials = (-math.inf, 1e4, 0.0) if name == "distillation_loss" else (math.nan, -math.inf, 1e4)
    of_teacher = () if learns else (*specials, *TEACHER_MASKS)
    student = draw(tensors(shape, specials=(*specials, STUDENT_MASK))).requires_grad_()
    teacher = draw(tensors(shape, specials=of_teacher, stream=1)).requires_grad_(learns)
    keywords, labels = keywords_of(draw, name, shape, dim)
    loss = over_ranks(draw, name, shape[dim])
    keywords = {**odd_keywords(draw, keywords), "dim": dim}
    heat = heat_of(draw, keywords)

    def expected():
        inputs = array(student), array(teacher)
        others = of_oracle(name, keywords, labels)
        if name == "soft_target_loss":
            found = oracle_rows.soft_target(*inputs, 2.0, **others)
        else:
            parts, gradients = oracle_rows.distillation(
                *inputs, others.pop("labels"), 2.0, **others
            )
            found = parts[0], gradients
        return without_infinite(found, **keywords)

    def call(s, t, *found, **others):
        return loss(s, t, *labels, **others | dict(zip(heat, found, strict=True)))

    compare(call, backend, [student, teacher, *heat.values()], expected, **keywords)


def slots_of(draw, rows, classes, heat, learns):
    """The values, indices and lse of a teacher, and what else is said of these."""
    k = draw(st.sampled_from([1, 2, 3, 7, 20]))
    specials = () if learns else (-math.inf, 0.0)
    values = draw(tensors((*rows, k), specials=specials, stream=1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = classes + (draw(st.integers(0, 19)) == 0)
    indices = torch.as_tensor(rng.integers(-1, max(most, 1), (*rows, k)))
    of_values = {
        "tail": draw(st.sampled_from(TAILS)),
        "values_are": draw(st.sampled_from(["logits", "logits", "log_probs"])),
    }
    if of_values["values_are"] == "log_probs":
        return -1 - values.abs(), indices, None, of_values
    lse = None
    if of_values["tail"] in TRUE:
        heat = torch.as_tensor(heat).double().unsqueeze(-1)
        lse = 1 + (values.double() / heat).logsumexp(-1)
    return values, indices, lse, of_values


@both_losses
@examples(60)
@given(st.data())
def test_top_k(backend, name, data):
    draw = started(data)
    shape = draw(shapes(1, 4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    learns = draw(st.booleans())
    specials = (-math.inf, 1e4) if name == "distillation_loss" else (math.nan, -math.inf, 1e4)
    student = draw(tensors(shape, specials=specials)).requires_grad_()
    keywords, labels = keywords_of(draw, name, shape, dim)
    own = keywords.get("teacher_temperature", keywords["temperature"])
    classes = min(keywords["num_classes"] or shape[dim], shape[dim])
    values, indices, lse, of_values = slots_of(draw, np.delete(shape, dim), classes, own, learns)
    if of_values["values_are"] == "log_probs":
        keywords.pop("teacher_temperature", None)
    if of_values["tail"] not in FOR_ALL:
        keywords = sometimes(draw, {**keywords, "divergence": "forward_kl"}, st.just(keywords))
    loss = over_ranks(draw, name, shape[dim])
    keywords = {**odd_keywords(draw, keywords), "dim": dim}
    heat = heat_of(draw, keywords)
    values = values.detach().requires_grad_(learns)
    of_teacher = [values] if lse is None else [values, lse.detach().requires_grad_(learns)]

    def call(s, *found, **others):
        of_slots, of_heat = found[: len(of_teacher)], found[len(of_teacher) :]
        kept = fastkd.TopK(of_slots[0], indices, lse=dict(enumerate(of_slots)).get(1), **of_values)
        return loss(s, kept, *labels, **others | dict(zip(heat, of_heat, strict=True)))

    def expected():
        arrays = array(student), array(values), array(indices), None if lse is None else array(lse)
        others = of_oracle(name, keywords, labels) | of_values
        losses, gradients = oracle_top_k.top_k(*arrays, 2.0, **others)
        return without_infinite((losses[0], gradients), **keywords)

    compare(call, backend, [student, *of_teacher, *heat.values()], expected, **keywords)

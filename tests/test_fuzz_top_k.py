"""Arguments at random: teachers that kept k classes of each row."""

import math

import numpy as np
import oracle_top_k
import torch
from agreement import array
from conftest import DEVICE
from fuzzing import compare, examples, odd_keywords, shapes, sometimes, started, tensors
from hypothesis import given
from hypothesis import strategies as st
from top_k import TRUE

import fastkd

TAILS = st.sampled_from(["renormalize", "zero", "bucket", "renormalize_both"])
DIVERGENCES = st.sampled_from(
    [
        *[("forward_kl", 0.5)] * 4,
        *[("reverse_kl", 0.5), ("tvd", 0.5), ("jsd", 0), ("jsd", 0.3), ("jsd", 1)],
        *[("skew_kl", 0.1), ("skew_reverse_kl", 0.5)],
    ]
)


def classes_of(draw, shape, classes):
    """Of each slot: a class, padding, and sometimes what is no class; on a GPU that is NaN."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = classes + (DEVICE == "cpu" and draw(st.integers(0, 9)) == 0)
    found = torch.as_tensor(generator.integers(-1, max(most, 1), shape))
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))
    return sometimes(draw, found.to(kind), st.sampled_from([found.double(), found[..., :0], None]))


@examples(100)
@given(st.data())
def test_top_k(backend, data):
    draw = started(data)
    shape = draw(shapes(low=1, high=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    rows, classes = tuple(np.delete(shape, dim)), shape[dim]
    k = draw(st.sampled_from([1, 2, 3, 7, 20]))
    student = draw(tensors(shape, specials=(math.nan, -math.inf, 1e4))).requires_grad_()
    of_values = draw(tensors((*rows, k), specials=(-math.inf, 0.0), stream=1))
    values_are = draw(st.sampled_from(["logits", "logits", "log_probs"]))
    tail = draw(TAILS)
    keywords = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 4])),
        "reduction": draw(st.sampled_from(["none", "sum", "mean", "batchmean"])),
        "dim": dim,
    }
    keywords["divergence"], keywords["beta"] = draw(DIVERGENCES)
    lse = None
    if tail in TRUE and values_are == "logits":
        heat = keywords["temperature"]
        lse = 1 + (of_values.double() / heat).logsumexp(-1)
        lse = sometimes(draw, lse, st.none())
    elif values_are == "log_probs":
        of_values = -1 - of_values.abs()
    if draw(st.booleans()):
        generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        keywords["mask"] = torch.as_tensor(generator.random(rows) < 0.7)
    indices = classes_of(draw, (*rows, k), classes)
    keywords = odd_keywords(draw, keywords)

    def loss(s, v, **others):
        kept = fastkd.TopK(v, indices, values_are=values_are, tail=tail, lse=lse)
        return fastkd.soft_target_loss(s, kept, **others)

    def expected():
        losses, gradients = oracle_top_k.top_k(
            array(student), array(of_values), array(indices), None if lse is None else array(lse),
            2.0, tail=tail, values_are=values_are, **keywords,
        )  # fmt: skip
        return losses[0], gradients

    compare(loss, backend, [student, of_values], expected, **keywords)

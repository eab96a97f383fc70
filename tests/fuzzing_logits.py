"""What tests of losses on logits at random share."""

import numpy as np
import temperatures
import torch
from agreement import array
from hypothesis import strategies as st

DIVERGENCES = st.sampled_from(
    [
        *[("forward_kl", 0.5)] * 3,
        *[("reverse_kl", 0.5), ("tvd", 0.5), ("jsd", 0), ("jsd", 0.3), ("jsd", 1), ("tvd", 0.3)],
        *[("skew_kl", 0.1), ("skew_kl", 0.9), ("skew_reverse_kl", 0.0), ("skew_reverse_kl", 0.5)],
    ]
)
# What masks a class, -inf in half precision. The student's is such that it times a probability that
# float32 takes for 0 is nothing.
TEACHER_MASKS, STUDENT_MASK = (-1e36, -3.4e38), -1e30


def of_rows(draw, rows):
    """Keywords that have a number for each row, and one about the classes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = torch.as_tensor(rng.integers(-1, 3, rows) / 2)
    return {
        "num_classes": draw(st.sampled_from([None, None, 1, 3])),
        "row_weight": draw(st.sampled_from([None, None, weights])),
    }


def draw_temperatures(draw, keywords, shape):
    """Sometimes tensors, or another one of the teacher."""
    if draw(st.booleans()) or not shape:
        return {}
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return temperatures.of_kind(
        draw(st.sampled_from(temperatures.KINDS)), shape, dim=keywords["dim"]
    )


def arrays_of(keywords):
    """For the oracle, whose gradients of temperatures come last and are not looked at."""
    is_heat = temperatures.NAMES.__contains__
    return {k: array(x) if is_heat(k) and torch.is_tensor(x) else x for k, x in keywords.items()}


def without_infinite(found, divergence, **_):
    """Where reverse KL is infinite a student has no gradient."""
    value, gradients = found
    if divergence != "forward_kl":
        gradients = [np.where(np.isfinite(g), g, np.nan) for g in gradients]
    return value, gradients

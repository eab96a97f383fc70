"""Losses on linear heads in NumPy float64: those on logits, and the chain rule by hand.

Nothing here comes from fastkd.
"""

import numpy as np


class Head:
    """`softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)` and its derivatives."""

    def __init__(self, hidden, weight, bias=None, scale=1.0, softcap=None, kept=None):
        kept = np.ones(hidden.shape[:-1], dtype=bool) if kept is None else kept
        self.hidden = np.where(kept[..., None], hidden, 0)  # which may be NaN where it is not kept
        self.weight, self.bias, self.scale = weight, bias, scale
        self.logits = scale * (self.hidden @ weight.T + (0 if bias is None else bias))
        self.slope = np.full_like(self.logits, scale)
        if softcap is not None:
            tanh = np.tanh(self.logits / softcap)
            self.logits, self.slope = softcap * tanh, scale * (1 - tanh**2)

    def gradients(self, of_logits, magnitudes=False):
        """Of hidden, weight and bias; with `magnitudes` no terms cancel."""
        size = np.abs if magnitudes else np.array
        slope = size(self.slope * of_logits)
        flat = slope.reshape(-1, slope.shape[-1])
        hidden = size(self.hidden).reshape(len(flat), -1)
        found = [slope @ size(self.weight), flat.T @ hidden]
        return found if self.bias is None else [*found, flat.sum(0)]


def loss(function, student, teacher, *arguments, **keywords):
    """`function`, an oracle's loss on logits, of heads or arrays on the sides.

    The gradients are those of the sides' tensors, and then what else the function has.
    """
    sides = student, teacher
    arrays = [side.logits if isinstance(side, Head) else side for side in sides]
    value, found = function(*arrays, *arguments, **keywords)
    count = len(teacher) if isinstance(teacher, list) else 1
    magnitudes = keywords.get("magnitudes", False)
    of_student, of_teachers, others = found[0], found[1 : 1 + count], found[1 + count :]
    gradients = []
    for side, of_side in ((student, [of_student]), (teacher, of_teachers)):
        gradients += side.gradients(*of_side, magnitudes) if isinstance(side, Head) else of_side
    return value, [*gradients, *others]

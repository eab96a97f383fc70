"""The kinds of temperatures besides one number for both sides."""

import math

import torch

NAMES = {"temperature", "teacher_temperature"}
KINDS = ["scalar", "rows", "rows and number", "number and rows", "numbers", "rows and rows"]


def of_kind(kind, shape, dtype=torch.float32, dim=-1):
    """The keywords of a call on logits of this shape, of temperatures around 2."""
    rows = [size for i, size in enumerate(shape) if i != dim % len(shape)]

    def draw(what):
        if what == "number":
            return 0.5 + 3 * torch.rand(()).item()
        size = rows if what == "rows" else []
        return 0.5 + 3 * torch.rand(size, dtype=torch.float64).to(dtype)

    if kind == "numbers":
        kind = "number and number"
    names = ("temperature", "teacher_temperature")
    return {name: draw(what) for name, what in zip(names, kind.split(" and "), strict=False)}


BAD = [0.0, -1.0, math.nan, math.inf]

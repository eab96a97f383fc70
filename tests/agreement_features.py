"""How losses on features are compared with the oracle."""

import functools
import math

import oracle
import torch
from agreement import check
from torch import float64

import fastkd


def features(*shape, dtype=torch.float32, channel_dim=1):
    """Of either sign, as before a ReLU, and stronger at some positions than at others."""
    strength = 0.1 + torch.rand(shape, dtype=float64)
    if len(shape) > 1:
        strength = strength.narrow(channel_dim, 0, min(1, shape[channel_dim]))
    return (torch.randn(shape, dtype=float64) * strength).to(dtype)


def distinct(draw, loss, size):
    """Two sides, drawn again while they nearly agree: all that is left of them then is rounding.

    Their loss is at least a tenth of `size`.
    """
    while True:
        sides = draw()
        if loss(*sides, backend="reference") >= 0.1 * size(*sides):
            return sides


def check_map(x, backend, **keywords):
    positions = math.prod(x.shape[1:]) // x.shape[keywords.get("channel_dim", 1)]
    check(
        functools.partial(fastkd.attention_map, backend=backend, **keywords),
        functools.partial(oracle.attention_map, **keywords),
        (x,),
        grad_output=torch.randn(x.shape[0], positions),
    )


def check_transfer(students, teachers, backend, grad_output=None, with_teachers=True, **keywords):
    """Tensors or lists of them, as the loss takes them."""
    is_sequence = isinstance(students, list)
    students, teachers = (x if is_sequence else [x] for x in (students, teachers))
    count = len(students)

    def loss(*tensors):
        sides = list(tensors[:count]), list(tensors[count:])
        if not is_sequence:
            sides = sides[0][0], sides[1][0]
        return fastkd.attention_transfer_loss(*sides, backend=backend, **keywords)

    def expected(*arrays, grad_output):
        value, gradients = oracle.attention_transfer(
            arrays[:count], arrays[count:], grad_output=grad_output, **keywords
        )
        per_sample = not is_sequence and keywords.get("reduction") == "none"
        return value[0] if per_sample else value, gradients

    check(
        loss, expected, [*students, *teachers],
        students=count, grad_output=grad_output, teachers=with_teachers,
    )  # fmt: skip


def check_hint(students, teachers, backend, weight=None, bias=None, grad_output=None, **keywords):
    """Tensors or lists of them, as the loss takes them."""
    is_sequence = isinstance(students, list)
    students, teachers = (x if is_sequence else [x] for x in (students, teachers))
    count = len(students)
    regressor = [x for x in (weight, bias) if x is not None]

    def split(values):
        extra = [*values[2 * count :], None, None]
        return list(values[:count]), list(values[count : 2 * count]), extra[0], extra[1]

    def loss(*tensors):
        *sides, w, b = split(tensors)
        if not is_sequence:
            sides = [side[0] for side in sides]
        return fastkd.hint_loss(
            *sides, regressor_weight=w, regressor_bias=b, backend=backend, **keywords
        )

    def expected(*arrays, grad_output):
        value, gradients = oracle.hint(*split(arrays), grad_output, **keywords)
        per_sample = not is_sequence and keywords.get("reduction") == "none"
        return value[0] if per_sample else value, gradients

    check(
        loss, expected, [*students, *teachers, *regressor], students=count, grad_output=grad_output
    )

"""How losses on relations are compared with the oracle."""

import functools

import oracle
import torch
from agreement import check

import fastkd

RELATIONS = ["rkd_distance_loss", "rkd_angle_loss"]


def points(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def check_relation(name, student, teacher, backend, grad_output=None, **keywords):
    check(
        functools.partial(getattr(fastkd, name), backend=backend, **keywords),
        functools.partial(getattr(oracle, name.removesuffix("_loss")), **keywords),
        (student, teacher),
        grad_output=grad_output,
    )


def check_similarity(student, teacher, backend, grad_output=None):
    check(
        functools.partial(fastkd.similarity_preserving_loss, backend=backend),
        oracle.similarity,
        (student, teacher),
        grad_output=grad_output,
    )


def in_pairs(flat):
    return list(zip(flat[::2], flat[1::2], strict=True))


def check_flow(student, teacher, backend, grad_output=None):
    """Lists of pairs."""
    flat = [x for side in (student, teacher) for pair in side for x in pair]
    count = len(flat) // 2

    def loss(*x):
        return fastkd.fsp_loss(in_pairs(x[:count]), in_pairs(x[count:]), backend=backend)

    def expected(*x, grad_output):
        return oracle.fsp(in_pairs(x[:count]), in_pairs(x[count:]), grad_output)

    check(loss, expected, flat, students=count, grad_output=grad_output)

"""Similarity-preserving distillation, from Gram matrices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.hint import add_up
from fastkd.kernels.triton.pairs import SUMS, store_twice, tile_of_pairs, tiles_of_pairs
from fastkd.kernels.triton.tiles import launch

# What a program has of rows at a time, and of a tile of pairs.
_SEVERAL = 4
_COLUMNS = 256
_ROWS = 32

EPS = tl.constexpr(1e-12)


@triton.jit
def inverse_of(norm):
    """What a row is multiplied with; a row of zeros stays one."""
    return tl.where(norm == 0, 0, 1 / tl.where(norm < EPS, EPS, norm))


@triton.jit(do_not_specialize=["n"])
def by_row(
    student,  # Gram matrices
    teacher,
    facts,  # (3, n): inverse norms, and the difference along the student's row
    losses,  # one a row
    weight: tl.float64,
    n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Losses of some rows, and what their slopes are made of."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    s_squares = tl.zeros([ROWS, 1], tl.float64)
    t_squares, total, inner = s_squares, s_squares, s_squares
    for first in range(0, n, COLUMNS):
        j = first + column
        mask = (i < n) & (j < n)
        s = tl.load(student + i * n + j, mask=mask, other=0).to(tl.float64)
        t = tl.load(teacher + i * n + j, mask=mask, other=0).to(tl.float64)
        s_squares += tl.sum(s * s, 1, keep_dims=True)
        t_squares += tl.sum(t * t, 1, keep_dims=True)
    norm = tl.sqrt(s_squares)
    s_inverse = inverse_of(norm)
    t_inverse = inverse_of(tl.sqrt(t_squares))
    for first in range(0, n, COLUMNS):
        j = first + column
        mask = (i < n) & (j < n)
        s = tl.load(student + i * n + j, mask=mask, other=0).to(tl.float64) * s_inverse
        t = tl.load(teacher + i * n + j, mask=mask, other=0).to(tl.float64) * t_inverse
        total += tl.sum((s - t) * (s - t), 1, keep_dims=True)
        inner += tl.sum((s - t) * s, 1, keep_dims=True)
    tl.store(losses + i, total * weight, mask=i < n)
    tl.store(facts + i, s_inverse, mask=i < n)
    tl.store(facts + n + i, t_inverse, mask=i < n)
    # What is divided by a constant has a slope of its own alone.
    tl.store(facts + 2 * n + i, tl.where(norm < EPS, 0, inner), mask=i < n)


@triton.jit
def row_slopes(student, teacher, facts, i, j, n):
    """By the elements of rows i, but for a factor that all share."""
    mask = (i < n) & (j < n)
    s_inverse = tl.load(facts + i, mask=i < n, other=0)
    t_inverse = tl.load(facts + n + i, mask=i < n, other=0)
    inner = tl.load(facts + 2 * n + i, mask=i < n, other=0)
    s = tl.load(student + i * n + j, mask=mask, other=0).to(tl.float64) * s_inverse
    t = tl.load(teacher + i * n + j, mask=mask, other=0).to(tl.float64) * t_inverse
    return (s - t - s * inner) * s_inverse


@triton.jit(do_not_specialize=["n"])
def by_pair(
    student,  # Gram matrices
    teacher,
    facts,  # what `by_row` found
    slopes,
    weight: tl.float64,
    n,
    ROWS: tl.constexpr,
):
    """The slopes of a tile of pairs, those of both orders added up."""
    i, j = tile_of_pairs(ROWS)
    found = row_slopes(student, teacher, facts, i[:, None], j[None, :], n)
    found += row_slopes(student, teacher, facts, j[None, :], i[:, None], n)
    store_twice(slopes, i, j, n, (found * (2 * weight)).to(slopes.dtype.element_ty))


def similarity(student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None) -> None:
    """Fill the loss, and its slopes by the student's Gram matrix."""
    count = len(student)
    if count == 0:
        loss.zero_()
        return
    facts = loss.new_empty(3, count, dtype=torch.float64)
    losses = loss.new_empty(count, dtype=torch.float64)
    weight = 1 / count**2
    # Equal sides differ by 0.
    options = {"enable_fp_fusion": False}
    launch(
        by_row,
        -(-count // _SEVERAL),
        loss,
        student,
        teacher,
        facts,
        losses,
        weight,
        count,
        ROWS=_SEVERAL,
        COLUMNS=_COLUMNS,
        **options,
    )
    launch(add_up, 1, loss, losses, loss, 1, count, ROWS=1, COLUMNS=SUMS)
    if slopes is not None:
        launch(
            by_pair,
            tiles_of_pairs(count, _ROWS),
            loss,
            student,
            teacher,
            facts,
            slopes,
            weight,
            count,
            ROWS=_ROWS,
            **options,
        )

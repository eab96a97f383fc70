"""Relations between embeddings: squared distances, and the losses on distances and on angles.

All of it is float64: angles at points that are close to each other would lose their digits.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.hint import add_up
from fastkd.kernels.triton.pairs import SUMS, added, store_twice, tile_of_pairs, tiles_of_pairs
from fastkd.kernels.triton.tiles import TILE, launch

# Rows and columns of a tile of pairs: 4 pairs a thread, or 2 of those that triangles are made of.
_ROWS = 32
_FEWER_ROWS = 16


@triton.jit(do_not_specialize=["n", "features"])
def squared_differences(
    x,  # (features, n)
    to,
    n,
    features,
    ROWS: tl.constexpr,
):
    """Squared distances of a tile of pairs."""
    i, j = tile_of_pairs(ROWS)
    total = tl.zeros([ROWS, ROWS], tl.float64)
    at_i, at_j = x + i, x + j
    for _ in tl.range(0, features, loop_unroll_factor=4):
        a = tl.load(at_i, mask=i < n, other=0).to(tl.float64)
        b = tl.load(at_j, mask=j < n, other=0).to(tl.float64)
        difference = a[:, None] - b[None, :]
        total += difference * difference
        at_i += n
        at_j += n
    store_twice(to, i, j, n, total)


@triton.jit(do_not_specialize=["count"])
def totals(
    student,  # squared distances
    teacher,
    sums,  # (4, programs)
    count,
    BLOCK: tl.constexpr,
):
    """Sums of both sides' distances, and the numbers of those that are not 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(student + at, mask=at < count, other=0)
    t = tl.load(teacher + at, mask=at < count, other=0)
    to = sums + tl.program_id(0)
    parts = tl.num_programs(0)
    tl.store(to, tl.sum(tl.sqrt(s)))
    tl.store(to + parts, tl.sum(tl.sqrt(t)))
    tl.store(to + 2 * parts, tl.sum((s != 0).to(tl.float64)))
    tl.store(to + 3 * parts, tl.sum((t != 0).to(tl.float64)))


@triton.jit
def mean(sums, side: tl.constexpr, parts, SUMS: tl.constexpr):
    """What distances are relative to, and their number; without any, 1 and 1 do."""
    count = added(sums + (2 + side) * parts, parts, SUMS)
    has_none = count == 0
    count = tl.where(has_none, 1, count)
    return tl.where(has_none, 1, added(sums + side * parts, parts, SUMS) / count), count


@triton.jit
def huber_slope(x, delta):
    """The derivative of Huber's loss; NaN stays NaN."""
    return tl.where(x > delta, delta, tl.where(x < -delta, -delta, x))


@triton.jit
def huber(x, slope):
    """Huber's loss, from its derivative."""
    return slope * (x - slope / 2)


@triton.jit(do_not_specialize=["count", "parts"])
def distances(
    student,  # squared distances
    teacher,
    sums,  # what `totals` found
    losses,  # one a program, which adds them up to the loss; or None
    through_mean,  # one a program: what the slopes make of the mean
    slopes,  # or None
    delta: tl.float64,
    weight: tl.float64,  # of one distance
    count,
    parts,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """First the losses of a block of distances and what they make of the mean, then the slopes."""
    s_mean, number = mean(sums, 0, parts, SUMS)
    t_mean, _ = mean(sums, 1, parts, SUMS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    distance = tl.sqrt(tl.load(student + at, mask=at < count, other=0))
    relative = distance / s_mean
    excess = relative - tl.sqrt(tl.load(teacher + at, mask=at < count, other=0)) / t_mean
    slope = huber_slope(excess, delta)
    if slopes is None:
        tl.store(losses + tl.program_id(0), tl.sum(huber(excess, slope)) * weight)
        tl.store(through_mean + tl.program_id(0), tl.sum(slope * relative))
    else:
        of_mean = added(through_mean, parts, SUMS) / number
        is_zero = distance == 0
        found = weight / s_mean * (slope - of_mean) / tl.where(is_zero, 1, distance)
        tl.store(slopes + at, tl.where(is_zero, 0, found), mask=at < count)


@triton.jit(do_not_specialize=["count", "parts"])
def inverse_roots(
    student,  # squared distances
    teacher,
    sums,  # what `totals` found
    to,  # (2, count)
    count,
    parts,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Means over distances of both sides, or 0 where a distance is 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for side in tl.static_range(2):
        squares = teacher if side else student
        relative_to, _ = mean(sums, side, parts, SUMS)
        square = tl.load(squares + at, mask=at < count, other=0)
        is_zero = square == 0
        found = tl.where(is_zero, 0, relative_to / tl.sqrt(tl.where(is_zero, 1, square)))
        tl.store(to + side * count + at, found, mask=at < count)


@triton.jit
def angle(s, t, s_one, s_other, t_one, t_other, delta):
    """Where two sides of a triangle meet: weight and cosine of the student's, excess and slope.

    Of the squares of two sides less the third one's, `s` and `t` are half; the others are the
    inverses of the two.
    """
    weight = s_one * s_other
    cosine = s * weight
    excess = cosine - t * (t_one * t_other)
    return weight, cosine, excess, huber_slope(excess, delta)


@triton.jit(do_not_specialize=["n", "parts"])
def angles(
    student,  # squared distances
    teacher,
    sums,  # what `totals` found
    s_inverses,  # what `inverse_roots` found
    t_inverses,
    losses,  # one a program
    slopes,  # or None
    delta: tl.float64,
    weight: tl.float64,  # of one angle
    n,
    parts,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """A tile of pairs (a, b) meets every third point c: so each slope is one program's sum."""
    s_mean, _ = mean(sums, 0, parts, SUMS)
    t_mean, _ = mean(sums, 1, parts, SUMS)
    # Halves of squares of relative lengths.
    s_scale = 0.5 / (s_mean * s_mean)
    t_scale = 0.5 / (t_mean * t_mean)
    a, b = tile_of_pairs(ROWS)
    at = a[:, None] * n + b[None, :]
    mask = (a < n)[:, None] & (b < n)[None, :]
    s_ab = tl.load(student + at, mask=mask, other=0) * s_scale
    t_ab = tl.load(teacher + at, mask=mask, other=0) * t_scale
    s_inverse = tl.load(s_inverses + at, mask=mask, other=0)
    t_inverse = tl.load(t_inverses + at, mask=mask, other=0)
    loss = tl.zeros([ROWS, ROWS], tl.float64)
    along = loss
    turns = loss
    at_a, at_b = a, b
    for _ in range(0, n):
        s_a = tl.load(student + at_a, mask=a < n, other=0) * s_scale
        t_a = tl.load(teacher + at_a, mask=a < n, other=0) * t_scale
        s_b = tl.load(student + at_b, mask=b < n, other=0) * s_scale
        t_b = tl.load(teacher + at_b, mask=b < n, other=0) * t_scale
        s_from_a = tl.load(s_inverses + at_a, mask=a < n, other=0)[:, None]
        t_from_a = tl.load(t_inverses + at_a, mask=a < n, other=0)[:, None]
        s_from_b = tl.load(s_inverses + at_b, mask=b < n, other=0)[None, :]
        t_from_b = tl.load(t_inverses + at_b, mask=b < n, other=0)[None, :]
        s = s_a[:, None] + s_b[None, :] - s_ab
        t = t_a[:, None] + t_b[None, :] - t_ab
        c_weight, _, excess, c_slope = angle(s, t, s_from_a, s_from_b, t_from_a, t_from_b, delta)
        loss += huber(excess, c_slope)
        if slopes is not None:
            s = s_a[:, None] - s_b[None, :]
            t = t_a[:, None] - t_b[None, :]
            a_weight, a_cosine, _, a_slope = angle(
                s_ab + s, t_ab + t, s_inverse, s_from_a, t_inverse, t_from_a, delta
            )
            b_weight, b_cosine, _, b_slope = angle(
                s_ab - s, t_ab - t, s_inverse, s_from_b, t_inverse, t_from_b, delta
            )
            along += a_slope * a_weight + b_slope * b_weight - c_slope * c_weight
            turns += a_slope * a_cosine + b_slope * b_cosine
        at_a += n
        at_b += n
    total = tl.sum(loss) * weight
    # Above the diagonal, a pair stands for its mirror image, too.
    is_diagonal = tl.min(a) == tl.min(b)
    tl.store(losses + tl.program_id(0), tl.where(is_diagonal, total, 2 * total))
    if slopes is not None:
        is_zero = s_ab == 0
        along -= tl.where(is_zero, 0, turns / tl.where(is_zero, 1, 2 * s_ab))
        slope = tl.where(a[:, None] == b[None, :], 0, along * (2 * s_scale * weight))
        store_twice(slopes, a, b, n, slope)


def squared_distances(x: Tensor, to: Tensor) -> None:
    """Fill the squared distances between the rows of `x`."""
    count = len(x)
    # So that a thread's neighbours read neighbours.
    columns = x.t().contiguous()
    launch(
        squared_differences,
        tiles_of_pairs(count, _ROWS),
        to,
        columns,
        to,
        count,
        x.shape[1],
        ROWS=_ROWS,
    )


def rkd_distance(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """Fill the loss on relative distances, and its slopes by the student's squared ones."""
    count = student.numel()
    if count == 0:
        loss.zero_()
        return
    sums = _totals(student, teacher)
    parts = sums.shape[1]
    losses, through_mean = sums.new_empty(2, parts)
    for to in (None,) if slopes is None else (None, slopes):
        launch(
            distances,
            parts,
            loss,
            student,
            teacher,
            sums,
            losses,
            through_mean,
            to,
            delta,
            1 / count,
            count,
            parts,
            BLOCK=TILE,
            SUMS=SUMS,
        )
    _add_up(losses, loss)


def rkd_angle(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """Fill the loss on angles, and its slopes by the student's squared distances."""
    count = len(student)
    if count == 0:
        loss.zero_()
        return
    sums = _totals(student, teacher)
    parts = sums.shape[1]
    inverses = sums.new_empty(2, count**2)
    launch(
        inverse_roots,
        parts,
        loss,
        student,
        teacher,
        sums,
        inverses,
        count**2,
        parts,
        BLOCK=TILE,
        SUMS=SUMS,
    )
    losses = sums.new_empty(tiles_of_pairs(count, _FEWER_ROWS))
    launch(
        angles,
        len(losses),
        loss,
        student,
        teacher,
        sums,
        *inverses,
        losses,
        slopes,
        delta,
        1 / count**3,
        count,
        parts,
        ROWS=_FEWER_ROWS,
        SUMS=SUMS,
        num_warps=4,
        # Equal sides differ by 0.
        enable_fp_fusion=False,
    )
    _add_up(losses, loss)


def _totals(student: Tensor, teacher: Tensor) -> Tensor:
    count = student.numel()
    sums = student.new_empty(4, -(-count // TILE))
    launch(totals, sums.shape[1], student, student, teacher, sums, count, BLOCK=TILE)
    return sums


def _add_up(losses: Tensor, loss: Tensor) -> None:
    launch(add_up, 1, loss, losses, loss, 1, len(losses), ROWS=1, COLUMNS=SUMS)

"""Relations between samples and between layers as the papers state them, in NumPy float64.

Nothing here comes from fastkd. Functions return what those of `oracle` do.
"""

import numpy as np
from oracle_features import of_pairs


def _huber(r, delta):
    """Huber's loss and its derivative."""
    return np.where(abs(r) <= delta, r**2 / 2, delta * (abs(r) - delta / 2)), np.clip(
        r, -delta, delta
    )


def _relations(x):
    """`x_j − x_i` as (i, j, D), its length, and what 1/length is by a convention: 0 at 0."""
    differences = x[None] - x[:, None]
    lengths = np.sqrt((differences**2).sum(-1))
    return differences, lengths, np.where(lengths == 0, 0, 1 / np.where(lengths == 0, 1, lengths))


def _to_points(by_difference):
    """A gradient of the differences as one of the points."""
    return by_difference.sum(0) - by_difference.sum(1)


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def rkd_distance(student, teacher, grad_output=1.0, *, delta=1.0):
    sides = [_relations(x) for x in (student, teacher)]
    counts = [max((d > 0).sum(), 1) for _, d, _ in sides]
    means = [d[d > 0].mean() if (d > 0).any() else 1.0 for _, d, _ in sides]
    quotients = [d / m for (_, d, _), m in zip(sides, means, strict=True)]
    losses, slope = _huber(quotients[0] - quotients[1], delta)
    entries = max(losses.size, 1)
    gradients = []
    for sign, (differences, d, inverse), mean, count, quotient in zip(
        (1, -1), sides, means, counts, quotients, strict=True
    ):
        by_quotient = sign * slope * grad_output / entries
        by_distance = by_quotient / mean - (d > 0) * (by_quotient * quotient).sum() / mean / count
        gradients.append(_to_points((by_distance * inverse)[..., None] * differences))
    return losses.sum() / entries, gradients


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def rkd_angle(student, teacher, grad_output=1.0, *, delta=1.0):
    sides = [_relations(x) for x in (student, teacher)]
    units = [differences * inverse[..., None] for differences, _, inverse in sides]
    cosines = [np.einsum("ijd,ikd->ijk", e, e) for e in units]
    losses, slope = _huber(cosines[0] - cosines[1], delta)
    entries = max(losses.size, 1)
    gradients = []
    for sign, (_, _, inverse), e in zip((1, -1), sides, units, strict=True):
        # Each cosine is of two directions, and the slopes are symmetric in them.
        by_unit = 2 * sign * grad_output / entries * np.einsum("ijk,ikd->ijd", slope, e)
        across = by_unit - e * (e * by_unit).sum(-1, keepdims=True)
        gradients.append(_to_points(across * inverse[..., None]))
    return losses.sum() / entries, gradients


@np.errstate(invalid="ignore", divide="ignore", over="ignore")
def similarity(student, teacher, grad_output=1.0):
    batch = len(student)
    rows = [x.reshape(batch, np.prod(x.shape[1:], dtype=int)) for x in (student, teacher)]
    grams = [x @ x.T for x in rows]
    norms = [np.sqrt((g**2).sum(1, keepdims=True)) for g in grams]
    q = [g / np.maximum(n, 1e-12) for g, n in zip(grams, norms, strict=True)]
    difference = (q[0] - q[1]) / max(batch, 1)
    gradients = []
    for sign, shape, x, norm, one in zip(
        (1, -1), (student.shape, teacher.shape), rows, norms, q, strict=True
    ):
        by_q = 2 * sign * grad_output / max(batch, 1) * difference
        radial = np.where(norm < 1e-12, 0, one * (one * by_q).sum(1, keepdims=True))
        by_gram = np.where(norm == 0, 0, (by_q - radial) / np.maximum(norm, 1e-12))
        gradients.append(((by_gram + by_gram.T) @ x).reshape(shape))
    return (difference**2).sum(), gradients


def similarities(students, teachers, grad_output=1.0, *, pair_weights=None):
    """Takes lists; the gradients are all students', then all teachers'."""
    weights = of_pairs(pair_weights, students)
    found = [
        similarity(*pair, weight * grad_output)
        for weight, *pair in zip(weights, students, teachers, strict=True)
    ]
    loss = sum(weight * value for weight, (value, _) in zip(weights, found, strict=True))
    return loss, [gradients[side] for side in range(2) for _, gradients in found]


def _max_pooled(x, height, width):
    """The maxima of adaptive bins, and the function that carries a gradient of them back."""
    pooled, argmax = np.empty((*x.shape[:2], height, width)), {}
    bins = [
        [slice(i * size // to, -(-(i + 1) * size // to)) for i in range(to)]
        for size, to in zip(x.shape[2:], (height, width), strict=True)
    ]
    for i, rows in enumerate(bins[0]):
        for j, columns in enumerate(bins[1]):
            bin = x[:, :, rows, columns]
            flat = bin.reshape(*x.shape[:2], bin.shape[2] * bin.shape[3])
            argmax[i, j] = np.divmod(flat.argmax(-1), bin.shape[3])
            pooled[:, :, i, j] = flat.max(-1)

    def back(gradient):
        to = np.zeros_like(x)
        samples, channels = np.ogrid[: x.shape[0], : x.shape[1]]
        for (i, j), (row, column) in argmax.items():
            at = row + bins[0][i].start, column + bins[1][j].start
            np.add.at(to, (samples, channels, *at), gradient[:, :, i, j])
        return to

    return pooled, back


def fsp(students, teachers, grad_output=1.0, *, pair_weights=None):
    """Takes lists of pairs; the gradients are those of all students' features, then teachers'."""
    loss, to_students, to_teachers = 0.0, [], []
    weights = of_pairs(pair_weights, students)
    for weight, *pairs in zip(weights, students, teachers, strict=True):
        sides = []
        for first, second in pairs:
            height, width = np.minimum(first.shape[2:], second.shape[2:])
            (one, back), (other, back_other) = (
                _max_pooled(x, height, width) for x in (first, second)
            )
            gram = np.einsum("bchw,bdhw->bcd", one, other) / (height * width)
            sides.append((gram, one, back, other, back_other))
        difference = sides[0][0] - sides[1][0]
        batch = max(len(difference), 1)
        loss += weight * (difference**2).sum() / batch
        for sign, to, (_, one, back, other, back_other) in zip(
            (1, -1), (to_students, to_teachers), sides, strict=True
        ):
            slope = 2 * sign * weight * grad_output * difference / batch / np.prod(one.shape[2:])
            to.append(back(np.einsum("bcd,bdhw->bchw", slope, other)))
            to.append(back_other(np.einsum("bcd,bchw->bdhw", slope, one)))
    return loss, [*to_students, *to_teachers]

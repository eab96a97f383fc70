"""Conventions of relations between samples and between layers in other libraries."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conventions import assert_same, draw, row

import fastkd

table = "Relations"
EMBEDDINGS = [(9, 4), (9, 6)]


def distances(e, squared=False, eps=1e-12):
    """`pdist` of lenscloth/RKD, RepDistiller, mdistiller and torchdistill."""
    squares = e.pow(2).sum(1)
    d = (squares[:, None] + squares - 2 * e @ e.T).clamp(min=eps)
    d = d if squared else d.sqrt()
    return d * (1 - torch.eye(len(e), dtype=e.dtype))


def distance_loss(s, t, squared=False, *, of_eps=1e-12, of_mean=0, **keywords):
    """RepDistiller distiller_zoo/RKD.py RKDLoss, mdistiller distillers/RKD.py rkd_loss."""
    d_s, d_t = (distances(x, squared, of_eps) for x in (s, t))
    d_s, d_t = (d / (d[d > 0].mean() + of_mean) for d in (d_s, d_t))
    return F.smooth_l1_loss(d_s, d_t, **keywords)


@row(table, "distances over the mean of the positive ones, smooth L1, mean over N²")
def test_distances(backend):
    assert_same(backend, fastkd.rkd_distance_loss, distance_loss, *draw(*EMBEDDINGS))


@row(table, "cosines by normalised differences, smooth L1, mean over N³")
def test_angles(backend):
    def cosines(x):
        e = F.normalize(x[None] - x[:, None], p=2, dim=2)
        return torch.bmm(e, e.mT).flatten()

    def formula(s, t):
        return F.smooth_l1_loss(cosines(s), cosines(t))

    assert_same(backend, fastkd.rkd_angle_loss, formula, *draw(*EMBEDDINGS))


@row(table, "`clamp(min=1e-12)` under the root of the distance; the mean counts it")
def test_coincident_points(backend):
    s, t = draw((64, 4), (64, 6))
    s[8:16] = s[:8]
    with fastkd.use_backend(backend):
        ours = fastkd.rkd_distance_loss(s, t)
    assert 1e-4 < abs(ours / distance_loss(s, t) - 1) < 0.05
    d = distances(s)
    d = torch.where(d < 1e-5, 0, d)
    relative = d / d[d > 0].mean()
    others = distances(t)
    torch.testing.assert_close(ours, F.smooth_l1_loss(relative, others / others[others > 0].mean()))


@row(table, "squared distances (`SQUARED`)")
def test_squared_distances(backend):
    rows = draw(*EMBEDDINGS)
    with fastkd.use_backend(backend):
        ours = fastkd.rkd_distance_loss(*rows)
    assert not torch.allclose(ours, distance_loss(*rows, squared=True))
    torch.testing.assert_close(ours, distance_loss(*rows))


@row(table, "smooth L1 with a `beta` other than 1, which divides by it")
def test_beta_of_smooth_l1(backend):
    assert_same(
        backend, lambda s, t: fastkd.rkd_distance_loss(s, t, delta=0.2) / 0.2,
        lambda s, t: distance_loss(s, t, beta=0.2), *draw(*EMBEDDINGS),
    )  # fmt: skip


def similarity(s, t, p=2):
    """RepDistiller distiller_zoo/SP.py; torchdistill SPKDLoss has p = 1 and a norm of norms."""
    q_s, q_t = (F.normalize(z.flatten(1) @ z.flatten(1).T, p=p, dim=1) for z in (s, t))
    return (q_s - q_t).pow(2).sum() / len(s) ** 2


FEATURES = [(5, 3, 4, 4), (5, 6, 2, 2)]


@row(table, "rows of the Gram matrix over their L2 norm")
def test_similarities(backend):
    assert_same(backend, fastkd.similarity_preserving_loss, similarity, *draw(*FEATURES))

    def of_lists(*f):
        return fastkd.similarity_preserving_loss(f[:2], f[2:])

    assert_same(
        backend, of_lists, lambda *f: similarity(f[0], f[2]) + similarity(f[1], f[3]),
        *draw(*FEATURES, *FEATURES), students=2,
    )  # fmt: skip


@row(table, "rows over their L1 norm")
def test_similarities_over_the_l1_norm(backend):
    """torchdistill losses/mid_level.py SPKDLoss, whose `normalize(G, 1)` names the norm."""

    def formula(s, t):
        q_s, q_t = (F.normalize(z.flatten(1) @ z.flatten(1).T, 1) for z in (s, t))
        return torch.norm(q_t - q_s) ** 2 / len(s) ** 2

    def call(s, t):
        q_s, q_t = (F.normalize(z.flatten(1) @ z.flatten(1).T, 1) for z in (s, t))
        return fastkd.hint_loss(q_s, q_t, half=False, reduction="sum") / len(s) ** 2

    sides = draw(*FEATURES)
    assert_same(backend, call, formula, *sides)
    torch.testing.assert_close(formula(*sides), similarity(*sides, p=1))


LAYERS = [(3, 4, 6, 6), (3, 5, 3, 3), (3, 4, 6, 6), (3, 5, 3, 3)]


def flow(first, second, pool):
    size = [min(sizes) for sizes in zip(first.shape[2:], second.shape[2:], strict=True)]
    first, second = (x if list(x.shape[2:]) == size else pool(x, size) for x in (first, second))
    return first.flatten(2) @ second.flatten(2).mT / (size[0] * size[1])


def difference(s1, s2, t1, t2, pool=F.adaptive_max_pool2d):
    return flow(s1, s2, pool) - flow(t1, t2, pool)


def pairs(s1, s2, t1, t2):
    return fastkd.fsp_loss((s1, s2), (t1, t2))


@row(table, "FSP: max-pooled, summed over the matrix, mean over the batch")
def test_flow(backend):
    def formula(*f):
        return difference(*f).pow(2).sum((1, 2)).mean()

    assert_same(backend, pairs, formula, *draw(*LAYERS), students=2)


@row(table, "FSP: larger layer average-pooled, mean over the matrix, of neighbours in a list")
def test_flow_by_means(backend):
    """RepDistiller distiller_zoo/FSP.py: by heights, whichever of the two is larger."""
    shapes = [(3, 4, 6, 6), (3, 5, 3, 3), (3, 2, 3, 3)]

    def formula(*f):
        loss = 0
        for i in range(2):
            d = difference(f[i], f[i + 1], f[i + 3], f[i + 4], F.adaptive_avg_pool2d)
            loss = loss + d.pow(2).mean()
        return loss

    def pooled(f, g):
        size = min(f.shape[2], g.shape[2])
        return tuple(x if x.shape[2] == size else F.adaptive_avg_pool2d(x, size) for x in (f, g))

    def call(*f):
        s, t = ([pooled(*pair) for pair in itertools.pairwise(g)] for g in (f[:3], f[3:]))
        weights = [1 / (a.shape[1] * b.shape[1]) for a, b in s]
        return fastkd.fsp_loss(s, t, pair_weights=weights)

    assert_same(backend, call, formula, *draw(*shapes, *shapes), students=3)


@row(table, "FSP: max-pooled, L2 norm of each column (over C₁), their sum over B")
def test_flow_by_norms_of_columns(backend):
    """torchdistill losses/mid_level.py FSPLoss."""

    def formula(*f):
        return difference(*f).norm(dim=1).sum() / len(f[0])

    def call(s1, s2, t1, t2):
        columns = [
            flow(*pair, F.adaptive_max_pool2d).mT.flatten(0, 1) for pair in ((s1, s2), (t1, t2))
        ]
        squares = fastkd.hint_loss(*columns, half=False, reduction="none")
        return squares.sqrt().sum() / len(s1)

    sides = draw(*LAYERS)
    assert_same(backend, call, formula, *sides, students=2)
    with fastkd.use_backend(backend):
        assert pairs(*sides) != pytest.approx(formula(*sides).item())

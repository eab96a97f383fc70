"""fastkd.compat.repdistiller against the formulas of HobbitLong/RepDistiller's distiller_zoo."""

import pytest
import torch
import torch.nn.functional as F
from compat import assert_stands_for, draw_logits, is_without_gradient
from conventions import draw
from test_conventions_relations import distance_loss, flow

from fastkd.compat import mdistiller, repdistiller

T = 4.0
LISTS = [(4, 3, 6, 6), (4, 5, 3, 3), (4, 2, 6, 6), (4, 4, 3, 3)]


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3), (2, 7, 3, 4)])
def test_distill_kl(backend, shape):
    """KD.py: the sum over everything, times T², over the first dimension."""

    def formula(y_s, y_t):
        q, p = F.log_softmax(y_s / T, 1), F.softmax(y_t / T, 1)
        return F.kl_div(q, p, reduction="sum") * T**2 / y_s.shape[0]

    assert_stands_for(
        backend, repdistiller.DistillKL(T), formula, *draw_logits(shape, shape), students=2
    )


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5, 5), (5,), ()])
def test_hint(backend, shape):
    """FitNet.py: torch.nn.MSELoss."""
    assert_stands_for(
        backend, repdistiller.HintLoss(), torch.nn.MSELoss(), *draw(shape, shape), students=2
    )


@pytest.mark.parametrize("criterion", [repdistiller.HintLoss(), mdistiller.mse_loss])
def test_features_are_not_broadcast(criterion):
    with pytest.raises(ValueError, match="same shape"):
        criterion(*draw((4, 3, 1, 1), (4, 3)))


def at(f, p):
    return F.normalize(f.pow(p).mean(1).flatten(1))


def by_height(one, other):
    """Adaptive average pooling of the higher one to a square, whatever the widths are."""
    height = min(one.shape[2], other.shape[2])
    pooled = (F.adaptive_avg_pool2d(x, (height, height)) for x in (one, other))
    return [y if x.shape[2] > height else x for x, y in zip((one, other), pooled, strict=True)]


def attention(f_s, f_t, p):
    f_s, f_t = by_height(f_s, f_t)
    return (at(f_s, p) - at(f_t, p)).pow(2).mean()


@pytest.mark.parametrize("p", [1, 2, 3, 4, 2.0])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 3, 5, 5), (4, 6, 5, 5)), ((4, 3, 8, 8), (4, 6, 4, 4)), ((4, 3, 4, 4), (4, 6, 7, 7)),
     ((4, 3, 8, 2), (4, 6, 4, 4)), ((4, 3, 5, 3), (4, 6, 5, 3))],
)  # fmt: skip
def test_attention(backend, student, teacher, p):
    """AT.py, of features with negative numbers: an odd p keeps their sign."""
    f_s, f_t = (0.5 + f.abs() for f in draw(student, teacher))
    # Smaller than the others, or float32 would keep no digits of a sum of odd powers.
    f_s[:, 0] *= -0.5
    f_t[:, 0] *= -0.5
    criterion = repdistiller.Attention(p)
    assert_stands_for(
        backend, lambda s, t: criterion([s], [t]), lambda s, t: [attention(s, t, p)], f_s, f_t,
        students=2,
    )  # fmt: skip
    assert_stands_for(
        backend, criterion.at_loss, lambda s, t: attention(s, t, p), f_s, f_t, in_half=True
    )
    assert_stands_for(backend, criterion.at, lambda f: at(f, p), f_s)


def test_attention_of_an_exponent_with_a_fraction(backend):
    """NaN of negative numbers, as there; the same of positive ones."""
    criterion = repdistiller.Attention(1.5)
    f_s, f_t = draw((4, 3, 5, 5), (4, 6, 5, 5))
    assert criterion.at_loss(f_s, f_t).isnan()
    f_s, f_t = f_s.abs() + 0.1, f_t.abs() + 0.1
    assert_stands_for(backend, criterion.at_loss, lambda s, t: attention(s, t, 1.5), f_s, f_t)


def lists(call):
    """Of two student's and two teacher's features."""
    return lambda *f: call(list(f[:2]), list(f[2:]))


def test_attention_of_lists(backend):
    def formula(g_s, g_t):
        return [attention(f_s, f_t, 2) for f_s, f_t in zip(g_s, g_t, strict=True)]

    assert_stands_for(
        backend, lists(repdistiller.Attention()), lists(formula), *draw(*LISTS), students=2
    )


def test_lists_of_unequal_length(backend):
    """Are as long as the shorter one, and need not be lists."""
    f = draw(*LISTS)
    for criterion in (repdistiller.Attention(), repdistiller.Similarity()):
        assert len(criterion(iter(f[:1]), f[2:])) == len(criterion(f[:2], iter(f[2:3]))) == 1


def similarity(f_s, f_t):
    q_s, q_t = (F.normalize(z @ z.T) for z in (x.reshape(len(x), -1) for x in (f_s, f_t)))
    return ((q_t - q_s) ** 2).view(-1, 1).sum(0) / len(f_s) ** 2


def test_similarity(backend):
    """SP.py, whose losses have the shape (1,)."""

    def formula(g_s, g_t):
        return [similarity(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=True)]

    f = draw(*LISTS)
    criterion = repdistiller.Similarity()
    assert_stands_for(backend, lists(criterion), lists(formula), *f, students=4, in_half=True)
    numbers = draw((4,), (4,))
    assert_stands_for(backend, criterion.similarity_loss, similarity, *numbers, students=2)
    assert criterion.similarity_loss(f[0], f[2]).shape == (1,)


def angle_loss(s, t):
    cosines = []
    for x in (s, t):
        e = F.normalize(x[None] - x[:, None], p=2, dim=2)
        cosines.append(e @ e.mT)
    return F.smooth_l1_loss(*cosines)


@pytest.mark.parametrize("weights", [{}, {"w_d": 1.0, "w_a": 2.0}])
@pytest.mark.parametrize("shapes", [((9, 4), (9, 6)), ((5, 3, 2, 2), (5, 2, 4, 4))])
def test_rkd(backend, shapes, weights):
    """RKD.py."""

    def formula(f_s, f_t):
        s, t = f_s.flatten(1), f_t.flatten(1)
        of = {"w_d": 25, "w_a": 50, **weights}
        return of["w_d"] * distance_loss(s, t) + of["w_a"] * angle_loss(s, t)

    criterion = repdistiller.RKDLoss(**weights)
    sides = draw(*shapes)
    assert_stands_for(backend, criterion, formula, *sides, in_half=True)
    assert is_without_gradient(criterion, *sides)


def test_rkd_of_numbers(backend):
    """A sample may be one."""

    def formula(s, t):
        s, t = s[:, None], t[:, None]
        return 25 * distance_loss(s, t) + 50 * angle_loss(s, t)

    # Apart from each other, or float32 would keep no digits of the angles' gradient, which is 0.
    sides = (torch.randperm(7) + 0.1 * x for x in draw((7,), (7,)))
    assert_stands_for(backend, repdistiller.RKDLoss(), formula, *sides)


@pytest.mark.parametrize(
    "shapes",
    [[(3, 4, 6, 6), (3, 5, 3, 3), (3, 2, 6, 6)], [(3, 4, 8, 8), (3, 5, 8, 8)],
     [(3, 2, 7, 7), (3, 3, 4, 4), (3, 3, 2, 2)]],
)  # fmt: skip
def test_fsp(backend, shapes):
    """FSP.py: neighbours in a list, average-pooled by their heights."""
    layers = len(shapes)

    def formula(*f):
        g_s, g_t = f[:layers], f[layers:]
        return [
            (flow(*g_s[i : i + 2], F.adaptive_avg_pool2d)
             - flow(*g_t[i : i + 2], F.adaptive_avg_pool2d)).pow(2).mean()
            for i in range(layers - 1)
        ]  # fmt: skip

    criterion = repdistiller.FSP(shapes, shapes)
    assert_stands_for(
        backend, lambda *f: criterion(f[:layers], f[layers:]), formula, *draw(*shapes, *shapes),
        students=2 * layers, in_half=True,
    )  # fmt: skip


def test_fsp_pools_to_a_square(backend):
    """Of the lower layer's height, though that makes a layer wider."""
    shapes = [(3, 4, 6, 2), (3, 5, 3, 3)]

    def formula(*f):
        g = [F.adaptive_avg_pool2d(x, (3, 3)) for x in f]
        flows = [a.flatten(2) @ b.flatten(2).mT / 9 for a, b in (g[:2], g[2:])]
        return [(flows[0] - flows[1]).pow(2).mean()]

    criterion = repdistiller.FSP(shapes, shapes)
    assert_stands_for(backend, lists(criterion), formula, *draw(*shapes, *shapes), students=2)


def test_fsp_compares_channels():
    with pytest.raises(ValueError, match="channels"):
        repdistiller.FSP([(2, 3, 4, 4)], [(2, 4, 4, 4)])
    with pytest.raises(AssertionError):
        repdistiller.FSP([(2, 3, 4, 4)], [])


def test_nothing_is_saved():
    criteria = [
        repdistiller.DistillKL(T), repdistiller.HintLoss(), repdistiller.Attention(),
        repdistiller.Similarity(), repdistiller.RKDLoss(), repdistiller.FSP([], []),
    ]  # fmt: skip
    for criterion in criteria:
        criterion.load_state_dict({})
        assert not criterion.state_dict()

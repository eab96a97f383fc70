"""fastkd.compat.mdistiller against the formulas of megvii-research/mdistiller's distillers."""

import pytest
import torch
import torch.nn.functional as F
from compat import assert_stands_for, draw_logits, is_without_gradient
from conventions import draw
from test_compat_repdistiller import LISTS, angle_loss, attention, lists, similarity
from test_conventions_relations import distance_loss

from fastkd.compat import mdistiller

T = 4.0


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3), (2, 7, 3, 4)])
def test_kd(backend, shape):
    """KD.py kd_loss: the mean over rows, so that pixels count as rows."""

    def formula(s, t):
        terms = F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="none")
        return terms.sum(1).mean() * T**2

    assert_stands_for(
        backend,
        lambda s, t: mdistiller.kd_loss(s, t, T),
        formula,
        *draw_logits(shape, shape),
        students=2,
    )


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_at(backend, p):
    """AT.py at_loss and single_stage_at_loss, of features with negative numbers."""
    f = [0.5 + x.abs() for x in draw(*LISTS)]
    for x in f:
        # Smaller than the others, or float32 would keep no digits of a sum of odd powers.
        x[:, 0] *= -0.3

    def formula(g_s, g_t):
        return sum(attention(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t, strict=True))

    assert_stands_for(
        backend, lists(lambda *g: mdistiller.at_loss(*g, p)), lists(formula), *f, students=2
    )
    assert_stands_for(
        backend, lambda s, t: mdistiller.single_stage_at_loss(s, t, p),
        lambda s, t: attention(s, t, p), f[0], f[3],
    )  # fmt: skip


def test_lists_of_unequal_length(backend):
    """Are as long as the shorter one, need not be lists, and without any pair the loss is 0."""
    students = draw(*LISTS)
    teachers = [x + 1 for x in students]
    losses = (lambda *g: mdistiller.at_loss(*g, 2), mdistiller.sp_loss, mdistiller.hcl_loss)
    for loss in losses:
        of_one = loss(students[:1], teachers[:1])
        torch.testing.assert_close(loss(iter(students[:1]), teachers), of_one)
        torch.testing.assert_close(loss(students, iter(teachers[:1])), of_one)
        assert loss([], teachers) == 0


def test_mse(backend):
    """FitNet.py forward_train: F.mse_loss of the regressor's output."""
    for shape in ((4, 3, 5, 5), (4,)):
        sides = draw(shape, shape)
        assert_stands_for(backend, mdistiller.mse_loss, F.mse_loss, *sides, students=2)


@pytest.mark.parametrize("height", [7, 4, 1])
def test_hcl(backend, height):
    """ReviewKD.py hcl_loss, which leaves out squares that are not lower than the features."""
    shapes = [(3, 4, height, 5), (3, 2, 6, 6)]

    def formula(*f):
        loss = 0.0
        for s, t in zip(f[:2], f[2:], strict=True):
            total, weights = F.mse_loss(s, t), 1.0
            below = [side for side in (4, 2, 1) if side < s.shape[2]]
            for i, side in enumerate(below, start=1):
                pooled = (F.adaptive_avg_pool2d(x, (side, side)) for x in (s, t))
                total, weights = total + F.mse_loss(*pooled) / 2**i, weights + 0.5**i
            loss = loss + total / weights
        return loss

    assert_stands_for(
        backend, lists(mdistiller.hcl_loss), formula, *draw(*shapes, *shapes), students=4,
        in_half=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "keywords",
    [{}, {"distance_weight": 1.0, "angle_weight": 2.0}, {"squared": True}, {"eps": 1e-3},
     {"squared": True, "eps": 1e-3}],
)  # fmt: skip
@pytest.mark.parametrize("shapes", [((9, 4), (9, 6)), ((5, 3, 2, 2), (5, 2, 4, 4))])
def test_rkd(backend, shapes, keywords):
    """RKD.py rkd_loss."""

    def formula(f_s, f_t, squared=False, eps=1e-12, distance_weight=25, angle_weight=50):
        s, t = f_s.flatten(1), f_t.flatten(1)
        of_distances = distance_loss(s, t, squared, of_eps=eps)
        return distance_weight * of_distances + angle_weight * angle_loss(s, t)

    def call(f_s, f_t):
        return mdistiller.rkd_loss(f_s, f_t, **keywords)

    sides = draw(*shapes)
    assert_stands_for(backend, call, lambda *f: formula(*f, **keywords), *sides, in_half=True)
    assert is_without_gradient(call, *sides)


def test_rkd_of_numbers():
    """A sample may be one."""
    s, t = (torch.randperm(7) + 0.1 * x for x in draw((7,), (7,)))
    torch.testing.assert_close(mdistiller.rkd_loss(s, t), mdistiller.rkd_loss(s[:, None], t))


def test_distances_of_samples_that_coincide(backend):
    """With another eps than the default they have its root, as there."""
    s, t = draw((9, 4), (9, 6))
    s[3] = s[5]
    torch.testing.assert_close(
        mdistiller.rkd_loss(s, t, eps=1e-3, distance_weight=1, angle_weight=0),
        distance_loss(s, t, of_eps=1e-3),
    )


def test_sp(backend):
    """SP.py sp_loss and similarity_loss, of the shape (1,)."""

    def formula(g_s, g_t):
        return sum(similarity(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=True))

    f = draw(*LISTS)
    assert_stands_for(backend, lists(mdistiller.sp_loss), lists(formula), *f, students=4)
    assert_stands_for(backend, mdistiller.similarity_loss, similarity, f[0], f[2], students=2)

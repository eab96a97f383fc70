"""fastkd.compat.kd_lib against the formulas of SforAiDl/KD_Lib."""

import pytest
import torch
import torch.nn.functional as F
from compat import assert_stands_for, draw_logits, is_without_gradient
from conventions import draw
from test_compat_repdistiller import LISTS, angle_loss, lists
from test_conventions_relations import distance_loss

from fastkd.compat import kd_lib

T, WEIGHT, B, K = 3.0, 0.3, 5, 7
LABELS = torch.tensor([0, 6, 3, 2, 2])


class Trainer:
    """What KD_Lib's trainers keep of their arguments; its own losses cannot be called."""

    def __init__(self, loss_fn=None, **attributes):
        self.temp, self.distil_weight, self.loss_fn = T, WEIGHT, loss_fn
        vars(self).update(attributes)

    def calculate_kd_loss(self, *arguments):
        raise AssertionError


def trainer(name, loss_fn=None, **attributes):
    return type(name, (getattr(kd_lib, name), Trainer), {})(loss_fn, **attributes)


def hard_and_soft(s, soft, weight=WEIGHT):
    return (1 - weight) * F.cross_entropy(s, LABELS) + weight * soft


def kl(s, t, reduction="mean", *, of_student=T, of_teacher=T):
    q, p = (s / of_student).log_softmax(1), (t / of_teacher).softmax(1)
    total = F.kl_div(q, p, reduction="sum")
    return total / {"mean": s.numel(), "batchmean": len(s), "sum": 1}[reduction]


def with_labels(method):
    return lambda s, t: method(s, t, LABELS)


def test_vanilla_kd(backend):
    """vision/vanilla/vanilla_kd.py VanillaKD."""

    def formula(s, t):
        return hard_and_soft(s, T * T * F.mse_loss((t / T).softmax(1), (s / T).softmax(1)))

    method = with_labels(trainer("VanillaKD", torch.nn.MSELoss()).calculate_kd_loss)
    assert_stands_for(
        backend, method, formula, *draw_logits((B, K), (B, K)), students=2, in_half=True
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("name", ["MessyCollab", "SoftRandom"])
def test_messy_collab_and_soft_random(backend, name, reduction):
    """vision/noisy/messy_collab.py MessyCollab, vision/noisy/soft_random.py SoftRandom."""
    method = trainer(name, torch.nn.KLDivLoss(reduction=reduction)).calculate_kd_loss
    assert_stands_for(
        backend, with_labels(method), lambda s, t: hard_and_soft(s, T * T * kl(s, t, reduction)),
        *draw_logits((B, K), (B, K)), students=2,
    )  # fmt: skip


def test_bann(backend):
    """vision/BANN/BANN.py BANN: from the second generation on."""
    later = trainer("BANN", torch.nn.CrossEntropyLoss(), gen=1).calculate_kd_loss
    sides = draw_logits((B, K), (B, K))
    assert_stands_for(
        backend, with_labels(later), lambda s, t: hard_and_soft(s, T * T * kl(s, t)), *sides,
        students=2,
    )  # fmt: skip
    first = trainer("BANN", torch.nn.CrossEntropyLoss(label_smoothing=0.1), gen=0)
    torch.testing.assert_close(
        first.calculate_kd_loss(*sides, LABELS),
        F.cross_entropy(sides[0], LABELS, label_smoothing=0.1),
    )


def test_cskd(backend):
    """vision/CSKD/cskd.py CSKD."""
    assert_stands_for(
        backend, trainer("CSKD").calculate_kd_loss,
        lambda s, t: kl(s, t, "sum") * T**2 / len(s), *draw_logits((B, K), (B, K)), students=2,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_self_training(backend, reduction):
    """vision/teacher_free/self_training.py SelfTraining."""
    method = trainer("SelfTraining", torch.nn.KLDivLoss(reduction=reduction)).calculate_kd_loss
    assert_stands_for(
        backend, with_labels(method),
        lambda s, t: hard_and_soft(s, kl(s, t, reduction, of_student=1)),
        *draw_logits((B, K), (B, K)), students=2,
    )  # fmt: skip


def test_virtual_teacher(backend):
    """vision/teacher_free/virtual_teacher.py VirtualTeacher."""

    def formula(s):
        made_up = torch.full((B, K), 0.1 / (K - 1), dtype=s.dtype)
        made_up[range(B), LABELS] = 0.9
        return hard_and_soft(s, kl(s, made_up, of_student=1))

    of = trainer("VirtualTeacher", torch.nn.KLDivLoss(), correct_prob=0.9)
    assert_stands_for(
        backend, lambda s: of.calculate_kd_loss(s, LABELS), formula, *draw_logits((B, K)),
        in_half=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "loss_fn"),
    [("VanillaKD", torch.nn.L1Loss()), ("VanillaKD", torch.nn.MSELoss(reduction="sum")),
     ("MessyCollab", torch.nn.MSELoss()), ("SelfTraining", torch.nn.KLDivLoss(reduction="sum")),
     ("SoftRandom", torch.nn.KLDivLoss(log_target=True))],
)  # fmt: skip
def test_another_loss_fn_is_refused(name, loss_fn):
    with pytest.raises(ValueError, match="loss_fn must be"):
        trainer(name, loss_fn).calculate_kd_loss(*draw((B, K), (B, K)), LABELS)


def test_ignored_labels_are_refused():
    """There they have no part in the cross-entropy alone."""
    method = trainer("MessyCollab", torch.nn.KLDivLoss()).calculate_kd_loss
    with pytest.raises(ValueError, match="-100"):
        method(*draw((B, K), (B, K)), torch.full((B,), -100))


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_attention(backend, p):
    """vision/attention/loss_metric.py ATLoss: the teacher first, no sum over channels."""

    def normalized(x):
        return F.normalize(x.pow(p).flatten(1))

    def formula(g_t, g_s):
        pairs = zip(g_t, g_s, strict=True)
        return sum((normalized(s) - normalized(t)).pow(p).mean() for t, s in pairs)

    f = draw(*LISTS[:2], *LISTS[:2])
    assert_stands_for(backend, lists(kd_lib.ATLoss(p)), lists(formula), *f, students=4)
    assert kd_lib.ATLoss(p)([], []) == 0


def test_attention_without_a_list(backend):
    """Of tensors, each first index is an activation of its own."""

    def formula(t, s):
        return sum(
            (F.normalize(one.pow(2)) - F.normalize(other.pow(2))).pow(2).mean()
            for one, other in zip(s, t, strict=True)
        )

    sides = draw((B, 2, K), (B, 2, K))
    assert_stands_for(backend, kd_lib.ATLoss(), formula, *sides, students=2)


def inner_products(t, s):
    products = [(d := x[None] - x[:, None]) @ d.mT for x in (s, t)]
    return F.smooth_l1_loss(*products)


def distance(t, s):
    return distance_loss(s, t, of_eps=1e-10, of_mean=1e-7)


@pytest.mark.parametrize("normalize", [True, False])
def test_rkd(backend, normalize):
    """vision/RKD/loss_metric.py RKDLoss, RKDDistanceLoss and RKDAngleLoss: the teacher first."""

    def angle(t, s):
        return angle_loss(s, t) if normalize else inner_products(t, s)

    def formula(s, t):
        return 0.2 * distance(t, s) + 0.7 * angle(t, s)

    of = kd_lib.RKDLoss(0.2, 0.7, normalize)
    sides = draw((9, 4), (9, 6))
    # The student first, for its gradient.
    assert_stands_for(backend, lambda s, t: of(t, s), formula, *sides, in_half=True)
    assert_stands_for(
        backend, lambda s, t: kd_lib.RKDAngleLoss()(t, s, normalize), lambda s, t: angle(t, s),
        *sides,
    )  # fmt: skip
    assert is_without_gradient(lambda s, t: of(t, s), *sides)


def test_rkd_of_small_distances(backend):
    """Where the 1e-7 that is added to their mean shows."""
    s, t = (1e-4 * x for x in draw((9, 4), (9, 6)))
    assert_stands_for(
        backend, lambda s, t: kd_lib.RKDDistanceLoss()(t, s), lambda s, t: distance(t, s), s, t
    )
    assert kd_lib.RKDDistanceLoss()(t, s) != pytest.approx(distance_loss(s, t).item(), rel=1e-5)


def test_nothing_is_saved():
    for criterion in (kd_lib.ATLoss(), kd_lib.RKDLoss()):
        criterion.load_state_dict({})
        assert not criterion.state_dict()

"""fastkd.compat.torchdistill without torchdistill: against its formulas, and what it refuses.

tests/test_peers_torchdistill_compat.py compares with the library.
"""

import pytest
import torch
import torch.nn.functional as F
from compat import assert_stands_for, draw_logits
from conventions import draw
from hooked import AT_PAIRS, FSP_PAIRS, of_loss, of_modules
from test_compat_repdistiller import angle_loss
from test_conventions_features import code_loss, paper_loss
from test_conventions_relations import difference, distance_loss, similarity

import fastkd
from fastkd.compat import torchdistill

T, K, B = 2.0, 7, 5
LABELS = torch.tensor([0, 6, 3, 2, 2])
at_module = of_modules("module")
two_paths = {"student_output_path": "0", "teacher_output_path": "0"}


def standardized(x):
    return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))


@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
def test_logits(backend, name):
    def soft(s, t):
        s, t = (standardized(x) for x in (s, t)) if name == "LogitStdKDLoss" else (s, t)
        return F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="batchmean")

    def both(s, t):
        return 0.3 * F.cross_entropy(s, LABELS) + 0.7 * T**2 * soft(s, t)

    criterion = getattr(torchdistill, name)(**at_module, temperature=T, alpha=0.3)
    sides = draw_logits((B, K), (B, K))
    assert_stands_for(backend, of_loss(criterion, LABELS), both, *sides, students=2, in_half=True)
    assert_stands_for(backend, of_loss(criterion), soft, *sides, students=2, in_half=True)


@pytest.mark.parametrize(("mode", "formula"), [("code", code_loss), ("paper", paper_loss)])
def test_at(backend, mode, formula):
    def of_pairs(*f):
        return formula(f[0], f[2]) + 0.5 * formula(f[1], f[3])

    sides = draw((4, 3, 5, 5), (4, 2, 3, 4), (4, 6, 5, 5), (4, 4, 3, 4))
    criterion = torchdistill.ATLoss(AT_PAIRS, mode)
    assert_stands_for(backend, of_loss(criterion), of_pairs, *sides, students=2, in_half=True)


def test_fsp(backend):
    def formula(*f):
        first, second = (difference(*f[i : i + 2], *f[i + 3 : i + 5]) for i in range(2))
        return (first.norm(dim=1).sum() + 3 * second.norm(dim=1).sum()) / len(f[0])

    shapes = [(3, 4, 6, 6), (3, 5, 3, 4), (3, 2, 4, 3)]
    criterion = torchdistill.FSPLoss(FSP_PAIRS)
    assert_stands_for(
        backend, of_loss(criterion), formula, *draw(*shapes, *shapes), students=3, in_half=True
    )


def test_rkd(backend):
    criterion = torchdistill.RKDLoss(**two_paths, dist_factor=2, angle_factor=3, reduction="mean")
    assert_stands_for(
        backend, of_loss(criterion), lambda s, t: 2 * distance_loss(s, t) + 3 * angle_loss(s, t),
        *draw((9, 4), (9, 6)), in_half=True,
    )  # fmt: skip


def test_spkd(backend):
    criterion = torchdistill.SPKDLoss(**two_paths, reduction="batchmean")
    assert_stands_for(
        backend, of_loss(criterion), lambda s, t: similarity(s, t, p=1),
        *draw((5, 3, 4, 4), (5, 6, 2, 2)), students=2, in_half=True,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(B, K), (3, K, 2, 4)])
def test_skd(backend, shape):
    """The median is of all rows, pixels too, and so is the mean."""

    def formula(s, t):
        rows = F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="none").sum(1)
        confidence = t.softmax(1).amax(1)
        return (T**2 * rows * (confidence <= confidence.median())).mean()

    criterion = torchdistill.SKDInstanceLoss(**at_module, temperature=T, mode="code")
    assert_stands_for(
        backend, of_loss(criterion), formula, *draw_logits(shape, shape), students=2, in_half=True
    )


def test_skd_of_a_teacher_that_is_nan(backend):
    """No row is below a median of NaN; the loss is not 0 for that."""
    student, teacher = draw((B, K), (B, K))
    teacher[1, 2] = torch.nan
    criterion = torchdistill.SKDInstanceLoss(**at_module, mode="code")
    with fastkd.use_backend(backend):
        assert of_loss(criterion)(student, teacher).isnan()


def test_srd(backend):
    def formula(f_s, s, f_t, t):
        q, p = (s / T).log_softmax(1), (t / T).softmax(1)
        return 2 * (f_s - f_t).abs().sum().log() + F.kl_div(q, p, reduction="batchmean")

    criterion = torchdistill.SRDLoss(**of_modules("feature_module", "linear_module"), temperature=T)
    sides = draw_logits((B, 6), (B, K), (B, 6), (B, K))
    assert_stands_for(backend, of_loss(criterion), formula, *sides, students=4, in_half=True)


def test_hierarchical_context(backend):
    """Of a height of 3, sizes below it: 2 and 1."""

    def formula(s, t):
        pooled = [F.mse_loss(*(F.adaptive_avg_pool2d(x, k) for x in (s, t))) for k in (2, 1)]
        return (F.mse_loss(s, t) + pooled[0] / 2 + pooled[1] / 4) / 1.75

    def call(s, t):
        return criterion({"0": {"output": (s, None)}}, {"0": {"output": t}})

    criterion = torchdistill.HierarchicalContextLoss(**at_module)
    assert_stands_for(
        backend, call, formula, *draw((4, 3, 3, 3), (4, 3, 3, 3)), students=2, in_half=True
    )


def test_ignored_targets_are_refused_unless_announced():
    sides = draw((B, K), (B, K))
    targets = LABELS.masked_fill(LABELS == 3, -100)
    with pytest.raises(ValueError, match="got -100: the cross-entropy would"):
        of_loss(torchdistill.KDLoss(**at_module, temperature=T, alpha=0.3), targets)(*sides)
    announced = torchdistill.KDLoss(**at_module, temperature=T, alpha=0.3, ignore_index=-100)
    assert of_loss(announced, targets)(*sides).isfinite()


def test_ignored_pixels(backend):
    """Have no part in the cross-entropy alone."""
    shape = (2, K, 3, 4)
    targets = torch.randint(K, (2, 3, 4))
    targets[0, 1:] = -100

    def formula(s, t):
        soft = F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="batchmean")
        return 0.3 * F.cross_entropy(s, targets) + 0.7 * T**2 * soft

    criterion = torchdistill.KDLoss(**at_module, temperature=T, alpha=0.3)
    sides = draw_logits(shape, shape)
    assert_stands_for(backend, of_loss(criterion, targets), formula, *sides, students=2)


@pytest.mark.parametrize(
    ("name", "keywords", "said"),
    [
        ("KDLoss", {**at_module, "temperature": T, "reduction": "none"}, "reduction"),
        ("LogitStdKDLoss", {**at_module, "temperature": T, "reduction": "none"}, "reduction"),
        ("SRDLoss", {**of_modules("feature_module", "linear_module"), "reduction": "none"},
         "reduction"),
        ("RKDLoss", {**two_paths, "dist_factor": 1, "angle_factor": 1, "reduction": "none"},
         "reduction"),
        ("HierarchicalContextLoss", {**at_module, "reduction": "none"}, "reduction"),
        ("ATLoss", {"at_pairs": {}, "mode": "norm"}, "mode"),
        ("SKDInstanceLoss", {**at_module, "mode": "norm"}, "mode"),
    ],
)  # fmt: skip
def test_what_is_refused(name, keywords, said):
    with pytest.raises(ValueError, match=f"{said} must"):
        getattr(torchdistill, name)(**keywords)


def test_pixels_are_not_standardised():
    criterion = torchdistill.LogitStdKDLoss(**at_module, temperature=T)
    with pytest.raises(ValueError, match="must be"):
        of_loss(criterion)(*draw((2, K, 3, 4), (2, K, 3, 4)))

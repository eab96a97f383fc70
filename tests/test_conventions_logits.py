"""Conventions of soft targets in other libraries: their formulas, and the calls instead."""

import pytest
import torch
import torch.nn.functional as F
from conventions import assert_same, draw, row

import fastkd

T, ALPHA, K, B = 4.0, 0.3, 7, 5
LABELS = torch.tensor([0, 6, -100, 2, 2])
WHOLE = LABELS.clamp(min=0)
table = "Soft targets"


def kl(s, t, reduction="batchmean", dim=1):
    """`F.kl_div` of the softened distributions, as most libraries write it."""
    return F.kl_div((s / T).log_softmax(dim), (t / T).softmax(dim), reduction=reduction)


def soft(s, t, **keywords):
    return fastkd.soft_target_loss(s, t, temperature=T, **keywords)


@row(table, "sum over rows / B, times T²")
def test_batchmean(backend):
    """RepDistiller distiller_zoo/KD.py DistillKL, mdistiller distillers/KD.py kd_loss."""
    rows = draw((B, K), (B, K))
    assert_same(backend, soft, lambda s, t: kl(s, t, "sum") * T**2 / len(s), *rows)
    assert_same(backend, soft, lambda s, t: kl(s, t, "none").sum(1).mean() * T**2, *rows)


@row(table, "no T²")
def test_no_t2(backend):
    assert_same(backend, lambda s, t: soft(s, t, scale_t2=False), kl, *draw((B, K), (B, K)))


@row(table, "T² on the reported loss, not on the gradient")
def test_t2_on_the_value_alone(backend):
    """axolotl integrations/kd: what is differentiated has no T²."""
    rows = draw((B, K), (B, K))
    assert_same(backend, lambda s, t: soft(s, t, scale_t2=False), kl, *rows, value=False)
    with fastkd.use_backend(backend):
        torch.testing.assert_close(soft(*rows), T**2 * kl(*rows))


@row(table, "`nn.KLDivLoss()` default, K times smaller")
def test_mean(backend):
    """haitongli model/net.py loss_fn_kd; deit losses.py DistillationLoss (sum / numel)."""
    rows = draw((B, K), (B, K))
    expected = torch.nn.KLDivLoss(reduction="mean")

    def formula(s, t):
        return expected((s / T).log_softmax(1), (t / T).softmax(1)) * T**2

    assert_same(backend, lambda s, t: soft(s, t, reduction="mean"), formula, *rows)
    assert_same(
        backend, lambda s, t: soft(s, t, reduction="mean"),
        lambda s, t: kl(s, t, "sum") * (T * T) / s.numel(), *rows,
    )  # fmt: skip


@row(table, "alpha weights the soft term, with that default")
def test_alpha_of_the_soft_term(backend):
    """haitongli model/net.py loss_fn_kd."""

    def formula(s, t):
        hard = F.cross_entropy(s, WHOLE) * (1 - ALPHA)
        return kl(s, t, "mean") * (ALPHA * T * T) + hard

    def call(s, t):
        return fastkd.distillation_loss(
            s, t, WHOLE, temperature=T, soft_weight=ALPHA / K, hard_weight=1 - ALPHA
        )

    assert_same(backend, call, formula, *draw((B, K), (B, K)))


def torchdistill(s, t, labels, alpha, beta=None, **keywords):
    """torchdistill losses/mid_level.py KDLoss."""
    beta = 1 - alpha if beta is None else beta
    loss = kl(s, t)
    if alpha is None or alpha == 0 or labels is None:
        return loss
    return alpha * F.cross_entropy(s, labels, **keywords) + beta * T**2 * loss


@row(table, "alpha weights the hard term")
def test_alpha_of_the_hard_term(backend):
    def call(s, t):
        return fastkd.distillation_loss(
            s, t, WHOLE, temperature=T, soft_weight=1 - ALPHA, hard_weight=ALPHA
        )

    assert_same(backend, call, lambda s, t: torchdistill(s, t, WHOLE, ALPHA), *draw((B, K), (B, K)))


@row(table, "T² dropped when alpha is None (with a beta) or 0, or there are no labels")
@pytest.mark.parametrize(
    ("labels", "alpha", "beta"), [(WHOLE, None, 0.9), (WHOLE, 0, None), (None, ALPHA, None)]
)
def test_t2_dropped(backend, labels, alpha, beta):
    rows = draw((B, K), (B, K))
    assert_same(
        backend, lambda s, t: soft(s, t, scale_t2=False),
        lambda s, t: torchdistill(s, t, labels, alpha, beta), *rows,
    )  # fmt: skip
    with pytest.raises(TypeError):
        torchdistill(*rows, WHOLE, None)


@row(table, "`ignore_index` of the cross-entropy alone: all rows count in the soft term")
def test_ignore_index_of_the_hard_term(backend):
    def call(s, t):
        hard = fastkd.distillation_loss(s, t, LABELS, soft_weight=0, hard_weight=1)
        return (1 - ALPHA) * soft(s, t) + ALPHA * hard

    def of_torch(s, t):
        return (1 - ALPHA) * soft(s, t) + ALPHA * F.cross_entropy(s, LABELS)

    def formula(s, t):
        return torchdistill(s, t, LABELS, ALPHA, ignore_index=-100)

    rows = draw((B, K), (B, K))
    assert_same(backend, call, formula, *rows)
    assert_same(backend, of_torch, formula, *rows)


@row(table, "`(N, C, H, W)`: sum over N alone, H·W times larger")
def test_pixels(backend):
    """`F.kl_div(..., reduction="batchmean")` divides by the first dimension."""
    images = draw((2, K, 3, 5), (2, K, 3, 5))
    formula = lambda s, t: kl(s, t) * T**2  # noqa: E731
    assert_same(backend, lambda s, t: soft(s, t, dim=1, reduction="sum") / len(s), formula, *images)
    assert_same(backend, lambda s, t: 3 * 5 * soft(s, t, dim=1), formula, *images)


@row(table, "`(B, L, K)`: sum over B alone, L times larger")
def test_tokens(backend):
    tokens = draw((2, 3, K), (2, 3, K))
    assert_same(
        backend, lambda s, t: soft(s, t, reduction="sum") / len(s),
        lambda s, t: kl(s, t, dim=-1) * T**2, *tokens,
    )  # fmt: skip
    with fastkd.use_backend(backend):
        torch.testing.assert_close(3 * soft(*tokens), kl(*tokens, dim=-1) * T**2)


@row(table, "mean over rows weighted by w: `Σ w·L / Σ w`")
def test_weighted_mean(backend):
    w = torch.rand(B, dtype=torch.float64)

    def formula(s, t):
        rows = F.kl_div((s / T).log_softmax(1), (t / T).softmax(1), reduction="none").sum(1)
        return (w * rows).sum() / w.sum() * T**2

    rows = draw((B, K), (B, K))
    assert_same(backend, lambda s, t: soft(s, t, row_weight=w, normalizer=w.sum()), formula, *rows)
    by_rows = lambda s, t: formula(s, t) * w.sum() / len(s)  # noqa: E731
    assert_same(backend, lambda s, t: soft(s, t, row_weight=w), by_rows, *rows)


@row(table, "both sides cut to the vocabulary that they share")
def test_padded_vocabularies(backend):
    rows = draw((B, K + 2), (B, K + 1))
    assert_same(
        backend, lambda s, t: soft(s, t, num_classes=K),
        lambda s, t: kl(s[:, :K], t[:, :K]) * T**2, *rows,
    )  # fmt: skip


@row(table, "soft cross-entropy `−Σ p log q`, no T²")
def test_soft_cross_entropy(backend):
    def formula(s, t):
        return -((t / T).softmax(1) * (s / T).log_softmax(1)).sum(1).mean()

    rows = draw((B, K), (B, K))
    assert_same(backend, lambda s, t: soft(s, t, scale_t2=False), formula, *rows, value=False)
    p = (rows[1] / T).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    with fastkd.use_backend(backend):
        torch.testing.assert_close(soft(*rows, scale_t2=False), formula(*rows) - entropy)


@row(table, "squared difference of softmaxes")
def test_squared_difference_of_softmaxes(backend):
    """KD_Lib KD/vision/vanilla/vanilla_kd.py VanillaKD with its default loss_fn, MSELoss."""

    def call(s, t):
        sides = (s / T).softmax(-1), (t / T).softmax(-1)
        return fastkd.hint_loss(*sides, half=False, reduction="mean")

    assert_same(
        backend, call, lambda s, t: F.mse_loss((t / T).softmax(1), (s / T).softmax(1)),
        *draw((B, K), (B, K)),
    )  # fmt: skip


@row(table, "forward KL, kept rows only (`beta=0`)")
def test_kept_rows(backend):
    """trl generalized_jsd_loss with labels."""

    def formula(s, t):
        log_q, log_p = (s / T).log_softmax(-1), (t / T).log_softmax(-1)
        kept = LABELS != -100
        return F.kl_div(log_q, log_p, reduction="none", log_target=True)[kept].sum() / kept.sum()

    def call(s, t):
        return fastkd.soft_target_loss(s, t, temperature=T, scale_t2=False, mask=LABELS != -100)

    assert_same(backend, call, formula, *draw((B, K), (B, K)))


WEIGHTS = [0.5, 0.2, 0.3]


@row(table, "arithmetic mean of the teachers' probabilities")
def test_mean_of_probabilities(backend):
    def formula(s, *teachers):
        p = sum(w * (t / T).softmax(1) for w, t in zip(WEIGHTS, teachers, strict=True))
        return F.kl_div((s / T).log_softmax(1), p, reduction="batchmean") * T**2

    assert_same(
        backend, lambda s, *t: soft(s, t, teacher_weights=WEIGHTS), formula, *draw(*[(B, K)] * 4)
    )


@row(table, "mean of the teachers' logits: the geometric mean")
def test_mean_of_logits(backend):
    def mean(teachers):
        return sum(w * t for w, t in zip(WEIGHTS, teachers, strict=True))

    def formula(s, *teachers):
        powers = [(t / T).softmax(1) ** w for w, t in zip(WEIGHTS, teachers, strict=True)]
        product = torch.stack(powers).prod(0)
        p = product / product.sum(1, keepdim=True)
        return F.kl_div((s / T).log_softmax(1), p, reduction="batchmean") * T**2

    assert_same(backend, lambda s, *t: soft(s, mean(t)), formula, *draw(*[(B, K)] * 4))


@row(table, "mean of the losses with each teacher")
def test_mean_of_losses(backend):
    def formula(s, *teachers):
        return sum(w * kl(s, t) * T**2 for w, t in zip(WEIGHTS, teachers, strict=True))

    rows = draw(*[(B, K)] * 4)
    assert_same(
        backend, lambda s, *t: soft(s, t, teacher_weights=WEIGHTS), formula, *rows, value=False
    )
    with fastkd.use_backend(backend):
        assert soft(rows[0], rows[1:], teacher_weights=WEIGHTS) < formula(*rows)


@row(table, '`"batchmean"` divides by all rows in KL, by kept rows in JSD')
def test_what_batchmean_divides_by(backend):
    """Liger-Kernel ops/kl_div.py and ops/jsd.py."""
    s, t = draw((B, K), (B, K))
    rows = kl(s, t, "none").sum(1)
    with fastkd.use_backend(backend):
        torch.testing.assert_close(soft(s, t, scale_t2=False), rows.sum() / B)
        kept = fastkd.distillation_loss(
            s, t, LABELS, temperature=T, soft_weight=1 / T**2, hard_weight=0
        )
    torch.testing.assert_close(kept, rows[LABELS != -100].mean())


@row(table, "`p * (p.log() - log_q)`")
def test_underflow(backend):
    s, t = (torch.tensor([[0.0, 200.0]]), torch.tensor([[200.0, 0.0]]))
    p = t.softmax(1)
    assert (p * (p.log() - s.log_softmax(1))).sum().isnan()
    with fastkd.use_backend(backend):
        torch.testing.assert_close(fastkd.soft_target_loss(s, t), torch.tensor(200.0))

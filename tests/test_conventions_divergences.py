"""Conventions of other divergences in other libraries: their formulas, and the calls instead."""

import pytest
import torch
import torch.nn.functional as F
from conventions import assert_same, draw, row

import fastkd

T, K, B = 4.0, 7, 5
LABELS = torch.tensor([0, 6, -100, 2, 2])
table = "Soft targets"


def logarithms(s, t):
    return (s / T).log_softmax(-1), (t / T).log_softmax(-1)


def generalized_jsd(s, t, beta, labels=None, reduction="batchmean"):
    """TRL experimental/gkd/gkd_trainer.py generalized_jsd_loss."""
    log_q, log_p = logarithms(s, t)
    if beta == 0:
        jsd = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(log_p, log_q, reduction="none", log_target=True)
    else:
        beta = torch.tensor(beta, dtype=log_q.dtype)
        both = torch.stack([log_q + torch.log1p(-beta), log_p + torch.log(beta)])
        mixture = torch.logsumexp(both, dim=0)
        of_teacher = F.kl_div(mixture, log_p, reduction="none", log_target=True)
        of_student = F.kl_div(mixture, log_q, reduction="none", log_target=True)
        jsd = beta * of_teacher + (1 - beta) * of_student
    if labels is not None:
        jsd = jsd[labels != -100]
    if reduction == "batchmean":
        return jsd.sum() / (jsd.size(0) if labels is None else (labels != -100).sum())
    return {"sum": jsd.sum, "mean": jsd.mean, "none": jsd.clone}[reduction]()


def soft(s, t, **keywords):
    return fastkd.soft_target_loss(s, t, temperature=T, scale_t2=False, **keywords)


def kept(s, t, **keywords):
    return soft(s, t, mask=LABELS != -100, **keywords)


every_beta = pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])


@row(table, "generalised Jensen-Shannon divergence, no T²")
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@every_beta
def test_generalized_jsd(backend, beta, reduction):
    assert_same(
        backend, lambda s, t: soft(s, t, divergence="jsd", beta=beta, reduction=reduction),
        lambda s, t: generalized_jsd(s, t, beta, reduction=reduction), *draw((B, K), (B, K)),
    )  # fmt: skip


@row(table, "the same over kept rows")
@every_beta
def test_generalized_jsd_of_kept_rows(backend, beta):
    rows = draw((B, K), (B, K))
    assert_same(
        backend, lambda s, t: kept(s, t, divergence="jsd", beta=beta),
        lambda s, t: generalized_jsd(s, t, beta, LABELS), *rows,
    )  # fmt: skip
    assert_same(
        backend, lambda s, t: kept(s, t, divergence="jsd", beta=beta, normalizer=3),
        lambda s, t: generalized_jsd(s, t, beta, LABELS, "sum") / 3, *rows,
    )  # fmt: skip


@row(table, "the same of `(B, L, K)`: sum over B alone")
@every_beta
def test_generalized_jsd_of_tokens(backend, beta):
    assert_same(
        backend, lambda s, t: soft(s, t, divergence="jsd", beta=beta, normalizer=len(s)),
        lambda s, t: generalized_jsd(s, t, beta), *draw((2, 3, K), (2, 3, K)),
    )  # fmt: skip


@row(table, "the same with hard labels, both over kept rows")
@every_beta
def test_generalized_jsd_and_labels(backend, beta):
    """Liger-Kernel chunked_loss/fused_linear_distillation.py _compute_loss."""

    def call(s, t):
        return fastkd.distillation_loss(
            s, t, LABELS, temperature=T, divergence="jsd", beta=beta, soft_weight=0.7 / T**2,
            hard_weight=0.4,
        )  # fmt: skip

    def formula(s, t):
        hard = F.cross_entropy(s, LABELS, reduction="sum") / (LABELS != -100).sum()
        return 0.4 * hard + 0.7 * generalized_jsd(s, t, beta, LABELS)

    assert_same(backend, call, formula, *draw((B, K), (B, K)))


@row(table, '`reduction="none"` has the terms of each class')
@every_beta
def test_terms_of_each_class(backend, beta):
    s, t = draw((B, K), (B, K))
    terms = generalized_jsd(s, t, beta, LABELS, "none")
    with fastkd.use_backend(backend):
        rows = kept(s, t, divergence="jsd", beta=beta, reduction="none")
    torch.testing.assert_close(rows[LABELS != -100], terms.sum(-1))
    assert (rows[LABELS == -100] == 0).all()


@row(table, "no row kept: NaN, or a division by 0")
@every_beta
def test_no_row_kept(backend, beta):
    s, t = draw((B, K), (B, K))
    nothing = torch.full_like(LABELS, -100)
    assert generalized_jsd(s, t, beta, nothing, "mean").isnan()
    s.requires_grad_()
    with fastkd.use_backend(backend):
        loss = soft(s, t, divergence="jsd", beta=beta, reduction="mean", mask=nothing != -100)
    assert loss == 0
    assert (torch.autograd.grad(loss, s)[0] == 0).all()


@row(table, "a class that both sides exclude by `-inf`: NaN")
@every_beta
def test_a_class_that_both_sides_exclude(backend, beta):
    s, t = draw((B, K), (B, K))
    s[:, 2] = t[:, 2] = -torch.inf
    assert generalized_jsd(s, t, beta).isnan()
    others = [x[:, torch.arange(K) != 2] for x in (s, t)]
    with fastkd.use_backend(backend):
        torch.testing.assert_close(
            soft(s, t, divergence="jsd", beta=beta), generalized_jsd(*others, beta)
        )


@row(table, "total variation, no T²")
def test_total_variation(backend):
    """Liger-Kernel ops/tvd.py: 0.5 * |p - q|."""

    def formula(s, t):
        log_q, log_p = logarithms(s, t)
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum() / len(s)

    assert_same(backend, lambda s, t: soft(s, t, divergence="tvd"), formula, *draw((B, K), (B, K)))


@row(table, "reverse KL, no T²")
def test_reverse_kl(backend):
    """MiniLLM and DistiLLM distillm/losses.py reverse_kl."""

    def formula(s, t):
        log_q, log_p = logarithms(s, t)
        return (log_q.exp() * (log_q - log_p)).sum(-1).mean()

    rows = draw((B, K), (B, K))
    assert_same(backend, lambda s, t: soft(s, t, divergence="reverse_kl"), formula, *rows)


@row(table, "skewed KL, as a cross-entropy")
def test_skewed_forward_kl(backend):
    """DistiLLM distillm/losses.py skewed_forward_kl: less the teacher's entropy."""

    def formula(s, t, lam=0.1):
        log_q, log_p = logarithms(s, t)
        mixed = (lam * log_p.exp() + (1 - lam) * log_q.exp()).log()
        return -(log_p.exp() * mixed).sum(-1).mean()

    rows = draw((B, K), (B, K))
    assert_same(
        backend, lambda s, t: soft(s, t, divergence="skew_kl", beta=0.1), formula, *rows,
        value=False,
    )  # fmt: skip


@row(table, "skewed reverse KL")
def test_skewed_reverse_kl(backend):
    """DistiLLM distillm/losses.py skewed_reverse_kl."""

    def formula(s, t, lam=0.1):
        log_q, log_p = logarithms(s, t)
        mixed = ((1 - lam) * log_p.exp() + lam * log_q.exp()).log()
        return (log_q.exp() * (log_q - mixed)).sum(-1).mean()

    rows = draw((B, K), (B, K))
    assert_same(
        backend, lambda s, t: soft(s, t, divergence="skew_reverse_kl", beta=0.1), formula, *rows
    )

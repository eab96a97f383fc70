"""Conventions of other divergences in other libraries: their formulas, and the calls instead."""

import pytest
import torch
import torch.nn.functional as F
from conventions import assert_same, draw, row
from divergences import HAVE_KERNELS

import fastkd

pytestmark = pytest.mark.skipif(not HAVE_KERNELS, reason="the CUDA kernels have forward KL alone")

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
    return jsd.sum() if reduction == "sum" else jsd.mean()


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

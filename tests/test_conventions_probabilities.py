"""Conventions of probabilities as targets: other libraries' formulas, and the calls instead."""

import pytest
import torch
import torch.nn.functional as F
from conventions import assert_same, draw, row

import fastkd

T, K, B = 2.0, 7, 5
table = "Soft targets"
reductions = pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])


def total(losses):
    """One number, to which each row counts another time."""
    return losses if losses.ndim == 0 else (losses * torch.arange(1, B + 1)).sum()


def loss(s, side, **keywords):
    return total(fastkd.soft_target_loss(s, side, **keywords))


def kl_div(s, target, reduction, **keywords):
    found = F.kl_div(s.log_softmax(-1), target, reduction=reduction, **keywords)
    return total(found.sum(-1) if reduction == "none" else found)


@row(table, "probabilities as the target, used as they are")
@reductions
def test_probabilities(backend, reduction):
    """torch.nn.KLDivLoss."""
    s, log_p = draw((B, K), (B, K))
    assert_same(
        backend, lambda s, p: loss(s, fastkd.Probabilities(p), reduction=reduction),
        lambda s, p: kl_div(s, p, reduction), s, log_p.exp(), students=2,
    )  # fmt: skip


@row(table, "their logarithms as the target, `log_target=True`")
@reductions
def test_logarithms(backend, reduction):
    assert_same(
        backend, lambda s, log_p: loss(s, fastkd.LogProbabilities(log_p), reduction=reduction),
        lambda s, log_p: kl_div(s, log_p, reduction, log_target=True),
        *draw((B, K), (B, K)), students=2,
    )  # fmt: skip


@row(table, "softened probabilities as the target")
def test_softened(backend):
    """The target is softened before it is stored; the student's logits are softened here."""
    s, t = draw((B, K), (B, K))
    assert_same(
        backend, lambda s, p: loss(s, fastkd.Probabilities(p), temperature=T, scale_t2=False),
        lambda s, p: kl_div(s / T, p, "batchmean"), s, (t / T).softmax(-1), students=2,
    )  # fmt: skip

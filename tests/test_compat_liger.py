"""Liger-Kernel's losses against its formulas, written out; test_peers_liger_compat.py runs its own.

Leaves are log-probabilities or probabilities where the library takes them: no softmax takes part in
their gradient.
"""

import pytest
import torch
import torch.nn.functional as F
from compat import assert_stands_for
from conventions import draw

import fastkd
from fastkd.compat import liger

B, V, H, T = 6, 13, 5, 2.0
LABELS = torch.tensor([3, -100, 0, 12, -100, 7])
NONE_KEPT = torch.full((B,), -100)
every_beta = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
some_labels = pytest.mark.parametrize("labels", [None, LABELS, NONE_KEPT], ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])


def drawn_logs():
    return [x.log_softmax(-1) for x in draw((B, V), (B, V))]


def heads(classes=V):
    return draw((B, H), (classes, H), (B, H + 1), (V, H + 1))


def jsd(log_q, log_p, beta):
    """Of each row, of what is given: exponentials need not sum to 1."""
    p, q = log_p.exp(), log_q.exp()
    if beta in (0, 1):
        return (p * (log_p - log_q) if beta == 0 else q * (log_q - log_p)).sum(-1)
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def mean_of_kept(losses, labels):
    if labels is None:
        return losses.mean()
    return losses[labels != -100].sum() / (labels != -100).sum().clamp(min=1)


def reduced(terms, reduction, rows):
    if reduction == "none":
        return terms.square().sum()
    divisors = {"sum": 1, "batchmean": rows, "mean": rows * V}
    return terms.sum() / divisors[reduction]


def check_reduction(backend, criterion, formula, reduction, *tensors):
    """Also of terms, whose squares have gradients of their own."""

    def call(*tensors):
        loss = criterion(*tensors)
        return loss.square().sum() if reduction == "none" else loss

    assert_stands_for(backend, call, formula, *tensors)


@some_labels
@every_beta
def test_jsd(backend, beta, labels):
    assert_stands_for(
        backend, lambda q, p: liger.LigerJSD(beta)(q, p, labels),
        lambda q, p: mean_of_kept(jsd(q, p, beta), labels), *drawn_logs(),
    )  # fmt: skip


def test_jsd_takes_the_student_s_side_as_it_is(backend):
    """Rows of Q need not sum to 1."""
    log_q, log_p = drawn_logs()
    assert_stands_for(
        backend, liger.LigerJSD(0.3), lambda q, p: jsd(q, p, 0.3).mean(), log_q - 0.2, log_p
    )


@every_beta
def test_jsd_of_logits(backend, beta):
    """What its docstring names has the gradient that reaches logits through `log_softmax`."""
    assert_stands_for(
        backend,
        lambda s, t: fastkd.soft_target_loss(s, t, divergence="jsd", beta=beta, scale_t2=False),
        lambda s, t: liger.LigerJSD(beta)(s.log_softmax(-1), t.log_softmax(-1)),
        *draw((B, V), (B, V)),
    )  # fmt: skip


@pytest.mark.parametrize("log_target", [False, True])
@every_reduction
def test_kl(backend, reduction, log_target):
    log_q, log_p = drawn_logs()
    p = log_p.exp()
    p[0, 3] = 0  # its term is 0; the target need not sum to 1, either
    log_p[0, 3] = -1e3
    criterion = liger.LigerKLDIVLoss(reduction=reduction, log_target=log_target)

    def formula(log_q, _):
        return reduced(torch.xlogy(p, p) - p * log_q, reduction, B)

    check_reduction(backend, criterion, formula, reduction, log_q, log_p if log_target else p)
    assert liger.LigerKLDIVLoss().reduction == "mean"


def test_kl_of_small_probabilities():
    """They count as eps inside the logarithm."""
    log_q, log_p = drawn_logs()
    p = log_p.exp()
    found = liger.LigerKLDIVLoss(0.2, reduction="sum")(log_q, p)
    torch.testing.assert_close(found, (p * (p.clamp(min=0.2).log() - log_q)).sum())


@some_labels
@every_reduction
def test_tvd(backend, reduction, labels):
    kept = torch.ones(B, dtype=torch.bool) if labels is None else labels != -100

    def formula(p, q):
        terms = (p - q).abs()[kept] / 2
        return reduced(terms, reduction, max(len(terms), 1))

    criterion = liger.LigerTVDLoss(reduction)
    sides = [x.exp() for x in drawn_logs()]
    check_reduction(
        backend, lambda p, q: criterion(p, q, labels), formula, reduction, *sides
    )  # fmt: skip
    if reduction == "none":
        assert not criterion(*sides, labels)[~kept].any()


@some_labels
@every_beta
def test_linear_jsd(backend, beta, labels):
    criterion = liger.LigerFusedLinearJSD(beta, temperature=T)

    def call(h_s, w_s, h_t, w_t):
        return criterion(h_s, w_s, h_t, w_t, labels)

    def formula(h_s, w_s, h_t, w_t):
        log_q, log_p = ((h @ w.T / T).log_softmax(-1) for h, w in [(h_s, w_s), (h_t, w_t)])
        return mean_of_kept(jsd(log_q, log_p, beta), labels)

    assert_stands_for(backend, call, formula, *heads(), students=2)


@some_labels
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
def test_linear_kl(backend, reduction, labels):
    kept = torch.ones(B, dtype=torch.bool) if labels is None else labels != -100
    hidden, weight, *_ = heads()
    p = 0.9 * drawn_logs()[0].exp()  # used as it is
    p[0, 3] = 0

    def formula(hidden, weight, p):
        log_q = (hidden @ weight.T / T).log_softmax(-1)
        terms = (torch.xlogy(p, p) - p * log_q)[kept]
        return reduced(terms, reduction, max(len(terms), 1))

    criterion = liger.LigerFusedLinearKLDivLoss(reduction, temperature=T)
    assert_stands_for(
        backend, lambda h, w, p: criterion(h, w, p, labels), formula, hidden, weight, p, students=2
    )


@pytest.mark.parametrize("classes", [V, V - 3], ids=["same", "fewer"])
@pytest.mark.parametrize("labels", [LABELS, NONE_KEPT], ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "none"])
@every_beta
def test_chunked_linear_jsd(backend, beta, biases, labels, classes):
    """A teacher with more classes adds logits of 0 to the student's, for the soft part alone."""
    labels = labels.clamp(max=classes - 1)
    criterion = liger.LigerFusedLinearJSDLoss(
        0.4, 0.7, beta, temperature=T, chunk_size=2, return_soft_hard_loss=True
    )

    def parts(h_s, w_s, b_s, h_t, w_t, b_t):
        s, t = h_s @ w_s.T, h_t @ w_t.T
        if biases:
            s, t = s + b_s, t + b_t
        hard = F.cross_entropy(s, labels, reduction="none")
        padded = F.pad(s, (0, V - classes))
        soft = jsd((padded / T).log_softmax(-1), (t / T).log_softmax(-1), beta)
        return [mean_of_kept(x, labels) for x in (soft, hard)]

    def formula(*tensors):
        soft, hard = parts(*tensors)
        return 0.7 * soft + 0.4 * hard + 0 * tensors[2].sum()

    def call(h_s, w_s, b_s, h_t, w_t, b_t):
        return criterion(h_s, w_s, h_t, w_t, labels, *((b_s, b_t) if biases else ()))

    h_s, w_s, h_t, w_t = heads(classes)
    tensors = h_s, w_s, *draw(classes), h_t, w_t, *draw(V)
    assert_stands_for(
        backend, lambda *tensors: call(*tensors)[0] + 0 * tensors[2].sum(), formula, *tensors,
        students=3,
    )  # fmt: skip
    with fastkd.use_backend(backend):
        _, *found = call(*tensors)
        criterion.return_soft_hard_loss = False
        assert call(*tensors).ndim == 0
    for one, other in zip(found, parts(*tensors), strict=True):
        torch.testing.assert_close(one, other)


def test_arguments_that_cannot_be_honoured():
    with pytest.raises(ValueError, match="accum_dtype must be None or"):
        liger.LigerFusedLinearJSD(accum_dtype=torch.bfloat16)
    liger.LigerFusedLinearKLDivLoss(accum_dtype=torch.float32)
    with pytest.raises(ValueError, match="eps must be at most"):
        liger.LigerFusedLinearKLDivLoss(eps=1e-3)
    with pytest.raises(ValueError, match="reduction must be"):
        liger.LigerFusedLinearKLDivLoss("none")

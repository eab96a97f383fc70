"""Liger-Kernel's losses against its formulas, written out; test_peers_liger_compat.py runs its own.

Leaves are log-probabilities or probabilities where the library takes them: no softmax takes part in
their gradient.
"""

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from compat import assert_stands_for
from conventions import draw

import fastkd
from fastkd.compat import liger
from fastkd.compat.liger import terms

B, V, H, T = 6, 13, 5, 2.0
LABELS = torch.tensor([3, -100, 0, 12, -100, 7])
NONE_KEPT = torch.full((B,), -100)
every_beta = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
some_labels = pytest.mark.parametrize("labels", [None, LABELS, NONE_KEPT], ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Of two rows."""
    for device in terms._CHUNK:
        monkeypatch.setitem(terms._CHUNK, device, 2 * V)


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


@every_beta
def test_jsd_takes_its_sides_as_they_are(backend, beta):
    """No row needs to sum to 1."""
    log_q, log_p = drawn_logs()
    assert_stands_for(
        backend, liger.LigerJSD(beta), lambda q, p: jsd(q, p, beta).mean(), log_q - 0.2, log_p + 0.3
    )


def of_probabilities():
    """Each criterion of two tensors and labels, and these: the student's first."""
    log_q, log_p = drawn_logs()
    return [
        *[(liger.LigerJSD(beta), log_q, log_p, (LABELS,)) for beta in (0.0, 0.3, 1.0)],
        *[
            (liger.LigerTVDLoss(how), log_q.exp(), log_p.exp(), (LABELS,))
            for how in ("sum", "none")
        ],
        (liger.LigerKLDIVLoss(reduction="none"), log_q, log_p.exp(), ()),
        (liger.LigerKLDIVLoss(reduction="sum", log_target=True), log_q, log_p, ()),
    ]


def test_rows_that_do_not_count_may_hold_nan():
    for criterion, q, p, labels in of_probabilities():
        if not labels:
            continue
        results = []
        for filling in (0.5, torch.nan):
            student, teacher = (x.clone() for x in (q, p))
            student[1] = teacher[4] = filling
            student.requires_grad_()
            loss = criterion(student, teacher, *labels).sum()
            results.append((loss, *torch.autograd.grad(loss, student)))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@every_beta
def test_jsd_of_classes_that_a_side_excludes(beta):
    """As if their probabilities were next to nothing, but for a KL, which is infinite then."""
    log_q, log_p = drawn_logs()
    log_q[0, 1] = log_p[0, 1] = log_q[1, 2] = log_p[2, 3] = -torch.inf
    found = [terms.jsd(beta).terms(log_q, log_p), terms.jsd(beta).slopes(log_q, log_p)]
    floored = [x.clamp(min=-1e5) for x in (log_q, log_p)]
    expected = [terms.jsd(beta).terms(*floored), terms.jsd(beta).slopes(*floored)]
    expected = [x.masked_fill(x.abs() > 10, torch.inf) for x in expected]
    found[1] = found[1].masked_fill(found[1] == -torch.inf, torch.inf)
    torch.testing.assert_close(found, expected)
    assert torch.isfinite(found[0]).all() == (0 < beta < 1)


def test_jsd_of_sides_that_nearly_agree():
    """Its terms of float32 are right to their last digits where logarithms nearly cancel."""
    log_p = drawn_logs()[0].float()
    log_q = log_p + 1e-3 * draw((B, V))[0].float()
    formula = terms.jsd(0.3)
    exact = formula.slopes(log_q.double(), log_p.double())
    p, q = log_p.double().exp(), log_q.double().exp()
    torch.testing.assert_close(exact, 0.7 * q * (log_q - (0.3 * p + 0.7 * q).log()))
    torch.testing.assert_close(
        formula.slopes(log_q, log_p).double(),
        exact,
        rtol=1e-3,
        atol=1e-6 * float(exact.abs().max()),
    )


def test_backward_again():
    """With the graph kept, of a teacher of inference mode, and differentiated once more."""
    for criterion, q, p, labels in of_probabilities():
        with torch.inference_mode():
            teacher = p.clone()
        student = q.clone().requires_grad_()
        loss = criterion(student, teacher, *labels).sum()
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        (again,) = torch.autograd.grad(loss, student, torch.tensor(-2.0), create_graph=True)
        torch.testing.assert_close(again, -2 * gradient, rtol=0, atol=0)
        if again.requires_grad:  # else it is linear
            others = p, *labels
            assert torch.autograd.gradgradcheck(
                lambda s, c=criterion, others=others: c(s, *others), student
            )


def test_memory():
    """Of half precision the gradient is all that is as large; what is wider is of a chunk."""
    for criterion, q, p, labels in of_probabilities():
        if getattr(criterion, "reduction", "") == "none":
            continue
        student, teacher = q.bfloat16().requires_grad_(), p.bfloat16()
        with Allocations() as allocations:
            criterion(student, teacher, *labels).backward()
        *others, gradient = sorted(allocations.sizes)
        assert gradient == 2 * B * V and others[-1] == 4 * 2 * V


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
    sides = drawn_logs()
    for criterion in (liger.LigerJSD(), liger.LigerTVDLoss()):
        with pytest.raises(ValueError, match=r"shift_labels must have the shape \(BT,\)"):
            criterion(*sides, LABELS[:, None])
        with pytest.raises(ValueError, match=r"one shape \(BT, V\)"):
            criterion(sides[0], sides[1][:1])
    with pytest.raises(ValueError, match="reduction must be"):
        liger.LigerTVDLoss("median")(*sides)

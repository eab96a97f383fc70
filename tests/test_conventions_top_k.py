"""Conventions of top-k teachers: other projects' formulas, and the calls instead."""

import pytest
import torch
import torch.nn.functional as F
from conventions import assert_same, draw, row

import fastkd

T, K, B, N = 2.0, 11, 5, 4  # classes, rows, and classes that are kept
table = "Soft targets"
every_beta = pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])


def drawn():
    """A student's and a teacher's logits, and the classes that the teacher keeps."""
    s, t = draw((B, K), (B, K))
    return s, t, t.topk(N).indices


def loss(s, values, indices, keywords=None, **of_teacher):
    kept = fastkd.TopK(values, indices, **of_teacher)
    return fastkd.soft_target_loss(
        s, kept, scale_t2=False, **{"temperature": T, **(keywords or {})}
    )


def with_rest(log_p, is_kept):
    """The rest of the mass as a last element: `log(1 - sum(exp(log_p)))`, clamped below 1."""
    log_sum = log_p.masked_fill(~is_kept, -torch.inf).logsumexp(-1, keepdim=True)
    rest = torch.log(-torch.expm1(log_sum.clamp(max=-1e-7)))
    return torch.cat([log_p, rest], -1)


def jsd(log_q, log_p, is_kept, beta):
    """Of padded slots, term by term; 0 is forward KL and 1 reverse KL."""
    log_q, log_p = (x.masked_fill(~is_kept, 0) for x in (log_q, log_p))
    p, q = (x.exp() * is_kept for x in (log_p, log_q))
    if beta == 0:
        return (p * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (q * (log_q - log_p)).sum(-1)
    log_m = torch.log((beta * p + (1 - beta) * q).clamp(min=1e-300))
    terms = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    return (terms * is_kept).sum(-1)


@row(table, "kept classes, both sides renormalised over them, no T²")
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_both_renormalised(backend, divergence):
    """ModelOpt's `TopKLogitsKLLoss` of its Megatron form; NeMo RL's `DistillationLossFn`."""
    s, t, indices = drawn()

    def formula(s, t):
        log_q = (s.gather(-1, indices) / T).log_softmax(-1)
        log_p = (t.gather(-1, indices) / T).log_softmax(-1)
        if divergence == "reverse_kl":
            log_p, log_q = log_q, log_p
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    assert_same(
        backend,
        lambda s, t: loss(
            s, t.gather(-1, indices), indices, {"divergence": divergence}, tail="renormalize_both"
        ),
        formula, s, t, students=2,
    )  # fmt: skip


@row(table, "forward and reverse KL of these, mixed by a weight")
def test_mixed(backend):
    """NeMo RL, `kl_type="mixed"`; the part that is 0 where the sides are equal is both."""
    s, t, indices = drawn()
    weight = 0.3

    def mixed(s, t):
        kept = {"tail": "renormalize_both"}
        values = t.gather(-1, indices)
        forward = loss(s, values, indices, {"temperature": 1.0}, **kept)
        reverse = loss(s, values, indices, {"temperature": 1.0, "divergence": "reverse_kl"}, **kept)
        return weight * forward + (1 - weight) * reverse

    def formula(s, t):
        log_q, log_p = (x.gather(-1, indices).log_softmax(-1) for x in (s, t))
        forward = (log_p.exp() * (log_p - log_q)).sum(-1)
        reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
        return (weight * forward + (1 - weight) * reverse).mean()

    assert_same(backend, mixed, formula, s, t, students=2)


@row(table, "kept classes, the teacher's alone renormalised")
def test_teacher_renormalised(backend):
    """axolotl; DistillKit, which calls it zero."""
    s, t, indices = drawn()

    def formula(s, t):
        log_q = (s / T).log_softmax(-1).gather(-1, indices)
        log_p = (t.gather(-1, indices) / T).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    assert_same(
        backend, lambda s, t: loss(s, t.gather(-1, indices), indices), formula, s, t, students=2
    )


@row(table, "kept classes as they are")
def test_as_they_are(backend):
    """verl's top-k forward KL, but for its clamp, which takes the gradient of rows below 0."""
    s, t, indices = drawn()

    def formula(s, t):
        log_q = (s / T).log_softmax(-1).gather(-1, indices)
        log_p = (t / T).log_softmax(-1).gather(-1, indices)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def call(s, t):
        values, lse = t.gather(-1, indices), (t / T).logsumexp(-1)
        return loss(s, values, indices, tail="zero", lse=lse)

    assert_same(backend, call, formula, s, t, students=2)


@row(table, "kept classes, and the rest as one more, no T²")
@every_beta
def test_bucket(backend, beta):
    """TRL's trainers with a teacher on a server, Megatron-LM's cached logits.

    `_add_tail_bucket` and `_jsd_divergence` of TRL's server_distillation_trainer.py; Megatron-LM's
    padding has the index -1.
    """
    s, t, indices = drawn()
    is_kept = torch.ones(B, N, dtype=torch.bool)
    is_kept[1, 2:] = is_kept[3, 3] = False
    log_p = (t / T).log_softmax(-1).gather(-1, indices).masked_fill(~is_kept, -torch.inf)
    padded = indices.masked_fill(~is_kept, 0)

    def formula(s, log_p):
        log_q = (s / T).log_softmax(-1).gather(-1, padded)
        both = torch.cat([is_kept, torch.ones(B, 1, dtype=torch.bool)], -1)
        return jsd(with_rest(log_q, is_kept), with_rest(log_p, is_kept), both, beta).mean()

    of_call = {"divergence": "jsd", "beta": beta}
    kept = {"values_are": "log_probs", "tail": "bucket"}
    assert_same(
        backend, lambda s, log_p: loss(s, log_p, padded, of_call, **kept), formula, s, log_p
    )
    elsewhere = padded.masked_fill(~is_kept, -1)
    values = log_p.masked_fill(~is_kept, -1e3)
    assert_same(
        backend, lambda s, _: loss(s, values, elsewhere, of_call, **kept), formula, s, log_p
    )

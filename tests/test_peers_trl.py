"""TRL's own divergences, where it is installed, against the calls that replace them."""

import warnings

import pytest
import torch
from conventions import assert_same, draw

import fastkd

pytest.importorskip("trl")
B, L, K, T = 2, 4, 11, 2.0
LABELS = torch.tensor([[3, -100, 0, 10], [-100, 7, 7, 1]])
KEPT = LABELS != -100
every_beta = pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])


@pytest.fixture(scope="module")
def generalized_jsd():
    with warnings.catch_warnings():
        # TRL says once in a process that it is experimental.
        warnings.simplefilter("ignore")
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    return GKDTrainer.generalized_jsd_loss


@pytest.fixture(scope="module")
def chunked():
    """The loss of DistillationTrainer, of hidden states and heads."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    return lambda *arguments, **keywords: _chunked_divergence_loss(*arguments, **keywords)[0]


def jsd(s, t, beta, **keywords):
    return fastkd.soft_target_loss(
        s, t, temperature=T, scale_t2=False, divergence="jsd", beta=beta, **keywords
    )


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@every_beta
def test_kept_tokens(backend, beta, reduction, generalized_jsd):
    assert_same(
        backend, lambda s, t: jsd(s, t, beta, mask=KEPT, reduction=reduction),
        lambda s, t: generalized_jsd(s, t, LABELS, beta, T, reduction), *draw((B, L, K), (B, L, K)),
    )  # fmt: skip


@every_beta
def test_all_tokens(backend, beta, generalized_jsd):
    """Of (B, L, K) without labels `"batchmean"` divides by B, and of (rows, K) by the rows."""
    for shape, divisor in [((B, L, K), {"normalizer": B}), ((B * L, K), {})]:
        assert_same(
            backend, lambda s, t, divisor=divisor: jsd(s, t, beta, **divisor),
            lambda s, t: generalized_jsd(s, t, None, beta, T), *draw(shape, shape),
        )  # fmt: skip
    for reduction in ("sum", "mean"):
        assert_same(
            backend, lambda s, t, r=reduction: jsd(s, t, beta, reduction=r),
            lambda s, t, r=reduction: generalized_jsd(s, t, None, beta, T, r),
            *draw((B, L, K), (B, L, K)),
        )  # fmt: skip


@every_beta
def test_without_reduction_are_the_terms_of_each_class(backend, beta, generalized_jsd):
    """Those of the kept tokens alone; here a token's terms are added up, and masked ones are 0."""

    def terms(s, t, labels):
        return generalized_jsd(s, t, labels, beta, T, "none").sum(-1).square().sum()

    rows = draw((B, L, K), (B, L, K))
    for labels, keywords in [(LABELS, {"mask": KEPT}), (None, {})]:
        assert_same(
            backend,
            lambda s, t, k=keywords: jsd(s, t, beta, reduction="none", **k).square().sum(),
            lambda s, t, y=labels: terms(s, t, y), *rows,
        )  # fmt: skip


@pytest.mark.parametrize("items", [3, 7.0, torch.tensor(5), torch.tensor(6.0)])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@every_beta
def test_items_in_batch(backend, beta, reduction, items, generalized_jsd):
    """They take the place of any reduction; here of `"batchmean"` only."""
    assert_same(
        backend, lambda s, t: jsd(s, t, beta, mask=KEPT, normalizer=items),
        lambda s, t: generalized_jsd(s, t, LABELS, beta, T, reduction, items),
        *draw((B, L, K), (B, L, K)),
    )  # fmt: skip


@every_beta
def test_no_token_kept(backend, beta, generalized_jsd):
    """`"mean"` is NaN there, and 0 here."""
    nothing, rows = torch.full((B, L), -100), draw((B, L, K), (B, L, K))
    for reduction in ("batchmean", "sum"):
        assert_same(
            backend, lambda s, t, r=reduction: jsd(s, t, beta, mask=nothing != -100, reduction=r),
            lambda s, t, r=reduction: generalized_jsd(s, t, nothing, beta, T, r), *rows,
        )  # fmt: skip
    assert generalized_jsd(*rows, nothing, beta, T, "mean").isnan()
    assert jsd(*rows, beta, mask=nothing != -100, reduction="mean", backend=backend) == 0


@every_beta
def test_an_excluded_class(backend, beta, generalized_jsd):
    """A logit of -inf on both sides is NaN there; here such a class contributes 0."""
    s, t = draw((B * L, K), (B * L, K))
    s[:, 4] = t[:, 4] = -torch.inf
    assert generalized_jsd(s, t, None, beta, T).isnan()
    others = [x[:, torch.arange(K) != 4] for x in (s, t)]
    torch.testing.assert_close(
        jsd(s, t, beta, backend=backend), generalized_jsd(*others, None, beta, T)
    )


@pytest.mark.parametrize("items", [None, 3, torch.tensor(5)])
@every_beta
def test_hidden_states_and_heads(backend, beta, items, chunked):
    """DistillationTrainer's: in float32, and `mean` is over tokens, as "batchmean" is here."""
    heads = [x.float() for x in draw((K, 6), (K, 5))]
    biases = [x.float() for x in draw(K, K)]

    def of_logits(h_s, h_t):
        s, t = (h @ w.T + b for h, w, b in zip((h_s, h_t), heads, biases, strict=True))
        return jsd(1.5 * s, t, beta, mask=KEPT, normalizer=items)

    def of_hidden(h_s, h_t):
        return chunked(
            h_s, h_t, *heads, KEPT, beta, items, *biases, student_logit_scale=1.5, temperature=T
        )

    results = []
    hidden = [x.float() for x in draw((B, L, 6), (B, L, 5))]
    for function in (of_logits, of_hidden):
        student = hidden[0].clone().requires_grad_()
        with fastkd.use_backend(backend):
            loss = function(student, hidden[1])
        results.append((loss, *torch.autograd.grad(loss, student)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("adds_tail", [False, True], ids=["renormalised", "tail"])
@every_beta
def test_the_student_s_own_classes(backend, beta, adds_tail):
    """Of SDPO's trainer: both sides of the k classes that the student thinks likeliest."""
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    s, t = draw((B * L, K), (B * L, K))
    indices = s.topk(4).indices

    def call(s, t):
        lse = t.logsumexp(-1) if adds_tail else None
        tail = "bucket" if adds_tail else "renormalize_both"
        kept = fastkd.TopK(t.gather(-1, indices), indices, tail=tail, lse=lse)
        return fastkd.soft_target_loss(s, kept, divergence="jsd", beta=beta)

    def theirs(s, t):
        return compute_topk_self_distillation_loss(
            s, t, distillation_topk=4, distillation_alpha=beta, distillation_add_tail=adds_tail
        ).mean()

    assert_same(backend, call, theirs, s, t)


@pytest.mark.parametrize("adds_tail", [False, True], ids=["renormalised", "tail"])
def test_a_teacher_on_a_server(backend, adds_tail):
    """Its log-probabilities, padded with `-inf` and the class 0: ServerDistillationTrainer's."""
    from trl.experimental.server_distillation import server_distillation_trainer as server

    trainer = server.ServerDistillationTrainer.__new__(server.ServerDistillationTrainer)
    trainer.loss_add_tail = adds_tail
    s, t = draw((B, L, K), (B, L, K))
    log_p, indices = t.log_softmax(-1).topk(4)
    log_p[0, :, 3], indices[0, :, 3] = -torch.inf, 0

    kind = (
        {"values_are": "log_probs", "tail": "bucket"} if adds_tail else {"tail": "renormalize_both"}
    )

    def call(s):
        return fastkd.soft_target_loss(s, fastkd.TopK(log_p, indices, **kind), mask=KEPT)

    def theirs(s):
        result = {"topk_logprobs": log_p, "topk_token_ids": indices}
        return trainer._compute_server_forward_kl_loss(result, s.log_softmax(-1), LABELS)

    assert_same(backend, call, theirs, s)

"""TRL's losses against its formulas, written out; test_peers_trl_compat.py runs TRL itself."""

import pytest
import torch
from compat import assert_stands_for
from conventions import draw

import fastkd
from fastkd.compat import trl

B, L, V, H, T = 2, 4, 11, 6, 2.0
LABELS = torch.tensor([[3, -100, 0, 10], [-100, 7, 7, 1]])
KEPT = LABELS != -100
every_beta = pytest.mark.parametrize("beta", [0, 0.3, 1])


def terms(s, t, beta, temperature=T):
    """Of each class: `generalized_jsd_loss` of `trl/experimental/gkd/gkd_trainer.py`."""
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (s, t))
    p, q = log_p.exp(), log_q.exp()
    if beta in (0, 1):
        return p * (log_p - log_q) if beta == 0 else q * (log_q - log_p)
    log_m = (beta * p + (1 - beta) * q).log()
    return beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)


@pytest.mark.parametrize("items", [None, 3, torch.tensor(5.0)], ids=str)
@pytest.mark.parametrize("labels", [None, LABELS], ids=["all", "kept"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@every_beta
def test_generalized_jsd(backend, beta, reduction, labels, items):
    def formula(s, t):
        found = terms(s, t, beta)
        found = found if labels is None else found[KEPT]
        if items is not None:
            return found.sum() / items
        if reduction == "none":
            return found.square().sum()
        divisor = {"sum": 1, "mean": found.numel(), "batchmean": len(found)}[reduction]
        return found.sum() / divisor

    def call(s, t):
        loss = trl.generalized_jsd_loss(s, t, labels, beta, T, reduction, items)
        return loss.square().sum() if reduction == "none" and items is None else loss

    assert_stands_for(backend, call, formula, *draw((B, L, V), (B, L, V)), students=2)


def test_one_number_of_items_for_each_gpu(backend):
    """As `Trainer` has them with DataParallel."""
    items, sides, inputs = torch.tensor([[5.0], [4.0]]), draw((B, L, V), (B, L, V)), heads()

    def losses(items):
        return [
            trl.generalized_jsd_loss(*sides, LABELS, num_items_in_batch=items),
            of_heads(trl.chunked_divergence_loss, *inputs, KEPT, 0.5, items)[0],
        ]

    leaves = [x.requires_grad_() for x in (sides[0], *inputs[:3])]
    with fastkd.use_backend(backend):
        found, ones = losses(items), losses(1)
        gradients = [torch.autograd.grad(sum(x.sum() for x in of), leaves) for of in (found, ones)]
    for one, other in zip(found, ones, strict=True):
        torch.testing.assert_close(one, other / items)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other * 0.45)


def test_no_token_kept(backend):
    sides = draw((B, L, V), (B, L, V))
    for reduction in ("batchmean", "sum", "mean"):
        nothing = torch.full((B, L), -100)
        with fastkd.use_backend(backend):
            assert trl.generalized_jsd_loss(*sides, nothing, reduction=reduction) == 0


def heads(dtype=torch.float64):
    shapes = [(B, L, H), (V, H), (V,), (B, L, H + 1), (V, H + 1), (V,)]
    return [x.to(dtype) for x in draw(*shapes)]


def of_heads(loss, h_s, w_s, b_s, h_t, w_t, b_t, *arguments, **keywords):
    """`loss` with TRL's order of arguments."""
    return loss(
        h_s, h_t, w_s, w_t, *arguments, student_lm_head_bias=b_s, teacher_lm_head_bias=b_t,
        **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("items", [None, 3, torch.tensor(5)], ids=str)
@pytest.mark.parametrize(
    "caps, has_bias", [((None, None), True), ((2.0, 3.0), False), ((2.0, None), True)], ids=str
)
@every_beta
def test_chunked_divergence(backend, beta, caps, has_bias, items):
    """`_chunked_divergence_loss` of `trl/trainer/distillation_trainer.py`."""
    scales = 1.5, 0.7
    mask = KEPT.int()
    inputs = heads()

    def logits(hidden, weight, bias, scale, cap):
        x = hidden @ weight.T + (bias if has_bias else 0)
        return scale * x if cap is None else cap * torch.tanh(scale * x / cap)

    def formula(h_s, w_s, b_s, h_t, w_t, b_t):
        s, t = (
            logits(*head, scale, cap)
            for head, scale, cap in zip(
                [(h_s, w_s, b_s), (h_t, w_t, b_t)], scales, caps, strict=True
            )
        )
        loss = terms(s, t, beta)[KEPT].sum() / (KEPT.sum() if items is None else items)
        return loss + 0 * b_s.sum()

    def compat(h_s, w_s, b_s, h_t, w_t, b_t):
        b_s, b_t = (b_s, b_t) if has_bias else (None, None)
        return of_heads(
            trl.chunked_divergence_loss, h_s, w_s, b_s, h_t, w_t, b_t, mask, beta, items,
            student_logit_scale=scales[0], teacher_logit_scale=scales[1],
            student_final_logit_softcapping=caps[0], teacher_final_logit_softcapping=caps[1],
            temperature=T,
        )  # fmt: skip

    assert_stands_for(
        backend, lambda *tensors: compat(*tensors)[0] + 0 * tensors[2].sum(), formula, *inputs,
        students=3,
    )  # fmt: skip
    with fastkd.use_backend(backend):
        _, entropy_sum, n_valid = compat(*inputs)
    log_q = (logits(*inputs[:3], scales[0], caps[0]) / T).log_softmax(-1)
    torch.testing.assert_close(entropy_sum, -(log_q.exp() * log_q).sum(-1)[KEPT].sum())
    assert n_valid == KEPT.sum()


def test_the_teacher_and_the_entropy_learn_nothing(backend):
    inputs = [x.requires_grad_() for x in heads()]
    with fastkd.use_backend(backend):
        loss, entropy_sum, _ = of_heads(trl.chunked_divergence_loss, *inputs, KEPT, 0.5)
    loss.backward()
    assert [x.grad is not None for x in inputs] == 3 * [True] + 3 * [False]
    assert not entropy_sum.requires_grad


def test_weights_of_another_dtype(backend):
    """They are cast to that of the hidden states where autocast is off, and left alone under it."""
    inputs = heads(torch.float32)
    half = [x.bfloat16() for x in inputs]
    given = [half[0], *inputs[1:3], half[3], *inputs[4:]]
    with fastkd.use_backend(backend):
        expected = of_heads(trl.chunked_divergence_loss, *half, KEPT, 0.5)
        torch.testing.assert_close(
            of_heads(trl.chunked_divergence_loss, *given, KEPT, 0.5), expected
        )
        with torch.autocast("cpu", torch.bfloat16):
            found = of_heads(trl.chunked_divergence_loss, *given, KEPT, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_a_rank_without_tokens(backend):
    with fastkd.use_backend(backend):
        found = of_heads(trl.chunked_divergence_loss, *heads(), 0 * LABELS, 0.5)
    assert [float(x) for x in found] == [0, 0, 0]


@pytest.mark.parametrize("adds_tail", [False, True], ids=["renormalised", "tail"])
@every_beta
def test_the_student_s_own_classes(backend, beta, adds_tail):
    """`compute_topk_self_distillation_loss` of `trl/experimental/sdpo/loss_utils.py`."""

    def kept(x, indices):
        log = x.log_softmax(-1).gather(-1, indices)
        if not adds_tail:
            return log
        return torch.cat([log, (1 - log.exp().sum(-1, keepdim=True)).log()], -1)

    def formula(s, t):
        indices = s.topk(4).indices
        # Their softmax is what they are, or what renormalises them.
        return terms(kept(s, indices), kept(t, indices), beta, 1.0).sum(-1).square().sum()

    def call(s, t):
        loss = trl.compute_topk_self_distillation_loss(
            s, t, distillation_topk=4, distillation_alpha=beta, distillation_add_tail=adds_tail
        )
        assert loss.shape == (B, L)
        return loss.square().sum()

    assert_stands_for(backend, call, formula, *draw((B, L, V), (B, L, V)), students=2)


@every_beta
def test_all_classes(backend, beta):
    def call(s, t):
        loss = trl.compute_full_logit_self_distillation_loss(s, t, distillation_alpha=beta)
        return loss.square().sum()

    assert_stands_for(
        backend, call, lambda s, t: terms(s, t, beta, 1.0).sum(-1).square().sum(),
        *draw((B, L, V), (B, L, V)), students=2,
    )  # fmt: skip

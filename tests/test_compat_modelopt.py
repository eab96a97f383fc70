"""Model-Optimizer's losses against its formulas, written out.

`modelopt/torch/distill/losses.py` and `modelopt/torch/distill/plugins/megatron.py`;
test_peers_modelopt_compat.py runs its own, and test_groups.py has them with a group.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from compat import assert_stands_for
from conventions import draw
from signatures import parameters

import fastkd
from fastkd.compat import modelopt
from fastkd.losses import logits as checks

S, B, V, K = 5, 2, 13, 4
T = 2.0
every_reduction = pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
either_way = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# What the library reads of Megatron's configuration.
CONFIG = SimpleNamespace(tensor_model_parallel_size=1)


def reduced(terms, reduction):
    """As `F.kl_div` has it."""
    divisors = {"sum": 1, "batchmean": len(terms), "mean": terms.numel()}
    return terms if reduction == "none" else terms.sum() / divisors[reduction]


def squared(losses):
    """A number whose gradient tells the losses apart."""
    return losses.square().sum()


def kl_terms(log_p, log_q, reverse):
    log_p, log_q = (log_q, log_p) if reverse else (log_p, log_q)
    return log_p.exp() * (log_p - log_q)


def old_top_k(*arguments, **keywords):
    with pytest.warns(UserWarning, match="TopLogitsKLLoss"):
        return modelopt.TopKLogitsKLLoss(*arguments, **keywords)


@pytest.mark.parametrize("shape", [(B, S, V), (S, V), (V,)], ids=str)
@every_reduction
def test_logits_distillation(backend, reduction, shape):
    """Of rows, whose first dimension alone is the batch."""
    criterion = modelopt.LogitsDistillationLoss(T, reduction)

    def formula(s, t):
        log_q, log_p = ((x / T).log_softmax(-1) for x in (s, t))
        terms = T**2 * kl_terms(log_p, log_q, False)
        return terms.sum(-1) if reduction == "none" else reduced(terms, reduction)

    of = squared if reduction == "none" else lambda loss: loss
    assert_stands_for(
        backend, lambda s, t: of(criterion(s, t)), lambda s, t: of(formula(s, t)),
        *draw(shape, shape),
    )  # fmt: skip
    assert criterion(*draw(shape, shape)).shape == (shape[:-1] if of is squared else ())


def test_logits_distillation_of_a_batch_of_maps(backend):
    """Classes are the last dimension, of which nothing warns."""
    checks._warn_once_of_last_dim.cache_clear()
    sides = draw((2, 3, 4, V), (2, 3, 4, V))
    with warnings.catch_warnings(), fastkd.use_backend(backend):
        warnings.simplefilter("error", UserWarning)
        assert modelopt.LogitsDistillationLoss(T, "none")(*sides).shape == (2, 3, 4)


def test_criteria_of_convert():
    """`modelopt.torch.distill.convert` takes nothing but losses of torch."""
    criteria = [
        modelopt.LogitsDistillationLoss(), modelopt.MFTLoss(), modelopt.LogitsKLLoss(CONFIG),
        modelopt.TopLogitsKLLoss(CONFIG), old_top_k(CONFIG),
    ]  # fmt: skip
    assert all(isinstance(criterion, torch.nn.modules.loss._Loss) for criterion in criteria)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
@every_reduction
def test_minifinetuning(backend, reduction, threshold):
    """Its labels are the teacher's likeliest class in some rows."""
    s, t = draw((B, S, V), (B, S, V))
    labels = torch.randint(V, (B * S,))
    labels[::2] = t.reshape(-1, V).argmax(-1)[::2]

    def corrected(p, y):
        """Of one row."""
        a = int(p.argmax())
        if a != y:
            share = (p[a] - p[y] + threshold) / (1 + p[a] - p[y] + 1e-7)
        else:
            aim = 1.0 if p[y] > 1 - threshold else p[y] + threshold
            share = (aim - p[a]) / (1 - p[a] + 1e-7)
        return p * (1 - share) + share * torch.eye(V, dtype=p.dtype)[y]

    def formula(s, t):
        p = (t.reshape(-1, V) / T).softmax(-1)
        target = torch.stack([corrected(*row) for row in zip(p, labels.tolist(), strict=True)])
        log_q = (s.reshape(-1, V) / T).log_softmax(-1)
        return T**2 * reduced(torch.xlogy(target, target) - target * log_q, reduction)

    criterion = modelopt.MFTLoss(T, threshold, reduction)
    of = squared if reduction == "none" else lambda loss: loss
    assert_stands_for(
        backend, lambda s, t: of(criterion(s, t, labels)), lambda s, t: of(formula(s, t)), s, t
    )
    with pytest.raises(ValueError, match="one dimension"):
        criterion(s, t, labels.reshape(B, S))


@either_way
def test_megatron_logits(backend, reverse):
    criterion = modelopt.LogitsKLLoss(CONFIG, T, reverse)

    def formula(s, t):
        return kl_terms((t / T).log_softmax(-1), (s / T).log_softmax(-1), reverse).sum(-1).T

    sides = draw((S, B, V), (S, B, V))
    assert_stands_for(
        backend, lambda s, t: squared(criterion(s, t)[0]), lambda s, t: squared(formula(s, t)),
        *sides,
    )  # fmt: skip
    loss, *flags = criterion(*((x, None) for x in sides))
    assert loss.shape == (B, S) and loss.is_contiguous() and flags == [True, False]
    torch.testing.assert_close(loss, formula(*sides))


@pytest.mark.parametrize("top_p, least", [(None, 1), (0.3, 1), (0.1, 1), (0.1, 3), (1.0, 2)])
@either_way
def test_megatron_top_classes(backend, reverse, top_p, least):
    criterion = modelopt.TopLogitsKLLoss(CONFIG, T, reverse, K, top_p=top_p, top_p_min_k=least)

    def formula(s, t):
        log_p, log_q = ((x / T).log_softmax(-1) for x in (t, s))
        values, indices = log_p.topk(K)
        stays = torch.ones(S, B, K, dtype=torch.bool)
        if top_p is not None:
            mass_before = values.exp().cumsum(-1) - values.exp()
            stays = (mass_before < top_p) | (torch.arange(K) < least)
        log_p, log_q = (x.gather(-1, indices) for x in (log_p, log_q))
        of_kept = torch.where(stays, kl_terms(log_p, log_q, reverse), 0).sum(-1)
        rests = [(1 - (x.exp() * stays).sum(-1)).log() for x in (log_p, log_q)]
        return (of_kept + kl_terms(*rests, reverse)).T

    sides = draw((S, B, V), (S, B, V))
    assert criterion(*sides)[1:] == (False, False)
    # What other classes have is 1 less a sum, of which some digits are lost on either side.
    assert_stands_for(
        backend, lambda s, t: squared(criterion(s, t)[0]), lambda s, t: squared(formula(s, t)),
        *sides, tolerance=5e-6,
    )  # fmt: skip


@either_way
def test_megatron_renormalised_classes(backend, reverse):
    criterion = old_top_k(CONFIG, T, reverse, K)

    def formula(s, t):
        indices = t.topk(K).indices
        log_p, log_q = ((x.gather(-1, indices) / T).log_softmax(-1) for x in (t, s))
        return kl_terms(log_p, log_q, reverse).sum(-1).T

    assert_stands_for(
        backend, lambda s, t: squared(criterion(s, t)[0]), lambda s, t: squared(formula(s, t)),
        *draw((S, B, V), (S, B, V)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="at most the number of classes, 3, got 4"):
        criterion(*draw((S, B, 3), (S, B, 3)))


def test_arguments_out_of_their_ranges():
    for keywords in ({"top_p": 0.0}, {"top_p": 1.5}, {"top_p": 0.5, "top_p_min_k": 0}):
        with pytest.raises(ValueError, match="top_p"):
            modelopt.TopLogitsKLLoss(CONFIG, **keywords)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        modelopt.TopLogitsKLLoss(CONFIG, top_k=0)(*draw((S, B, V), (S, B, V)))


def test_ranks_need_their_group():
    split = SimpleNamespace(tensor_model_parallel_size=2)
    for make in (modelopt.LogitsKLLoss, modelopt.TopLogitsKLLoss, old_top_k):
        with pytest.raises(ValueError, match="pass the process group"):
            make(split)


def test_signatures():
    """Those of the library, whose losses for Megatron have no group, at commit 02151b3."""
    of_all = {"temperature": 1.0, "reverse": False}
    group = {"group": None}
    top_p = {"top_p": None, "top_p_min_k": 1}
    for loss, expected in [
        (modelopt.LogitsDistillationLoss, {"temperature": 1.0, "reduction": "mean"}),
        (modelopt.MFTLoss, {"temperature": 1.0, "threshold": 0.2, "reduction": "batchmean"}),
        (modelopt.LogitsKLLoss, {"model_config": ..., **of_all, **group}),
        (
            modelopt.TopLogitsKLLoss,
            {"model_config": ..., **of_all, "top_k": 1024, **top_p, **group},
        ),
        (modelopt.TopKLogitsKLLoss, {"model_config": ..., **of_all, "top_k": 1024, **group}),
    ]:
        assert list(parameters(loss).items()) == list(expected.items())

"""DistillKit's losses against its formulas, written out: kl, jsd, tvd.py of `lossfuncs`."""

from types import SimpleNamespace

import pytest
import torch
from compat import assert_stands_for
from conventions import draw
from signatures import parameters

from fastkd.compat import distillkit

B, S, V, K = 2, 5, 13, 4
T, G = 2.0, 1.5
MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
DENSE = [distillkit.dense_kl_div, distillkit.dense_js_div, distillkit.dense_tvd]
SPARSE = [distillkit.sparse_kl_div, distillkit.sparse_js_div, distillkit.sparse_tvd]
CLASSES = [distillkit.KLDLoss, distillkit.JSDLoss, distillkit.TVDLoss]
ZERO, UNIFORM = distillkit.MissingProbabilityHandling
every_kind = pytest.mark.parametrize("kind", [0, 1, 2], ids=["kl", "jsd", "tvd"])
every_mask = pytest.mark.parametrize(
    "mask", [None, MASK, MASK[..., None], 1.5 * MASK], ids=["none", "2d", "3d", "weights"]
)


def of_token(kind, p, q):
    """The divergence of distributions over the same classes, in which p may be 0."""
    if kind == 0:
        return (torch.xlogy(p, p) - p * q.log()).sum(-1)
    if kind == 1:
        m = (p + q) / 2
        return (torch.xlogy(p, p) - p * m.log() + q * (q / m).log()).sum(-1) / 2
    return (p - q).abs().sum(-1) / 2


def added(losses, mask):
    return losses.sum() if mask is None else (losses * mask.reshape(B, S)).sum()


def kept(values_are):
    """Of a teacher at the temperature G: its values and their classes."""
    t = draw((B, S, V))[0] / G
    values, ids = (t.log_softmax(-1) if values_are == "log_probs" else t).topk(K)
    return values, ids


def sparse_formula(kind, ids, missing, power, temperature, mask):
    def formula(s, values):
        q = (s / temperature).softmax(-1)
        values = values.detach()
        if missing is ZERO:
            p = torch.zeros_like(q).scatter(-1, ids, (power * values).softmax(-1))
            return added(of_token(kind, p, q), mask)
        rest = 1 - values.exp().sum(-1, keepdim=True)
        raised = torch.cat([values.exp(), rest], -1) ** power
        p = raised / raised.sum(-1, keepdim=True)
        listed = q.gather(-1, ids)
        q = torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1)
        return added(of_token(kind, p, q), mask)

    return formula


@every_mask
@every_kind
def test_dense(backend, kind, mask):
    def formula(s, t):
        return added(of_token(kind, (t / T).softmax(-1), (s / T).softmax(-1)), mask)

    sides = draw((B, S, V), (B, S, V))
    assert_stands_for(backend, lambda s, t: DENSE[kind](s, t, mask, T), formula, *sides, students=2)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0, 1.0), (T, G, 1.0), (T, T, 1.3)], ids=str)
@pytest.mark.parametrize(
    "values_are, missing",
    [("logits", ZERO), ("log_probs", ZERO), ("log_probs", UNIFORM)],
    ids=["logits", "zero", "uniform"],
)
@every_mask
@every_kind
def test_sparse(backend, kind, mask, values_are, missing, temperatures):
    own, of_target, of_student = temperatures
    values, ids = kept(values_are)
    formula = sparse_formula(kind, ids, missing, of_target / own, own / of_student, mask)

    def call(s, values):
        return SPARSE[kind](
            s, ids, values, mask, missing=missing, log_target=values_are == "log_probs",
            temperature=own, target_generation_temperature=of_target,
            student_generation_temperature=of_student, chunk_length=2,
        )  # fmt: skip

    assert_stands_for(backend, call, formula, *draw((B, S, V)), values)


@pytest.mark.parametrize("items", [None, 3, torch.tensor(7)], ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@every_kind
def test_classes(backend, kind, mask, items):
    """Times T², over the tokens; of either kind of signal."""
    count = items if items is not None else B * S if mask is None else mask.sum()
    criterion = CLASSES[kind](T)
    assert criterion.name() == ["kl", "jsd", "tvd"][kind]
    assert not criterion.requires_hidden_states()
    s, t = draw((B, S, V), (B, S, V))

    def dense(s, t):
        outputs, signal = SimpleNamespace(logits=s), SimpleNamespace(logits=t)
        return criterion(outputs, signal, mask, None, items)

    assert_stands_for(backend, dense, lambda s, t: T**2 * DENSE[kind](s, t, mask, T) / count, s, t)
    values, ids = kept("log_probs")
    criterion = CLASSES[kind](T, UNIFORM, 2)

    def sparse(s, values):
        signal = SimpleNamespace(
            sparse_ids=ids, sparse_values=values, log_values=True, generation_temperature=G
        )
        outputs = SimpleNamespace(logits=s)
        return criterion(outputs, signal, mask=mask, num_items_in_batch=items)

    formula = sparse_formula(kind, ids, UNIFORM, G / T, T, mask)
    assert_stands_for(backend, sparse, lambda s, v: T**2 * formula(s, v) / count, s, values)


def test_arguments_that_cannot_be_honoured():
    values, ids = kept("logits")
    (s,) = draw((B, S, V))
    with pytest.raises(ValueError, match="do not tell what the others have"):
        distillkit.sparse_kl_div(s, ids, values, missing=UNIFORM, log_target=False)
    with pytest.raises(ValueError, match="eps must be at most"):
        distillkit.sparse_kl_div(s, ids, values, eps=1e-4)


def test_signatures():
    """Those of the library at commit a61c2e7."""
    sparse = {
        "logits": ..., "target_ids": ..., "target_values": ..., "mask": None, "eps": 1e-8,
        "missing": ZERO, "log_target": True, "temperature": 1.0,
        "target_generation_temperature": 1.0, "student_generation_temperature": 1.0,
        "chunk_length": None,
    }  # fmt: skip
    dense = {"logits": ..., "target_logits": ..., "mask": None, "temperature": 1.0}
    of_class = {
        "temperature": ..., "missing_probability_handling": ZERO, "sparse_chunk_length": None,
    }  # fmt: skip
    call = {
        "student_outputs": ..., "signal": ..., "mask": None, "hidden_state_mapping": None,
        "num_items_in_batch": None,
    }  # fmt: skip
    assert all(parameters(function) == sparse for function in SPARSE)
    assert all(parameters(function) == dense for function in DENSE)
    assert all(parameters(of) == of_class for of in CLASSES)
    assert all(parameters(of(1.0).forward) == call for of in CLASSES)

"""`fastkd.compat.trl` against TRL itself, where it is installed."""

import itertools
import warnings

import pytest
import torch
from conventions import assert_same, draw
from signatures import parameters

import fastkd
from fastkd.compat import trl

pytest.importorskip("trl")
B, L, V, H, T = 2, 4, 11, 6, 2.0
LABELS = torch.tensor([[3, -100, 0, 10], [-100, 7, 7, 1]])
BETAS = [0, 0.3, 1]


@pytest.fixture(scope="module")
def originals():
    """TRL's functions by fastkd's names."""
    with warnings.catch_warnings():
        # TRL says once in a process that it is experimental.
        warnings.simplefilter("ignore")
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.sdpo import loss_utils
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    functions = [getattr(loss_utils, name) for name in trl.__all__ if name.startswith("compute_")]
    return {
        "generalized_jsd_loss": GKDTrainer.generalized_jsd_loss,
        "chunked_divergence_loss": _chunked_divergence_loss,
        **{function.__name__: function for function in functions},
    }


def test_signatures(originals):
    assert originals.keys() == set(trl.__all__)
    for name, original in originals.items():
        found, expected = parameters(getattr(trl, name)), parameters(original)
        assert list(found.items()) == list(expected.items())


def both(name, backend, originals, arguments, *tensors, students):
    """The function of either, whose results with several numbers have gradients of their own."""

    def of(function):
        def number(*tensors):
            result = function(*arguments(*tensors))
            result = result[0] if isinstance(result, tuple) else result
            return result.square().sum() if result.ndim else result

        return number

    assert_same(backend, of(getattr(trl, name)), of(originals[name]), *tensors, students=students)


@pytest.mark.parametrize("items", [None, 3, torch.tensor(5)], ids=str)
@pytest.mark.parametrize("labels", [None, LABELS], ids=["all", "kept"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd(backend, beta, reduction, labels, items, originals):
    both(
        "generalized_jsd_loss", backend, originals,
        lambda s, t: (s, t, labels, beta, T, reduction, items), *draw((B, L, V), (B, L, V)),
        students=2,
    )  # fmt: skip


@pytest.mark.parametrize("items", [None, 3, torch.tensor(5)], ids=str)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("beta", [float(beta) for beta in BETAS])
def test_chunked_divergence(backend, beta, cap, items, originals):
    """In float32, which it computes in whatever comes in."""
    shapes = [(B, L, H), (V, H), (V,), (B, L, H + 1), (V, H + 1), (V,)]
    h_s, w_s, b_s, h_t, w_t, b_t = (x.float() for x in draw(*shapes))
    mask = (LABELS != -100).int()
    results = []
    for function in (trl.chunked_divergence_loss, originals["chunked_divergence_loss"]):
        leaves = [x.clone().requires_grad_() for x in (h_s, w_s, b_s)]
        with fastkd.use_backend(backend):
            found = function(
                leaves[0], h_t, leaves[1], w_t, mask, beta, items, leaves[2], b_t, 1.5, 0.7, cap,
                cap, T,
            )  # fmt: skip
        results.append((*found, *torch.autograd.grad(found[0], leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-7)


def test_self_distillation(backend, originals):
    sides = draw((B, L, V), (B, L, V))
    for beta, adds_tail in itertools.product(BETAS, (False, True)):
        keywords = {"distillation_alpha": beta}
        of_top = {**keywords, "distillation_topk": 4, "distillation_add_tail": adds_tail}
        for name, given in [
            ("compute_full_logit_self_distillation_loss", keywords),
            ("compute_topk_self_distillation_loss", of_top),
        ]:
            assert_same(
                backend, lambda s, t, n=name, k=given: getattr(trl, n)(s, t, **k).square().sum(),
                lambda s, t, n=name, k=given: originals[n](s, t, **k).square().sum(), *sides,
                students=2,
            )  # fmt: skip

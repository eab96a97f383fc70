"""What several modules of fastkd.compat share, and their memory."""

import warnings

import pytest
import torch
from allocations import Allocations
from compat import assert_stands_for
from conventions import draw

import fastkd
from fastkd.compat import modelopt, trl
from fastkd.compat._common import log_sum_exp
from fastkd.losses import logits as checks

ROWS, V = 64, 50


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("shape", [(V,), (3, V), (2, 3, 4, V)], ids=str)
def test_log_sum_exp(backend, shape, learns):
    """Also of a row whose classes are all excluded."""
    checks._warn_once_of_last_dim.cache_clear()
    (logits,) = draw(shape)
    logits.view(-1, V)[0] = -torch.inf
    with warnings.catch_warnings(), fastkd.use_backend(backend):
        warnings.simplefilter("error", UserWarning)
        found = log_sum_exp(logits.requires_grad_(learns), 2.0)
    torch.testing.assert_close(found, (logits / 2).logsumexp(-1))
    assert found.requires_grad == learns


def test_log_sum_exp_learns(backend):
    assert_stands_for(
        backend, lambda x: log_sum_exp(x, 2.0).square().sum(),
        lambda x: (x / 2).logsumexp(-1).square().sum(), *draw((5, V)),
    )  # fmt: skip


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: trl.compute_topk_self_distillation_loss(
            s, t, distillation_topk=2, distillation_alpha=0.5, distillation_add_tail=True
        ),
        lambda s, t: modelopt.TopLogitsKLLoss(None, 2.0, top_k=2)(s, t)[0],
        lambda s, t: modelopt.LogitsDistillationLoss(2.0, "none")(s, t),
    ],
    ids=["compute_topk_self_distillation_loss", "TopLogitsKLLoss", "LogitsDistillationLoss"],
)
def test_no_logits_are_copied(loss):
    """Of half precision, in the kernels: the gradient is all that is as large."""
    student, teacher = (x.bfloat16() for x in draw((ROWS, 1, V), (ROWS, 1, V)))
    with Allocations() as allocations, fastkd.use_backend("native"):
        loss(student.requires_grad_(), teacher).sum().backward()
    assert [size for size in allocations.sizes if size >= student.nbytes] == [student.nbytes]

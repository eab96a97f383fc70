"""The reference's derivatives, first and second, by finite differences in float64."""

import functools
import math

import pytest
import torch
from calls import pair, public_losses
from torch.autograd import gradcheck, gradgradcheck

import fastkd

LABELS = torch.tensor([2, -100, 0])

# For each loss the shapes of what is differentiated, and the keywords.
GRADCHECKS = {
    "soft_target_loss": [
        ([(3, 5)] * 2, {"temperature": 2.0}),
        ([(3, 5)] * 2, {"reduction": "none", "scale_t2": False}),
        ([(2, 4, 3)] * 2, {"reduction": "mean", "dim": 1, "temperature": 0.5}),
        ([(2, 4, 3)] * 2, {"reduction": "sum", "dim": 0}),
        ([(3, 5)] * 2, {"divergence": "jsd", "beta": 0.3, "temperature": 2.0}),
    ],
    "distillation_loss": [
        ([(3, 5)] * 2, {"labels": LABELS}),
        ([(3, 5)] * 2, {"labels": LABELS, "label_smoothing": 0.2, "temperature": 1.0}),
        ([(5, 3)] * 2, {"labels": LABELS, "dim": 0, "hard_weight": 3.0}),
        ([(3, 5)] * 2, {"labels": LABELS, "reduction": "none"}),
        ([(3, 5)] * 2, {"labels": LABELS, "reduction": "sum", "soft_weight": 0.0}),
        ([(3, 5)] * 2, {"labels": LABELS, "divergence": "reverse_kl", "reduction": "none"}),
    ],
    "attention_map": [
        ([(2, 3, 4)], {"kind": "sum"}),
        ([(2, 3, 2, 2)], {"p": 3.0, "normalize": False}),
        ([(2, 4, 3)], {"kind": "max_pow", "channel_dim": -1}),
        ([(2, 3, 4)], {"eps": 1e3}),
    ],
    "attention_transfer_loss": [
        ([(2, 3, 4), (2, 2, 4)], {}),
        ([(2, 3, 4), (2, 2, 4)], {"distance": "mse", "kind": "sum", "beta": 100.0}),
        ([(2, 3, 4), (2, 2, 4)], {"order": 3.0, "kind": "max_pow", "reduction": "none"}),
        ([(2, 3, 4), (2, 2, 4)], {"order": 1.5, "p": 2.7, "reduction": "sum"}),
        ([(2, 3, 4), (2, 2, 4)], {"order": 1.0, "p": 4.0}),
        ([(2, 3, 4), (2, 2, 4)], {"order": math.inf}),
        ([(1, 2, 3, 3), (1, 2, 2, 2)], {"resize": "adaptive_avg_pool"}),
        ([(2, 3, 4), (2, 2, 4)], {"pair_weights": [2.5]}),
    ],
    "hint_loss": [
        ([(2, 3, 4)] * 2, {}),
        ([(2, 3, 4)] * 2, {"reduction": "none", "half": False}),
        ([(2, 3, 4)] * 2, {"reduction": "none", "pair_weights": [2.5]}),
        ([(2, 3, 2, 2), (2, 4, 2, 2), (4, 3), (4,)], {"reduction": "mean"}),
        ([(2, 3), (2, 4), (4, 3, 1, 1), (4,)], {"reduction": "sum"}),
    ],
    "rkd_distance_loss": [([(4, 2), (4, 3)], {}), ([(4, 2), (4, 3)], {"delta": 0.3})],
    "rkd_angle_loss": [([(4, 2), (4, 3)], {}), ([(4, 2), (4, 3)], {"delta": 0.3})],
    "similarity_preserving_loss": [
        ([(3, 2, 2), (3, 3)], {}),
        ([(3, 2, 2), (3, 3)], {"pair_weights": [2.5]}),
    ],
    "fsp_loss": [
        ([(2, 2, 2, 2), (2, 3, 2, 2)] * 2, {}),
        ([(1, 2, 3, 2), (1, 2, 2, 3), (1, 2, 1, 4), (1, 2, 2, 2)], {}),
        ([(2, 2, 2, 2), (2, 3, 2, 2)] * 2, {"pair_weights": [2.5]}),
    ],
}
CASES = [(name, case) for name, cases in GRADCHECKS.items() for case in cases]


def reference(name, keywords):
    function = functools.partial(getattr(fastkd, name), backend="reference", **keywords)

    if name == "fsp_loss":
        return pair(function)

    def call(*tensors):
        regressor = dict(zip(("regressor_weight", "regressor_bias"), tensors[2:], strict=False))
        return function(*tensors[:2], **regressor)

    return call


@pytest.mark.parametrize("name", public_losses())
def test_gradient_checks(name):
    assert GRADCHECKS[name]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_derivatives(name, case):
    shapes, keywords = case
    inputs = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    # Kinks (|x| at 0, a change of the maximum) are further away than the steps taken.
    inputs = tuple((x + 0.1 * x.sign()).detach().requires_grad_() for x in inputs)
    assert gradcheck(reference(name, keywords), inputs)
    assert gradgradcheck(reference(name, keywords), inputs)

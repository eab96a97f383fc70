"""One small valid call of every public loss, for the tests that treat all of them alike."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

import fastkd

# The shapes of the tensors, student first; the keywords; and keywords that take other paths.
_SAMPLES = {
    "soft_target_loss": (
        [(4, 10), (4, 10)],
        {"temperature": 2.0},
        [{"reduction": "none"}],
    ),
    "distillation_loss": (
        [(4, 10), (4, 10)],
        {"labels": [1, 9, -100, 0], "temperature": 2.0},
        [{"label_smoothing": 0.1}],
    ),
    "attention_map": (
        [(2, 3, 4, 5)],
        {},
        [{"kind": "max_pow"}, {"kind": "sum"}],
    ),
    "attention_transfer_loss": (
        [(2, 3, 4, 5), (2, 6, 4, 5)],
        {"beta": 10.0},
        [{"reduction": "none"}, {"kind": "max_pow"}, {"distance": "mse"}],
    ),
    "hint_loss": (
        [(2, 3, 4, 5), (2, 3, 4, 5)],
        {},
        [{"reduction": "none"}],
    ),
}
LOSSES = tuple(_SAMPLES)


class Call(NamedTuple):
    """`function(*tensors, **keywords)`; any of the tensors may require grad."""

    function: Callable
    tensors: tuple
    keywords: dict

    def __call__(self, *tensors, **keywords):
        return self.function(*(tensors or self.tensors), **{**self.keywords, **keywords})

    def leaves(self):
        return [x.clone().requires_grad_() for x in self.tensors]


def variants(name, dtype=torch.float32):
    """The loss on fresh random tensors, plainly and then with each of the other keywords."""
    shapes, keywords, others = _SAMPLES[name]
    tensors = tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)
    function = getattr(fastkd, name)
    if "labels" in keywords:
        keywords = {**keywords, "labels": torch.tensor(keywords["labels"])}
    return [Call(function, tensors, {**keywords, **other}) for other in ({}, *others)]


def sample(name, dtype=torch.float32):
    return variants(name, dtype)[0]


def public_losses():
    """The functions that take a backend, whether the table above has them or not."""
    return sorted(
        name
        for name in fastkd.__all__
        if inspect.isfunction(value := getattr(fastkd, name))
        and "backend" in inspect.signature(value).parameters
    )

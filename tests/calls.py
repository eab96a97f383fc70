"""One small valid call of every public loss, for the tests that treat all of them alike."""

import dataclasses
import inspect
from collections.abc import Callable

import torch

import fastkd

# The shapes of the tensors, student first; the keywords; and keywords that take other paths.
_SAMPLES = {
    "soft_target_loss": (
        [(4, 10), (4, 10)],
        {"temperature": 2.0},
        [{"reduction": "none"}, {"teacher_weights": [1, 3]}],
    ),
    "distillation_loss": (
        [(4, 10), (4, 10)],
        {"labels": [1, 9, -100, 0], "temperature": 2.0},
        [{"label_smoothing": 0.1}, {"teacher_weights": [0.5, 0.25, 0.25]}],
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
    "rkd_distance_loss": ([(4, 6), (4, 5)], {}, [{"delta": 0.1}]),
    "rkd_angle_loss": ([(4, 6), (4, 5)], {}, [{"delta": 0.1}]),
    "similarity_preserving_loss": ([(4, 3, 5), (4, 7)], {}, []),
    "fsp_loss": ([(2, 3, 4, 5), (2, 4, 2, 5), (2, 3, 3, 3), (2, 4, 3, 3)], {}, []),
}
# How many of the tensors are the student's, where it is not one.
_STUDENTS = {"fsp_loss": 2}
LOSSES = tuple(_SAMPLES)


# Not a NamedTuple: within compiled code torch 2.8 calls none that holds tensors.
@dataclasses.dataclass(frozen=True)
class Call:
    """`function(*tensors, **keywords)`; any of the tensors may require grad."""

    function: Callable
    tensors: tuple
    keywords: dict
    students: int = 1

    def __call__(self, *tensors, **keywords):
        return self.function(*(tensors or self.tensors), **{**self.keywords, **keywords})

    def _replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def leaves(self):
        return [x.clone().requires_grad_() for x in self.tensors]


def ensemble(function):
    """A loss on logits whose teachers come one by one."""
    return lambda student, *teachers, **keywords: function(student, list(teachers), **keywords)


def pair(function):
    """A loss on one pair of layers, whose tensors come one by one."""

    def flat(first, second, *teacher, **keywords):
        return function((first, second), teacher, **keywords)

    return flat


def variants(name, dtype=torch.float32):
    """The loss on fresh random tensors, plainly and then with each of the other keywords."""
    shapes, keywords, others = _SAMPLES[name]
    function = getattr(fastkd, name)
    function = pair(function) if name == "fsp_loss" else function
    if "labels" in keywords:
        keywords = {**keywords, "labels": torch.tensor(keywords["labels"])}

    def draw(shapes):
        return tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)

    tensors = draw(shapes)
    calls = []
    for other in ({}, *others):
        more = len(other.get("teacher_weights", [1])) - 1
        calls.append(
            Call(
                ensemble(function) if more else function,
                tensors + draw(shapes[1:] * more),
                {**keywords, **other},
                _STUDENTS.get(name, 1),
            )
        )
    return calls


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

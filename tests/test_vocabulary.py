"""Rows as long as a language model's vocabulary, in bfloat16 and peaked as its logits are."""

import divergences
import pytest
import torch
from agreement_logits import check_distillation, check_soft_target, edge_labels

CLASSES, ROWS = 151_936, 4
BFLOAT16 = torch.bfloat16

every_divergence = pytest.mark.parametrize(
    "keywords", [{}, *divergences.DIVERGENCES], ids=divergences.name_of
)
every_temperature = pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
# All rows, half of them, one, and none.
every_mask = pytest.mark.parametrize("kept", [4, 2, 1, 0])


def peaked(temperature):
    """Of a few classes that take nearly all of the probability, not all the same on both sides."""
    student, teacher = divergences.sides(
        ROWS, CLASSES, BFLOAT16, BFLOAT16, temperature=temperature, scale=2.0
    )
    for side, first in ((student, 17), (teacher, 18)):
        side[:, first : first + 3] = torch.tensor([24.0, 21.0, 20.0]).to(side)
    return student, teacher


@every_mask
@every_temperature
@every_divergence
def test_soft_targets(backend, keywords, temperature, kept):
    sides = peaked(temperature)
    mask = torch.arange(ROWS) < kept
    check_soft_target(*sides, backend, mask=mask, temperature=temperature, **keywords)


@every_temperature
@every_divergence
def test_with_labels(backend, keywords, temperature):
    labels = edge_labels(ROWS, CLASSES)
    labels[1] = -100
    check_distillation(*peaked(temperature), labels, backend, temperature, **keywords)

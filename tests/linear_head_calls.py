"""Small calls of the losses with linear heads on both sides."""

import pytest
import torch
from linear_heads import NUMBERS, head

import fastkd

ROWS, CLASSES = (2, 3), 11
LABELS = torch.tensor([[1, -100, 10], [0, 3, -100]])
FORMS = {"soft_target_loss": (), "distillation_loss": (LABELS,)}
CALLS = [{}, {"reduction": "none"}, {"divergence": "jsd", "beta": 0.3}]
every_call = pytest.mark.parametrize("keywords", CALLS, ids=str)
every_loss = pytest.mark.parametrize("name", FORMS)


def sides(dtype=torch.float32):
    student = head(ROWS, CLASSES, 4, dtype=dtype, **NUMBERS)
    return student, head(ROWS, CLASSES, 6, dtype=dtype, bias=False, softcap=3.0)


def loss_of(name, backend, dtype=torch.float32, **keywords):
    """A loss of the tensors of two heads, and these."""
    student, teacher = sides(dtype)
    count = len(student.tensors)

    def loss(*tensors):
        return getattr(fastkd, name)(
            student.of(tensors[:count]), teacher.of(tensors[count:]), *FORMS[name],
            temperature=2.0, chunk_size=2, backend=backend, **keywords,
        )  # fmt: skip

    return loss, [*student.tensors, *teacher.tensors]


def gradients(loss, tensors, count=None, upstream=3.0):
    leaves = [x.clone().requires_grad_(i < (count or len(tensors))) for i, x in enumerate(tensors)]
    value = loss(*leaves)
    wanted = leaves[:count]
    return value, *torch.autograd.grad(value, wanted, torch.full_like(value, upstream))

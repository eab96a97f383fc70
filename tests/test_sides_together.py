"""What may stand for a side, together: top-k teachers of linear heads, and both over ranks.

Each alone is compared with an oracle in tests of its own. Together they must be what the reference
makes of the logits in float64.
"""

import random

import pytest
import torch
from linear_heads import NUMBERS, head
from split import Threads, cuts_of

import fastkd

CLASSES, K = 37, 6
TAILS = [
    ("renormalize", {}),
    ("zero", {}),
    ("bucket", {}),
    ("bucket", {"divergence": "jsd", "beta": 0.3}),
    ("renormalize_both", {}),
    ("renormalize_both", {"divergence": "reverse_kl"}),
]
every_tail = pytest.mark.parametrize(("tail", "keywords"), TAILS, ids=str)
every_loss = pytest.mark.parametrize("name", ["soft_target_loss", "distillation_loss"])
every_reduction = pytest.mark.parametrize("reduction", ["batchmean", "none"])


@pytest.fixture(autouse=True)
def seeded():
    random.seed(torch.initial_seed())


def draw(rows):
    """A head, and values, indices and lse of a teacher, one slot of which is padding."""
    student = head(rows, CLASSES, 8, **NUMBERS)
    logits = 2 * torch.randn(*rows, CLASSES)
    values, indices = logits.topk(K)
    indices[..., -1] = -1
    return student, values, indices, logits.logsumexp(-1)


def kept(values, indices, lse, tail):
    lse = lse if tail in ("zero", "bucket") else None
    return fastkd.TopK(values, indices, tail=tail, lse=lse)


def logits_of(tensors, student):
    hidden, weight, *bias = tensors
    x = student.scale * torch.nn.functional.linear(hidden, weight, *bias)
    return student.softcap * (x / student.softcap).tanh()


def tensors_of(student):
    return [x for x in (student.hidden, student.weight, student.bias) if x is not None]


def leaves(*tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def compare(found, expected):
    for one, other in zip(found, expected, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * size + 1e-7)


def of_rows(name, rows):
    mask = torch.rand(rows) < 0.8
    if name == "soft_target_loss":
        return {"mask": mask}
    return {"mask": mask, "labels": torch.randint(CLASSES, rows), "label_smoothing": 0.1}


def gradients(loss, upstream, tensors):
    return loss.detach(), *torch.autograd.grad(loss, tensors, upstream.to(loss.dtype))


def expected_of(name, student, values, indices, lse, tail, upstream, heat, **keywords):
    wide = leaves(*tensors_of(student), values, lse, heat, dtype=torch.float64)
    *of_student, v, log_sum, t = wide
    teacher = kept(v, indices, log_sum, tail)
    used = [x for x in wide if x is not log_sum or teacher.lse is not None]
    loss = getattr(fastkd, name)(
        logits_of(of_student, student), teacher, temperature=t, backend="reference", **keywords
    )
    return gradients(loss, upstream, used)


@every_tail
@every_reduction
@every_loss
def test_top_k_teachers_of_linear_heads(backend, name, reduction, tail, keywords):
    rows = (3, 4)
    student, *teacher = draw(rows)
    heat = 1 + torch.rand(rows)
    keywords = {**keywords, **of_rows(name, rows), "reduction": reduction}
    upstream = torch.rand(rows) if reduction == "none" else torch.tensor(1.7)
    expected = expected_of(name, student, *teacher, tail, upstream, heat, **keywords)
    of_student = leaves(*tensors_of(student))
    values, indices, lse = teacher
    v, log_sum, t = leaves(values, lse, heat)
    whole = fastkd.LinearHead(*of_student, scale=student.scale, softcap=student.softcap)
    slots = kept(v, indices, log_sum, tail)
    learning = [*of_student, v, *(() if slots.lse is None else (log_sum,)), t]
    keywords.update(chunk_size=5, backend=backend)
    loss = getattr(fastkd, name)(whole, slots, temperature=t, **keywords)
    compare(gradients(loss, upstream, learning), expected)


@every_tail
@every_loss
def test_a_teacher_that_does_not_learn(backend, name, tail, keywords):
    """Then the gradients are computed in forward."""
    rows = (3, 4)
    student, values, indices, lse = draw(rows)
    keywords = {**keywords, **of_rows(name, rows), "chunk_size": 5}
    upstream, heat = torch.tensor(0.3), torch.tensor(2.0)
    expected = expected_of(
        name, student, values, indices, lse, tail, upstream, heat, **{**keywords, "chunk_size": None}
    )
    of_student = leaves(*tensors_of(student))
    whole = fastkd.LinearHead(*of_student, scale=student.scale, softcap=student.softcap)
    teacher = kept(values, indices, lse / 2 if False else lse, tail)
    loss = getattr(fastkd, name)(whole, teacher, temperature=2.0, backend=backend, **keywords)
    compare(gradients(loss, upstream, of_student), expected[: 1 + len(of_student)])

"""What may stand for a side, together: top-k teachers of linear heads, and both over ranks.

Each alone is compared with an oracle in tests of its own. Together they must be what the reference
makes of whole logits in float64.
"""

import pytest
import torch
from linear_heads import NUMBERS, head
from split import Threads, cuts_of

import fastkd

ROWS, CLASSES, K = (3, 4), 37, 6
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


def draw(temperature):
    """A head, and what a teacher kept of each row; one slot is padding."""
    student = head(ROWS, CLASSES, 8, **NUMBERS)
    logits = 2 * torch.randn(*ROWS, CLASSES)
    values, indices = logits.topk(K)
    indices[..., 2] = -1
    return student, values, indices, (logits / temperature[..., None]).logsumexp(-1)


def kept(values, indices, lse, tail):
    return fastkd.TopK(values, indices, tail=tail, lse=lse if tail in ("zero", "bucket") else None)


def logits_of(hidden, weight, bias, scale, softcap):
    return softcap * (scale * (hidden @ weight.T + bias) / softcap).tanh()


def leaves(*tensors, dtype=None):
    return [x.detach().to(dtype or x.dtype).clone().requires_grad_() for x in tensors]


def of_rows(name):
    mask = torch.rand(ROWS) < 0.8
    if name == "soft_target_loss":
        return {"mask": mask}
    return {"mask": mask, "labels": torch.randint(CLASSES, ROWS), "label_smoothing": 0.1}


def upstream_of(reduction):
    return torch.rand(ROWS) if reduction == "none" else torch.tensor(1.7)


def differentiated(loss, upstream, tensors):
    found = torch.autograd.grad(loss, tensors, upstream.to(loss.dtype), allow_unused=True)
    return [loss.detach(), *(g for g in found if g is not None)]


def expected_of(name, student, teacher, tail, heat, upstream, **keywords):
    """The loss, and the gradients of the head's tensors, values, lse if it counts, and T."""
    values, indices, lse = teacher
    wide = leaves(*student.tensors, values, lse, heat, dtype=torch.float64)
    slots = kept(wide[-3], indices, wide[-2], tail)
    logits = logits_of(*wide[:3], **student.numbers)
    function = getattr(fastkd, name)
    loss = function(logits, slots, temperature=wide[-1], backend="reference", **keywords)
    return differentiated(loss, upstream, wide)


def compare(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * size + 1e-9)


@every_tail
@every_reduction
@every_loss
def test_top_k_teachers_of_linear_heads(backend, name, reduction, tail, keywords):
    heat = 1 + torch.rand(ROWS)
    student, *teacher = draw(heat)
    keywords = {**keywords, **of_rows(name), "reduction": reduction}
    upstream = upstream_of(reduction)
    expected = expected_of(name, student, teacher, tail, heat, upstream, **keywords)
    own = leaves(*student.tensors, teacher[0], teacher[2], heat)
    slots = kept(own[-3], teacher[1], own[-2], tail)
    keywords.update(temperature=own[-1], chunk_size=5, backend=backend)
    loss = getattr(fastkd, name)(student.of(own[:3]), slots, **keywords)
    compare(differentiated(loss, upstream, own), expected)


@every_tail
@every_loss
def test_a_teacher_that_does_not_learn(backend, name, tail, keywords):
    """Then forward computes the gradients."""
    heat, upstream = torch.tensor(2.0), torch.tensor(-0.3)
    student, *teacher = draw(heat)
    keywords = {**keywords, **of_rows(name)}
    expected = expected_of(name, student, teacher, tail, heat, upstream, **keywords)
    own = leaves(*student.tensors)
    keywords.update(temperature=2.0, chunk_size=5, backend=backend)
    loss = getattr(fastkd, name)(student.of(own), kept(*teacher, tail), **keywords)
    compare(differentiated(loss, upstream, own), expected[:4])


@every_tail
@every_reduction
@every_loss
@pytest.mark.parametrize("is_head", [False, True])
@pytest.mark.parametrize("learning", ["all", "student"])
def test_top_k_teachers_over_ranks(backend, name, reduction, tail, keywords, is_head, learning):
    """Of logits and of linear heads whose weights are split by classes; classes are global."""
    heat = 1 + torch.rand(ROWS)
    student, *teacher = draw(heat)
    keywords = {**keywords, **of_rows(name), "reduction": reduction}
    upstream = upstream_of(reduction)
    expected = expected_of(name, student, teacher, tail, heat, upstream, **keywords)
    hidden, weight, bias = student.tensors
    cuts = cuts_of(CLASSES, 3)

    def on_rank(rank, group):
        here = slice(sum(cuts[:rank]), sum(cuts[: rank + 1]))
        own = leaves(hidden, weight[here], bias[here])
        others = leaves(teacher[0], teacher[2], heat)
        if learning == "student":
            others = [x.detach() for x in others]
        sides = student.of(own) if is_head else logits_of(*own, **student.numbers)
        slots = kept(others[0], teacher[1], others[1], tail)
        given = {**keywords, "temperature": others[2], "backend": backend, "group": group}
        if is_head:
            given["chunk_size"] = 5
        loss = getattr(fastkd, name)(sides, slots, **given)
        wanted = [x for x in (*own, *others) if x.requires_grad]
        return differentiated(loss, upstream, wanted)

    found = [list(x) for x in zip(*Threads(3).run(on_rank), strict=True)]
    found[2:4] = [[torch.cat(parts)] for parts in found[2:4]]
    if not is_head:  # autograd knows nothing of the other ranks' classes
        found[1] = [sum(found[1])]
    for same in found:
        assert all(torch.equal(x, same[0]) for x in same)
    compare([x[0] for x in found], expected[: len(found)])

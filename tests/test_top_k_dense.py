"""A teacher that kept every class is the dense loss, of the oracle that has no slots."""

import oracle
import pytest
import torch
from agreement import DTYPES, GRADIENT_TOLERANCE, array, check
from agreement_logits import some_labels
from divergences import FEW, name_of
from temperatures import of_kind
from top_k import TAILS, TRUE, kept, sides

import fastkd

# Forward KL by every tail; every divergence by those that make distributions of both sides.
CALLS = [{"tail": tail} for tail in TAILS] + [
    {"tail": tail, **keywords} for tail in ("bucket", "renormalize_both") for keywords in FEW
]
every_call = pytest.mark.parametrize("keywords", CALLS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def in_order(values, indices):
    """The logits of all classes, from the slots that hold them."""
    return torch.empty_like(values).scatter(-1, indices.long(), values)


def check_dense(tensors, backend, tail, labels=None, grad_output=None, **keywords):
    """Of the student, the teacher's logits, and temperatures that are tensors."""
    student, values, indices, _ = tensors
    teacher = in_order(values, indices)
    names = [n for n in ("temperature", "teacher_temperature") if torch.is_tensor(keywords.get(n))]
    others = {name: x for name, x in keywords.items() if name not in names}

    def loss(s, t, *heat):
        of_call = {**others, **dict(zip(names, heat, strict=True))}
        own = of_call.get("teacher_temperature", of_call["temperature"])
        own = own[:, None] if torch.is_tensor(own) and own.ndim else own
        # A part of the graph, in which the classes' probabilities sum to 1.
        lse = (t.double() / own).logsumexp(-1) if tail in TRUE else None
        lse = lse if lse is None or t.dtype == torch.float64 else lse.float()
        side = kept(t.gather(-1, indices.long()), indices, lse, tail=tail)
        if labels is None:
            return fastkd.soft_target_loss(s, side, backend=backend, **of_call)
        return fastkd.distillation_loss(s, side, labels, backend=backend, **of_call)

    def expected(s, t, *heat, grad_output, **magnitudes):
        of_call = {**others, **dict(zip(names, heat, strict=True)), **magnitudes}
        if labels is None:
            return oracle.soft_target(s, t, grad_output, **of_call)
        parts, gradients = oracle.distillation(s, t, array(labels), grad_output, **of_call)
        return parts[0], gradients

    check(
        loss,
        expected,
        (student, teacher, *(keywords[name] for name in names)),
        # In half precision torch would round the gradient's two parts before it adds them.
        teachers=tail not in TRUE or teacher.dtype in GRADIENT_TOLERANCE,
        grad_output=grad_output,
        size=float(torch.as_tensor(keywords["temperature"]).max()) ** 2,
        terms=lambda *arrays, grad_output: expected(
            *arrays, grad_output=abs(grad_output), magnitudes=True
        )[1],
    )


@pytest.mark.parametrize("classes", [2, 40, 1300])
@every_dtype
@every_call
def test_every_class(backend, keywords, dtype, classes):
    keywords = {**keywords, "temperature": 2.0}
    tensors = sides(6, classes, classes, (dtype, dtype), **keywords)
    check_dense(tensors, backend, **keywords)
    check_dense(tensors, backend, grad_output=3.0, **keywords)


@every_dtype
@every_call
def test_with_labels(backend, keywords, dtype):
    keywords = {**keywords, "temperature": 2.0, "label_smoothing": 0.1}
    tensors = sides(6, 40, 40, (dtype, dtype), **keywords)
    check_dense(tensors, backend, labels=some_labels(6, classes=40), **keywords)


@pytest.mark.parametrize("kind", ["rows", "rows and rows", "scalar"])
@every_dtype
@every_call
def test_temperatures(backend, keywords, dtype, kind):
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    keywords = {**keywords, **of_kind(kind, (6, 40), precise)}
    check_dense(sides(6, 40, 40, (dtype, dtype), **keywords), backend, **keywords)


@pytest.mark.parametrize("k", range(1, 41, 3))
@every_call
def test_gradients_are_finite_for_any_k(backend, keywords, k):
    """The likeliest classes, as a cache has them, of teachers that are sure and that are not."""
    tail = keywords["tail"]
    keywords = {name: x for name, x in keywords.items() if name != "tail"}
    for scale in (0.1, 3.0, 300.0):
        student = (scale * torch.randn(6, 40)).requires_grad_()
        teacher = (scale * torch.randn(6, 40)).requires_grad_()
        values, indices = teacher.topk(k)
        lse = teacher.logsumexp(-1) if tail in TRUE else None
        side = kept(values, indices, lse, tail=tail)
        loss = fastkd.soft_target_loss(student, side, backend=backend, **keywords)
        assert loss.isfinite()
        for gradient in torch.autograd.grad(loss, (student, teacher)):
            assert gradient.isfinite().all()

"""Linear heads in training: half precision, autocast, loss scales, checkpoints, shared weights."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from linear_heads import NUMBERS, head
from torch.utils import checkpoint as ckpt

import fastkd
from fastkd.ops import linear_head_sides

HALF = [torch.bfloat16, torch.float16]
ROWS, CLASSES = (6, 8), 300


def sides(dtype=torch.float32, **numbers):
    student = head(ROWS, CLASSES, 32, dtype=dtype, **numbers)
    return student, head(ROWS, CLASSES, 48, dtype=dtype, bias=False, **numbers)


def fused(student, teacher, of_student, **keywords):
    heads = student.of(of_student), teacher.of(teacher.tensors)
    return fastkd.soft_target_loss(*heads, **{"chunk_size": 7, **keywords})


def eager(student, teacher, of_student):
    """As it is written in PyTorch: the loss is computed in float32, the rest as it comes."""

    def logits(side, hidden, weight, bias=None):
        found = F.linear(hidden, weight, bias)
        numbers = {"scale": 1.0, "softcap": None, **side.numbers}
        found, softcap = found * numbers["scale"], numbers["softcap"]
        return (softcap * torch.tanh(found / softcap) if softcap else found).flatten(0, -2)

    sides = logits(student, *of_student), logits(teacher, *teacher.tensors)
    log_q, log_p = (x.float().log_softmax(-1) if x.dtype != torch.float64 else x.log_softmax(-1)
                    for x in sides)  # fmt: skip
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def gradients(loss, tensors, upstream=1.0):
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(leaves)
    return value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, upstream))


def double(side):
    return type(side)(side.kind, [x.double() for x in side.tensors], side.numbers)


@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=str)
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_no_worse_than_eager(backend, dtype, numbers):
    student, teacher = sides(dtype, **numbers)
    exact = gradients(lambda x: eager(double(student), double(teacher), x), double(student).tensors)
    found = gradients(lambda x: fused(student, teacher, x, backend=backend), student.tensors)
    plain = gradients(lambda x: eager(student, teacher, x), student.tensors)
    for value, wanted, rival in zip(found[1:], exact[1:], plain[1:], strict=True):
        assert value.dtype == dtype
        rounding = (wanted.to(dtype) - wanted).norm()
        error, of_rival = ((x.double() - wanted).norm() for x in (value, rival))
        assert error <= 1.1 * of_rival + rounding
    assert abs(found[0] - exact[0]) <= 1e-2 * exact[0].abs()


def test_many_chunks_add_up_in_float32(backend):
    """In bfloat16 a sum of 480 parts would lose most of them."""
    student, teacher = head((480,), 20, 8, dtype=torch.bfloat16), head((480,), 20, 8)
    teacher.tensors = [x.bfloat16() for x in teacher.tensors]
    exact = gradients(lambda x: fused(double(student), double(teacher), x), double(student).tensors)
    found = gradients(
        lambda x: fused(student, teacher, x, chunk_size=1, backend=backend), student.tensors
    )
    for value, wanted in zip(found[2:], exact[2:], strict=True):
        assert (value.double() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("numbers", [{}, NUMBERS], ids=str)
def test_autocast(backend, dtype, numbers):
    """Products are computed in its dtype, the loss in float32; gradients are in the inputs'."""
    student, teacher = sides(**numbers)
    rounded = [type(side)("head", [x.to(dtype) for x in side.tensors], numbers)
               for side in (student, teacher)]  # fmt: skip
    expected = gradients(lambda x: fused(*rounded, x, backend=backend), rounded[0].tensors, 3.0)

    def under_autocast(x):
        with torch.autocast(DEVICE, dtype=dtype):
            return fused(student, teacher, x, backend=backend)

    found = gradients(under_autocast, student.tensors, 3.0)
    assert [x.dtype for x in found] == [torch.float32] * 4
    # A CPU has no product of float16, and does not round what float32 takes its place.
    tolerance = 1e-5 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=1e-6)
    for value, wanted in zip(found[1:], expected[1:], strict=True):
        assert (value - wanted.float()).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()
    with torch.autocast(DEVICE, dtype=dtype):
        student = double(student)
        value = fused(student, double(teacher), student.tensors, backend=backend)
    assert value.dtype == torch.float64


def test_autocast_in_compiled_code(backend, fresh_compiler):
    student, teacher = sides()

    def loss(x):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return fused(student, teacher, x, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(f, student.tensors, 2.0) for f in (compiled, loss))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("terms", [{}, {"reduction": "sum"}, {"temperature": 3.0}], ids=str)
def test_float16_does_not_underflow(backend, terms, monkeypatch):
    """A mean over many rows, and products of float16 as a GPU has them; a loss scale comes late."""
    monkeypatch.setattr(linear_head_sides, "product_dtype", lambda dtype, device: dtype)
    student, teacher = sides(torch.float16)
    keywords = {"backend": backend, **terms}
    if "reduction" not in terms:
        keywords["normalizer"] = torch.tensor(1e6)
    exact = gradients(
        lambda x: fused(double(student), double(teacher), x, **keywords),
        double(student).tensors, 2.0**15,
    )  # fmt: skip
    found = gradients(lambda x: fused(student, teacher, x, **keywords), student.tensors, 2.0**15)
    for value, wanted in zip(found[1:], exact[1:], strict=True):
        fits = wanted.abs() < 60000
        error = (value.double() - wanted)[fits].norm()
        assert error <= 0.01 * wanted[fits].norm()


@pytest.mark.parametrize("dtype", HALF)
def test_a_loss_scale(backend, dtype):
    student, teacher = sides(dtype)
    plain = gradients(lambda x: fused(student, teacher, x, backend=backend), student.tensors)
    scaled = gradients(
        lambda x: fused(student, teacher, x, backend=backend), student.tensors, 1024.0
    )
    for value, wanted in zip(scaled[1:], plain[1:], strict=True):
        torch.testing.assert_close(value / 1024, wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}], ids=str)
def test_checkpointing(backend, reentrant, keywords):
    student, teacher = sides()

    def backward(wrap):
        leaves = [x.clone().requires_grad_() for x in student.tensors]
        loss = wrap(lambda *x: fused(student, teacher, [2 * y for y in x], backend=backend,
                                     **keywords), *leaves)  # fmt: skip
        loss.backward(torch.full_like(loss, 3.0))
        return [loss.detach(), *(x.grad for x in leaves)]

    found = backward(lambda f, *x: ckpt.checkpoint(f, *x, use_reentrant=reentrant))
    expected = backward(lambda f, *x: f(*x))
    torch.testing.assert_close(found, expected)
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(backward(lambda f, *x: f(*x)), expected)


def test_one_weight_for_both_sides(backend):
    """The teacher's part reaches it, too, unless it is detached there."""
    hidden, of_teacher = torch.randn(5, 8), torch.randn(5, 8)
    weight = torch.randn(20, 8, requires_grad=True)

    def gradient(teacher_weight, tied):
        student = fastkd.LinearHead(hidden, weight)
        teacher = fastkd.LinearHead(of_teacher, teacher_weight)
        if not tied:
            student, teacher = student.hidden @ weight.T, teacher.hidden @ teacher_weight.T
        loss = fastkd.soft_target_loss(student, teacher, backend=backend)
        return torch.autograd.grad(3 * loss, weight)[0]

    for teacher_weight in (weight, weight.detach()):
        torch.testing.assert_close(gradient(teacher_weight, True), gradient(teacher_weight, False))


def test_one_weight_in_compiled_code(backend, fresh_compiler):
    hidden, weight = torch.randn(5, 8), torch.randn(20, 8)

    def loss(x):
        sides = fastkd.LinearHead(x[0], x[1]), fastkd.LinearHead(2 * x[0], x[1])
        return fastkd.soft_target_loss(*sides, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = gradients(loss, [hidden, weight])
    torch.testing.assert_close(gradients(compiled, [hidden, weight]), expected)


def test_a_weight_that_is_an_embedding_too(backend):
    """Its gradients add up, and hooks see each parameter once, as those of DDP must."""
    weight = torch.nn.Parameter(torch.randn(20, 8))
    seen = []
    weight.register_post_accumulate_grad_hook(seen.append)
    tokens, teacher = torch.randint(20, (5,)), torch.randn(5, 20)

    def loss(as_head):
        hidden = F.embedding(tokens, weight).tanh()
        student = fastkd.LinearHead(hidden, weight) if as_head else hidden @ weight.T
        return fastkd.soft_target_loss(student, teacher, backend=backend)

    found = {}
    for as_head in (True, False):
        weight.grad = None
        loss(as_head).backward()
        found[as_head] = weight.grad
    assert len(seen) == 2
    torch.testing.assert_close(found[True], found[False])

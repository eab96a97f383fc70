"""Calls with linear heads: errors, derivatives, modules, what is picked."""

import copy
import math
import re

import pytest
import torch
from linear_head_calls import (
    CLASSES,
    FORMS,
    LABELS,
    ROWS,
    every_call,
    every_loss,
    gradients,
    loss_of,
    sides,
)
from linear_heads import head, other
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

import fastkd
from fastkd.ops import linear_head_chunks
from fastkd.ops.linear_head_chunks import pick
from fastkd.ops.linear_head_sides import Rows


def test_a_head_is_a_pytree():
    side = fastkd.LinearHead(torch.rand(4, 3), torch.rand(5, 3), scale=2.0, softcap=30.0)
    with pytest.raises(AttributeError):
        side.scale = 1.0
    moved = pytree.tree_map(lambda x: x.double(), [side])[0]
    assert moved.hidden.dtype == moved.weight.dtype == torch.float64
    assert (moved.bias, moved.scale, moved.softcap) == (None, 2.0, 30.0)
    with_bias = fastkd.LinearHead(torch.rand(4, 3), torch.rand(5, 3), torch.rand(5))
    assert len(pytree.tree_leaves(with_bias)) == 3


@every_loss
def test_errors(name):
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    logits, good = torch.randn(4, 5), fastkd.LinearHead(hidden, weight)
    labels = (torch.tensor([0, 1, 2, 3]),) if name == "distillation_loss" else ()

    def refuses(error, words, student, teacher, **keywords):
        with pytest.raises(error, match=re.escape(words)):
            getattr(fastkd, name)(student, teacher, *labels, **keywords)

    def make(*tensors, **numbers):
        return fastkd.LinearHead(*tensors, **numbers)

    refuses(ValueError, "chunk_size is how many rows", logits, logits, chunk_size=4)
    refuses(ValueError, "chunk_size must be at least 1, got 0", good, logits, chunk_size=0)
    refuses(TypeError, "chunk_size must be an int", good, logits, chunk_size=2.5)
    refuses(ValueError, "inplace=True writes over", good, logits, inplace=True)
    refuses(ValueError, "dim must be the last", good, logits, dim=0)
    refuses(
        TypeError, "student_logits.hidden must be a tensor, got list", make([1.0], weight), good
    )
    refuses(TypeError, "teacher_logits.weight must be float32", logits, make(hidden, weight.int()))
    refuses(ValueError, "(V, H), got (4, 3) and (5, 4)", make(hidden, torch.randn(5, 4)), logits)
    refuses(ValueError, "(V, H), got (4, 3) and (3,)", make(hidden, torch.randn(3)), logits)
    refuses(ValueError, "must have the shape (V,), (5,), got (4,)",
            make(hidden, weight, torch.randn(4)), logits)  # fmt: skip
    refuses(TypeError, "the same dtype where autocast is off, got torch.float32 and torch.float64",
            make(hidden, weight.double()), logits)  # fmt: skip
    refuses(ValueError, "must be on the same device, got cpu and meta",
            make(hidden, weight.to("meta")), logits)  # fmt: skip
    for scale in (float("inf"), float("nan")):
        refuses(ValueError, "student_logits.scale must be", make(hidden, weight, scale=scale), good)
    for softcap in (0.0, -1.0, float("nan")):
        refuses(ValueError, "teacher_logits.softcap must be a finite number > 0",
                logits, make(hidden, weight, softcap=softcap))  # fmt: skip
    refuses(TypeError, "teacher_logits[0] must be a tensor, got LinearHead", logits, [good])
    refuses(ValueError, "must have the same shape, got (4, 5) and (4, 6)", good,
            make(hidden, torch.randn(6, 3)))  # fmt: skip
    if labels:
        labels = (torch.tensor([0, 1, 2, 5]),)
        refuses(ValueError, "labels must lie in [0, 4]", good, logits)


def test_metrics_take_logits_alone():
    side = fastkd.LinearHead(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(TypeError, match="student_logits must be a tensor, got LinearHead"):
        fastkd.distillation_metrics(side, torch.randn(4, 5))


def test_explain(backend, monkeypatch):
    """What is picked follows from the memory that is free; what is given is honoured."""
    side = fastkd.LinearHead(torch.randn(4, 3), torch.randn(2**15, 3))
    call = fastkd.soft_target_loss, side, side
    gib = 2**30
    for free, size in ((64 * gib, 768), (2 * gib, 768), (gib, 512), (gib - 1, 256), (1, 16)):
        monkeypatch.setattr("fastkd.losses.linear_head.free_bytes", lambda device, n=free: n)
        answer = fastkd.explain(*call, backend=backend)
        assert answer.chosen == backend
        assert answer.notes[0].startswith(f"chunk_size={size} (picked, free memory: ")
        assert answer.notes[0] in str(answer)
        assert f"{size * 2**18 / 2**20:.1f} MiB" in answer.notes[0]
    answer = fastkd.explain(*call, chunk_size=7, backend=backend)
    assert answer.notes[0].startswith("chunk_size=7 (given)")
    logits = torch.randn(4, 5)
    assert fastkd.explain(fastkd.soft_target_loss, logits, logits).notes == ()


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 768, 769, 2048, 5000])
@pytest.mark.parametrize("size", [1, 7, 64, 100, 768, 2048])
def test_chunks_are_even(count, size):
    """They are as few as with the whole size, and go through all rows once."""
    rows = Rows(torch.Size([count]), None, -100)
    even = rows.evened(size)
    chunks = [range(count)[at] for at in rows.chunks(even)]
    assert 1 <= even <= size
    assert len(chunks) == math.ceil(count / size)
    assert [i for chunk in chunks for i in chunk] == [*range(count)]
    if len(chunks) > 1:
        assert even < math.ceil(count / len(chunks)) + 64


def test_free_memory(monkeypatch):
    """It is measured, or where nothing tells, enough is taken to be there."""
    assert 2**20 < linear_head_chunks.free_bytes(torch.device("cpu")) < 2**50
    assert linear_head_chunks.free_bytes(torch.device("meta")) is None
    assert pick(4, None, torch.device("cpu")) == 768
    assert pick(4, None, torch.device("cuda")) == 2048

    def missing(*_):
        raise OSError

    monkeypatch.setattr("builtins.open", missing)
    assert 2**20 < linear_head_chunks.free_bytes(torch.device("cpu")) < 2**50
    monkeypatch.setattr("os.sysconf", missing)
    assert linear_head_chunks.free_bytes(torch.device("cpu")) is None


@every_call
@every_loss
def test_derivatives(backend, name, keywords):
    loss, tensors = loss_of(name, backend, torch.float64, **keywords)
    inputs = [x.requires_grad_() for x in tensors]
    assert gradcheck(loss, inputs)
    if backend == "reference":
        assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("count", [3, 5])
@every_loss
def test_second_derivatives_raise(kernel_backend, name, count):
    loss, tensors = loss_of(name, kernel_backend)
    leaves = [x.requires_grad_(i < count) for i, x in enumerate(tensors)]
    found = torch.autograd.grad(loss(*leaves), leaves[:count], create_graph=True)
    with pytest.raises(RuntimeError, match=r'linear head.*backend="reference"'):
        sum(g.sum() for g in found).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [3, 5])
@every_call
@every_loss
def test_two_backwards_and_two_runs_are_the_same(backend, name, keywords, dtype, count):
    loss, tensors = loss_of(name, backend, dtype, **keywords)
    leaves = [x.requires_grad_(i < count) for i, x in enumerate(tensors)]
    value = loss(*leaves)
    upstream = torch.full_like(value, 0.3)
    first = torch.autograd.grad(value, leaves[:count], upstream, retain_graph=True)
    second = torch.autograd.grad(value, leaves[:count], upstream)
    other = torch.autograd.grad(loss(*leaves), leaves[:count], upstream)
    for x, y, z in zip(first, second, other, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@every_loss
def test_inputs_are_not_changed(backend, name):
    for teacher in ("head", "logits"):
        student, _ = sides()
        side = head(ROWS, CLASSES, 6) if teacher == "head" else other("logits", ROWS, CLASSES)
        tensors = [*student.tensors, *side.tensors]
        copies = [x.clone() for x in tensors]
        gradients(
            lambda *x, side=side, student=student: getattr(fastkd, name)(
                student.of(x[:3]), side.of(x[3:]), *FORMS[name], backend=backend
            ),
            tensors, 3,
        )  # fmt: skip
        for x, before in zip(tensors, copies, strict=True):
            assert torch.equal(x, before)


def test_modules(backend):
    student, teacher = sides()
    heads = student.of(student.tensors), teacher.of(teacher.tensors)
    keywords = {"temperature": 2.0, "chunk_size": 2, "backend": backend}
    found = fastkd.nn.SoftTargetLoss(**keywords)(*heads)
    torch.testing.assert_close(found, fastkd.soft_target_loss(*heads, **keywords))
    found = fastkd.nn.DistillationLoss(**keywords)(*heads, LABELS)
    torch.testing.assert_close(found, fastkd.distillation_loss(*heads, LABELS, **keywords))
    assert "chunk_size=2" in repr(fastkd.nn.SoftTargetLoss(**keywords))


def test_without_gradients_nothing_is_recorded(kernel_backend):
    loss, tensors = loss_of("distillation_loss", kernel_backend)
    with_gradients = loss(*[x.clone().requires_grad_() for x in tensors])
    assert with_gradients.requires_grad
    with torch.no_grad():
        found = loss(*[x.clone().requires_grad_() for x in tensors])
    torch.testing.assert_close(found, with_gradients.detach())
    with torch.inference_mode():
        torch.testing.assert_close(loss(*tensors), with_gradients.detach())


def test_a_module_s_chunk_size(backend):
    """What is set is what the next call takes, in copies, too."""
    student, teacher = sides()
    heads = student.of(student.tensors), teacher.of(teacher.tensors)
    for one in (fastkd.nn.SoftTargetLoss(backend=backend), fastkd.nn.DistillationLoss()):
        given = (LABELS,) if isinstance(one, fastkd.nn.DistillationLoss) else ()
        expected = one(*heads, *given)
        one.chunk_size = 3
        torch.testing.assert_close(copy.deepcopy(one)(*heads, *given), expected)
        assert fastkd.explain(one, *heads, *given).notes[0].startswith("chunk_size=3 (given)")
        one.chunk_size = -1
        with pytest.raises(ValueError, match="chunk_size must be at least 1, got -1"):
            one(*heads, *given)

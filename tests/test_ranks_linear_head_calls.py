"""Calls with linear heads over ranks, which are threads here: errors, refusals, what is picked."""

import itertools

import pytest
import torch
from agreement_logits import GIVEN
from linear_head_calls import CLASSES, LABELS, ROWS, sides
from linear_heads import check_loss, head, other
from split import Alike, Threads, whole
from torch.utils import checkpoint as ckpt

import fastkd


def heads_of(rank, size=2, dtype=torch.float32):
    """Both sides of a rank of as many."""
    torch.manual_seed(0)
    found = []
    for side in sides(dtype):
        hidden, *of_classes = side.tensors
        here = [x.tensor_split(size)[rank] for x in of_classes]
        found.append(fastkd.LinearHead(hidden, *here, **side.numbers))
    return found


def replaced(head, **fields):
    return fastkd.LinearHead(**{**vars(head), **fields})


def narrow(head):
    return replaced(head, hidden=head.hidden[..., :-1], weight=head.weight[:, :-1])


# What is different on the last rank: of the call, and of its student.
DIFFERING = [
    (lambda student: {"chunk_size": 3}, r"got chunk_size \[2, 3\]"),
    (lambda student: {"chunk_size": None}, r"got chunk_size \[2, 0\]"),
    (lambda student: {"student": replaced(student, scale=2.0)}, "got heads"),
    (lambda student: {"student": replaced(student, softcap=None)}, "got heads"),
    (lambda student: {"student": narrow(student)}, "got heads"),
    (lambda student: {"student": replaced(student, bias=None)}, "got dtypes"),
    (lambda student: {"student": torch.zeros(*ROWS, len(student.weight))}, "got dtypes"),
    (
        lambda student: {"student": replaced(student, weight=student.weight.requires_grad_())},
        "got learning",
    ),
    (lambda student: {"chunk_size": 0}, "at least 1, got 0|rank 1 of the group raised"),
]


@pytest.mark.parametrize(("other", "message"), DIFFERING, ids=range(len(DIFFERING)))
def test_every_rank_raises(other, message):
    def on_rank(rank, group):
        student, teacher = heads_of(rank)
        call = {"student": student, "chunk_size": 2, **(other(student) if rank else {})}
        with pytest.raises((ValueError, RuntimeError), match=message):
            fastkd.soft_target_loss(call.pop("student"), teacher, group=group, **call)

    Threads(2).run(on_rank)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_no_class(backend, label):
    def on_rank(rank, group):
        labels = torch.full(ROWS, label)
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, {CLASSES - 1}\]"):
            fastkd.distillation_loss(*heads_of(rank), labels, group=group, backend=backend)

    Threads(2).run(on_rank)


@pytest.mark.parametrize("kind", ["ensemble", *GIVEN])
def test_what_is_for_the_reference(kernel_backend, split, kind):
    """Kernels say so, and the reference serves it."""
    split(3)
    student, teacher = head(ROWS, CLASSES, 4), other(kind, ROWS, CLASSES)
    check_loss("soft_target_loss", student, teacher, "reference", chunk_size=2)
    refusal = "a LinearHead .* ensembles and probabilities are for the reference"
    with pytest.raises(fastkd.BackendUnavailableError, match=refusal):
        check_loss("soft_target_loss", student, teacher, kernel_backend)


def test_ranks_take_the_least_that_is_picked(kernel_backend, monkeypatch):
    """Chunks of two sizes would not be exchanged."""
    rows, student, teacher = 64, head((64,), CLASSES, 4), head((64,), CLASSES, 4)
    free = itertools.cycle([2**40, 8 * 16 * CLASSES * 4, 8 * 32 * CLASSES * 4])
    monkeypatch.setattr("fastkd.ops.linear_head_call.free_bytes", lambda device: next(free))
    pair = student.of(student.tensors), teacher.of(teacher.tensors)
    expected = fastkd.soft_target_loss(*pair, backend=kernel_backend, reduction="none")
    found = whole("soft_target_loss", Threads(3))(*pair, backend=kernel_backend, reduction="none")
    assert found.shape == (rows,)
    torch.testing.assert_close(found, expected)


def test_explanations(kernel_backend):
    call = fastkd.soft_target_loss, *heads_of(0)
    found = fastkd.explain(*call, group=Alike(2), backend=kernel_backend)
    assert found.chosen == kernel_backend
    assert "the ranks take the least that one of them picks" in found.notes[0]
    found = fastkd.explain(*call, group=Alike(2), backend=kernel_backend, chunk_size=3)
    assert found.notes[0].startswith("chunk_size=3 (given)")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}], ids=str)
def test_checkpointing(backend, keywords, reentrant):
    """Forward runs again in backward, on every rank."""

    def gradients(wrap, pair, **group):
        leaves = [x.clone().requires_grad_() for side in pair for x in vars(side).values()
                  if torch.is_tensor(x)]  # fmt: skip
        count = 3

        def call(*tensors):
            student = replaced(pair[0], hidden=2 * tensors[0], weight=tensors[1], bias=tensors[2])
            teacher = replaced(pair[1], hidden=tensors[count], weight=tensors[count + 1])
            return fastkd.soft_target_loss(
                student, teacher, chunk_size=2, backend=backend, **keywords, **group
            )

        loss = wrap(call, *leaves)
        loss.backward(torch.full_like(loss, 3.0))
        return [loss.detach(), *(x.grad for x in leaves)]

    def checkpointed(call, *leaves):
        return ckpt.checkpoint(call, *leaves, use_reentrant=reentrant)

    expected = gradients(lambda call, *leaves: call(*leaves), heads_of(0, size=1))
    found = Threads(2).run(lambda rank, group: gradients(checkpointed, heads_of(rank), group=group))
    for i, wanted in enumerate(expected):
        parts = [of_rank[i] for of_rank in found]
        if i in (2, 3, 5):
            parts = [torch.cat(parts)]
        for part in parts:
            torch.testing.assert_close(part, wanted)


def test_a_second_derivative_of_kernels_raises(kernel_backend):
    def on_rank(rank, group):
        student, teacher = heads_of(rank)
        hidden = student.hidden.requires_grad_()
        loss = fastkd.soft_target_loss(student, teacher, group=group, backend=kernel_backend)
        (first,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated only once"):
            first.sum().backward()

    Threads(2).run(on_rank)


def test_modules(backend):
    keywords = {"chunk_size": 2, "temperature": 2.0, "backend": backend}
    pair = heads_of(0, size=1)
    expected = (
        fastkd.soft_target_loss(*pair, **keywords),
        fastkd.distillation_loss(*pair, LABELS, **keywords),
    )

    def on_rank(rank, group):
        of_call = {**keywords, "group": group}
        return (
            fastkd.nn.SoftTargetLoss(**of_call)(*heads_of(rank)),
            fastkd.nn.DistillationLoss(**of_call)(*heads_of(rank), LABELS),
        )

    for found in Threads(2).run(on_rank):
        torch.testing.assert_close(found, expected)

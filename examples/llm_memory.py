"""What a loss needs at its peak on a vocabulary as large language models have it."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_methods import METHODS, TOP_K, Cached, Head, Loss
from llm_tokens import PADDING

# Where the benchmarks are, which measure resident memory.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu import Cpu

VOCABULARY = 32_000
PADDED = 0.1  # of the positions, as in a batch of documents


@dataclass(frozen=True)
class Memory:
    """Bytes beyond hidden states, weights and cached tokens; None where nothing counts them."""

    eager: int | None
    fastkd: int | None


def measure(windows: int, length: int, widths: tuple[int, int]) -> Iterator[tuple[str, Memory]]:
    """For each method, from the hidden states to their gradients and those of the head.

    Student and teacher have hidden states of `widths`; float32.
    """
    torch.manual_seed(0)
    hidden = [torch.randn(windows, length, width) for width in widths]
    weights = [torch.randn(VOCABULARY, width) / width**0.5 for width in widths]
    student, teacher = map(Head, hidden, weights)
    labels = torch.randint(VOCABULARY, (windows, length))
    labels[torch.rand(windows, length) < PADDED] = PADDING
    for tensor in student:
        tensor.requires_grad_()
    targets = {None: None, "head": teacher, "cache": _cached(teacher)}
    for method in METHODS:
        target = targets[method.teacher]
        eager = _peak(method.eager, student, target, labels)
        # Without a teacher there is no loss of fastkd.
        fused = None if target is None else _peak(method.loss, student, target, labels)
        yield method.name, Memory(eager, fused)


def _cached(teacher: Head) -> Cached:
    """Window by window, so that this leaves no room in which a loss would find its own."""
    kept = [
        Head(hidden[None], teacher.weight).logits.log_softmax(-1).topk(TOP_K)
        for hidden in teacher.hidden
    ]
    return Cached(
        torch.cat([some.values for some in kept]).half(),
        torch.cat([some.indices for some in kept]).int(),
    )


def _peak(loss: Loss, student: Head, target: Head | Cached | None, labels: Tensor) -> int | None:
    def step(windows: int) -> None:
        some = Head(student.hidden[:windows], student.weight)
        theirs = target
        if isinstance(target, Cached):
            theirs = Cached(*(tensor[:windows] for tensor in target))
        elif target is not None:
            theirs = Head(target.hidden[:windows], target.weight)
        loss(some, theirs, labels[:windows]).backward()

    def forget() -> None:
        for tensor in student:
            tensor.grad = None

    step(1)  # what libraries set aside for good when they are first called
    whole: Callable[[], None] = lambda: step(len(labels))  # noqa: E731
    found = Cpu("system").peak_extra_bytes(forget, whole)
    forget()
    return found

"""Calls of the losses with linear heads on their sides, and what the oracle has for them."""

import dataclasses

import oracle_linear_head
import oracle_rows
import torch
from agreement import array, check
from agreement_logits import GIVEN, some_labels

import fastkd

NUMBERS = {"scale": 0.7, "softcap": 4.0}


@dataclasses.dataclass
class Side:
    """Some tensors, as a side of a loss and of the oracle's.

    `kind` is "head", "logits", "ensemble" or what a teacher states.
    """

    kind: str
    tensors: list
    numbers: dict = dataclasses.field(default_factory=dict)

    def of(self, tensors):
        if self.kind == "head":
            return fastkd.LinearHead(*tensors, **self.numbers)
        if self.kind in GIVEN:
            return GIVEN[self.kind](*tensors)
        return list(tensors) if self.kind == "ensemble" else tensors[0]

    def of_arrays(self, arrays, kept):
        if self.kind == "head":
            return oracle_linear_head.Head(*arrays, **self.numbers, kept=kept)
        return list(arrays) if self.kind == "ensemble" else arrays[0]


def head(rows, classes, hidden, *, dtype=torch.float32, bias=True, **numbers):
    """One whose logits are about as large as a network's."""
    tensors = [torch.randn(*rows, hidden), 2 * torch.randn(classes, hidden) / hidden**0.5]
    tensors += [torch.randn(classes)] if bias else []
    return Side("head", [x.to(dtype) for x in tensors], numbers)


def other(kind, rows, classes, *, dtype=torch.float32):
    """A side that is no head."""
    tensors = [2 * torch.randn(*rows, classes) for _ in range(2 if kind == "ensemble" else 1)]
    if kind in GIVEN:
        tensors = [tensors[0].log_softmax(-1)]
    if kind == "probabilities":
        tensors = [tensors[0].exp()]
    return Side(kind, [x.to(dtype) for x in tensors])


def check_loss(name, student, teacher, backend, *, labels=None, mask=None, chunk_size=None,
               grad_output=None, teachers=True, **keywords):  # fmt: skip
    """The loss and all its gradients agree with the oracle's; temperatures may be tensors."""
    sizes = len(student.tensors), len(teacher.tensors)
    names = [n for n in ("temperature", "teacher_temperature", "row_weight")
             if isinstance(keywords.get(n), torch.Tensor)]  # fmt: skip
    heat = [n for n in names if n != "row_weight"]
    numbers = {n: x for n, x in keywords.items() if n not in heat}
    tensors = [*student.tensors, *teacher.tensors, *(keywords[n] for n in heat)]
    stated = {"teacher_is": teacher.kind} if teacher.kind in GIVEN else {}
    if stated:
        numbers = {k: v for k, v in numbers.items() if k != "teacher_temperature"}
        stated["teacher_temperature"] = 1.0
    given = [] if labels is None else [labels]
    kept = None if mask is None else array(mask)
    if labels is not None:
        ignored = labels == keywords.get("ignore_index", -100)
        masked = labels if mask is None else labels.masked_fill(~mask, -100)
        kept = array(~ignored) & (True if kept is None else kept)

    def split(values):
        first, second = sizes[0], sizes[0] + sizes[1]
        return values[:first], values[first:second], dict(zip(heat, values[second:], strict=True))

    def loss(*leaves):
        of_student, of_teacher, temperatures = split(leaves)
        sides = student.of(of_student), teacher.of(of_teacher)
        return getattr(fastkd, name)(
            *sides, *given, mask=mask, chunk_size=chunk_size, backend=backend,
            **numbers, **temperatures,
        )  # fmt: skip

    def expected(*arrays, **of_gradient):
        of_student, of_teacher, temperatures = split(arrays)
        sides = student.of_arrays(of_student, kept), teacher.of_arrays(of_teacher, kept)
        options = {**of_gradient, **numbers, **temperatures, **stated}
        if labels is None:
            function, others = oracle_rows.soft_target, []
            options["mask"] = kept
        else:
            function, others = oracle_rows.distillation, [array(masked)]
        value, gradients = oracle_linear_head.loss(function, *sides, *others, **options)
        return value if labels is None else value[0], gradients

    def terms(*arrays, grad_output):
        return expected(*arrays, grad_output=abs(grad_output), magnitudes=True)[1]

    check(
        loss, expected, tensors, students=sizes[0], grad_output=grad_output, teachers=teachers,
        terms=terms, size=20 * max(labels.numel() if labels is not None else 1, 1),
    )  # fmt: skip


def labels_and_mask(rows, classes):
    return some_labels(*rows, classes=classes), torch.rand(rows) < 0.7

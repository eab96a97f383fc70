"""A loss whose rows come in chunks: both sides of the call, and its two loops."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd.operators import kernels
from fastkd.ops import soft_target, top_k
from fastkd.ops.linear_head_chunks import bytes_of_row, free_bytes, pick
from fastkd.ops.linear_head_sides import Head, Logits, OfRows, Rows
from fastkd.ops.soft_target_operators import forward as forward_of_rows
from fastkd.ops.top_k_operators import forward as forward_of_slots
from fastkd.parameters import Heads, SoftTarget

# What kernels take of a chunk: logits of both sides, labels and temperatures.
Inputs = tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]


class Call:
    """Both sides of a call, chunk by chunk, and what else there is of its rows."""

    def __init__(
        self,
        student: Sequence[Tensor],
        teachers: Sequence[Tensor],
        labels: Tensor | None,
        temperatures: Sequence[Tensor],
        heads: Heads,
        p: SoftTarget,
    ) -> None:
        self.heads, self.tensors = heads, (*student, *teachers, *temperatures)
        self.sizes = len(student), len(teachers)
        self.listed_only = heads.listed_only
        self.rows = rows = Rows(student[0].shape[:-1], labels, p.ignore_index)
        # Where the rows that count are packed, marks say nothing more.
        if labels is not None and rows.cleared is None and not p.labels_are_classes:
            labels = None
        self.labels = None if labels is None else rows.of(labels)
        self.temperatures = [OfRows(t, rows) for t in temperatures]
        self.p = p._replace(dim=1, num_classes=None, reduction="none")
        size = self.size = heads.chunk_size or picked(student, teachers, heads)
        self.student: Head | Logits
        if heads.student_is_head:
            dtype = getattr(torch, heads.dtype)
            of_student = heads.scale, p.softcap, dtype, p.num_classes, rows, size
            self.student = Head(student, *of_student)
        else:
            self.student = Logits(student[0], p.num_classes, rows)
        self.teachers: list[Head | Logits | OfRows]
        if heads.teacher_is_head:
            dtype = getattr(torch, heads.teacher_dtype)
            of_teacher = heads.teacher_scale, p.teacher_softcap, dtype, p.num_classes
            self.teachers = [Head(teachers, *of_teacher, rows, size)]
        elif p.teacher_is == "top_k":
            self.teachers = [OfRows(slots, rows) for slots in teachers]
        else:
            self.teachers = [Logits(teacher, p.num_classes, rows) for teacher in teachers]

    def inputs(self, at: slice) -> Inputs:
        return (
            self.student.chunk(at),
            [teacher.chunk(at) for teacher in self.teachers],
            None if self.labels is None else self.labels[at],
            [t.chunk(at) for t in self.temperatures],
        )

    def loss_and_gradient(
        self,
        inputs: Inputs,
        factor: Tensor | None,
        losses: Tensor,
        parts: Tensor | None,
        gradient: Tensor | None,
    ) -> None:
        """The losses of a chunk, their parts, and the gradient, if need be in the logits' place."""
        student, teachers, labels, temperatures = inputs
        p, outputs = self.p, (losses, parts, None, gradient)
        others = {"temperatures": temperatures, "grad_output": factor}
        if p.teacher_is == "top_k":
            inputs_and_outputs = student, *slots_in(teachers), labels, *outputs, self.listed_only
            kernels(p.backend, "top_k").top_k_forward(*inputs_and_outputs, p, **others)
        else:
            run = kernels(p.backend, "soft_target").soft_target_forward
            run(student, teachers, labels, *outputs, p, **others)

    def gradients(
        self,
        inputs: Inputs,
        grad_output: Tensor,
        wanted: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Those that are wanted of a chunk: of its sides and its temperatures."""
        student, teachers, labels, temperatures = inputs
        p = self.p
        if p.teacher_is != "top_k":
            has = soft_target.has_statistics(p)
            statistics = forward_of_rows(*inputs, None, False, has, False, p)[2] if has else None
            return soft_target.all_gradients(grad_output, *inputs, statistics, wanted, p)
        of_rows = student, *slots_in(teachers), labels, temperatures
        log_q = None
        if any(wanted[1 : 1 + len(teachers)]):
            log_q = forward_of_slots(*of_rows, None, self.listed_only, False, True, False, p)[2]
        to_student, to_slots, to_temperatures = top_k.all_gradients(
            grad_output,
            *of_rows,
            self.listed_only,
            log_q,
            wanted[0],
            wanted[1 + len(teachers) :],
            p,
        )
        return to_student, None, *to_slots[: len(teachers) - 1], *to_temperatures

    def finish(self) -> None:
        """What is left to do when the gradients of all chunks are there."""

    def forward(
        self, factor: Tensor | None, with_parts: bool, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The losses of rows, their parts, and gradients of the student's tensors that want one.

        The gradients are of the sum of the losses, each times the factor, a number or one for each
        row. Those of a head are in the precision in which they were added up.
        """
        rows, student, dtype = self.rows, self.student, loss_dtype(self.heads)
        student.want(wanted)
        factor, multiplier = _lifted(factor, student, self.p)
        if factor is not None:
            factor = rows.of(factor.expand(rows.shape))
        losses = self.tensors[0].new_empty(rows.count, dtype=dtype)
        parts = self.tensors[0].new_empty((2, rows.count), dtype=dtype) if with_parts else None
        for at in rows.chunks(self.size):
            inputs = self.inputs(at)
            gradient = student.room(inputs[0]) if any(wanted) else None
            of_rows = None if factor is None else factor[at]
            # What kernels fill is contiguous.
            of_parts = None if parts is None else parts.new_empty(2, at.stop - at.start)
            self.loss_and_gradient(inputs, of_rows, losses[at], of_parts, gradient)
            if parts is not None and of_parts is not None:
                parts[:, at] = of_parts
            if gradient is not None:
                student.backward(gradient, at)
            del inputs, gradient  # before the next chunk has its own
        self.finish()
        if parts is not None:
            parts = torch.stack([rows.back(part) for part in parts])
        return rows.back(losses), parts, student.gradients(multiplier)

    def backward(self, grad_output: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
        """The gradients of those tensors that want one, for a `grad_output` of each row.

        The logits are computed once more.
        """
        sizes = self.sizes
        of_student, of_others = wanted[: sizes[0]], wanted[sizes[0] :]
        of_teachers, of_temperatures = of_others[: sizes[1]], of_others[sizes[1] :]
        self.student.want(of_student)
        if self.heads.teacher_is_head:
            self.teachers[0].want(of_teachers)
            of_sides = [any(of_student), any(of_teachers)]
        else:
            for teacher, want in zip(self.teachers, of_teachers, strict=True):
                teacher.want([want])
            of_sides = [any(of_student), *of_teachers]
        grad_output = self.rows.of(grad_output)
        each = self.student, *self.teachers, *self.temperatures
        for temperature, want in zip(self.temperatures, of_temperatures, strict=True):
            temperature.want([want])
        for at in self.rows.chunks(self.size):
            inputs = self.inputs(at)
            found = self.gradients(inputs, grad_output[at], [*of_sides, *of_temperatures])
            for of_call, gradient in zip(each, found, strict=True):
                if gradient is not None:
                    of_call.backward(gradient, at)
            del inputs, found, gradient  # before the next chunk has its own
        self.finish()
        gradients = [gradient for of_call in each for gradient in of_call.gradients()]
        like = [x for x, want in zip(self.tensors, wanted, strict=True) if want]
        return [g.view(x.shape).to(x.dtype) for g, x in zip(gradients, like, strict=True)]


def loss_dtype(heads: Heads) -> torch.dtype:
    """In which the losses of rows are."""
    is_double = "float64" in (heads.dtype, heads.teacher_dtype)
    return torch.float64 if is_double else torch.float32


def slots_in(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The classes, their log-probabilities, and that of the rest if there is one."""
    indices, log_p, *rest = tensors
    return indices, log_p, rest[0] if rest else None


def picked(student: Sequence[Tensor], teachers: Sequence[Tensor], heads: Heads) -> int:
    """How many rows have logits at a time, where the call does not say."""
    device = student[0].device
    classes = [len(side[min(1, len(side) - 1)]) for side in (student, teachers)]
    return pick(bytes_of_row(heads, classes, device), free_bytes(device), device)


def _lifted(
    factor: Tensor | None, student: Head | Logits, p: SoftTarget
) -> tuple[Tensor | None, Tensor | None]:
    """The factor for the gradient of logits in float16, and what undoes it in the end.

    A mean's gradient of a row would underflow. Both are powers of 2 times what they were.
    """
    if not isinstance(student, Head) or student.logits.dtype != torch.float16:
        return factor, None
    if factor is None:
        factor = student.logits.new_ones((), dtype=torch.float32)
    of_terms = abs(p.soft_weight) / p.temperature + abs(p.hard_weight)
    number = factor.new_tensor(of_terms)
    top = torch.frexp(factor.abs().amax() * number)[1] if factor.numel() else factor.new_zeros(())
    lift = torch.ldexp(factor.new_tensor(2.0**8), -top)
    return factor * lift, 1 / lift

"""Losses on linear heads whose classes are split over ranks, chunk by chunk on all of them.

A rank has its rows of weight and bias, and the hidden states that all ranks have. A chunk is rows
over ranks, whose numbers are exchanged; the ranks have the same rows in it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import no_grad
from fastkd.operators import kernels
from fastkd.ops import ranks as soft_target_over_ranks
from fastkd.ops import top_k_over_ranks
from fastkd.ops.linear_head_call import Call, Inputs, picked, slots_in
from fastkd.ops.linear_head_sides import Head
from fastkd.ops.rows_over_ranks import labels_here, of_shard
from fastkd.parameters import Heads, SoftTarget
from fastkd.product import no_autocast
from fastkd.ranks import Ranks
from fastkd.reference.scaled import LOGIT_SCALE
from fastkd.reference.top_k import Slots


def agreed(
    student: Sequence[Tensor], teachers: Sequence[Tensor], heads: Heads, ranks: Ranks
) -> Heads:
    """With a chunk size: the least of what the ranks pick, where the call does not say."""
    if heads.chunk_size:
        return heads
    size = torch.tensor(picked(student, teachers, heads), device=ranks.device)
    return heads._replace(chunk_size=int(ranks.gather(size).min()))


def forward(
    ranks: Ranks,
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    factor: Tensor | None,
    with_parts: bool,
    wanted: Sequence[bool],
    heads: Heads,
    p: SoftTarget,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """As `Call.forward`."""
    with no_grad(), no_autocast(student[0].device.type):
        call = _Call(student, teachers, labels, temperatures, heads, p, ranks)
        return call.forward(factor, with_parts, wanted)


def backward(
    ranks: Ranks,
    grad_output: Tensor,
    student: Sequence[Tensor],
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    temperatures: Sequence[Tensor],
    wanted: Sequence[bool],
    heads: Heads,
    p: SoftTarget,
) -> list[Tensor]:
    """As `Call.backward`."""
    with no_grad(), no_autocast(student[0].device.type):
        call = _Call(student, teachers, labels, temperatures, heads, p, ranks)
        return call.backward(grad_output, wanted)


class _Call(Call):
    """The part of a call that is on this rank."""

    def __init__(
        self,
        student: Sequence[Tensor],
        teachers: Sequence[Tensor],
        labels: Tensor | None,
        temperatures: Sequence[Tensor],
        heads: Heads,
        p: SoftTarget,
        ranks: Ranks,
    ) -> None:
        super().__init__(student, teachers, labels, temperatures, heads, p)
        self.ranks = ranks

    def loss_and_gradient(
        self,
        inputs: Inputs,
        factor: Tensor | None,
        losses: Tensor,
        parts: Tensor | None,
        gradient: Tensor | None,
    ) -> None:
        """The losses of a chunk on all ranks, and the gradient of the logits that are here."""
        found, of_parts, *kept = self._losses(inputs, (gradient is not None, False))
        losses.copy_(found / LOGIT_SCALE)
        if parts is not None:
            parts.copy_(of_parts / LOGIT_SCALE)
        if gradient is not None and self.ranks.here:
            upstream = torch.ones_like(losses) if factor is None else factor
            self._fill(gradient, upstream, inputs, *kept)

    def _losses(self, inputs: Inputs, wanted: Sequence[bool]) -> tuple[Any, ...]:
        """Those of a chunk, scaled, their parts, and what gradients take.

        `wanted` tells of which side there will be one.
        """
        student, teachers, labels, temperatures = inputs
        if self.p.teacher_is != "top_k":
            (teacher,) = teachers
            of_rows = student, teacher, labels, self.p, temperatures, self.ranks
            return soft_target_over_ranks.forward(*of_rows, wanted)
        of_call = self._slots(teachers), labels, self.p, temperatures, self.ranks
        return top_k_over_ranks.forward(student, *of_call, wanted[1])

    def _fill(self, gradient: Tensor, upstream: Tensor, inputs: Inputs, *kept: Any) -> None:
        """The student's gradient, which may take the logits' place."""
        student, teachers, labels, temperatures = inputs
        p = of_shard(self.p, self.ranks)
        if p.teacher_is != "top_k":
            here, statistics, *_ = kept
            kernels(p.backend, "soft_target").soft_target_backward(
                *(upstream, student, teachers, here, statistics.flatten(), gradient, None, p),
                temperatures=temperatures,
            )
            return
        sums, logits, *_ = kept
        slots = *slots_in(teachers), labels_here(labels, self.p, self.ranks)
        kernels(p.backend, "top_k").top_k_forward(
            *(student, *slots, None, None, None, gradient, self.listed_only, p),
            temperatures=temperatures,
            grad_output=upstream,
            first=self.ranks.first,
            sums=sums,
            logits=logits,
        )

    def gradients(
        self, inputs: Inputs, grad_output: Tensor, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Those that are wanted of a chunk, from its losses once more."""
        student, teachers, labels, temperatures = inputs
        of_teachers, of_temperatures = wanted[1 : 1 + len(teachers)], wanted[1 + len(teachers) :]
        by_temperature = any(of_temperatures)
        sides = wanted[0] or by_temperature, any(of_teachers) or by_temperature
        of_call: Any
        if self.p.teacher_is != "top_k":
            (teacher,) = teachers
            _, _, here, *kept = self._losses(inputs, sides)
            of_call = here, temperatures, *kept, wanted, of_shard(self.p, self.ranks), self.ranks
            return soft_target_over_ranks.gradients(grad_output, student, teacher, *of_call)
        _, _, *kept = self._losses(inputs, (wanted[0], any(of_teachers)))
        of_call = self._slots(teachers), labels, self.p, temperatures, self.ranks, *kept
        found = top_k_over_ranks.gradients(
            *(grad_output, student, *of_call, (wanted[0], False, False, *of_temperatures))
        )
        to_student, *to_slots = found[:3]
        return to_student, None, *to_slots[: len(teachers) - 1], *found[3:]

    def _slots(self, teachers: Sequence[Tensor]) -> Slots:
        return Slots(*slots_in(teachers), self.listed_only)

    def finish(self) -> None:
        """Add up the hidden states' gradients, to which each rank's classes give a part.

        A part of the rows at a time, since a rank gets those of all.
        """
        if not self.rows.count:
            return
        for side in (self.student, *self.teachers):
            if isinstance(side, Head) and side.to[0] is not None:
                for part in side.to[0].split(max(self.size // self.ranks.size, 1)):
                    part.copy_(self.ranks.total(part))

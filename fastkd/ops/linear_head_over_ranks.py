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
from fastkd.ops import ranks as rows_over_ranks
from fastkd.ops.linear_head_call import Call, Inputs, picked
from fastkd.ops.linear_head_sides import Head
from fastkd.parameters import Heads, SoftTarget
from fastkd.precision import compute_dtype
from fastkd.product import no_autocast
from fastkd.ranks import Ranks
from fastkd.reference.scaled import LOGIT_SCALE


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
        student, (teacher,), labels, temperatures = inputs
        sides = gradient is not None, False
        of_chunk = student, teacher, labels, self.p, temperatures, self.ranks
        found, of_parts, here, statistics, *_ = rows_over_ranks.forward(*of_chunk, sides)
        losses.copy_(found / LOGIT_SCALE)
        if parts is not None:
            parts.copy_(of_parts / LOGIT_SCALE)
        if gradient is None or not self.ranks.here:
            return
        kernels(self.p.backend, "soft_target").soft_target_backward(
            torch.ones_like(losses) if factor is None else factor,
            *(student, [teacher], here, statistics.flatten(), gradient, None),
            rows_over_ranks.of_shard(self.p, self.ranks),
            temperatures=temperatures,
        )

    def gradients(
        self, inputs: Inputs, grad_output: Tensor, wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Those that are wanted of a chunk, from its losses once more."""
        student, (teacher,), labels, temperatures = inputs
        of_temperatures = any(wanted[2:])
        sides = wanted[0] or of_temperatures, wanted[1] or of_temperatures
        of_chunk = student, teacher, labels, self.p, temperatures, self.ranks
        _, _, here, *kept = rows_over_ranks.forward(*of_chunk, sides)
        upstream = grad_output.to(compute_dtype(student, teacher))
        shard = rows_over_ranks.of_shard(self.p, self.ranks)
        of_rows: Any = student, teacher, here, temperatures, *kept, wanted, shard, self.ranks
        return rows_over_ranks.gradients(upstream, *of_rows)

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

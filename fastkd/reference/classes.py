"""Reductions over the classes, of which a process has all, or those of its rank."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.ranks import Ranks


class Classes:
    """All are here."""

    def count(self, logits: Tensor) -> int:
        """How many there are."""
        return logits.shape[-1]

    def largest(self, logits: Tensor) -> Tensor:
        """The maximum of each row, which no gradient goes through."""
        return logits.detach().amax(-1, keepdim=True)

    def total(self, x: Tensor, keepdim: bool = False) -> Tensor:
        """The sum of each row."""
        return x.sum(-1, keepdim=keepdim)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of each row."""
        return x.mean(-1)

    def at(self, x: Tensor, labels: Tensor) -> Tensor:
        """What each row has at its label."""
        return self.at_each(x, labels[..., None]).squeeze(-1)

    def at_each(self, x: Tensor, indices: Tensor) -> Tensor:
        """What each row has at several classes."""
        return x.gather(-1, indices)

    def without(self, x: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """The logits, -inf at those of these classes that count."""
        count = torch.zeros_like(x, dtype=torch.int32)
        count = count.scatter_add(-1, indices, counts.to(torch.int32))
        return x.masked_fill(count > 0, -torch.inf)


HERE = Classes()


class Split(Classes):
    """Each rank has some.

    The gradients are those of the sum of all ranks' losses: that makes the sum over ranks its own
    derivative, wherever it stands. `spread` and `share` make of them the gradients of the loss, of
    which every rank has a copy.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def count(self, logits: Tensor) -> int:
        """On all ranks."""
        return self.ranks.classes

    def largest(self, logits: Tensor) -> Tensor:
        """The maximum over all ranks."""
        if logits.shape[-1]:
            found = super().largest(logits)
        else:
            found = logits.new_full((*logits.shape[:-1], 1), -torch.inf, requires_grad=False)
        return self.ranks.gather(found).amax(0)

    def total(self, x: Tensor, keepdim: bool = False) -> Tensor:
        """The sum over all ranks."""
        return sum_over(self.ranks, super().total(x, keepdim))

    def mean(self, x: Tensor) -> Tensor:
        """The mean over all ranks."""
        return self.total(x) / self.count(x)

    def at_each(self, x: Tensor, indices: Tensor) -> Tensor:
        """From the rank that has the class."""
        own, is_here = self._own(indices)
        if self.ranks.here:
            picked = super().at_each(x, own)
        else:
            picked = x.sum(-1, keepdim=True).expand(indices.shape)
        return sum_over(self.ranks, picked.masked_fill(~is_here, 0))

    def without(self, x: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
        """Of those that are here."""
        if not self.ranks.here:
            return x
        own, is_here = self._own(indices)
        return super().without(x, own, counts & is_here)

    def _own(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Classes as this rank counts them, and whether they are here."""
        own, here = indices - self.ranks.first, self.ranks.here
        return own.clamp(0, max(here - 1, 0)), (own >= 0) & (own < here)

    def spread(self, x: Tensor) -> Tensor:
        """A number that all ranks have, and whose gradient all of them make."""
        found: Tensor = _Identity.apply(lambda of_rank: sum_over(self.ranks, of_rank), x)
        return found

    def share(self, x: Tensor) -> Tensor:
        """A result that all ranks have, of whose gradient each passes on its share."""
        found: Tensor = _Identity.apply(lambda of_all: of_all / self.ranks.size, x)
        return found


def sum_over(ranks: Ranks, x: Tensor) -> Tensor:
    """The sum of the ranks' tensors, differentiable any number of times."""
    found: Tensor = _Sum.apply(ranks, x)
    return found


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.total(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return None, sum_over(ctx.ranks, grad_output)


class _Identity(torch.autograd.Function):
    """The same tensor, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx: Any, of_gradient: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.of_gradient = of_gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return None, ctx.of_gradient(grad_output)

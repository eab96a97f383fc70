"""The ranks of a process group over which the classes are split, and all that they exchange.

A call first exchanges headers, which are a few integers: a rank that raises says so in the next
one, and ranks whose calls differ find out before anything of another size is sent. So each of them
raises, and none waits for the others. Then come tensors with a few numbers for each row, which
every rank gets of every rank, and adds up in the order of ranks: the results are equal to the last
bit.
"""

import contextlib
import hashlib
from typing import Any

import torch
from torch import Tensor

_FACTS = 9  # at most, in a header, besides its state
_READY, _FAILED = 0, 1


class Ranks:
    """The ranks of one call, of which this process is one.

    Attributes:
        size: how many there are.
        rank: which one this is.
        classes: how many exist on all of them.
        first: the first one that is here.
        here: how many of those that exist are here.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = group.size(), group.rank()
        self.classes = self.first = self.here = 0
        self.shares: list[int] = []  # of the classes, of each rank
        self._listening = True  # whether the other ranks wait for a header of this one

    @property
    def device(self) -> torch.device:
        """Where headers are: on the CPU if the group can, so that no GPU is waited for."""
        if "cpu:" in torch.distributed.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape, one after another."""
        found = x.new_empty((self.size, *x.shape))
        torch.distributed.all_gather([*found.unbind()], x.contiguous(), group=self.group)
        return found

    def total(self, x: Tensor) -> Tensor:
        """The sum of these tensors."""
        return self.gather(x).sum(0)

    def split(self, student: int, teacher: int, num_classes: int | None) -> None:
        """Find out which classes each rank has, from how many are stored here of both sides.

        Raises:
            ValueError: the shards of both sides, or the numbers of classes, do not fit.
            RuntimeError: another rank raised.
        """
        wanted = -1 if num_classes is None else num_classes
        found = self._exchange(student=student, teacher=teacher, num_classes=wanted)
        self._check_equal({"num_classes": found["num_classes"]}, {"num_classes": wanted})
        students, teachers = found["student"], found["teacher"]
        most = min(sum(students), sum(teachers))
        self.classes = sum(students) if num_classes is None else num_classes
        if not 1 <= self.classes <= most:
            self._listening = False
            stored = f"the logits have {sum(students)} and {sum(teachers)} classes on all ranks"
            raise ValueError(
                f"logits must have at least one class: {stored}"
                if num_classes is None
                else f"num_classes must lie in [1, {most}], since {stored}, got {num_classes}"
            )
        firsts = [sum(students[:i]) for i in range(self.size)]
        self.shares = [
            min(max(self.classes - first, 0), stored)
            for first, stored in zip(firsts, students, strict=True)
        ]
        self.first, self.here = firsts[self.rank], self.shares[self.rank]
        for i, here in enumerate(self.shares):
            if here and (sum(teachers[:i]) != firsts[i] or teachers[i] < here):
                self._listening = False
                raise ValueError(
                    "each rank must have the same classes of student and teacher, got shards of "
                    f"{students} and of {teachers} classes"
                )

    def agree(self, **facts: object) -> None:
        """What each rank needs to know of the others before it sends tensors.

        Raises:
            ValueError: the ranks differ in a fact.
            RuntimeError: another rank raised.
        """
        numbers = {k: v if isinstance(v, int) else _digest(v) for k, v in facts.items()}
        found = self._exchange(**numbers)
        self._listening = False
        self._check_equal(found, facts)

    def fail(self) -> None:
        """Tell the others that this rank has raised, if they are waiting."""
        if not self._listening:
            return
        self._listening = False
        with contextlib.suppress(RuntimeError):  # what was raised here says more
            self._send([_FAILED])

    def _exchange(self, **facts: int) -> dict[str, list[int]]:
        """The facts of each rank."""
        states, *columns = self._send([_READY, *facts.values()])
        failed = [rank for rank, state in enumerate(states) if state == _FAILED]
        if failed:
            self._listening = False
            raise RuntimeError(
                f"rank {', '.join(map(str, failed))} of the group raised an error in this call; "
                "its own message says which"
            )
        return dict(zip(facts, columns, strict=False))

    def _send(self, header: list[int]) -> list[list[int]]:
        """The columns of all ranks' headers."""
        filled = header + [0] * (1 + _FACTS - len(header))
        return self.gather(torch.tensor(filled, device=self.device)).T.tolist()

    def _check_equal(self, found: dict[str, list[int]], own: dict[str, object]) -> None:
        for name, values in found.items():
            if len(set(values)) == 1:
                continue
            self._listening = False
            value = own[name]
            shown = values if isinstance(value, int) else f"{value!r} on rank {self.rank}"
            raise ValueError(f"the ranks of a group must make the same call, got {name} {shown}")


class Explained(Ranks):
    """Ranks that are taken to have what this one has: nothing is exchanged."""

    def gather(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)

    def split(self, student: int, teacher: int, num_classes: int | None) -> None:
        self.classes = num_classes or max(student, 1) * self.size
        self.here = student

    def fail(self) -> None:
        return


def _digest(fact: object) -> int:
    """A number for a fact, the same in every process; Python's own hash is not."""
    return int.from_bytes(hashlib.blake2b(repr(fact).encode(), digest_size=7).digest(), "big")

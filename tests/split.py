"""Losses on whole logits that are computed by ranks which have a part of the classes each.

The ranks are threads of this process, one of which runs at a time, or processes of a group. What is
made of them is a function like the loss itself, so that all that checks a loss checks the ranks.
"""

import dataclasses
import functools
import threading

import torch
import torch.distributed

import fastkd
from fastkd.losses.distillation import DistillationParts
from fastkd.ranks import Ranks

LOSSES = {"soft_target_loss": 2, "distillation_loss": 3}


class Threads:
    """`run(f)` is the results of `f(rank, group)` in as many threads."""

    def __init__(self, size):
        self.size = size

    def run(self, f):
        self.slots, self.barrier = [None] * self.size, threading.Barrier(self.size)
        self.turn = threading.Lock()
        found, errors = [None] * self.size, [None] * self.size
        device = torch.get_default_device()  # of this thread

        def on_rank(rank):
            with self.turn, device:
                try:
                    found[rank] = f(rank, _OfThread(self, rank))
                except Exception as error:
                    errors[rank] = error
                    self.barrier.abort()

        threads = [threading.Thread(target=on_rank, args=(i,)) for i in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.errors = [error for error in errors if error is not None]
        own = [x for x in self.errors if not isinstance(x, threading.BrokenBarrierError)]
        if self.errors:
            raise (own or self.errors)[0]
        return found


class _Place:
    def __init__(self, size, rank):
        self.size, self.rank = lambda: size, lambda: rank


class _OfThread(Ranks):
    """What a call of one thread takes for its group."""

    device = torch.device("cpu")

    def __init__(self, world, rank):
        self.world = world
        super().__init__(_Place(world.size, rank))

    def gather(self, x):
        self.world.slots[self.rank] = x.detach()
        self._wait()
        found = torch.stack(self.world.slots)
        self._wait()
        return found

    def _wait(self):
        self.world.turn.release()
        try:
            self.world.barrier.wait(60)
        finally:
            self.world.turn.acquire()


class Processes:
    """The processes of a group, of which this is one: each runs the same, and has all results."""

    def __init__(self, group=None):
        self.group = group or torch.distributed.group.WORLD
        self.size = self.group.size()

    def run(self, f):
        own, found = f(self.group.rank(), self.group), [None] * self.size
        torch.distributed.all_gather_object(found, own, group=self.group)
        return found


def cuts_of(classes, parts):
    """How many classes each has: any number, also none."""
    at = sorted(torch.randint(classes + 1, (parts - 1,)).tolist())
    return [end - begin for begin, end in zip([0, *at], [*at, classes], strict=True)]


def whole(name, world, cuts=None):
    """The loss of this name as a function of whole logits; `cuts` are the classes of each rank.

    Without them they are drawn, once for each number of classes.
    """
    drawn = functools.cache(functools.partial(cuts_of, parts=world.size))

    def loss(student, teacher, *labels, **keywords):
        teachers, kept, put_together = _teachers(teacher)
        names = [k for k, v in keywords.items() if torch.is_tensor(v) and v.requires_grad]
        heat = [keywords.pop(k) for k in names]
        dim = keywords.get("dim", -1)
        parts = cuts or drawn(min(x.shape[dim] for x in (student, *teachers)))

        def of_rank(rank, group, tensors):
            first = sum(parts[:rank])
            sides = []
            for x in tensors[: 1 + len(teachers)]:
                last = first + parts[rank] if rank + 1 < world.size else x.shape[dim]
                sides.append(x.narrow(dim, first, last - first))
            leaves = [x.detach().requires_grad_(x.requires_grad) for x in sides]
            others = [x.detach().requires_grad_(x.requires_grad) for x in tensors[len(sides) :]]
            of_heat = dict(zip(names, others[len(kept) :], strict=True))
            given = {**keywords, **of_heat, "group": group}
            with torch.enable_grad():
                function = getattr(_LOSSES, name)
                of_teacher = put_together([*leaves[1:], *others[: len(kept)]])
                return function(leaves[0], of_teacher, *labels, **given), [*leaves, *others]

        tensors = student, *teachers, *kept, *heat
        found = _Whole.apply(world, of_rank, 1 + len(teachers), dim, *tensors)
        return DistillationParts(*found) if isinstance(found, tuple) else found

    return loss


def _teachers(teacher):
    """The tensors that are split, those that every rank has whole, and what both make."""
    if isinstance(teacher, list):
        return teacher, [], lambda tensors: tensors
    if isinstance(teacher, fastkd.logits.STATED):
        return [*vars(teacher).values()], [], lambda tensors: type(teacher)(*tensors)
    if isinstance(teacher, fastkd.TopK):
        kept = [teacher.values] if teacher.lse is None else [teacher.values, teacher.lse]

        def put_together(tensors):
            values, lse = tensors if len(tensors) == 2 else (*tensors, None)
            return dataclasses.replace(teacher, values=values, lse=lse)

        return [], kept, put_together
    return [teacher], [], lambda tensors: tensors[0]


class _LOSSES:
    soft_target_loss = staticmethod(fastkd.soft_target_loss)
    distillation_loss = staticmethod(fastkd.distillation_loss)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, world, of_rank, sides, dim, *tensors):
        ctx.world, ctx.sides, ctx.dim, ctx.kept = world, sides, dim, {}

        def run(rank, group):
            found, leaves = of_rank(rank, group, tensors)
            of_all = found if isinstance(found, tuple) else (found,)
            ctx.kept[rank] = of_all[0], leaves
            return [x.detach() for x in of_all]

        losses = world.run(run)
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=0, atol=0, equal_nan=True)
        loss, *parts = [x.clone() for x in losses[0]]
        ctx.mark_non_differentiable(*parts)
        return (loss, *parts) if parts else loss

    @staticmethod
    def backward(ctx, grad_output, *_):
        wanted = [i for i, x in enumerate(ctx.needs_input_grad[4:]) if x]

        def run(rank, group):
            loss, leaves = ctx.kept[rank]
            chosen = [leaves[i] for i in wanted]
            return torch.autograd.grad(loss, chosen, grad_output, retain_graph=True)

        found = ctx.world.run(run)
        gradients = [None] * len(ctx.needs_input_grad)
        for place, i in enumerate(wanted):
            parts = [of_rank[place] for of_rank in found]
            if i < ctx.sides:
                gradients[4 + i] = torch.cat(parts, ctx.dim)
                continue
            for other in parts[1:]:  # of what all ranks have, the same on each
                torch.testing.assert_close(other, parts[0], rtol=0, atol=0, equal_nan=True)
            gradients[4 + i] = parts[0]
        return tuple(gradients)

"""Losses on whole sides that are computed by ranks which have a part of the classes each.

The ranks are threads of this process, one of which runs at a time, or processes of a group. What is
made of them is a function like the loss itself, so that all that checks a loss checks the ranks.
"""

import copy
import functools
import threading

import torch
import torch.distributed
from torch.utils import _pytree as pytree

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
        # Of this thread.
        device = torch.get_default_device()
        kind, is_on = device.type, torch.is_autocast_enabled(device.type)
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), is_on)

        def on_rank(rank):
            with self.turn, device, copy.copy(autocast):
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


class Alike(Ranks):
    """Ranks of which all have what this one has."""

    device = torch.device("cpu")

    def __init__(self, size):
        super().__init__(_Place(size, 0))

    def gather(self, x):
        return torch.stack([x.detach()] * self.size)


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


def dims_of(side, dim):
    """By which dimension each tensor of a side is split; None where all ranks have all of it."""
    count = len(pytree.tree_leaves(side))
    if isinstance(side, fastkd.LinearHead):
        return [None, 0, 0][:count]
    return [None if isinstance(side, fastkd.TopK) else dim] * count


def whole(name, world, cuts=None):
    """The loss of this name as a function of whole sides; `cuts` are the classes of each rank.

    Without them they are drawn, once for each number of classes.
    """
    drawn = functools.cache(functools.partial(cuts_of, parts=world.size))

    def loss(student, teacher, *labels, **keywords):
        tensors, sides = pytree.tree_flatten((student, teacher))
        dim = keywords.get("dim", -1)
        dims = [*dims_of(student, dim), *dims_of(teacher, dim)]
        names = [k for k, v in keywords.items() if torch.is_tensor(v) and v.requires_grad]
        heat = [keywords.pop(k) for k in names]
        split = [(x, d) for x, d in zip(tensors, dims, strict=True) if d is not None]
        parts = cuts or drawn(min(x.shape[d] for x, d in split))

        def of_rank(rank, group, tensors):
            first = sum(parts[:rank])
            own = []
            for x, d in zip(tensors, dims, strict=False):
                if d is not None:
                    last = first + parts[rank] if rank + 1 < world.size else x.shape[d]
                    x = x.narrow(d, first, last - first)
                own.append(x)
            own += tensors[len(dims) :]
            leaves = [
                x.detach().requires_grad_(of_all.requires_grad)
                for x, of_all in zip(own, tensors, strict=True)
            ]
            others = dict(zip(names, leaves[len(dims) :], strict=True))
            with torch.enable_grad():
                found = getattr(_LOSSES, name)(
                    *pytree.tree_unflatten(leaves[: len(dims)], sides), *labels,
                    **keywords, **others, group=group,
                )  # fmt: skip
            return found, leaves

        found = _Whole.apply(world, of_rank, [*dims, *[None] * len(heat)], *tensors, *heat)
        return DistillationParts(*found) if isinstance(found, tuple) else found

    return loss


class _LOSSES:
    soft_target_loss = staticmethod(fastkd.soft_target_loss)
    distillation_loss = staticmethod(fastkd.distillation_loss)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, world, of_rank, dims, *tensors):
        ctx.world, ctx.dims, ctx.kept = world, dims, {}

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
        wanted = [i for i, x in enumerate(ctx.needs_input_grad[3:]) if x]

        def run(rank, group):
            loss, leaves = ctx.kept[rank]
            chosen = [leaves[i] for i in wanted]
            return torch.autograd.grad(loss, chosen, grad_output, retain_graph=True)

        found = ctx.world.run(run)
        gradients = [None] * len(ctx.dims)
        for place, i in enumerate(wanted):
            parts = [of_rank[place] for of_rank in found]
            if ctx.dims[i] is not None:
                gradients[i] = torch.cat(parts, ctx.dims[i])
                continue
            for other in parts[1:]:  # of what all ranks have, the same on each
                torch.testing.assert_close(other, parts[0], rtol=0, atol=0, equal_nan=True)
            gradients[i] = parts[0]
        return None, None, None, *gradients

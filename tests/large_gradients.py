"""Gradients from a kilobyte to 32 MB, of every pair of dtypes, each in a process of its own.

    PYTHONPATH=tests python tests/large_gradients.py [--few] [--losses hint ...] [--jobs 2]

A call that ends its process is a failure like any other. Loss and gradients are compared with those
of the reference in float64, to what docs/numerics.md promises. All dtypes get the same numbers,
which each of them holds, so that one reference serves them all.
"""

import argparse
import functools
import itertools
import math
import os
import signal
import sys
import time
import traceback
from typing import NamedTuple

import torch
from agreement import DTYPES, array, assert_gradient, assert_loss
from agreement_features import features
from layouts import channels_last, contiguous, cropped, reversed_dims

import fastkd

LIMIT = 8 << 20  # from which on the CPU kernels write past the cache
# Bytes of the gradient; what is largest below, or what is smallest from there on.
SIZES = {
    "1 KB": (1 << 10, math.floor),
    "64 KB": (1 << 16, math.floor),
    "below 8 MiB": (LIMIT - 1, math.floor),
    "8 MiB": (LIMIT, math.ceil),
    "32 MB": (32_000_000, math.floor),
}
TEMPERATURE = 2.0
IN_DIM_1 = {"temperature": TEMPERATURE, "dim": 1}


class Group(NamedTuple):
    """What one reference serves: a loss, and a gradient of so many elements."""

    loss: str
    size: str
    itemsize: int

    def samples(self, elements):
        """How many of so many elements each the gradient has."""
        wanted, whole = SIZES[self.size]
        return max(1, whole(wanted / (elements * self.itemsize)))

    def rows(self):
        """A shape of logits: many classes where the gradient is large."""
        classes = 32007 if SIZES[self.size][0] > LIMIT / 2 else 201
        return self.samples(classes), classes

    def pixels(self):
        return self.samples(21 * 90), 21, 9, 10

    def maps(self):
        return self.samples(48 * 90), 48, 9, 10

    def points(self):
        points = 8 if self.size == "1 KB" else 64
        return points, self.samples(points)


class Case(NamedTuple):
    """A call of a group. Its layout is `channels_last` where the tensors have channels."""

    student: torch.dtype
    teacher: torch.dtype
    layout: str

    def __str__(self):
        dtypes = [str(dtype).removeprefix("torch.") for dtype in self[:2]]
        return f"student {dtypes[0]}, teacher {dtypes[1]}, {self.layout}"

    def laid(self, x):
        to = {"contiguous": contiguous, "cropped": cropped}
        return to.get(self.layout, channels_last if x.ndim == 4 else reversed_dims)(x)


def logits(*shape):
    return 3 * torch.randn(shape, dtype=torch.float64)


def held_by_all(x):
    """The nearest numbers that every dtype holds."""
    return x.bfloat16().half().double()


def soft_targets(group, shape, teachers=1):
    tensors = [logits(*shape(group)) for _ in range(1 + teachers)]

    def loss(student, *teachers, **keywords):
        teachers = list(teachers) if len(teachers) > 1 else teachers[0]
        return fastkd.soft_target_loss(student, teachers, **IN_DIM_1, **keywords)

    return loss, tensors, 1, TEMPERATURE**2


def distillation(group, shape):
    tensors = [logits(*shape(group)) for _ in range(2)]
    labels = torch.randint(tensors[0].shape[1], tensors[0][:, 0].shape)
    labels[::5] = -100
    loss = functools.partial(fastkd.distillation_loss, labels=labels, **IN_DIM_1)
    return loss, tensors, 1, 0.9 * TEMPERATURE**2 + 0.1


def on_maps(group, name, **keywords):
    tensors = [features(*group.maps()) for _ in range(2)]
    return functools.partial(getattr(fastkd, name), **keywords), tensors, 1, 0.0


def relations(group, name):
    """Embeddings that lie near a space of few dimensions: else all would be as far apart."""
    count, width = group.points()
    tensors = [logits(count, 3) @ logits(3, width) + logits(count, width) for _ in range(2)]
    return getattr(fastkd, name), tensors, 1, 0.0


def flows(group):
    batch, *large = group.maps()
    shapes = [(batch, *large), (batch, 5, 4, 5)]
    tensors = [features(*shape) for shape in shapes + shapes]
    return (lambda *x, **keywords: fastkd.fsp_loss(x[:2], x[2:], **keywords)), tensors, 2, 0.0


# From a group: the loss, its tensors, how many are the student's, and what the loss may be rounded
# against where it is smaller.
LOSSES = {
    "soft targets": functools.partial(soft_targets, shape=Group.rows),
    "soft targets of pixels": functools.partial(soft_targets, shape=Group.pixels),
    "ensemble": functools.partial(soft_targets, shape=Group.rows, teachers=2),
    "ensemble of pixels": functools.partial(soft_targets, shape=Group.pixels, teachers=2),
    "distillation": functools.partial(distillation, shape=Group.rows),
    "distillation of pixels": functools.partial(distillation, shape=Group.pixels),
    "attention": functools.partial(on_maps, name="attention_transfer_loss"),
    "attention of maxima": functools.partial(
        on_maps, name="attention_transfer_loss", kind="max_pow"
    ),
    "hint": functools.partial(on_maps, name="hint_loss"),
    "distances": functools.partial(relations, name="rkd_distance_loss"),
    "angles": functools.partial(relations, name="rkd_angle_loss"),
    "similarities": functools.partial(relations, name="similarity_preserving_loss"),
    "flows": flows,
}


def check(case, loss, tensors, students, size, value, gradients):
    """The student's gradient alone, which forward computes; and then everybody's."""
    torch.set_num_threads(2)
    dtypes = [case.student if i < students else case.teacher for i in range(len(tensors))]
    sides = [case.laid(x.to(dtype)) for x, dtype in zip(tensors, dtypes, strict=True)]
    for count in (students, len(sides)):
        leaves = [x.detach().requires_grad_(i < count) for i, x in enumerate(sides)]
        actual = loss(*leaves, backend="native")
        assert_loss(actual, value, sides, size)
        found = torch.autograd.grad(actual, leaves[:count])
        for one, expected in zip(found, gradients[:count], strict=True):
            assert_gradient(one, expected)


def why(error):
    """On one line, and where it came from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} in {place.name}: {said}"


def forked(function):
    """How a process that calls the function ends: what it says is wrong, or nothing."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        status = 1
        try:
            function()
            status = 0
        except BaseException as error:
            os.write(writing, why(error).encode())
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, errors="replace") as said:
        wrong = said.read()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return wrong or (f"ended with {status}" if status else "")


def check_group(group, cases, seed):
    """Says what is wrong. One thread computes the reference: a process of more cannot be forked."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    loss, drawn, students, size = LOSSES[group.loss](group)
    tensors = [held_by_all(x).requires_grad_() for x in drawn]
    value = loss(*tensors, backend="reference")
    gradients = [array(g) for g in torch.autograd.grad(value, tensors)]
    tensors, value = [x.detach() for x in tensors], array(value)
    wrong = 0
    for case in cases:
        found = forked(
            functools.partial(check, case, loss, tensors, students, size, value, gradients)
        )
        if found:
            wrong += 1
            print(f"{group.loss}, {group.size}, {case}: {found}", flush=True)
    print(f"{group.loss}, {group.size}: {wrong} of {len(cases)} calls wrong", flush=True)
    sys.exit(min(wrong, 100))


def groups(chosen):
    """Each group and its cases."""
    itemsizes = {dtype.itemsize for dtype in DTYPES}
    for group in itertools.starmap(
        Group, itertools.product(chosen.losses, chosen.sizes, itemsizes)
    ):
        layouts = ["contiguous", "channels_last", "cropped"]
        cases = itertools.starmap(Case, itertools.product(DTYPES, DTYPES, layouts))
        cases = [case for case in cases if case.student.itemsize == group.itemsize]
        if chosen.few:
            pair = (torch.float32, torch.float64)
            cases = [case for case in cases if case[:2] == pair and case.layout != "cropped"]
        if cases:
            yield group, cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--few", action="store_true", help="float32 next to float64 alone")
    parser.add_argument("--losses", nargs="+", default=[*LOSSES], choices=LOSSES)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES], choices=SIZES)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began, count, wrong, running = time.monotonic(), 0, 0, 0
    for group, cases in [*groups(chosen), *chosen.jobs * [(None, [])]]:
        if running == chosen.jobs or (group is None and running):
            _, status = os.wait()
            wrong, running = wrong + (status != 0), running - 1
        if group is not None and os.fork() == 0:
            try:
                check_group(group, cases, chosen.seed)
            except Exception:
                traceback.print_exc()
                os._exit(1)
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code)
        running, count = running + (group is not None), count + len(cases)
    took = time.monotonic() - began
    print(f"{count} calls in {took:.0f} s, {wrong} groups wrong; seed {chosen.seed}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

"""Every kernel of a backend on small tensors, to be run under compute-sanitizer.

python tests/gpu_check/selection.py native logits
"""

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import fastkd

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Whole vectors and not, several blocks and less than a warp.
SHAPES = ((3, 40, 9, 11), (2, 64, 8, 8), (5, 3), (2, 4099))
# A few rows of as many classes as there are kernels for, and the classes across the positions.
CLASSES = (100, 300, 1000, 1003, 4099, 9000, 20000, 40000)
LOGITS = (*(((4, classes), 1) for classes in CLASSES), ((2, 19, 9, 11), 1))
LOGITS_DTYPES = (*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16))
# As hints; tokens; a sample of more than a MiB; more than one pair.
MAPS = (*SHAPES[:2], (3, 33, 17), (1, 96, 61, 67))
KINDS = (
    {"kind": "sum"},
    *({"kind": kind, "p": p} for kind in ("sum_pow", "max_pow") for p in (None, 1.5)),
)
DISTANCES = ({"distance": "mse"}, *({"order": order} for order in (None, 1.0, 3.0, math.inf)))
# Part of a tile of pairs, and several.
BATCHES = (5, 33, 70)
TOLERANCE = 1e-2  # what a half-precision gradient is rounded to; wrong addresses show at once


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def cropped(x: Tensor) -> Tensor:
    """Runs that begin at any alignment."""
    room = x.new_zeros([size + 2 for size in x.shape])
    return room[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


LAYOUTS = (lambda x: x, channels_last, cropped)


def close(found: Tensor, expected: Tensor) -> bool:
    # A gradient that underflows in float16 does so in both.
    expected = expected.to(found.dtype).double()
    found = found.detach().double().cpu()
    return bool((found - expected).norm() <= TOLERANCE * expected.norm() + 1e-12)


def check(loss: Callable[..., Tensor], tensors: Sequence[Tensor], backend: str, count: int) -> None:
    """Against float64 on the CPU, with the gradients of the first `count` tensors."""
    leaves = [x.detach().requires_grad_(i < count) for i, x in enumerate(tensors)]
    exact = [x.detach().cpu().double().requires_grad_(i < count) for i, x in enumerate(leaves)]
    found = loss(*leaves, backend=backend)
    expected = loss(*exact, backend="reference")
    assert close(found, expected), (found, expected)
    for grad_output in (1.0, 3.0):
        gradients, wanted = (
            torch.autograd.grad(x, y[:count], torch.full_like(x, grad_output), retain_graph=keeps)
            for x, y, keeps in ((found, leaves, grad_output == 1), (expected, exact, True))
        )
        assert all(map(close, gradients, wanted)), (leaves[0].shape, leaves[0].dtype, grad_output)


def draw(shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [torch.randn(shape).to(DEVICE, dtype) for dtype in dtypes]


def hints(backend: str) -> int:
    runs = 0
    for dtypes, shape in itertools.product(itertools.product(DTYPES, repeat=2), SHAPES):
        if dtypes[0] != dtypes[1] and shape != SHAPES[0]:
            continue
        for layouts in itertools.product(LAYOUTS, repeat=2):
            pair = [layout(x) for layout, x in zip(layouts, draw(shape, dtypes), strict=True)]
            for count, reduction in enumerate(("mean", "none"), 1):
                check(partial(fastkd.hint_loss, reduction=reduction), pair, backend, count)
                runs += 1
    return runs


def transfer(*tensors: Tensor, **keywords) -> Tensor:
    """Of as many pairs as there are students."""
    half = len(tensors) // 2
    return fastkd.attention_transfer_loss(list(tensors[:half]), list(tensors[half:]), **keywords)


def attention_map(features: Tensor, **keywords) -> Tensor:
    """With a loss of its own, in which every position counts."""
    weights = torch.linspace(-1, 2, features[0, 0].numel(), dtype=torch.float64)
    maps = fastkd.attention_map(features, **keywords)
    return maps @ weights.to(maps)


def attention(backend: str) -> int:
    """Every kind in every layout and dtype, and every distance in one."""
    runs = 0

    def run(loss: Callable[..., Tensor], tensors: Sequence[Tensor], count: int) -> None:
        nonlocal runs
        check(loss, tensors, backend, count)
        runs += 1

    for dtype, shape, layout in itertools.product(DTYPES, MAPS, LAYOUTS):
        if shape == MAPS[-1] and dtype not in DTYPES[::2]:
            continue
        for number, kind in enumerate(KINDS):
            pair = [layout(x) for x in draw(shape, (dtype, dtype))]
            run(partial(attention_map, **kind), pair[:1], 1)
            # In turns, the gradients of students alone and of both sides.
            run(partial(transfer, **kind), pair, 1 + number % 2)
    for dtypes, (student, teacher) in itertools.product(
        itertools.permutations(DTYPES, 2), itertools.product(LAYOUTS, repeat=2)
    ):
        pair = draw(SHAPES[0], dtypes)
        run(transfer, [student(pair[0]), teacher(pair[1])], 1)
    for distance, reduction in itertools.product(DISTANCES, ("mean", "sum", "none")):
        students = [x for shape in MAPS[:2] for x in draw((2, *shape[1:]), DTYPES[:1])]
        teachers = [x for shape in MAPS[:2] for x in draw((2, 7, *shape[2:]), DTYPES[:1])]
        for count in (2, 4):
            options = {**distance, "reduction": reduction}
            run(partial(transfer, **options), [*students, *teachers], count)
    return runs


def distillation(
    student: Tensor, teacher: Tensor | list[Tensor], *, labels: Tensor, **keywords
) -> Tensor:
    return fastkd.distillation_loss(student, teacher, labels.to(student.device), **keywords)


def ensemble(student: Tensor, *teachers: Tensor, **keywords) -> Tensor:
    weights = range(1, len(teachers) + 1)
    return distillation(student, list(teachers), teacher_weights=list(weights), **keywords)


def from_cache(
    student: Tensor, values: Tensor, *, indices: Tensor, tail: str, labels: Tensor, **keywords
) -> Tensor:
    teacher = fastkd.TopK(values, indices.to(values.device), tail=tail)
    return fastkd.distillation_loss(student, teacher, labels.to(student.device), **keywords)


def logits(backend: str) -> int:
    runs = 0
    for dtypes, (shape, dim) in itertools.product(LOGITS_DTYPES, LOGITS):
        labels = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])
        labels[1] = -100
        keywords = {"temperature": 2.0, "dim": dim}
        for layout in (LAYOUTS[0], cropped):
            pair = [layout(x) for x in draw(shape, dtypes)]
            for count, reduction in enumerate(("batchmean", "none"), 1):
                soft = partial(fastkd.soft_target_loss, reduction=reduction, **keywords)
                check(soft, pair, backend, count)
                check(partial(distillation, labels=labels, **keywords), pair, backend, count)
                runs += 2
            sides = [pair[0], *(layout(x) for x in draw(shape, (*dtypes, DTYPES[2])))]
            check(partial(ensemble, labels=labels, **keywords), sides, backend, 1)
            runs += 1
            indices = torch.rand(*labels.shape, shape[dim]).topk(9).indices
            sides = [pair[0], *draw(indices.shape, dtypes[1:])]
            for tail in ("renormalize", "renormalize_both"):
                top_k = partial(from_cache, indices=indices, tail=tail, labels=labels)
                check(partial(top_k, **keywords), sides, backend, 1)
                runs += 1
    return runs


def relations(backend: str) -> int:
    """Batches around the tiles of pairs; both losses on either side of other widths."""
    runs = 0
    losses = (
        *(
            partial(function, delta=delta)
            for function in (fastkd.rkd_distance_loss, fastkd.rkd_angle_loss)
            for delta in (1.0, 0.1)
        ),
        fastkd.similarity_preserving_loss,
    )
    for dtypes, batch in itertools.product(LOGITS_DTYPES, BATCHES):
        for loss, count in itertools.product(losses, (1, 2)):
            student, teacher = (
                draw((batch, width), (dtype,))[0]
                for width, dtype in zip((40, 33), dtypes, strict=True)
            )
            check(loss, (student, teacher), backend, count)
            runs += 1
    return runs


def main(backend: str, losses: str) -> None:
    torch.manual_seed(0)
    every = {"attention": attention, "hints": hints, "logits": logits, "relations": relations}
    runs = every[losses](backend)
    print(f"{backend}: {runs} calls agree with float64")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Relational knowledge distillation (Park et al. 2019).

In float64 whatever the inputs, where the device has it: see `docs/numerics.md`.
"""

import torch
from torch import Tensor

from fastkd.precision import compute_dtype, widest_dtype
from fastkd.symbols import operand

# Elements of the differences that are formed at a time.
_ELEMENTS = 1 << 24


def rkd_distance_loss(student: Tensor, teacher: Tensor, *, delta: float) -> Tensor:
    """Huber of the difference of the distances, each over the mean of the positive ones."""
    loss = _huber(_relative(student), _relative(teacher), delta) / max(len(student) ** 2, 1)
    return loss.to(compute_dtype(student, teacher))


def rkd_angle_loss(student: Tensor, teacher: Tensor, *, delta: float) -> Tensor:
    """Huber of the difference of the cosines at each point between the ways to two others."""
    total = torch.zeros((), dtype=widest_dtype(student.device), device=student.device)
    for vertices in blocks(student, teacher):
        total = total + angle_loss_at(vertices, student, teacher, delta=delta)
    return total.to(compute_dtype(student, teacher))


def angle_loss_at(vertices: slice, student: Tensor, teacher: Tensor, *, delta: float) -> Tensor:
    """What the angles at some of the points contribute to the loss."""
    total = _huber(_cosines(student, vertices), _cosines(teacher, vertices), delta)
    return total / max(len(student) ** 3, 1)


def blocks(student: Tensor, teacher: Tensor) -> list[slice]:
    """All points, a few at a time."""
    count = len(student)
    step = max(1, _ELEMENTS // max(count * max(student.shape[1], teacher.shape[1], count), 1))
    return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


def _huber(student: Tensor, teacher: Tensor, delta: float) -> Tensor:
    """Its sum; by `clamp`, because `F.huber_loss` has no derivatives in forward mode."""
    r = student - teacher
    threshold = operand(delta, r)
    slope = r.clamp(-threshold, threshold)
    return (slope * (r - slope / 2)).sum()


def _differences(x: Tensor, points: slice) -> Tensor:
    """`x_j − x_i` as `(i, j, D)`, for some i."""
    x = x.to(widest_dtype(x.device))
    return x - x[points, None]


def _lengths(differences: Tensor) -> Tensor:
    """With a gradient of 0 where they are 0."""
    squares = differences.square().sum(-1)
    is_zero = squares == 0
    return squares.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def _relative(x: Tensor) -> Tensor:
    distances = torch.cat([_lengths(_differences(x, points)) for points in blocks(x, x)])
    count = (distances > 0).sum()
    mean = distances.masked_fill(~(distances > 0), 0).sum() / count.clamp_min(1)
    return distances / mean.masked_fill(count == 0, 1)


def _cosines(x: Tensor, vertices: slice) -> Tensor:
    differences = _differences(x, vertices)
    lengths = _lengths(differences)[..., None]
    # Masked twice, for the gradient to be 0 where the length is.
    units = differences.masked_fill(lengths == 0, 0) / lengths.masked_fill(lengths == 0, 1)
    if units.dtype == torch.float64:
        return units @ units.mT
    # Autocast, which leaves float64 alone, would have the product in half precision.
    with torch.autocast(x.device.type, enabled=False):
        return units @ units.mT

"""Kernels on matrices of pairs, where a tile of them ends or another form takes over."""

import functools
import os

import numpy as np
import pytest
import shim
import torch
from agreement import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from conftest import DEVICE

from fastkd.operators import kernels

F32, F64 = torch.float32, torch.float64
DTYPES = [F32, F64]
# Around the tiles of every kernel.
SIZES = [1, 2, 8, 9, 17, 33]
# CUDA's angles take several pairs a thread where there are so many that they fill the chip. The
# interpreter takes seconds for few.
COPIES = 2 if os.environ.get("TRITON_INTERPRET") == "1" else 9 if DEVICE == "cpu" else 40
LOSSES = ["rkd_distance", "rkd_angle", "similarity"]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_size = pytest.mark.parametrize("n", SIZES)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def embeddings(n, features, dtype=F64):
    """One of them twice, and one nearly so: cosines lose as many digits as its distance has."""
    x = torch.randn(n, features, dtype=F64).to(dtype)
    if n > 4:
        x[1] = x[4]
        x[3] = x[2] + 0.1 / features**0.5
    return x


def squared(x):
    """By NumPy, on the CPU, in float64."""
    x = x.cpu().double().numpy()
    return torch.from_numpy(np.square(x[:, None] - x).sum(-1))


def roots(squares):
    """0 of 0, with a derivative of 0."""
    is_zero = squares == 0
    return squares.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)


def huber(x, delta):
    return torch.where(x.abs() <= delta, x.square() / 2, delta * (x.abs() - delta / 2)).mean()


def relative(squares):
    d = roots(squares)
    count = (d > 0).sum()
    return d * count / d.sum() if count else d


def cosines(squares):
    d = roots(squares)
    legs = 2 * d[:, :, None] * d[:, None]
    inner = squares[:, :, None] + squares[:, None] - squares
    return torch.where(legs == 0, 0, inner / legs.masked_fill(legs == 0, 1))


def similarities(gram):
    """A row of zeros stays one, and has no slopes."""
    norms = roots(gram.square().sum(1, keepdim=True))
    is_zero = norms == 0
    return (gram / norms.masked_fill(is_zero, 1).clamp_min(1e-12)).masked_fill(is_zero, 0)


MEASURES = {"rkd_distance": relative, "rkd_angle": cosines, "similarity": similarities}


def expected(loss, student, teacher, delta):
    """The loss, and its slopes in float64."""
    student, teacher = student.cpu().double().requires_grad_(), teacher.cpu().double()
    excess = MEASURES[loss](student) - MEASURES[loss](teacher)
    n = max(len(student), 1)
    value = excess.square().sum() / n**2 if loss == "similarity" else huber(excess, delta)
    slopes = torch.autograd.grad(value, student)[0]
    slopes = slopes + slopes.T
    if loss != "similarity":
        slopes.fill_diagonal_(0)
    return value.detach(), slopes


def found(loss, student, teacher, delta, dtype, backend, slopes=True):
    """What a backend's function fills, in the dtype of the loss."""
    value = torch.empty((), dtype=dtype)
    to = torch.empty_like(student) if slopes else None
    more = () if loss == "similarity" else (delta,)
    module = kernels(backend, loss.partition("_")[0])
    getattr(module, loss)(student, teacher, value, to, *more)
    return value, to


def draw(loss, n, dtype):
    """Both sides as a loss wants them."""
    if loss == "similarity":
        rows = [torch.randn(n, 7, dtype=F64) for _ in range(2)]
        rows[0][n // 2] = 0
        rows[1][n // 3] *= 1e-9
        return [(x @ x.T).to(dtype) for x in rows]
    # Each has its own coincident points.
    sides = embeddings(n, 5), embeddings(n, 3).flip(0)
    return [squared(x).to(torch.get_default_device()) for x in sides]


def close(actual, wanted, tolerance):
    """Or what is left where a loss of two points is nothing."""
    error = (actual.cpu().double() - wanted).norm()
    assert error <= tolerance * (wanted.norm() + 1e-5), (error, wanted.norm())


@every_dtype
@pytest.mark.parametrize("features", [1, 33, 130])
def test_squared_distances(kernel_backend, features, dtype):
    for n in (1, 7, 9, 33):
        x = embeddings(n, features, dtype) + 100
        to = torch.empty(n, n, dtype=F64)
        kernels(kernel_backend, "rkd").squared_distances(x, to)
        assert torch.equal(to, to.T)
        close(to, squared(x), 1e-14)
        assert torch.equal(to.cpu() == 0, squared(x) == 0)


@every_dtype
@every_size
@every_loss
def test_losses_and_slopes(kernel_backend, loss, n, dtype):
    student, teacher = draw(loss, n, dtype)
    for delta in (1.0, 0.2):
        wanted = expected(loss, student, teacher, delta)
        value, slopes = found(loss, student, teacher, delta, dtype, kernel_backend)
        close(value, wanted[0], LOSS_TOLERANCE[dtype])
        close(slopes, wanted[1], GRADIENT_TOLERANCE[dtype])
        alone, _ = found(loss, student, teacher, delta, dtype, kernel_backend, slopes=False)
        close(alone, wanted[0], LOSS_TOLERANCE[dtype])


@every_loss
def test_many_points_that_are_copies_of_few(kernel_backend, loss):
    """The loss is that of the few, and each slope its part of theirs."""
    few = draw(loss, 20, F32)
    wanted, wanted_slopes = expected(loss, *few, 0.5)
    many = [x.repeat(COPIES, COPIES) for x in few]
    value, slopes = found(loss, *many, 0.5, F32, kernel_backend)
    if loss == "similarity":
        # Norms are of as many elements more.
        wanted, wanted_slopes = wanted / COPIES, wanted_slopes / COPIES
    else:
        # A pair of copies has a slope, too, and no distance that could change by it.
        slopes[torch.eye(20).repeat(COPIES, COPIES) == 1] = 0
    close(value, wanted, LOSS_TOLERANCE[F32])
    wanted_slopes = (wanted_slopes / COPIES**2).repeat(COPIES, COPIES)
    close(slopes, wanted_slopes, GRADIENT_TOLERANCE[slopes.dtype])


@every_loss
def test_equal_sides_differ_by_rounding_at_most(kernel_backend, loss):
    student, _ = draw(loss, 33, F32)
    value, slopes = found(loss, student, student.clone(), 1.0, F32, kernel_backend)
    # A processor may round a product and its sum once, and so one side otherwise than the other.
    assert 0 <= value <= 1e-28
    assert slopes.abs().max() <= 1e-14


@pytest.mark.parametrize("scale", [2.0**-133, 2.0**133])
@pytest.mark.parametrize("loss", LOSSES[:2])
def test_distances_of_any_size(kernel_backend, loss, scale):
    """Squares that float32 does not hold, and scales that round none of them."""
    student, teacher = draw(loss, 9, F32)
    wanted = expected(loss, student, teacher, 1.0)
    value, slopes = found(loss, student * scale, teacher / scale, 1.0, F32, kernel_backend)
    close(value, wanted[0], LOSS_TOLERANCE[F32])
    close(slopes * scale, wanted[1], GRADIENT_TOLERANCE[F64])


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_one_side_of_coincident_points(kernel_backend, loss):
    student, _ = draw(loss, 9, F32)
    nothing = torch.zeros_like(student)
    for sides in ((student, nothing), (nothing, student)):
        wanted = expected(loss, *sides, 1.0)
        value, slopes = found(loss, *sides, 1.0, F32, kernel_backend)
        close(value, wanted[0], LOSS_TOLERANCE[F32])
        close(slopes, wanted[1], GRADIENT_TOLERANCE[F64])


@pytest.mark.parametrize("side", [0, 1])
@every_loss
def test_nan_is_seen(kernel_backend, loss, side):
    sides = draw(loss, 9, F32)
    sides[side][2] = sides[side][:, 2] = float("nan")
    assert found(loss, *sides, 1.0, F32, kernel_backend)[0].isnan()


@every_loss
def test_an_empty_batch_has_no_loss(kernel_backend, loss):
    nothing = torch.empty(0, 0, dtype=F32 if loss == "similarity" else F64)
    assert found(loss, nothing, nothing, 1.0, F32, kernel_backend)[0] == 0


@every_loss
def test_repeated_calls_are_bitwise_equal(kernel_backend, loss):
    call = functools.partial(found, loss, *draw(loss, 20, F32), 0.5, F32, kernel_backend)
    first = call()
    for seed in range(3):
        shim.set_schedule(seed)
        assert all(map(torch.equal, call(), first))

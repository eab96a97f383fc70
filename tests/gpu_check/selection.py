"""Every kernel of a backend on small tensors, to be run under compute-sanitizer.

python tests/gpu_check/selection.py native
"""

import itertools
import sys

import torch
from torch import Tensor

import fastkd

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Whole vectors and not, several blocks and less than a warp.
SHAPES = ((3, 40, 9, 11), (2, 64, 8, 8), (5, 3), (2, 4099))
TOLERANCE = 1e-2  # what a half-precision gradient is rounded to; wrong addresses show at once


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def cropped(x: Tensor) -> Tensor:
    """Runs that begin at any alignment."""
    room = x.new_zeros([size + 2 for size in x.shape])
    return room[tuple(slice(1, size + 1) for size in x.shape)].copy_(x)


LAYOUTS = (lambda x: x, channels_last, cropped)


def close(found: Tensor, expected: Tensor) -> bool:
    found = found.detach().double().cpu()
    return bool((found - expected).norm() <= TOLERANCE * expected.norm() + 1e-12)


def check(student: Tensor, teacher: Tensor, backend: str, reduction: str, count: int) -> None:
    """Against float64 on the CPU, with the gradients of the first `count` of the two."""
    leaves = [x.detach().requires_grad_(i < count) for i, x in enumerate((student, teacher))]
    exact = [x.detach().cpu().double().requires_grad_(i < count) for i, x in enumerate(leaves)]
    loss = fastkd.hint_loss(*leaves, reduction=reduction, backend=backend)
    expected = fastkd.hint_loss(*exact, reduction=reduction, backend="reference")
    assert close(loss, expected), (loss, expected)
    for grad_output in (1.0, 3.0):
        gradients, wanted = (
            torch.autograd.grad(x, y[:count], torch.full_like(x, grad_output), retain_graph=keeps)
            for x, y, keeps in ((loss, leaves, grad_output == 1), (expected, exact, True))
        )
        assert all(map(close, gradients, wanted)), (student.shape, student.dtype, grad_output)


def main(backend: str) -> None:
    torch.manual_seed(0)
    runs = 0
    for dtypes, shape in itertools.product(itertools.product(DTYPES, repeat=2), SHAPES):
        if dtypes[0] != dtypes[1] and shape != SHAPES[0]:
            continue
        for layouts in itertools.product(LAYOUTS, repeat=2):
            pair = [
                layout(torch.randn(shape).to(DEVICE, dtype))
                for layout, dtype in zip(layouts, dtypes, strict=True)
            ]
            check(*pair, backend, "mean", 1)
            check(*pair, backend, "none", 2)
            runs += 2
    print(f"{backend}: {runs} calls agree with float64")


if __name__ == "__main__":
    main(sys.argv[1])

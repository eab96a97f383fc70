"""Gradients that forward computed, for another `grad_output`."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.triton.tiles import COMPUTE, launch, locate, offsets, plan
from fastkd.precision import compute_dtype


@triton.jit(do_not_specialize=["tiles", "parts"], do_not_specialize_on_alignment=["grad_output"])
def scale(
    gradient,
    grad_output,
    tiles,
    parts,
    counts,
    sizes,
    strides,
    COMPUTE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Multiply one tile after another by grad_output."""
    factor = tl.load(grad_output).to(COMPUTE)
    tiles = tl.where(factor == 1, 0, tiles)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), disable_licm=True):
        place, mask = locate(tile, parts, counts, sizes, DEPTH, ROWS, COLUMNS)
        at = gradient + offsets(place, sizes, strides)
        scaled = tl.load(at, mask=mask, other=0).to(COMPUTE) * factor
        tl.store(at, scaled.to(gradient.dtype.element_ty), mask=mask)


def multiply(gradients: Sequence[Tensor], grad_output: Tensor) -> None:
    """Multiply float32 and float64 gradients in place by a scalar, which the device reads.

    Where it is 1, no gradient is touched.
    """
    for gradient in gradients:
        p = plan([gradient])
        launch(
            scale,
            p.few,
            gradient,
            gradient,
            grad_output,
            p.tiles,
            p.parts,
            p.counts,
            p.sizes,
            *p.strides,
            COMPUTE=COMPUTE[compute_dtype(gradient, grad_output)],
            **p.shape,
        )

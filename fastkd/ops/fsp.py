"""Operators and autograd of the flow between layers: the maxima of the larger one, on a CPU.

The products are torch's, and so is all of it on a GPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.autograd import Fused, check_grad_output, differentiate_once, no_grad, wants_gradient
from fastkd.operators import define, kernels
from fastkd.precision import compute_dtype


def _outputs(
    features: Tensor, height: int, width: int, with_winners: bool
) -> tuple[Tensor, Tensor]:
    shape = (*features.shape[:2], height, width)
    pooled = features.new_empty(shape, dtype=compute_dtype(features))
    return pooled, features.new_empty(shape if with_winners else (0,), dtype=torch.int32)


@define(
    "max_pool_forward(Tensor features, SymInt height, SymInt width, bool with_winners) "
    "-> (Tensor pooled, Tensor argmax)",
    _outputs,
)
def forward(features: Tensor, height: int, width: int, with_winners: bool) -> tuple[Tensor, Tensor]:
    """The maxima of as many bins, in the precision of the loss, and where in their plane they are.

    At ties the first in memory wins.
    """
    pooled, argmax = _outputs(features, height, width, with_winners)
    kernels("native", "fsp").max_pool(features, pooled, argmax if with_winners else None)
    return pooled, argmax


class Layout(NamedTuple):
    """What a gradient has of the features it belongs to, beside batch and channels."""

    height: int
    width: int
    channels_last: bool
    dtype: torch.dtype


def _gradient(grad_output: Tensor, argmax: Tensor, layout: Layout) -> Tensor:
    return torch.empty(
        (*argmax.shape[:2], layout.height, layout.width),
        dtype=layout.dtype,
        device=grad_output.device,
        memory_format=torch.channels_last if layout.channels_last else torch.contiguous_format,
    )


@define(
    "max_pool_backward(Tensor grad_output, Tensor argmax, SymInt height, SymInt width, "
    "bool channels_last, ScalarType dtype) -> Tensor",
    _gradient,
    Layout,
)
def backward(grad_output: Tensor, argmax: Tensor, layout: Layout) -> Tensor:
    """What the elements at the argmax receive, summed before it is rounded."""
    to = _gradient(grad_output, argmax, layout)
    kernels("native", "fsp").max_pool_backward(grad_output, argmax, to)
    return to


class MaxPool(Fused):
    """`apply(features, height, width)`; keeps no features."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, height: int, width: int) -> Tensor:
        pooled, argmax = forward(features, height, width, True)
        ctx.save_for_backward(argmax)
        is_contiguous = features.is_contiguous()
        channels_last = features.is_contiguous(memory_format=torch.channels_last)
        rows, columns = features.shape[2:]
        interleaved = channels_last and not is_contiguous
        ctx.layout = Layout(rows, columns, interleaved, features.dtype)
        return pooled

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        check_grad_output("fsp_loss", grad_output)
        with no_grad():
            gradient = backward(grad_output, *ctx.saved_tensors, ctx.layout)
        return (*differentiate_once("fsp_loss", (gradient,), (grad_output,)), None, None)


def has_kernels(backend: str, features: Sequence[Tensor]) -> bool:
    """Whether `max_pool` takes all of these; the argmax is numbered in 32 bits."""
    if backend != "native" or not features[0].is_cpu:
        return False
    return all([x.shape[2] * x.shape[3] < 2**31 for x in features])


def max_pool(features: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """`fastkd.reference.fsp.max_pool` by the kernel; differentiable where that is wanted."""
    if features.shape[2:] == (height, width):
        return features.to(dtype)
    if wants_gradient(features):
        pooled: Tensor = MaxPool.record(features, height, width)
    else:
        pooled, _ = forward(features, height, width, False)
    return pooled.to(dtype)

"""What the losses' autograd functions share."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastkd.operators import define, kernels
from fastkd.tensors import (
    are_transforms_active,
    dispatch_modes,
    has_tangent,
    is_plain,
    is_transformed,
    may_have_tangents,
)

_NOTHING = contextlib.nullcontext()


def no_grad() -> contextlib.AbstractContextManager[None]:
    """`torch.no_grad()`, which costs 3 µs, where it is not the state already: in most backwards."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


class Fused(torch.autograd.Function):
    """What the losses' autograd functions have in common."""

    @classmethod
    def record(cls, *args: Any) -> Any:
        """`apply`, without its search for function transforms where there are none."""
        if torch.compiler.is_compiling() or are_transforms_active():
            return cls.apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


_UNROUNDED = (torch.float32, torch.float64)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a call must be recorded; otherwise the operator alone does, and costs less."""
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])


def scales(*tensors: Tensor) -> bool:
    """Whether gradients like these, for a `grad_output` of 1, take another by multiplication.

    In half precision they would be rounded twice, and what is too small would have become 0 before
    a loss scale could save it: such gradients are computed again.
    """
    return all([t.dtype in _UNROUNDED for t in tensors])


def eager_gradient(*students: Tensor) -> bool:
    """Whether forward may already compute the gradient for a `grad_output` of 1.

    Compiled code can only multiply: what `grad_output` will be is not known there.
    """
    return scales(*students) or not torch.compiler.is_compiling()


# Whether the graph is kept after this backward; private to torch, and a copy is always right.
keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)


def is_final(grad_output: Tensor) -> bool:
    """Whether forward's gradients, which are for a `grad_output` of 1, can be handed on unchanged.

    On a GPU only the kernel can tell without waiting.
    """
    return (
        not torch.compiler.is_compiling()
        and grad_output.is_cpu
        and not keeps_graph()
        and not torch.is_grad_enabled()
        and not dispatch_modes()
        and is_plain(grad_output)
        and not may_have_tangents()
        and grad_output.item() == 1
    )


def check_grad_output(loss: str, grad_output: Tensor) -> None:
    """One that a kernel can be linear in.

    Raises:
        RuntimeError: it is a batch of several, a transform's own, or a dual number.
    """
    if torch.compiler.is_compiling() or (is_plain(grad_output) and not may_have_tangents()):
        return
    if is_transformed(grad_output):
        problem = (
            "takes one grad_output at a time, not a batch of them (is_grads_batched=True, "
            "vectorize=True, torch.func.vmap)"
        )
    elif has_tangent(grad_output):
        problem = "has no derivatives in forward mode"
    else:
        return
    raise RuntimeError(f'{loss}: a fused kernel {problem}; pass backend="reference"')


def savable(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The same tensors for `save_for_backward`, which refuses those made in inference mode.

    Teachers often are; an ordinary tensor that shares the memory stands for each. Compiled code
    cannot ask, and torch raises there.
    """
    if torch.compiler.is_compiling():
        return tensors
    return [_ordinary(t) if t is not None and t.is_inference() else t for t in tensors]


def _ordinary(tensor: Tensor) -> Tensor:
    storage, offset = tensor.untyped_storage(), tensor.storage_offset()
    return tensor.new_empty(0).set_(storage, offset, tensor.size(), tensor.stride())


@define(
    "multiply(Tensor(a!)[] gradients, Tensor grad_output, str backend) -> ()",
    lambda *_: None,
)
def multiply(gradients: Sequence[Tensor], grad_output: Tensor, backend: str) -> None:
    """Gradients in float32 or float64 that take a scalar `grad_output` by multiplication."""
    kernels(backend, "multiply").multiply(gradients, grad_output)


def for_grad_output(
    gradients: Sequence[Tensor],
    grad_output: Tensor,
    backend: str,
    rescale: Callable[[list[Tensor], bool], None],
) -> list[Tensor]:
    """Forward's gradients, which are for a scalar `grad_output` of 1, for this one.

    They are changed in place, by `rescale(gradients, True)` where multiplication will not do (see
    `scales`); where the graph is retained, new ones are made, by `rescale(new, False)`.
    """
    if torch.compiler.is_compiling():
        return [(g * grad_output).to(g.dtype) for g in gradients]
    keeps = keeps_graph()
    if not scales(*gradients):
        to = [torch.empty_like(g) for g in gradients] if keeps else list(gradients)
        rescale(to, not keeps)
        return to
    if keeps:
        return [g * grad_output for g in gradients]
    multiply(gradients, grad_output, backend)
    return list(gradients)


def of_wanted(
    gradients: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradient of each input, None where it is not wanted; the first inputs have them."""
    # zip of unequal lengths is more than torch.compile of torch 2.8 can trace.
    pairs = zip(gradients, wanted[: len(gradients)], strict=True)
    found = tuple(g if want else None for g, want in pairs)
    return found + (None,) * (len(wanted) - len(found))


class _DifferentiateOnce(torch.autograd.Function):
    """The identity on gradients, whose own backward raises."""

    @staticmethod
    def forward(ctx: FunctionCtx, loss: str, count: int, *tensors: Tensor) -> Any:
        ctx.loss = loss  # type: ignore[attr-defined]
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.loss}: a fused kernel can be differentiated only once; "  # type: ignore[attr-defined]
            'for second derivatives pass backend="reference"'
        )


def differentiate_once(
    loss: str, gradients: tuple[Tensor | None, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """`gradients`, which raise when they are differentiated again (`create_graph=True`).

    `inputs` tie them to the graph: without that a second derivative would silently be 0.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    present = [g for g in gradients if g is not None]
    guarded = iter(_DifferentiateOnce.apply(loss, len(present), *present, *inputs))
    return tuple(None if g is None else next(guarded) for g in gradients)

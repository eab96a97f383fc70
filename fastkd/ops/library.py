"""How an operator is defined, and what the autograd functions share."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

_LIBRARY = torch.library.Library("fastkd", "DEF")

OPERATORS: dict[str, Callable[..., Any]] = {}

# How many __torch_dispatch__ modes are active; private to torch.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


class Operator:
    """`fastkd::<name>`, which skips torch's dispatcher where nothing could listen there.

    That saves about 13 µs of a forward and backward, a tenth of a loss on small logits.
    """

    def __init__(self, implementation: Callable[..., Any], overload: Callable[..., Any]) -> None:
        self.implementation = implementation
        self.overload = overload

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _dispatch_modes() or not _are_plain(args):
            return self.overload(*args)
        return self.implementation(*args)


_PLAIN = frozenset({Tensor, torch.nn.Parameter, float, int, bool, str, type(None)})


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether no tensor subclass is among the arguments and the lists in them."""
    for arg in args:
        kind = type(arg)
        if kind not in _PLAIN and not (kind in (list, tuple) and _are_plain(arg)):
            return False
    return True


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Define `fastkd::<schema>`; the decorated function is its implementation on every device."""

    def register(implementation: Callable[..., Any]) -> Operator:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, implementation, key)
        torch.library.register_fake(f"fastkd::{name}", fake, lib=_LIBRARY)
        OPERATORS[name] = getattr(torch.ops.fastkd, name).default
        return Operator(implementation, OPERATORS[name])

    return register


@functools.cache
def kernels(backend: str, loss: str) -> ModuleType:
    """The module that holds a backend's kernels of one loss."""
    if backend == "native":
        return importlib.import_module("fastkd.kernels.native")
    return importlib.import_module(f"fastkd.kernels.{backend}.{loss}")


_NOTHING = contextlib.nullcontext()


def no_grad() -> contextlib.AbstractContextManager[None]:
    """`torch.no_grad()`, which costs 3 µs, where it is not the state already: in most backwards."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether a call must be recorded; otherwise the operator alone does, and costs less."""
    return torch.is_grad_enabled() and any([t.requires_grad for t in tensors])


def scales(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients like these, for a `grad_output` of 1, take another by multiplication.

    In half precision they would be rounded twice, and what is too small would have become 0 before
    a loss scale could save it: such gradients are computed again.
    """
    return all([t.dtype in (torch.float32, torch.float64) for t in tensors])


def eager_gradient(students: Sequence[Tensor]) -> bool:
    """Whether forward may already compute the gradient for a `grad_output` of 1.

    Compiled code can only multiply: what `grad_output` will be is not known there.
    """
    return not torch.compiler.is_compiling() or scales(students)


def for_grad_output(
    gradients: Sequence[Tensor], grad_output: Tensor, rescale: Callable[[list[Tensor]], None]
) -> list[Tensor]:
    """Forward's gradients, which are for a scalar `grad_output` of 1, for this one.

    They are changed in place, by `rescale` where multiplication will not do (see `scales`); where
    the graph is retained, copies of them are.
    """
    if torch.compiler.is_compiling():
        return [(g * grad_output).to(g.dtype) for g in gradients]
    to = [g.clone() for g in gradients] if _graph_is_retained() else list(gradients)
    if _is_one(grad_output):
        return to
    if scales(to):
        for gradient in to:
            gradient.mul_(grad_output)
    else:
        rescale(to)
    return to


def _is_one(grad_output: Tensor) -> bool:
    """Whether there is nothing to apply. On a GPU only the kernel can tell without waiting."""
    is_readable = grad_output.is_cpu and _are_plain((grad_output,))
    return is_readable and not _dispatch_modes() and grad_output.item() == 1


def _graph_is_retained() -> bool:
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:  # private to torch, and a copy is always right
        return True


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

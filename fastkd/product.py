"""torch's matrix products in full precision, whatever autocast says.

Disabling autocast around a product is not enough. Its backward runs under the autocast of whoever
calls `backward()`, and `torch.compile` traces it under that of whoever calls forward.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import Fused, savable, wants_gradient
from fastkd.operators import define
from fastkd.tensors import are_transforms_active, is_exporting, is_one_gradient


def no_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off, at no cost where it is off already."""
    is_on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if is_on else contextlib.nullcontext()


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` of two matrices, or of two equally long batches of matrices.

    All derivatives are products of this kind. `bias` has as many dimensions as the product, to
    which it is expanded.
    """
    is_transformed = are_transforms_active()
    if not is_transformed and not wants_gradient(a, b, *(() if bias is None else (bias,))):
        return _multiply(a, b, bias)
    if is_transformed and torch.compiler.is_compiling() and not is_one_gradient():
        # torch.compile traces no autograd function under vmap or several transforms. Derivatives
        # are as precise there as autocast says.
        return _in_full_precision(a, b, bias)
    kind = _Product if torch.compiler.is_compiling() else _ProductWithTangents
    result: Tensor = kind.record(a, b, bias, is_transformed)
    return result


def _in_full_precision(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return _in_full_precision(a, b, bias)
    if a.ndim == 2:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias, a, b)


_operator = define(
    "product(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    lambda a, b, bias: a.new_empty((*a.shape[:-1], b.shape[-1])),
)(_in_full_precision)


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """As an operator in compiled code: autocast may be on when that runs, and off in its trace.

    Not where torch must see what the product is made of: in transforms and exported programs.
    """
    if (
        torch.compiler.is_compiling()
        and not is_exporting()
        and not are_transforms_active()
        and (a.is_cpu or a.is_cuda)
    ):
        return _operator(a, b, bias)
    return _in_full_precision(a, b, bias)


class _Product(Fused):
    """`apply(a, b, bias, keeps_both)`.

    For the vmap rule that torch makes, backward and `jvp` must keep the same. Otherwise backward
    keeps only what it needs, so that the user may change the rest.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, bias: Tensor | None, keeps_both: bool) -> Tensor:
        return _multiply(a, b, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, bias, keeps_both = inputs
        to_a, to_b, *_ = ctx.needs_input_grad
        kept = [*([a] if to_b or keeps_both else []), *([b] if to_a or keeps_both else [])]
        ctx.save_for_backward(*savable(*kept))
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.b_is_transposed = b.stride(-2) == 1 != b.stride(-1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved = ctx.saved_tensors
        to_a, to_b, to_bias, _ = ctx.needs_input_grad
        multiply = product if torch.is_grad_enabled() else _multiply
        by_b = None
        if to_b:
            # In the layout of b, or adding it to the gradient of what b is a view of is slow.
            by_b = (
                multiply(grad_output.mT, saved[0]).mT
                if ctx.b_is_transposed
                else multiply(saved[0].mT, grad_output)
            )
        return (
            multiply(grad_output, saved[-1].mT) if to_a else None,
            by_b,
            grad_output.sum_to_size(ctx.bias_shape) if to_bias else None,
            None,
        )


class _ProductWithTangents(_Product):
    """The same with forward mode. `torch.compile` traces no function that has a `jvp`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Product.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:2])
        ctx.shape = output.shape

    @staticmethod
    def jvp(
        ctx: Any,
        a_tangent: Tensor | None,
        b_tangent: Tensor | None,
        bias_tangent: Tensor | None,
        _: None,
    ) -> Tensor:
        a, b = ctx.saved_tensors
        terms = []
        if a_tangent is not None:
            terms.append(product(a_tangent, b))
        if b_tangent is not None:
            terms.append(product(a, b_tangent))
        if bias_tangent is not None:
            terms.append(bias_tangent.expand(ctx.shape))
        return sum(terms[1:], terms[0])

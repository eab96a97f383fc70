"""Operators and autograd of attention maps and attention transfer.

Forward reads each feature map once and keeps its *slopes*: the loss's derivative with respect to
each position of the unnormalised map, `(B, positions)`. Backward turns slopes into the features'
gradient with one more read. `max_pow` keeps the argmax over channels of each position as well, and
its slopes are by the features at the argmax: backward then reads no features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.autograd import (
    Fused,
    check_grad_output,
    differentiate_once,
    eager_gradient,
    for_grad_output,
    is_final,
    no_grad,
    of_wanted,
    savable,
    scales,
    wants_gradient,
)
from fastkd.operators import define, kernels
from fastkd.parameters import Map, Transfer, in_schema
from fastkd.precision import compute_dtype
from fastkd.symbols import operand

_MAP, _TRANSFER = in_schema(Map), in_schema(Transfer)


def _new_maps(
    features: Sequence[Tensor], p: Map, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Room for a number per position of each, and for the argmax of `max_pow`."""
    shapes = []
    for x in features:
        batch, *inner = x.shape
        del inner[p.channel_dim % x.ndim - 1]
        shapes.append((batch, math.prod(inner)))
    winning = shapes if p.kind == "max_pow" else ()
    first = features[0]
    return (
        [first.new_empty(shape, dtype=dtype) for shape in shapes],
        [first.new_empty(shape, dtype=torch.int32) for shape in winning],
    )


def _map_outputs(features: Tensor, p: Map) -> tuple[Tensor, Tensor]:
    maps, argmax = _new_maps([features], p, compute_dtype(features))
    return maps[0], argmax[0] if argmax else features.new_empty(0, dtype=torch.int32)


@define(
    f"attention_map_forward(Tensor features, {_MAP}) -> (Tensor map, Tensor argmax)",
    _map_outputs,
    Map,
)
def map_forward(features: Tensor, p: Map) -> tuple[Tensor, Tensor]:
    """The unnormalised map and, for `max_pow`, the winning channels."""
    raw, argmax = _map_outputs(features, p)
    kernels(p.backend, "attention").attention_map_forward(features, raw, argmax, p)
    return raw, argmax


def _transfer_outputs(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    with_gradients: bool,
    with_teachers: bool,
    transfer: Transfer,
    p: Map,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    dtype = compute_dtype(*students, *teachers)
    first = students[0]
    shape = (len(students), first.shape[0]) if transfer.reduction == "none" else ()
    sides = (*students, *teachers) if with_teachers else students
    gradients = [torch.empty_like(s) for s in students] if with_gradients else []
    return first.new_empty(shape, dtype=dtype), *_new_maps(sides, p, dtype), gradients


@define(
    "attention_transfer_forward(Tensor[] students, Tensor[] teachers, bool with_gradients, "
    f"bool with_teachers, {_TRANSFER}, {_MAP}) "
    "-> (Tensor loss, Tensor[] slopes, Tensor[] argmax, Tensor[] gradients)",
    _transfer_outputs,
    Transfer,
    Map,
)
def transfer_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    with_gradients: bool,
    with_teachers: bool,
    transfer: Transfer,
    p: Map,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The loss; slopes and argmax of students, and of teachers after them if asked for."""
    outputs = _transfer_outputs(students, teachers, with_gradients, with_teachers, transfer, p)
    kernels(p.backend, "attention").attention_transfer_forward(
        students, teachers, *outputs, transfer, p
    )
    return outputs


_BACKWARD = f"Tensor grad_output, Tensor[] features, Tensor[] slopes, Tensor[] argmax, {_MAP}"


@define(
    f"attention_backward({_BACKWARD}) -> Tensor[]",
    lambda grad_output, features, *_: [torch.empty_like(f) for f in features],
    Map,
)
def backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    slopes: Sequence[Tensor],
    argmax: Sequence[Tensor],
    p: Map,
) -> list[Tensor]:
    """The gradients of features, `grad_output · slope · dF/dA`, for `max_pow` without `dF/dA`.

    `grad_output` is a scalar, or `(pairs, B)`.
    """
    gradients = [torch.empty_like(f) for f in features]
    kernels(p.backend, "attention").attention_backward(
        grad_output, features, slopes, argmax, gradients, p
    )
    return gradients


@define(
    "attention_rescale(Tensor(a!)[] gradients, Tensor grad_output, Tensor[] features, "
    f"Tensor[] slopes, Tensor[] argmax, {_MAP}) -> ()",
    lambda *_: None,
    Map,
)
def rescale(
    gradients: Sequence[Tensor],
    grad_output: Tensor,
    features: Sequence[Tensor],
    slopes: Sequence[Tensor],
    argmax: Sequence[Tensor],
    p: Map,
) -> None:
    """Forward's gradients for another scalar `grad_output`, computed again."""
    kernels(p.backend, "attention").attention_backward(
        grad_output, features, slopes, argmax, gradients, p
    )


def by_winners(slopes: Tensor, features: Tensor, argmax: Tensor, p: Map) -> Tensor:
    """Slopes by a map of `max_pow` as slopes by the features that won: times `d|A|^p/dA`."""
    dim = p.channel_dim % features.ndim
    shape = [*features.shape[:dim], 1, *features.shape[dim + 1 :]]
    won = features.gather(dim, argmax.long().view(shape)).view(slopes.shape).to(slopes.dtype)
    return slopes * (p.p * won.abs().pow(operand(p.p - 1, won)) * won.sign())


def gradient_follows(students: Sequence[Tensor], p: Map) -> bool:
    """Whether the kernels compute gradients in forward, from features that are still in cache.

    On a GPU reading them from there takes longer than backward does.
    """
    return p.backend == "native" and students[0].is_cpu


class AttentionMap(Fused):
    """The unnormalised map. Its normalisation is map-sized and left to torch."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, p: Map) -> Tensor:
        raw, argmax = map_forward(features, p)
        ctx.save_for_backward(*savable(features, argmax))
        ctx.parameters = p
        return raw

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        check_grad_output("attention_map", grad_output)
        features, argmax = ctx.saved_tensors
        with no_grad():
            one, slopes, p = grad_output.new_ones(()), grad_output.contiguous(), ctx.parameters
            if p.kind == "max_pow":
                slopes = by_winners(slopes, features, argmax, p)
            gradients = backward(one, [features], [slopes], [argmax], p)
        return (*differentiate_once("attention_map", (gradients[0],), (features,)), None)


class AttentionTransfer(Fused):
    """The loss of all pairs: `apply(transfer, parameters, *students, *teachers)`."""

    @staticmethod
    def forward(ctx: Any, transfer: Transfer, p: Map, *features: Tensor) -> Tensor:
        count = len(features) // 2
        students, teachers = features[:count], features[count:]
        needed = ctx.needs_input_grad[2:]
        with_teachers = any(needed[count:])
        with_gradients = (
            all(needed[:count])
            and not with_teachers
            and transfer.reduction != "none"
            and eager_gradient(*students)
            and gradient_follows(students, p)
        )
        loss, slopes, argmax, gradients = transfer_forward(
            students, teachers, with_gradients, with_teachers, transfer, p
        )
        kept = features if with_teachers else students
        scaled = with_gradients and scales(*students)
        if scaled:
            ctx.save_for_backward(*kept, *gradients)
        else:
            ctx.save_for_backward(*savable(*kept, *gradients, *slopes, *argmax))
        ctx.parameters, ctx.kept, ctx.with_gradients = p, len(kept), with_gradients
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        tensors, kept, p = ctx.saved_tensors, ctx.kept, ctx.parameters
        features = tensors[:kept]
        gradients = tensors[kept : 2 * kept] if ctx.with_gradients else ()
        if ctx.with_gradients and is_final(grad_output):
            return (None, None, *gradients, *[None] * kept)
        check_grad_output("attention_transfer_loss", grad_output)
        others = tensors[kept + len(gradients) :]
        slopes, argmax = others[:kept], others[kept:]
        needed = ctx.needs_input_grad[2:]
        with no_grad():
            if not ctx.with_gradients:
                to = backward(grad_output, features, slopes, argmax, p)
            else:
                to = for_grad_output(
                    gradients,
                    grad_output,
                    p.backend,
                    lambda to, _: rescale(to, grad_output, features, slopes, argmax, p),
                )
        found = of_wanted(to, needed)
        return (None, None, *differentiate_once("attention_transfer_loss", found, features))


def attention_transfer(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    transfer: Transfer,
    p: Map,
) -> Tensor:
    """The loss of all pairs, differentiable where that is wanted."""
    if wants_gradient(*students, *teachers):
        loss: Tensor = AttentionTransfer.record(transfer, p, *students, *teachers)
        return loss
    return transfer_forward(students, teachers, False, False, transfer, p)[0]


def raw_attention_map(features: Tensor, p: Map) -> Tensor:
    """The unnormalised map, differentiable where that is wanted."""
    if wants_gradient(features):
        raw: Tensor = AttentionMap.record(features, p)
        return raw
    return map_forward(features, p)[0]

"""Calls of losses on logits whose classes are split over the ranks of a process group."""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastkd.dispatch import is_explaining
from fastkd.facts import ONE_TEACHER
from fastkd.losses import checks, linear_head, shards
from fastkd.losses.rows import Reduction, shape_of
from fastkd.ops.ranks import soft_target_rows
from fastkd.ops.top_k_over_ranks import top_k_rows
from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype
from fastkd.ranks import Explained, Ranks
from fastkd.reference.classes import Split
from fastkd.reference.scaled import LOGIT_SCALE
from fastkd.reference.soft_target import divisor_of
from fastkd.reference.top_k import Slots
from fastkd.tensors import are_transforms_active, is_of_torch

P = ParamSpec("P")
R = TypeVar("R")


def keywords(function: Callable[P, R]) -> Callable[P, R]:
    """`checks.keywords` of a loss, which gets `Ranks` in the place of a group.

    DTensors that are sharded on the classes are such a call, of their shards and of their mesh's
    group.
    """
    return checks.keywords(function, _call)


def _call(
    function: Callable[..., R], args: Sequence[Any], kwargs: dict[str, Any]
) -> Callable[[], R] | None:
    """The call over ranks that this one is, if it is one."""
    if kwargs.get("group") is not None:
        return functools.partial(_in_step, function, args, kwargs)
    if not args or is_of_torch(args[0]) or torch.compiler.is_compiling():
        return None
    local = shards.local(inspect.signature(function), args, kwargs)
    if local is None:
        return None
    arguments, mesh = local
    return lambda: shards.replicated(_in_step(function, (), arguments), mesh)


def _in_step(function: Callable[..., R], args: Sequence[Any], kwargs: dict[str, Any]) -> R:
    """A call that raises on every rank if it does on one."""
    ranks = _ranks_of(kwargs["group"])
    try:
        if are_transforms_active():
            raise NotImplementedError("no torch.func transform goes through a loss with a group")
        if kwargs.get("inplace", False) is not False:
            raise ValueError(
                "inplace=True does not go with a group, whose gradient is computed in backward; "
                "pass inplace=False"
            )
        return function(*args, **{**kwargs, "group": ranks})
    except Exception:
        ranks.fail()
        raise


# Compiled code stops in front of it, and with fullgraph=True raises.
_in_step._torchdynamo_disable = True  # type: ignore[attr-defined]
_in_step._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "fastkd: a loss with a group compares what the ranks call, which is not compiled; leave "
    "fullgraph=True out, and compile what is around it"
)


def _ranks_of(group: Any) -> Ranks:
    if isinstance(group, Ranks):  # that have a way of their own to exchange, in tests
        return copy.copy(group)
    if not torch.distributed.is_available() or not isinstance(
        group, torch.distributed.ProcessGroup
    ):
        raise TypeError(
            "group must be a torch.distributed.ProcessGroup to which this process belongs, got "
            f"{type(group).__name__}"
        )
    return Explained(group) if is_explaining() else Ranks(group)


def obstacle(
    teachers: Sequence[Tensor], teacher_is: str, heads: linear_head.Sides | None
) -> str | None:
    """What keeps kernels from a call with a group."""
    is_served = teacher_is == "top_k" or (teacher_is == "logits" and len(teachers) == 1)
    return None if is_served and heads is None else ONE_TEACHER


def run(
    reference: Callable[..., tuple[Tensor, ...]],
    student: Tensor,
    teachers: Sequence[Tensor] | Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    reduce: Reduction,
    ranks: Ranks,
    heads: linear_head.Sides | None,
) -> tuple[Tensor, ...]:
    """The loss and its parts, as `losses.run` has them; the same on every rank."""
    sides = student, *teachers, *linear_head.tensors_of(heads)
    learning = [t.requires_grad for t in (*sides, *temperatures)]
    ranks.agree(
        rows=shape_of(student, p.dim).numel(),
        dtypes=[t.dtype for t in sides],
        backend=p.backend,
        divergence=(p.divergence, p.beta, len(sides), p.teacher_is),
        temperatures=(p.temperature, p.teacher_temperature, len(temperatures)),
        weights=(p.soft_weight, p.hard_weight, p.label_smoothing, p.weights),
        reduction=(p.reduction, p.ignore_index, *reduce.kind, labels is None),
        slots=_kept(teachers),
        learning=(torch.is_grad_enabled(), learning),
    )
    dtype = compute_dtype(student, *teachers)
    if p.backend == "reference":
        split = Split(ranks)
        heat = [split.spread(t) for t in temperatures]
        if heads is not None:
            student, teachers = heads.materialized(student, teachers, labels, p, split.spread)
        if isinstance(teachers, Slots):
            teachers = teachers.each(split.spread)
        loss, *of_parts = reference(student, teachers, labels, p, heat, split)
        return reduce.of(split.share(loss)), *of_parts
    if isinstance(teachers, Slots):
        rows, parts = top_k_rows(student, teachers, labels, p, temperatures, ranks)
    else:
        (teacher,) = teachers
        rows, parts = soft_target_rows(student, teacher, labels, p, temperatures, ranks)
    divisor = divisor_of(rows.numel(), ranks.classes, rows, labels, p)

    def reduced(x: Tensor) -> Tensor:
        found = x / divisor / LOGIT_SCALE
        return found if p.reduction == "none" else found.sum()

    return reduce.of(reduced(rows)).to(dtype), *(reduced(x).to(dtype) for x in parts)


def _kept(teachers: Sequence[Tensor] | Slots) -> tuple[int, bool]:
    """How many classes a teacher kept of each row, and whether the student has only these."""
    if isinstance(teachers, Slots):
        return teachers.indices.shape[-1], teachers.listed_only
    return 0, False

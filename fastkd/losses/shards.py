"""DTensors that are sharded on the classes, as the shards and the group that they are."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastkd.logits import TopK


def local(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Any] | None:
    """The arguments of a call by name, with this rank's tensors and a group; and the mesh.

    None where the call is no such one: the student is no DTensor, or is not split on the classes
    and nothing else, or other tensors are no DTensors, or teachers are split in another way.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    try:
        arguments = signature.bind(*args, **kwargs).arguments
        student, dim = arguments["student_logits"], arguments.get("dim", -1)
        if tensors is None or not isinstance(student, tensors.DTensor):
            return None
        split = [placement.is_shard(dim % student.ndim) for placement in student.placements]
    except (TypeError, ZeroDivisionError):  # which the loss says better
        return None
    others = [placement.is_replicate() for placement in student.placements]
    if split.count(True) != 1 or others.count(False) != 1:
        return None
    teacher = arguments.get("teacher_logits")
    # What a teacher kept is the same on every rank.
    sides = [] if isinstance(teacher, TopK) else pytree.tree_leaves(teacher)
    given: list[Any] = [x for x in pytree.tree_leaves(dict(arguments)) if isinstance(x, Tensor)]
    if not all([isinstance(x, tensors.DTensor) for x in given]):
        return None
    mesh: Any = student.device_mesh
    same = [(x.device_mesh, x.placements) == (mesh, student.placements) for x in sides]
    if not all([x.device_mesh == mesh for x in given]) or not all(same):
        return None
    whole = [tensors.Replicate()] * mesh.ndim

    def here(x: Any) -> Any:
        if not isinstance(x, tensors.DTensor):
            return x
        is_side = x is student or any([x is side for side in sides])
        return (x if is_side else x.redistribute(placements=whole)).to_local()

    found = pytree.tree_map(here, dict(arguments))
    return {**found, "group": mesh.get_group(split.index(True))}, mesh


def replicated(result: Any, mesh: Any) -> Any:
    """A loss, or a loss and its parts, that every rank of the mesh has."""
    tensors = sys.modules["torch.distributed.tensor"]
    placements = [tensors.Replicate()] * mesh.ndim
    wrap: Callable[[Tensor], Any] = lambda x: tensors.DTensor.from_local(  # noqa: E731
        x, mesh, placements, run_check=False
    )
    return pytree.tree_map_only(torch.Tensor, wrap, result)

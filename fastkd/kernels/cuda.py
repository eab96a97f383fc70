"""Hands CUDA tensors to the compiled module, on the current stream of their device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd.dispatch import Facts, Refusal
from fastkd.kernels.compiled import (
    DTYPES,
    REDUCTIONS,
    address,
    addresses,
    as_buffer,
    loaded,
    map_parameters,
    soft_target_parameters,
    transfer_parameters,
    view,
    views,
)
from fastkd.kernels.refusals import ON_GPUS, USE_REFERENCE
from fastkd.reference.precision import compute_dtype

if TYPE_CHECKING:
    from fastkd.ops import attention as attention_ops
    from fastkd.ops import hint as hint_ops
    from fastkd.ops import soft_target as soft_target_ops

# Private to torch; the public way makes a Stream object first.
_raw_stream: Any = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda index: torch.cuda.current_stream(index).cuda_stream,
)

OLDEST_ARCHITECTURE = 80  # what csrc/architectures.py allows


def refuse(module: Any, facts: Facts) -> Refusal | None:
    """Why the compiled module does not serve a call on a CUDA device, or None if it does."""
    if torch.version.hip is not None:
        return Refusal("the compiled module is for NVIDIA's GPUs, not AMD's", expected=True)
    if facts.loss not in ON_GPUS:
        return Refusal(f"this release has no CUDA kernels for {facts.loss}", USE_REFERENCE)
    archs = module.cuda_archs()
    if not archs:
        return Refusal(
            "the compiled module was built without CUDA kernels",
            "`python -m fastkd.info` tells why; with a CUDA compiler, reinstall fastkd with "
            "FASTKD_BUILD=cuda.",
        )
    index = torch.device(facts.device).index
    problem = module.cuda_problem(index)
    return _cannot_run(archs, facts.device, index, problem) if problem else None


def _cannot_run(archs: list[str], device: str, index: int, problem: str) -> Refusal:
    """The module holds no kernels for this GPU, or its driver does not take them."""
    capability = "{}{}".format(*torch.cuda.get_device_capability(index))
    reason = (
        f"the compiled module's CUDA kernels, for sm_{', sm_'.join(archs)}, do not run on "
        f"{device}, which is sm_{capability} ({problem})"
    )
    if int(capability) < OLDEST_ARCHITECTURE:
        return Refusal(f"{reason}; they need sm_{OLDEST_ARCHITECTURE} or newer", expected=True)
    if capability in archs:
        remedy = "Update the driver, or reinstall fastkd with a CUDA compiler as old as the driver."
    else:
        wanted = ";".join([*archs, capability])
        remedy = f'Reinstall fastkd with FASTKD_CUDA_ARCHS="{wanted}".'
    return Refusal(reason, remedy)


def _place(tensor: Tensor) -> tuple[int, int]:
    index = tensor.get_device()
    return index, _raw_stream(index)


def _scratch(like: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def soft_target_forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    loss: Tensor,
    statistics: Tensor | None,
    gradient: Tensor | None,
    p: "soft_target_ops.Parameters",
) -> None:
    """Fill the loss, and those that are wanted of the rows' statistics and the gradient."""
    if labels is not None:
        labels = labels.contiguous()
    module = loaded()
    scratch = _scratch(loss, module.cuda_soft_target_scratch_bytes)
    sides = views(student, teacher, loss, gradient)
    module.cuda_soft_target_forward(
        *sides[:2],
        address(labels),
        sides[2],
        address(statistics),
        sides[3],
        scratch.data_ptr(),
        soft_target_parameters(p, 0),
        *_place(loss),
    )


def soft_target_backward(
    grad_output: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    statistics: Tensor,
    to_student: Tensor | None,
    to_teacher: Tensor | None,
    p: "soft_target_ops.Parameters",
    in_place: bool = False,
) -> None:
    """Fill the gradients that are wanted."""
    grad_output = as_buffer(grad_output, statistics.dtype)
    if labels is not None:
        labels = labels.contiguous()
    loaded().cuda_soft_target_backward(
        *views(grad_output, student, teacher),
        address(labels),
        statistics.data_ptr(),
        *views(to_student, to_teacher),
        in_place,
        soft_target_parameters(p, 0),
        *_place(grad_output),
    )


def soft_target_ensemble(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: tuple[float, ...],
    labels: Tensor | None,
    loss: Tensor | None,
    parts: Tensor | None,
    gradient: Tensor | None,
    grad_output: Tensor | None,
    p: "soft_target_ops.Parameters",
    in_place: bool = False,
) -> None:
    """Fill those that are wanted of the loss, its parts, and the student's gradient."""
    if grad_output is not None:
        grad_output = as_buffer(grad_output, compute_dtype(student, *teachers))
    if labels is not None:
        labels = labels.contiguous()
    module = loaded()
    scratch = _scratch(student, module.cuda_soft_target_scratch_bytes)
    module.cuda_soft_target_ensemble(
        view(student),
        views(*teachers),
        weights,
        address(labels),
        *views(loss),
        address(parts),
        *views(gradient, grad_output),
        in_place,
        scratch.data_ptr(),
        soft_target_parameters(p, 0),
        *_place(student),
    )


def multiply(gradients: Sequence[Tensor], grad_output: Tensor) -> None:
    """Multiply each gradient in place by a scalar, which is read on the device."""
    loaded().cuda_multiply(views(*gradients), view(grad_output), *_place(grad_output))


def hint_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    gradients: Sequence[Tensor],
    p: "hint_ops.Parameters",
) -> None:
    """Fill the loss, and the students' gradients if there are any."""
    module, reduction = loaded(), REDUCTIONS[p.reduction]
    pairs = views(*students), views(*teachers)
    to = views(*gradients)
    size = module.cuda_scratch_bytes
    if p.reduction == "none":
        size = module.cuda_hint_scratch_bytes(*pairs, to, DTYPES[loss.dtype])
    scratch = _scratch(loss, size)
    module.cuda_hint_forward(
        *pairs, view(loss), to, scratch.data_ptr(), p.scale, reduction, *_place(loss)
    )


def hint_backward(
    grad_output: Tensor,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    p: "hint_ops.Parameters",
    in_place: bool = False,
) -> None:
    """Fill the gradients that are wanted, of students and then of teachers."""
    grad_output = as_buffer(grad_output, compute_dtype(*students, *teachers))
    loaded().cuda_hint_backward(
        view(grad_output),
        views(*students),
        views(*teachers),
        views(*gradients),
        in_place,
        p.scale,
        REDUCTIONS[p.reduction],
        *_place(grad_output),
    )


def attention_map_forward(
    features: Tensor, raw: Tensor, winners: Tensor, p: "attention_ops.MapParameters"
) -> None:
    """Fill the unnormalised map, and the winners of max_pow."""
    loaded().cuda_attention_map_forward(
        *views(features, raw), winners.data_ptr(), map_parameters(p, 0), *_place(raw)
    )


def attention_transfer_forward(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    loss: Tensor,
    slopes: Sequence[Tensor],
    winners: Sequence[Tensor],
    gradients: Sequence[Tensor],  # none: backward computes them
    transfer: "attention_ops.TransferParameters",
    p: "attention_ops.MapParameters",
) -> None:
    """Fill the loss, slopes and winners."""
    module, of_slopes = loaded(), views(*slopes)
    scratch = _scratch(loss, module.cuda_attention_scratch_bytes(of_slopes, len(students)))
    module.cuda_attention_transfer_forward(
        views(*students),
        views(*teachers),
        view(loss),
        of_slopes,
        addresses(winners, slopes),
        scratch.data_ptr(),
        transfer_parameters(transfer),
        map_parameters(p, 0),
        *_place(loss),
    )


def attention_backward(
    grad_output: Tensor,
    features: Sequence[Tensor],
    slopes: Sequence[Tensor],
    winners: Sequence[Tensor],
    gradients: Sequence[Tensor],
    p: "attention_ops.MapParameters",
) -> None:
    """Fill the features' gradients."""
    grad_output = as_buffer(grad_output, slopes[0].dtype)
    loaded().cuda_attention_backward(
        view(grad_output),
        views(*features),
        views(*slopes),
        addresses(winners, slopes),
        views(*gradients),
        map_parameters(p, 0),
        *_place(grad_output),
    )


def squared_distances(x: Tensor, to: Tensor) -> None:
    """Fill the squared distances between the rows of `x`."""
    loaded().cuda_squared_distances(*views(x, to), *_place(to))


def rkd_distance(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """Fill the loss on relative distances, and its slopes by the student's squared ones."""
    module = loaded()
    scratch = _scratch(loss, module.cuda_rkd_scratch_bytes)
    sides = views(student, teacher, loss, slopes)
    module.cuda_rkd_distance(*sides, scratch.data_ptr(), delta, *_place(loss))


def rkd_angle(
    student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None, delta: float
) -> None:
    """Fill the loss on angles, and its slopes by the student's squared distances."""
    module = loaded()
    scratch = _scratch(loss, module.cuda_rkd_scratch_bytes)
    sides = views(student, teacher, loss, slopes)
    module.cuda_rkd_angle(*sides, scratch.data_ptr(), delta, *_place(loss))


def similarity(student: Tensor, teacher: Tensor, loss: Tensor, slopes: Tensor | None) -> None:
    """Fill the loss, and its slopes by the student's Gram matrix."""
    module = loaded()
    scratch = _scratch(loss, module.cuda_similarity_scratch_bytes(len(student)))
    sides = views(student, teacher, loss, slopes)
    module.cuda_similarity(*sides, scratch.data_ptr(), *_place(loss))

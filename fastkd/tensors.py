"""Whether the memory of a tensor holds its values, so that a kernel may read it.

A kernel that reads memory goes around torch's dispatcher, and so around all that the dispatcher
would do first: negate, fill in zeros that have no memory, take a batch apart, differentiate. What
that could be is asked here, of every tensor that enters forward or backward. Each question is a
call of torch's that takes 60 ns; comparing a tensor's dispatch keys, which would be one question
for most of them, takes 600.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd.facts import DTENSOR, FORWARD_MODE, TRACE, TRANSFORM

# Private to torch, all of these; tests/test_private_names.py takes each away. Where one of the
# first two is missing, operators always go through the dispatcher; where one of the last two is,
# torch raises what it has to say itself. The others have a second way.
dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_is_zero: Callable[[Tensor], bool] = getattr(Tensor, "_is_zerotensor", lambda _: True)
_functorch: Any = getattr(torch._C, "_functorch", None)
_tracing_state: Callable[[], object] = getattr(
    torch._C,
    "_get_tracing_state",
    lambda: torch.jit.is_tracing() or None,  # type: ignore[attr-defined]
)
_innermost_transform: Callable[[], Any] = getattr(
    _functorch, "peek_interpreter_stack", lambda: None
)


def _has_innermost_transform() -> bool:
    return _innermost_transform() is not None


# A fact of the trace, by what torch.compiler.assume_constant_result does.
_has_innermost_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]

are_transforms_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", _has_innermost_transform
)
_is_wrapped: Callable[[Tensor], bool] = getattr(
    _functorch, "is_functorch_wrapped_tensor", lambda _: False
)
_is_batched: Callable[[Tensor], bool] = getattr(
    _functorch, "is_legacy_batchedtensor", lambda _: False
)

# What an older torch is not asked to do: see docs/versions.md.
_IS_NEW = torch.__version__ >= "2.13"  # compared as versions are

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_TENSORS_OR_NONE = _TENSORS | {type(None)}
_NO_TENSORS = frozenset({float, int, bool, str, type(None)})
_SEQUENCES = frozenset({list, tuple})


def is_of_torch(x: object) -> bool:
    """Whether it is a tensor of torch's own class, and of no subclass."""
    return type(x) in _TENSORS


def may_have_tangents() -> bool:
    """Whether a level of forward mode is open; without one torch makes no dual number."""
    level = getattr(forward_ad, "_current_level", None)
    if level is not None:
        return level >= 0
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:
        return False
    return True


def is_plain(tensor: Tensor) -> bool:
    """Whether memory holds the values of a tensor, and no subclass of tensors listens to it."""
    return (
        type(tensor) in _TENSORS
        and not tensor.is_neg()
        and not _is_zero(tensor)
        and not _is_wrapped(tensor)
        and not _is_batched(tensor)
    )


def can_be_read(tensor: Tensor) -> bool:
    """Whether its values can be looked at: compiled code and GPUs would have to wait for them."""
    is_known = not torch.compiler.is_compiling() and tensor.device.type == "cpu"
    return is_known and is_plain(tensor)


def nobody_listens(args: Sequence[Any]) -> bool:
    """Whether an operator called with these may read memory, without torch's dispatcher.

    Compilers, modes and subclasses among the tensors need the dispatcher; so do negated tensors and
    zeros without memory. Tensors that a transform has wrapped do not come this far.
    """
    return not torch.compiler.is_compiling() and not dispatch_modes() and _are_as_they_are(args)


def _are_as_they_are(args: Sequence[Any]) -> bool:
    for arg in args:
        kind = type(arg)
        if kind in _NO_TENSORS:
            continue
        if kind in _TENSORS:
            if arg.is_neg() or _is_zero(arg):
                return False
        elif kind not in _SEQUENCES or (arg and not _are_as_they_are(arg)):
            return False
    return True


def obstacle_to_kernels(tensors: Sequence[Tensor | None]) -> str | None:
    """What keeps kernels from serving a call with these tensors, whatever their device and dtype.

    Negated tensors, those of zeros without memory and other subclasses are none: the dispatcher
    makes of them what an operator can read.

    Raises:
        TypeError: some tensors are DTensors and some are not.
        NotImplementedError: they are DTensors, and torch is older than 2.13.
    """
    if are_transforms_active():
        return TRANSFORM
    if _tracing_state() is not None:
        return TRACE
    if may_have_tangents() and any([has_tangent(t) for t in tensors]):
        return FORWARD_MODE
    are_known = _TENSORS_OR_NONE.issuperset(map(type, tensors))
    if not are_known and any([_is_dtensor(t) for t in tensors]):
        _check_all_are_dtensors(tensors)
        _check_torch_splits_losses()
        return DTENSOR
    return None


def obstacle_while_compiling(kinds: Sequence[type[Tensor]]) -> str | None:
    """The same of tensors of these types while torch.compile traces.

    Torch enters the transforms and levels that it meets there, and its tensors tell no more.
    """
    if are_transforms_active():
        return TRANSFORM
    if may_have_tangents():
        return FORWARD_MODE
    if not any([issubclass(kind, _dtensor()) for kind in kinds]):
        return None
    _check_torch_splits_losses()
    return DTENSOR


def is_one_gradient() -> bool:
    """Whether the transforms that are active are one, of `torch.func.grad` or `vjp`.

    Never before torch 2.13, whose `torch.compile` traces no autograd function in one either.
    """
    transform = _innermost_transform()
    try:
        is_gradient = transform.level() == 1 and transform.key() == _functorch.TransformType.Grad
        return _IS_NEW and is_gradient
    except AttributeError:  # there is none, or torch has not these names
        return False


is_one_gradient._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which torch 2.8 answers with True in all compiled code."""
    return torch.compiler.is_exporting()


is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_tangent(tensor: Tensor | None) -> bool:
    """Whether a tensor is a dual number of the current level of forward mode."""
    return (
        tensor is not None
        and may_have_tangents()
        and forward_ad.unpack_dual(tensor).tangent is not None
    )


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is a transform's own, such as a batch of the tensors that it stands for."""
    return _is_wrapped(tensor) or _is_batched(tensor)


def _dtensor() -> Any:
    """The class of DTensors; none where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def _is_dtensor(tensor: Tensor | None) -> bool:
    return isinstance(tensor, _dtensor())


def _check_all_are_dtensors(tensors: Sequence[Tensor | None]) -> None:
    if not all([t is None or _is_dtensor(t) for t in tensors]):
        kinds = [type(t).__name__ for t in tensors if t is not None]
        raise TypeError(f"the tensors of a call must all be DTensors or none, got {kinds}")


def _check_torch_splits_losses() -> None:
    if not _IS_NEW:
        raise NotImplementedError(
            f"DTensors need torch 2.13 or newer, got {torch.__version__}; where each rank has "
            "whole samples, pass `x.to_local()`"
        )


def unshard(tensor: Tensor, dim: int) -> Tensor:
    """A tensor of which each rank has all along `dim`: a DTensor is gathered where it has not."""
    if not _is_dtensor(tensor):
        return tensor
    sharded: Any = tensor
    whole = sys.modules["torch.distributed.tensor"].Replicate()
    return sharded.redistribute(
        placements=[whole if p.is_shard(dim % tensor.ndim) else p for p in sharded.placements]
    )

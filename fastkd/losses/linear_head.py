"""Linear heads on the sides of a loss: checks, and logits that stand in for theirs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.logits import LinearHead
from fastkd.losses import checks
from fastkd.losses.rows import Reduction
from fastkd.ops.linear_head import linear_head
from fastkd.ops.linear_head_chunks import bytes_of_row, free_bytes, pick, product_dtype
from fastkd.parameters import Heads, SoftTarget
from fastkd.precision import compute_dtype
from fastkd.ranks import Ranks
from fastkd.reference.linear_head import logits as logits_of
from fastkd.reference.top_k import Slots


# Not a NamedTuple: within compiled code torch 2.8 makes none that holds tensors.
@dataclasses.dataclass(frozen=True)
class Sides:
    """The sides of a call of which one at least is a head; None stands for one that is none.

    Their classes may be split over ranks.
    """

    student: LinearHead | None
    teacher: LinearHead | None
    parameters: Heads
    are_split: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """What is the same on all ranks of the heads, besides dtypes and the chunk size."""
        heads = self.student, self.teacher
        return tuple([h and (h.hidden.shape[-1], h.scale, h.softcap) for h in heads])

    def tensors(self) -> tuple[Tensor, ...]:
        heads = [head for head in (self.student, self.teacher) if head is not None]
        return tuple([x for head in heads for x in _tensors(head)])

    def materialized(
        self,
        student: Tensor,
        teachers: Any,
        labels: Tensor | None,
        p: SoftTarget,
        of_hidden: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    ) -> tuple[Tensor, Any]:
        """Both sides with logits, of what a function makes of the hidden states."""
        counts = None if labels is None else labels != p.ignore_index

        def logits(head: LinearHead, stand_in: Tensor) -> Tensor:
            dtype = product_dtype(stand_in.dtype, stand_in.device)
            head = dataclasses.replace(head, hidden=of_hidden(head.hidden))
            return logits_of(head, counts, dtype, p.num_classes)

        if self.student is not None:
            student = logits(self.student, student)
        if self.teacher is not None:
            teachers = [logits(self.teacher, teachers[0])]
        return student, teachers

    def notes(self) -> list[str]:
        """How many rows have logits at a time, for `fastkd.explain`."""
        device = self.tensors()[0].device
        classes = [0 if h is None else len(h.weight) for h in (self.student, self.teacher)]
        of_row, free = bytes_of_row(self.parameters, classes, device), free_bytes(device)
        size, how = self.parameters.chunk_size, "given"
        if not size:
            measured = "unknown" if free is None else f"{free / 2**30:.1f} GiB"
            size, how = pick(of_row, free, device), f"picked, free memory: {measured}"
            how += "; the ranks take the least that one of them picks" if self.are_split else ""
        return [
            f"chunk_size={size} ({how}): kernels hold the logits of {size} rows at a time, "
            f"{size * of_row / 2**20:.1f} MiB; the reference holds all of them"
        ]


def sides_of(
    student: Any, teacher: Any, dim: Any, chunk_size: Any, inplace: Any, are_split: bool
) -> tuple[Tensor, Any, Sides | None]:
    """Both sides, with logits without memory in the place of heads, and the heads if there are any.

    All checks of logits then hold for heads, too.
    """
    if not (isinstance(student, LinearHead) or isinstance(teacher, LinearHead)):
        if chunk_size is not None:
            raise ValueError(
                "chunk_size is how many rows of a fastkd.LinearHead have logits at a time, and "
                f"neither side is one: leave it out, got {chunk_size!r}"
            )
        return student, teacher, None
    heads = [side if isinstance(side, LinearHead) else None for side in (student, teacher)]
    if chunk_size is not None and checks.integer("chunk_size", chunk_size) < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if inplace is not False and checks.flag("inplace", inplace):
        raise ValueError(
            "inplace=True writes over the student's logits, which with a LinearHead on a side do "
            "not exist as a whole: leave it out"
        )
    names = "student_logits", "teacher_logits"
    for name, head in zip(names, heads, strict=True):
        if head is not None:
            _check(name, head)
    ndim = next(head.hidden.ndim for head in heads if head is not None)
    if checks.dimension("dim", dim, ndim) != ndim - 1:
        raise ValueError(
            f"dim must be the last dimension with a LinearHead, -1 or {ndim - 1}, got {dim}"
        )
    dtypes = ["float32" if h is None else _name(_product_dtype(h)) for h in heads]
    scales = [1.0 if h is None else float(h.scale) for h in heads]
    parameters = Heads(
        student_is_head=heads[0] is not None,
        scale=scales[0],
        dtype=dtypes[0],
        teacher_is_head=heads[1] is not None,
        teacher_scale=scales[1],
        teacher_dtype=dtypes[1],
        listed_only=False,
        chunk_size=0 if chunk_size is None else chunk_size,
    )
    student, teacher = (
        side if head is None else _stand_in(head)
        for side, head in zip((student, teacher), heads, strict=True)
    )
    return student, teacher, Sides(heads[0], heads[1], parameters, are_split)


def tensors_of(sides: Sides | None) -> tuple[Tensor, ...]:
    """Of the heads, if there are any."""
    return () if sides is None else sides.tensors()


def _tensors(head: LinearHead) -> list[Tensor]:
    return [head.hidden, head.weight, *([] if head.bias is None else [head.bias])]


def _check(name: str, head: LinearHead) -> None:
    tensors = zip(("hidden", "weight", "bias"), _tensors(head), strict=False)
    named = [(f"{name}.{field}", x) for field, x in tensors]
    checks.floating(*named)
    (of_hidden, hidden), (of_weight, weight), *_ = named
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{of_hidden} must have the shape (*rows, H) and {of_weight} (V, H), "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if head.bias is not None and head.bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}.bias must have the shape (V,), {tuple(weight.shape[:1])}, "
            f"got {tuple(head.bias.shape)}"
        )
    for other, x in named[1:]:
        checks.same_device(of_hidden, hidden, other, x)
        if x.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"{of_hidden} and {other} must have the same dtype where autocast is off, "
                f"got {hidden.dtype} and {x.dtype}"
            )
    checks.number(f"{name}.scale", head.scale)
    if head.softcap is not None:
        checks.number(f"{name}.softcap", head.softcap, above=0)


def _product_dtype(head: LinearHead) -> torch.dtype:
    """That of the logits: autocast's where it is on, which leaves float64 alone."""
    device = head.hidden.device.type
    dtype = head.hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _stand_in(head: LinearHead) -> Tensor:
    """A tensor of the logits' shape, dtype and device, without their memory."""
    one = head.hidden.detach().new_empty((), dtype=_product_dtype(head))
    return one.expand(*head.hidden.shape[:-1], len(head.weight))


def _softcap(head: LinearHead | None) -> float:
    return 0.0 if head is None or head.softcap is None else float(head.softcap)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(
    reference: Callable[..., tuple[Tensor, ...]],
    sides: Sides,
    student: Tensor,
    teachers: Sequence[Tensor] | Slots,
    labels: Tensor | None,
    p: SoftTarget,
    temperatures: Sequence[Tensor],
    reduce: Reduction,
    with_parts: bool,
    ranks: Ranks | None = None,
) -> tuple[Tensor, ...]:
    """The loss, and the parts of each row where they are wanted."""
    if p.backend == "reference":
        student, teachers = sides.materialized(student, teachers, labels, p)
        loss, *parts = reference(student, teachers, labels, p, temperatures)
        return reduce.of(loss), *parts
    of_student = [student] if sides.student is None else _tensors(sides.student)
    of_teachers: Sequence[Tensor] = [*teachers]
    heads = sides.parameters
    if isinstance(teachers, Slots):
        of_teachers = [teachers.indices, *teachers]
        heads = heads._replace(listed_only=teachers.listed_only)
    elif sides.teacher is not None:
        of_teachers = _tensors(sides.teacher)
    if sides.student is None:
        heads = heads._replace(dtype=_name(student.dtype))
    if sides.teacher is None:
        heads = heads._replace(teacher_dtype=_name(compute_dtype(*teachers)))
    weight = reduce.row_weight
    sums = reduce.sums and not (weight is not None and weight.requires_grad)
    factor = reduce.factor(compute_dtype(student, *teachers)) if sums else None
    p = p._replace(softcap=_softcap(sides.student), teacher_softcap=_softcap(sides.teacher))
    inputs = of_student, of_teachers, labels, heads, p, temperatures
    loss, *parts = linear_head(*inputs, with_parts, sums, factor, ranks)
    return loss if sums else reduce.of(loss), *parts

"""Teachers that kept k classes of each row."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.parameters import SoftTarget
from fastkd.precision import widest_dtype
from fastkd.reference.divergence import DIVERGENCES, Sides, infinite
from fastkd.reference.scaled import LOGIT_SCALE, largest, shifted
from fastkd.reference.temperatures import Temperatures, over, times

# What the classes that no slot lists weigh together at least: rounded probabilities of those that
# are listed may sum to more than 1.
LEAST_REST = 1e-7
_MOST = 2**31 - 1  # what int32 holds


# Not a NamedTuple: within compiled code torch 2.8 makes none that holds tensors.
@dataclasses.dataclass(frozen=True)
class Slots:
    """The classes that a teacher kept, as the losses use them, in the order of the classes.

    Iterating gives the tensors that may have a gradient.

    Attributes:
        indices: int32, of shape `(*rows, k)`, ascending in each row; padding is -1 and comes first.
        log_p: their log-probabilities, temperature and tail applied; -inf for padding.
        log_rest: of each row, that of all other classes as one more; None without that.
        listed_only: whether the student's softmax is over the slots, too.
    """

    indices: Tensor
    log_p: Tensor
    log_rest: Tensor | None
    listed_only: bool

    def __iter__(self) -> Iterator[Tensor]:
        yield self.log_p
        if self.log_rest is not None:
            yield self.log_rest


def slots_of(
    values: Tensor,
    indices: Tensor,
    lse: Tensor | None,
    tail: str,
    temperature: float | Tensor,
    classes: int,
    ignored: Tensor | None,
    dtype: torch.dtype,
) -> Slots:
    """The slots in the precision of the loss, from what the teacher kept of `classes` classes.

    The rest of a row is what its probabilities lack of 1: it is taken in float64 where there is
    such, because float32 has few digits for it. `temperature` is 1 for what is used as it is.
    """
    if not indices.dtype.is_signed:  # of which torch compares few
        indices = indices.to(torch.int64)
    is_slot = (indices >= 0) & (values != -torch.inf)
    if ignored is not None:  # such a row may hold anything
        is_slot = is_slot & ~ignored[..., None]
    found = indices.clamp(max=_MOST) if indices.dtype == torch.int64 else indices
    found, order = found.to(torch.int32).masked_fill(~is_slot, -1).sort(-1)
    is_padding = found < 0
    wide = widest_dtype(values.device)
    logits = values.gather(-1, order).to(wide).masked_fill(is_padding, 0)
    if isinstance(temperature, Tensor):
        temperature = temperature if ignored is None else temperature.masked_fill(ignored, 1)
        temperature = temperature.to(wide)[..., None]
    log_p = logits / temperature
    log_rest = None
    if tail in ("renormalize", "renormalize_both"):
        # Not -inf: a row of padding alone has no sum.
        log_p = log_p.masked_fill(is_padding, torch.finfo(wide).min).log_softmax(-1)
    elif lse is not None:
        lse = lse if ignored is None else lse.masked_fill(ignored, 0)
        log_p = log_p - lse.to(wide)[..., None]
    log_p = log_p.masked_fill(is_padding, -torch.inf)
    if tail == "bucket":
        log_rest = (1 - log_p.exp().sum(-1)).clamp(min=LEAST_REST).log().to(dtype)
        if found.shape[-1] >= classes:
            listed = (found[..., 1:] != found[..., :-1]).sum(-1) + ~is_padding[..., 0]
            log_rest = log_rest.masked_fill(listed >= classes, -torch.inf)
    return Slots(found, log_p.to(dtype), log_rest, tail == "renormalize_both")


def sides_of(
    log_p: Tensor,
    log_q: Tensor,
    logits: Tensor,
    beta: float,
    unit: float | Tensor = 1.0,
    log_ratio: Tensor | None = None,
) -> Sides:
    """What divergences are made of, of slots in the place of classes.

    The ratio is log(p / q) times the unit, and a logit is -inf where the student excludes a class.
    """
    return Sides(
        student=logits,
        teachers=[log_p],
        log_ratio=log_p - log_q if log_ratio is None else log_ratio,
        shares=[log_p.exp()],
        log_parts=lambda: [],
        weights=(1.0,),
        q=lambda: log_q.exp(),
        lift=1.0,
        unit=unit,
        beta=beta,
        normalized=False,
    )


def divergence_rows(student: Tensor, slots: Slots, p: SoftTarget, by: Temperatures) -> Tensor:
    """`T * D` of rows, scaled. Logarithms are multiplied by T: finite of any finite logits."""
    is_padding, unit = slots.indices < 0, by.student * LOGIT_SCALE
    classes = slots.indices.clamp(min=0).to(torch.int64)
    listed = student.gather(-1, classes).masked_fill(is_padding, -torch.inf)
    logits, log_p = listed, slots.log_p
    whole = listed if slots.listed_only else student
    top, log_total, is_empty = _log_sum_exp(whole, by.student)
    if slots.listed_only:  # a row of padding alone has nothing that could be missing
        is_empty = is_empty & ~is_padding.all(-1, keepdim=True)
    log_total = log_total.masked_fill(is_empty, torch.nan)
    log_q = shifted(listed, top) - times(log_total, unit)
    if slots.log_rest is not None:
        count = torch.zeros_like(student, dtype=torch.int32)
        count = count.scatter_add(-1, classes, (~is_padding).to(torch.int32))
        rest = student.masked_fill(count > 0, -torch.inf)
        top_of_rest, log_rest, is_empty = _log_sum_exp(rest, by.student)
        of_rest = shifted(top_of_rest, top) + times(log_rest - log_total, unit)
        logits = torch.cat([listed, largest(rest)], -1)
        log_q = torch.cat([log_q, of_rest.masked_fill(is_empty, -torch.inf)], -1)
        log_p = torch.cat([log_p, slots.log_rest[..., None]], -1)
    nothing = (log_p == -torch.inf) & (logits == -torch.inf)
    log_q = log_q.masked_fill(nothing, -torch.inf)
    ratio = (times(log_p, unit) - log_q).masked_fill(nothing, 0)
    sides = sides_of(log_p, over(log_q, unit), logits, p.beta, unit, ratio)
    if p.divergence == "reverse_kl":
        return _reverse_kl(sides)
    return DIVERGENCES[p.divergence].rows(sides)


def _log_sum_exp(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, the maximum, and the logarithm of the sum of exponentials relative to it.

    Both are 0 where there is no class, which is the third result.
    """
    top = largest(logits)
    is_empty = top == -torch.inf
    top = top.masked_fill(is_empty, 0)
    total = over(logits - top, temperature).exp().sum(-1, keepdim=True)
    return top, total.masked_fill(is_empty, 1).log(), is_empty


def _reverse_kl(sides: Sides) -> Tensor:
    """`sum(q * log(q / p))`. Where two slots have one class q does not sum to 1."""
    ratio, q = (-sides.log_ratio).masked_fill(sides.student == -torch.inf, 0), sides.q()
    return infinite(ratio, q) + (q * ratio.masked_fill(q == 0, 0)).sum(-1)

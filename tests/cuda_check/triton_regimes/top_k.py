"""Teachers that kept k classes of each row."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, bfloat16, float64

from fastkd.kernels.triton import top_k, top_k_sums
from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype

from .regime import MAPS, Narrow, Regime, meta

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl")
_BUCKETS = {f"bucket, {name}" for name in _DIVERGENCES}
_OTHERS = {
    *("renormalize", "zero, loss only", "in place", "backward", "temperatures"),
    *("both, hard", "both, forward_kl", "both, jsd", "capped"),
}
_SUMS_OF_SHARDS = {f"shard, {name} sums" for name in ("bucket", "temperatures", "both")}
_SHARDS = _SUMS_OF_SHARDS | {
    f"shard, {name} {use}"
    for name in (*_DIVERGENCES, "temperatures", "both")
    for use in ("losses", "gradient")
}
_FEW_SHARDS = _SUMS_OF_SHARDS | {
    f"shard, {name} gradient" for name in ("forward_kl", "skew_kl", "temperatures", "both")
}

# Slots, labels and numbers of rows; and where no logits but those of slots are read.
_SLOTS, _SLOTS_ALONE = Narrow(54, 8), Narrow(26, 8, has_elements=False)
# And what shards have exchanged of rows.
_SLOTS_OF_SHARDS = Narrow(55, 8)

# A student, the dimension of the classes, k, and the uses that are compiled.
_STUDENTS: dict[str, tuple[Tensor, int, int, set[str]]] = {
    "10 classes": (
        meta(512, 10),
        1,
        3,
        {"bucket, forward_kl", "both, hard", "temperatures"} | _FEW_SHARDS,
    ),
    "1,000 classes": (meta(512, 1000), 1, 10, _BUCKETS | _OTHERS | _SHARDS),
    "1,000 classes, many slots": (
        meta(512, 1000),
        1,
        100,
        {"bucket, forward_kl", "both, jsd", "temperatures"} | _FEW_SHARDS,
    ),
    "4,096 classes": (meta(512, 4096), 1, 4096, {"bucket, forward_kl", "bucket, jsd", "both, jsd"}),
    "32,000 classes": (
        meta(512, 32000),
        1,
        32,
        {"bucket, forward_kl", "renormalize", "both, forward_kl"},
    ),
    "32,000 classes, bfloat16": (
        meta(512, 32000, dtype=bfloat16),
        1,
        100,
        {*_BUCKETS, "backward", "in place", "temperatures", "capped"} | _SHARDS,
    ),
    "50,257 classes, bfloat16": (
        meta(512, 50257, dtype=bfloat16),
        1,
        64,
        {"bucket, forward_kl"},
    ),
    "2,048 classes, float64": (
        meta(512, 2048, dtype=float64),
        1,
        16,
        {"bucket, forward_kl", "bucket, skew_kl", "temperatures"},
    ),
    "5,000 classes, float64": (
        meta(512, 5000, dtype=float64),
        1,
        5000,
        {"bucket, jsd", "bucket, reverse_kl", "both, hard"} | _SHARDS,
    ),
    "rows side by side": (
        MAPS,
        1,
        5,
        {"bucket, forward_kl", "both, forward_kl", "temperatures"} | _FEW_SHARDS,
    ),
}
# Of which elements are accessed less than 16 bytes at a time, or slots by each class for itself.
_NARROW = {
    "10 classes",
    "1,000 classes, many slots",
    "4,096 classes",
    "50,257 classes, bfloat16",
    "5,000 classes, float64",
    "rows side by side",
}


def regimes() -> Iterator[Regime]:
    for name, (student, dim, k, uses) in _STUDENTS.items():
        for regime in _uses(student, dim, k):
            if regime.name in uses:
                narrow = None if name in _NARROW else regime.narrow
                yield Regime(f"top-k, {name}, {regime.name}", regime.launch, narrow)


def _uses(student: Tensor, dim: int, k: int) -> Iterator[Regime]:
    dtype = compute_dtype(student)
    gradient = torch.empty_like(student)
    shape = student.shape[:dim] + student.shape[dim + 1 :]
    labels = student.new_empty(shape, dtype=torch.int64)
    scalar, row = student.new_empty((), dtype=dtype), student.new_empty(shape, dtype=dtype)
    rest, log_p = row.flatten(), student.new_empty(row.numel(), k, dtype=dtype)
    slots = log_p.new_empty(log_p.shape, dtype=torch.int32), log_p
    log_q = log_p.new_empty(row.numel(), k + 1)
    soft = SoftTarget(
        temperature=4.0,
        teacher_temperature=4.0,
        soft_weight=16.0,
        hard_weight=0.0,
        label_smoothing=0.0,
        ignore_index=-100,
        labels_are_classes=True,
        divergence="forward_kl",
        beta=0.5,
        reduction="batchmean",
        dim=dim,
        weights=(1.0,),
        num_classes=None,
        backend="triton",
        teacher_is="top_k",
        all_classes=0,
        softcap=0.0,
        teacher_softcap=0.0,
    )
    hard = soft._replace(soft_weight=0.9 * 16, hard_weight=0.1, label_smoothing=0.1)

    def regime(name: str, *args: object, narrow: Narrow | None = _SLOTS) -> Regime:
        launch = functools.partial(top_k.top_k_forward, student, *slots, *args)  # type: ignore[arg-type]
        return Regime(name, launch, narrow)

    outputs = scalar, scalar.new_empty(2), None, gradient
    for divergence in _DIVERGENCES:
        p = hard._replace(divergence=divergence)
        yield regime(f"bucket, {divergence}", rest, labels, *outputs, False, p)
    yield regime("renormalize", None, None, *outputs, False, soft)
    yield regime("zero, loss only", None, None, scalar, None, None, None, False, soft)
    yield regime("in place", None, labels, scalar, None, None, student, False, hard)
    yield regime("backward", rest, labels, None, None, log_q, gradient, False, hard, (), scalar)
    capped = hard._replace(softcap=30.0)
    yield regime("capped", rest, labels, *outputs, False, capped)
    of_rows = hard._replace(temperature=1.0, teacher_temperature=1.0, reduction="none")
    losses = row, row.expand(2, *row.shape), log_q, gradient
    yield regime("temperatures", rest, labels, *losses, False, of_rows, [row] * 3, row)
    yield regime("both, hard", None, labels, *outputs, True, hard)
    for divergence in ("forward_kl", "jsd"):
        p = soft._replace(divergence=divergence)
        yield regime(f"both, {divergence}", None, None, *outputs, True, p, narrow=_SLOTS_ALONE)

    # A quarter of the classes, from the second one on.
    classes = student.shape[dim]
    of_all = of_rows._replace(ignore_index=-1, all_classes=4 * classes)
    at_4 = of_all._replace(temperature=4.0, teacher_temperature=4.0)
    found = slots[0], labels, log_p.new_empty(row.numel(), 4, dtype=float64)
    exchanged = classes, found[-1], log_q

    def of_shard(
        name: str, listed_only: bool, p: SoftTarget, heat: Sequence[Tensor] = ()
    ) -> Iterator[Regime]:
        rest_here = None if listed_only else rest
        losses = rest_here, labels, row, row.expand(2, *row.shape), log_q, None, listed_only, p
        yield regime(f"{name} losses", *losses, heat, None, *exchanged, narrow=None)
        gradients = rest_here, labels, None, None, None, gradient, listed_only, p
        call = *gradients, heat, row, *exchanged
        yield regime(f"{name} gradient", *call, narrow=_SLOTS_OF_SHARDS)

    def sums(name: str, listed_only: bool, *args: object) -> Regime:
        launch = functools.partial(top_k_sums.top_k_sums, student, *found, listed_only, classes)
        return Regime(f"{name} sums", functools.partial(launch, *args), _SLOTS)

    for divergence in _DIVERGENCES:
        yield from of_shard(f"shard, {divergence}", False, at_4._replace(divergence=divergence))
    yield from of_shard("shard, temperatures", False, of_all, [row] * 3)
    yield from of_shard("shard, both", True, at_4)
    yield sums("shard, bucket", False, at_4)
    yield sums("shard, temperatures", False, of_all, [row] * 3)
    yield sums("shard, both", True, at_4)

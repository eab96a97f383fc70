"""Soft targets of one teacher and of several."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32, float64

from fastkd.kernels.triton import shards, soft_target
from fastkd.ops.soft_target_operators import STATISTICS
from fastkd.parameters import SoftTarget
from fastkd.precision import compute_dtype

from .regime import MAPS, Narrow, Regime, channels_last, meta


def regimes() -> Iterator[Regime]:
    for name, (sides, dim, names) in _LOGITS.items():
        for use, launch, narrow in _uses(sides, dim):
            if use in names:
                is_wide = name not in _NARROW
                yield Regime(f"{name}, {use}", launch, narrow if is_wide else None)


def _uses(sides: Sequence[Tensor], dim: int) -> list[Regime]:
    """Of a student and its teachers; each is named after the use."""
    student, *teachers = sides
    dtype = compute_dtype(*sides)
    gradient = torch.empty_like(student)
    labels = student.new_empty(student.shape[:dim] + student.shape[dim + 1 :], dtype=torch.int64)
    scalar, row = student.new_empty((), dtype=dtype), torch.empty_like(labels, dtype=dtype)
    statistics = student.new_empty(labels.numel() * STATISTICS + 1, dtype=dtype)
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
        weights=(1 / len(teachers),) * len(teachers),
        num_classes=None,
        backend="triton",
        teacher_is="logits",
        all_classes=0,
        softcap=0.0,
        teacher_softcap=0.0,
    )
    hard = soft._replace(soft_weight=0.9 * 16, hard_weight=0.1, label_smoothing=0.1)
    by_row = soft._replace(reduction="none")
    parts, of_rows = student.new_empty(2, dtype=dtype), torch.empty_like(row.expand(2, *row.shape))

    def forward(*args: Any) -> Callable[[], None]:
        return functools.partial(soft_target.soft_target_forward, student, teachers, *args)

    # The others than forward KL.
    divergences = [
        Regime(
            name,
            forward(None, scalar, None, None, gradient, soft._replace(divergence=name)),
            Narrow(0, 3),
        )
        for name in ("jsd", "tvd", "skew_kl", "skew_reverse_kl", "reverse_kl")
    ]
    # A number of the teacher's, and temperatures of rows, of which three are loaded.
    own, of_rows_alone = hard._replace(teacher_temperature=2.0), _at_1(hard)
    capped = hard._replace(softcap=30.0, teacher_softcap=20.0)
    heat = [row] * 3
    temperatures = [
        Regime("own number", forward(labels, scalar, parts, None, gradient, own), Narrow(7, 3)),
        *(
            Regime(
                f"temperatures, {name}",
                forward(
                    *(labels, scalar, parts, None, gradient),
                    of_rows_alone._replace(divergence=name),
                    *(None, None, heat),
                ),
                Narrow(10, 3),
            )
            for name in ("forward_kl", "reverse_kl", "jsd")
        ),
    ]

    # The teacher's temperature is 1.
    stated = [
        Regime(
            f"{teacher_is}, {name}",
            forward(
                *(labels, scalar, parts, None, gradient),
                own._replace(teacher_temperature=1.0, divergence=name, teacher_is=teacher_is),
            ),
            Narrow(7, 3),
        )
        for teacher_is in ("probabilities", "log_probabilities")
        for name in ("forward_kl", "reverse_kl", "skew_kl")
    ]

    def backward(upstream: Tensor, *args: Any) -> Callable[[], None]:
        return functools.partial(
            soft_target.soft_target_backward, upstream, student, teachers, *args
        )

    if len(teachers) > 1:
        # Narrow are labels, their logits, the rows that count, first logits, and sums.
        return [
            Regime("hard", forward(labels, scalar, parts, None, gradient, hard), Narrow(7, 3)),
            Regime("soft", forward(None, scalar, None, None, gradient, soft), Narrow(0, 3)),
            Regime("loss only", forward(None, scalar, None, None, None, soft), Narrow(0, 3)),
            Regime("by row", forward(None, row, None, None, None, by_row), Narrow(0, 4)),
            Regime(
                "backward",
                backward(scalar, labels, None, gradient, None, hard, scalar),
                Narrow(5, 0),
            ),
            Regime(
                "backward by row", backward(row, None, None, gradient, None, by_row), Narrow(1, 0)
            ),
            Regime("capped", forward(None, scalar, None, None, gradient, capped), Narrow(0, 3)),
            *divergences,
            *temperatures,
        ]
    to_teacher = torch.empty_like(teachers[0])
    return [
        # Narrow are a label, its logit, the rows that count and the first logit, and statistics
        # and sums.
        Regime("hard", forward(labels, scalar, parts, statistics, gradient, hard), Narrow(4, 10)),
        Regime("soft", forward(None, scalar, None, None, gradient, soft), Narrow(0, 3)),
        Regime("loss only", forward(None, scalar, None, None, None, soft), Narrow(0, 3)),
        Regime("by row", forward(None, row, of_rows, statistics, None, by_row), Narrow(0, 11)),
        Regime(
            "backward",
            backward(scalar, labels, statistics, gradient, to_teacher, hard),
            Narrow(9, 0),
        ),
        Regime(
            "backward by row",
            backward(row, None, statistics, gradient, to_teacher, by_row),
            Narrow(7, 0),
        ),
        Regime(
            "in place",
            backward(scalar, labels, statistics, gradient, None, hard, scalar),
            Narrow(10, 0),
        ),
        Regime(
            "capped", forward(labels, scalar, parts, statistics, gradient, capped), Narrow(4, 10)
        ),
        Regime(
            "capped, backward",
            backward(scalar, labels, statistics, gradient, to_teacher, capped),
            Narrow(9, 0),
        ),
        *divergences,
        Regime(
            "reverse_kl backward",
            backward(
                *(scalar, labels, statistics, gradient, to_teacher),
                hard._replace(divergence="reverse_kl"),
            ),
            Narrow(9, 0),
        ),
        *temperatures,
        *stated,
        *(
            Regime(
                f"shard, {name} backward",
                backward(
                    *(row, labels, statistics, gradient, None),
                    by_row._replace(divergence=name, all_classes=8192),
                ),
                Narrow(9, 0),
            )
            for name in ("forward_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl")
        ),
        *(
            Regime(
                f"shard, {name} terms",
                functools.partial(
                    shards.soft_target_terms,
                    *(student, teachers, labels, statistics),
                    student.new_empty(labels.numel(), 2, dtype=float64),
                    by_row._replace(divergence=name, all_classes=8192),
                ),
                Narrow(5, 2),
            )
            for name in ("jsd", "tvd", "skew_kl", "skew_reverse_kl")
        ),
        Regime(
            "own number, backward",
            backward(scalar, labels, statistics, gradient, to_teacher, own),
            Narrow(9, 0),
        ),
        *(
            Regime(
                f"temperatures, {name} backward",
                backward(
                    *(scalar, labels, statistics, gradient, to_teacher),
                    of_rows_alone._replace(divergence=name),
                    *(None, heat, row.new_empty(3, *row.shape)),
                ),
                Narrow(15, 3),  # each temperature twice
            )
            for name in ("forward_kl", "reverse_kl")
        ),
    ]


def _at_1(p: SoftTarget) -> SoftTarget:
    """With temperatures of rows in the place of its own."""
    return p._replace(temperature=1.0, teacher_temperature=1.0, soft_weight=0.9)


def _both(*shape: int, dtype: torch.dtype = float32) -> list[Tensor]:
    return [meta(*shape, dtype=dtype)] * 2


_USES = {"hard", "soft", "loss only", "by row", "backward", "backward by row", "in place"}

_CAPPED = {"capped", "capped, backward"}

_DIVERGENCES = {"jsd", "tvd", "skew_kl", "skew_reverse_kl", "reverse_kl", "reverse_kl backward"}

_OWN = {
    "own number",
    "own number, backward",
    *(f"temperatures, {name}" for name in ("forward_kl", "reverse_kl", "jsd")),
    *(f"temperatures, {name} backward" for name in ("forward_kl", "reverse_kl")),
}

_STATED = {
    f"{teacher_is}, {name}"
    for teacher_is in ("probabilities", "log_probabilities")
    for name in ("forward_kl", "reverse_kl", "skew_kl")
}

_SHARDS = {
    *(
        f"shard, {name} backward"
        for name in ("forward_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl")
    ),
    *(f"shard, {name} terms" for name in ("jsd", "tvd", "skew_kl", "skew_reverse_kl")),
}

_LOGITS_OF_3 = {
    (classes, dtype): [meta(512, classes, dtype=dtype)] * 3
    for classes in (10, 1000, 4096, 32000)
    for dtype in (float32, bfloat16)
}

# A student and its teachers, the dimension of the classes, and the uses that are compiled.
_LOGITS: dict[str, tuple[list[Tensor], int, set[str]]] = {
    "1,000 classes": (
        _both(512, 1000),
        1,
        _USES | _CAPPED | _DIVERGENCES | _OWN | _STATED | _SHARDS,
    ),
    "1,000 classes, bfloat16": (_both(512, 1000, dtype=bfloat16), 1, {"hard", "in place"}),
    "1,000 classes, float16 and float32": (
        [meta(512, 1000, dtype=float16), meta(512, 1000)],
        1,
        {"hard"},
    ),
    "4,096 classes": (
        _both(512, 4096),
        1,
        {"hard", "soft", "own number", "temperatures, forward_kl", "temperatures, jsd"} | _STATED,
    ),
    "4,096 classes, bfloat16": (_both(512, 4096, dtype=bfloat16), 1, {"hard"}),
    "32,000 classes": (_both(512, 32000), 1, {"hard", "loss only"}),
    "32,000 classes, bfloat16": (
        _both(512, 32000, dtype=bfloat16),
        1,
        {"hard", "backward"} | _CAPPED | _DIVERGENCES | _OWN | _STATED,
    ),
    "2,048 classes, float64": (
        _both(512, 2048, dtype=float64),
        1,
        {
            *("hard", "backward", "temperatures, forward_kl", "temperatures, forward_kl backward"),
            *("jsd", "temperatures, jsd", "shard, skew_kl backward", "shard, skew_kl terms"),
        },
    ),
    "5,000 classes, float64": (
        _both(512, 5000, dtype=float64),
        1,
        {
            *("hard", "jsd", "temperatures, forward_kl", "temperatures, jsd"),
            *_CAPPED,
            *("probabilities, forward_kl", "probabilities, skew_kl"),
        },
    ),
    "10 classes": (_both(512, 10), 1, {"hard", "backward"} | _OWN | _STATED),
    "33 classes, bfloat16": (_both(512, 33, dtype=bfloat16), 1, {"hard"}),
    "50,257 classes, bfloat16": (_both(512, 50257, dtype=bfloat16), 1, {"hard"}),
    "rows side by side": (
        [MAPS, MAPS],
        1,
        {
            *("hard", "soft", "backward", "jsd", "probabilities, forward_kl"),
            *("temperatures, forward_kl", "temperatures, forward_kl backward"),
        },
    ),
    "rows side by side, bfloat16": (_both(8, 150, 65, 65, dtype=bfloat16), 1, {"hard"}),
    "rows side by side and apart": ([MAPS, channels_last(MAPS)], 1, {"hard"}),
    "far apart": (
        [meta(9, 2**31, dtype=bfloat16)[:, :500], meta(500, 2**31)[:, :9].t()],
        1,
        {"hard"},
    ),
    "2 teachers, 1,000 classes": (
        _LOGITS_OF_3[1000, float32],
        1,
        {"hard", "soft", "loss only", "by row", "backward", "backward by row", "reverse_kl"} | _OWN,
    ),
    "2 teachers, 1,000 classes, bfloat16": (_LOGITS_OF_3[1000, bfloat16], 1, {"soft", "backward"}),
    "3 teachers, 1,000 classes, of each dtype": (
        [meta(512, 1000, dtype=dtype) for dtype in (bfloat16, float16, float32, bfloat16)],
        1,
        {"hard"},
    ),
    "2 teachers, 4,096 classes": (
        _LOGITS_OF_3[4096, float32],
        1,
        {"hard", "reverse_kl", "temperatures, forward_kl"},
    ),
    "2 teachers, 4,096 classes, bfloat16": (_LOGITS_OF_3[4096, bfloat16], 1, {"hard"}),
    "2 teachers, 32,000 classes": (_LOGITS_OF_3[32000, float32], 1, {"backward", "jsd"}),
    "2 teachers, 32,000 classes, bfloat16": (
        _LOGITS_OF_3[32000, bfloat16],
        1,
        {"hard", "loss only", "reverse_kl", "capped"} | _OWN,
    ),
    "2 teachers, 5,000 classes, float64": (
        [meta(512, 5000, dtype=float64)] * 2 + [meta(512, 5000)],
        1,
        {"hard", "reverse_kl"},
    ),
    "2 teachers, 10 classes": (_LOGITS_OF_3[10, float32], 1, {"hard"}),
    "2 teachers, rows side by side": ([MAPS, MAPS, channels_last(MAPS)], 1, {"hard"}),
}
# Of which some elements are accessed less than 16 bytes at a time.
_NARROW = {
    "10 classes",
    "33 classes, bfloat16",
    "50,257 classes, bfloat16",
    "rows side by side",
    "rows side by side, bfloat16",
    "rows side by side and apart",
    "far apart",
    "2 teachers, 10 classes",
    "2 teachers, rows side by side",
}

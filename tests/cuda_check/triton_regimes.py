"""Every Triton kernel in each of its regimes, compiled for NVIDIA chips where there is none.

A regime is a call of a launcher on tensors without memory. The launches it makes are caught and
specialised by Triton's own code, so that what is compiled is what a GPU would run.
"""

import contextlib
import functools
import itertools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, bfloat16, float16, float32, float64
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastkd.kernels.triton import (
    attention,
    hint,
    multiply,
    rkd,
    similarity,
    soft_target,
    soft_target_ensemble,
)
from fastkd.ops.attention import MapParameters, TransferParameters
from fastkd.ops.hint import Parameters
from fastkd.ops.soft_target import PARTS, STATISTICS
from fastkd.ops.soft_target import Parameters as SoftTargetParameters
from fastkd.reference.precision import compute_dtype

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    kernel: str
    regime: str
    capability: int
    registers: int
    shared_bytes: int
    spills: int  # instructions that access local memory
    stack: int  # bytes
    wide_loads: bool | None  # 16 bytes at a time; None where that is not promised


class Narrow(NamedTuple):
    """How many accesses may move less than 16 bytes: those of numbers that are not elements."""

    loads: int
    stores: int
    has_elements: bool = True  # among the loads


class Regime(NamedTuple):
    name: str
    launch: Callable[[], None]
    narrow: Narrow | None = None  # None where nothing is demanded


# Of grad_output, and of a sum.
_FEW = Narrow(1, 1)


# The kernels that go over elements; others add up what these found.
_ELEMENTWISE = {
    attention.channel_map,
    attention.channel_gradient,
    hint.squared_difference,
    multiply.scale,
    soft_target.logits_forward,
    soft_target.logits_backward,
    soft_target_ensemble.logits_ensemble,
}


class _Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _uses(student: Tensor, teacher: Tensor) -> list[Regime]:
    """Of a pair; each is named after the use."""
    dtype = compute_dtype(student, teacher)
    gradient, to_teacher = torch.empty_like(student), torch.empty_like(teacher)
    scalar, row = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((), (1, len(student)))
    )

    def forward(loss: Tensor, reduction: str, *gradients: Tensor) -> None:
        p = Parameters(0.5, reduction, "triton")
        hint.hint_forward([student], [teacher], loss, gradients, p)

    def backward(
        upstream: Tensor, reduction: str, *gradients: Tensor, in_place: bool = False
    ) -> None:
        p = Parameters(0.5, reduction, "triton")
        hint.hint_backward(upstream, [student], [teacher], gradients, p, in_place)

    return [
        Regime("forward", lambda: forward(scalar, "batchmean", gradient), _FEW),
        Regime("backward", lambda: backward(scalar, "sum", gradient, to_teacher), _FEW),
        Regime("per sample", lambda: forward(row, "none"), _FEW),
        Regime("in place", lambda: backward(scalar, "sum", gradient, in_place=True), _FEW),
        Regime("loss only", lambda: forward(scalar, "mean"), _FEW),
        Regime("per sample, backward", lambda: backward(row, "none", gradient, to_teacher)),
    ]


def _features(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


_SHAPE = 64, 256, 56, 56
_X, _HALF, _DOUBLE = (_features(*_SHAPE, dtype=dtype) for dtype in (float32, bfloat16, float64))
_CROPPED = _features(64, 256, 9, 9)[..., 1:-1, 1:-1]

# Pairs whose every element is accessed 16 bytes at a time.
_WIDE = {
    "float32": (_X, _X),
    "bfloat16": (_HALF, _HALF),
    "float16": (_HALF.to(float16), _HALF.to(float16)),
    "float64": (_DOUBLE, _DOUBLE),
    "bfloat16 and float32": (_HALF, _X),
    "bfloat16 and float64": (_HALF, _DOUBLE),
    "channels_last": (_channels_last(_X), _channels_last(_X)),
    "slices of channels": (_HALF, _features(64, 512, 56, 56, dtype=bfloat16)[:, :256]),
}
_OTHERS = {
    "channels_last and NCHW": (_channels_last(_X), _X),
    "NCHW and channels_last, bfloat16": (_HALF, _channels_last(_HALF)),
    "channels_last and NCHW, bfloat16 and float32": (_channels_last(_HALF), _X),
    "channels_last and NCHW, float64": (_channels_last(_DOUBLE), _DOUBLE),
    "cropped": (_CROPPED, _features(64, 256, 7, 7)),
    "stepped": (_features(64, 512, 14, 14)[:, ::2, ::2, ::2], _features(64, 256, 7, 7)),
    "expanded": (_features(1, 256, 56, 56).expand(_SHAPE), _X),
    "permuted": (
        _features(6, 10, 3, 18, 35).permute(3, 1, 4, 0, 2),
        _features(18, 35, 10, 3, 6).permute(0, 2, 1, 4, 3),
    ),
    "unaligned": (_features(3, 33, 7, 7), _features(3, 33, 7, 7)),
    "far apart": (_features(9, 2**31, dtype=bfloat16)[:, :4096], _features(9, 4096)),
}
# All uses of these pairs are compiled, and the first three of the others.
_THOROUGHLY = {"float32", "bfloat16", "channels_last and NCHW", "cropped"}

_GRADIENTS = {"float32": _X, "float64": _DOUBLE, "channels_last": _channels_last(_X)}


def regimes() -> Iterator[Regime]:
    for pairs in (_WIDE, _OTHERS):
        for layout, pair in pairs.items():
            for use, launch, narrow in _uses(*pair)[: None if layout in _THOROUGHLY else 3]:
                yield Regime(f"{layout}, {use}", launch, narrow if pairs is _WIDE else None)
    for name, gradient in {**_GRADIENTS, "cropped": _CROPPED}.items():
        call = functools.partial(multiply.multiply, [gradient], _features())
        yield Regime(f"{name}, multiply", call, _FEW if name in _GRADIENTS else None)
    yield from soft_target_regimes()
    yield from ensemble_regimes()
    yield from attention_regimes()
    yield from relation_regimes()


def soft_target_regimes() -> Iterator[Regime]:
    for name, (student, teacher, dim, names) in _LOGITS.items():
        for use, launch, narrow in _uses_of_logits(student, teacher, dim):
            if use in names:
                is_wide = name not in _NARROW_LOGITS
                yield Regime(f"{name}, {use}", launch, narrow if is_wide else None)


def _uses_of_logits(student: Tensor, teacher: Tensor, dim: int) -> list[Regime]:
    """Of student and teacher; each is named after the use."""
    dtype = compute_dtype(student, teacher)
    gradient, to_teacher = torch.empty_like(student), torch.empty_like(teacher)
    labels = student.new_empty(student.shape[:dim] + student.shape[dim + 1 :], dtype=torch.int64)
    scalar, row = student.new_empty((), dtype=dtype), torch.empty_like(labels, dtype=dtype)
    statistics = student.new_empty(labels.numel() * STATISTICS + PARTS, dtype=dtype)
    soft = SoftTargetParameters(4.0, 16.0, 0.0, 0.0, -100, "batchmean", dim, "triton")
    hard = soft._replace(soft_weight=0.9 * 16, hard_weight=0.1, label_smoothing=0.1)
    by_row = soft._replace(reduction="none")
    both = student, teacher

    def forward(*args: Any) -> Callable[[], None]:
        return functools.partial(soft_target.soft_target_forward, *both, *args)

    def backward(upstream: Tensor, *args: Any) -> Callable[[], None]:
        return functools.partial(soft_target.soft_target_backward, upstream, *both, *args)

    return [
        # Narrow are a label, its logit, the rows that count and the first logit, and statistics
        # and sums.
        Regime("hard", forward(labels, scalar, statistics, gradient, hard), Narrow(4, 10)),
        Regime("soft", forward(None, scalar, None, gradient, soft), Narrow(0, 3)),
        Regime("loss only", forward(None, scalar, None, None, soft), Narrow(0, 3)),
        Regime("by row", forward(None, row, statistics, None, by_row), Narrow(0, 11)),
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
            backward(scalar, labels, statistics, gradient, None, hard, True),
            Narrow(9, 0),
        ),
    ]


def _both(*shape: int, dtype: torch.dtype = float32) -> tuple[Tensor, Tensor]:
    x = _features(*shape, dtype=dtype)
    return x, x


_USES = {"hard", "soft", "loss only", "by row", "backward", "backward by row", "in place"}
_MAPS = _features(8, 19, 64, 64)

# Both sides, the dimension of the classes, and the uses that are compiled.
_LOGITS: dict[str, tuple[Tensor, Tensor, int, set[str]]] = {
    "1,000 classes": (*_both(512, 1000), 1, _USES),
    "1,000 classes, bfloat16": (*_both(512, 1000, dtype=bfloat16), 1, {"hard", "in place"}),
    "1,000 classes, float16 and float32": (
        _features(512, 1000, dtype=float16),
        _features(512, 1000),
        1,
        {"hard"},
    ),
    "4,096 classes": (*_both(512, 4096), 1, {"hard", "soft"}),
    "4,096 classes, bfloat16": (*_both(512, 4096, dtype=bfloat16), 1, {"hard"}),
    "32,000 classes": (*_both(512, 32000), 1, {"hard", "loss only"}),
    "32,000 classes, bfloat16": (*_both(512, 32000, dtype=bfloat16), 1, {"hard", "backward"}),
    "2,048 classes, float64": (*_both(512, 2048, dtype=float64), 1, {"hard", "backward"}),
    "5,000 classes, float64": (*_both(512, 5000, dtype=float64), 1, {"hard"}),
    "10 classes": (*_both(512, 10), 1, {"hard", "backward"}),
    "33 classes, bfloat16": (*_both(512, 33, dtype=bfloat16), 1, {"hard"}),
    "50,257 classes, bfloat16": (*_both(512, 50257, dtype=bfloat16), 1, {"hard"}),
    "rows side by side": (_MAPS, _MAPS, 1, {"hard", "soft", "backward"}),
    "rows side by side, bfloat16": (*_both(8, 150, 65, 65, dtype=bfloat16), 1, {"hard"}),
    "rows side by side and apart": (_MAPS, _channels_last(_MAPS), 1, {"hard"}),
    "far apart": (
        _features(9, 2**31, dtype=bfloat16)[:, :500],
        _features(500, 2**31)[:, :9].t(),
        1,
        {"hard"},
    ),
}
# Of which some elements are accessed less than 16 bytes at a time.
_NARROW_LOGITS = {
    "10 classes",
    "33 classes, bfloat16",
    "50,257 classes, bfloat16",
    "rows side by side",
    "rows side by side, bfloat16",
    "rows side by side and apart",
    "far apart",
}


def ensemble_regimes() -> Iterator[Regime]:
    for name, (sides, dim, names) in _ENSEMBLES.items():
        for use, launch, narrow in _uses_of_ensembles(sides, dim):
            if use in names:
                is_wide = name not in _NARROW_ENSEMBLES
                yield Regime(f"{name}, {use}", launch, narrow if is_wide else None)


def _uses_of_ensembles(sides: Sequence[Tensor], dim: int) -> list[Regime]:
    """Of a student and teachers; each is named after the use."""
    student, *teachers = sides
    dtype = compute_dtype(*sides)
    weights = (1 / len(teachers),) * len(teachers)
    gradient = torch.empty_like(student)
    labels = student.new_empty(student.shape[:dim] + student.shape[dim + 1 :], dtype=torch.int64)
    scalar, row = student.new_empty((), dtype=dtype), torch.empty_like(labels, dtype=dtype)
    parts = student.new_empty(PARTS, dtype=dtype)
    soft = SoftTargetParameters(4.0, 16.0, 0.0, 0.0, -100, "batchmean", dim, "triton")
    hard = soft._replace(soft_weight=0.9 * 16, hard_weight=0.1, label_smoothing=0.1)
    by_row = soft._replace(reduction="none")

    def call(*args: Any) -> Callable[[], None]:
        function = soft_target_ensemble.soft_target_ensemble
        return functools.partial(function, student, teachers, weights, *args)

    return [
        # Narrow are labels, their logits, the rows that count, first logits, and sums.
        Regime("hard", call(labels, scalar, parts, gradient, None, hard), Narrow(7, 3)),
        Regime("soft", call(None, scalar, None, gradient, None, soft), Narrow(0, 3)),
        Regime("loss only", call(None, scalar, None, None, None, soft), Narrow(0, 3)),
        Regime("by row", call(None, row, None, None, None, by_row), Narrow(0, 4)),
        Regime("backward", call(labels, None, None, gradient, scalar, hard, True), Narrow(4, 0)),
        Regime("backward by row", call(None, None, None, gradient, row, by_row), Narrow(1, 0)),
    ]


_LOGITS_OF_3 = {
    (classes, dtype): [_features(512, classes, dtype=dtype)] * 3
    for classes in (10, 1000, 4096, 32000)
    for dtype in (float32, bfloat16)
}

# A student and its teachers, the dimension of the classes, and the uses that are compiled.
_ENSEMBLES: dict[str, tuple[list[Tensor], int, set[str]]] = {
    "2 teachers, 1,000 classes": (
        _LOGITS_OF_3[1000, float32],
        1,
        {"hard", "soft", "loss only", "by row", "backward", "backward by row"},
    ),
    "2 teachers, 1,000 classes, bfloat16": (_LOGITS_OF_3[1000, bfloat16], 1, {"soft", "backward"}),
    "3 teachers, 1,000 classes, of each dtype": (
        [_features(512, 1000, dtype=dtype) for dtype in (bfloat16, float16, float32, bfloat16)],
        1,
        {"hard"},
    ),
    "2 teachers, 4,096 classes": (_LOGITS_OF_3[4096, float32], 1, {"hard"}),
    "2 teachers, 4,096 classes, bfloat16": (_LOGITS_OF_3[4096, bfloat16], 1, {"hard"}),
    "2 teachers, 32,000 classes": (_LOGITS_OF_3[32000, float32], 1, {"backward"}),
    "2 teachers, 32,000 classes, bfloat16": (
        _LOGITS_OF_3[32000, bfloat16],
        1,
        {"hard", "loss only"},
    ),
    "2 teachers, 5,000 classes, float64": (
        [_features(512, 5000, dtype=float64)] * 2 + [_features(512, 5000)],
        1,
        {"hard"},
    ),
    "2 teachers, 10 classes": (_LOGITS_OF_3[10, float32], 1, {"hard"}),
    "2 teachers, rows side by side": ([_MAPS, _MAPS, _channels_last(_MAPS)], 1, {"hard"}),
}
# Of which some elements are accessed less than 16 bytes at a time.
_NARROW_ENSEMBLES = {"2 teachers, 10 classes", "2 teachers, rows side by side"}


def attention_regimes() -> Iterator[Regime]:
    for name, (features, channel_dim) in _FEATURES.items():
        is_wide = name not in _NARROW_FEATURES
        for use, launch, narrow in _uses_of_features(features, channel_dim):
            if use in _MAP_USES or name in _MAPS_THOROUGHLY:
                yield Regime(f"{name}, {use}", launch, narrow if is_wide else None)
    for features in (_X, _DOUBLE, _features(64, 512, 7, 7)):
        for kind, p, order in _DISTANCES if features is _X else _DISTANCES[:2]:
            name = f"{features.dtype}, {features.shape[2]}², {kind} {p}, order {order}"
            yield Regime(name, _transfer(features, kind, p, order))


def _map_sized(features: Tensor, channel_dim: int, dtype: torch.dtype) -> Tensor:
    batch, channels = len(features), features.shape[channel_dim]
    return features.new_empty(batch, features.numel() // (batch * channels), dtype=dtype)


def _transfer(features: Tensor, kind: str, p: float, order: float) -> Callable[[], None]:
    """Of features with themselves, with the teacher's slopes."""
    dtype = compute_dtype(features)
    slopes = [_map_sized(features, 1, dtype)] * 2
    winners = [_map_sized(features, 1, torch.int32)] * 2 if kind == "max_pow" else []
    return lambda: attention.attention_transfer_forward(
        [features],
        [features],
        features.new_empty((), dtype=dtype),
        slopes,
        winners,
        [],
        TransferParameters("norm", order, 1.0, "mean"),
        MapParameters(kind, p, 1e-12, 1, "triton"),
    )


def _uses_of_features(features: Tensor, channel_dim: int) -> list[Regime]:
    """Maps and gradients of any kind; each is named after the use."""
    dtype = compute_dtype(features)
    slopes = _map_sized(features, channel_dim, dtype)
    winners = _map_sized(features, channel_dim, torch.int32)
    scalar, row = (features.new_empty(x, dtype=dtype) for x in ((), (1, len(features))))
    uses = []
    for kind, p in _POWERS:
        parameters = MapParameters(kind, p, 1e-12, channel_dim, "triton")
        gradient = [features], [slopes], [winners], [torch.empty_like(features)], parameters
        backward = functools.partial(attention.attention_backward, scalar, *gradient)
        forward = functools.partial(
            attention.attention_map_forward, features, slopes, winners, parameters
        )
        # Narrow is what there is one of a position: the map, winners and their features, slopes.
        is_max = kind == "max_pow"
        uses += [
            Regime(f"map of {kind} {p}", forward, Narrow(4, 8) if is_max else Narrow(0, 4)),
            Regime(f"gradient of {kind} {p}", backward, Narrow(17, 0, not is_max)),
        ]
    uses += [
        Regime(
            "gradient by sample",
            functools.partial(attention.attention_backward, row, *gradient),
            Narrow(17, 0),
        ),
    ]
    return uses


_POWERS = [("sum", 1.0), ("max_pow", 2.0), ("sum_pow", 2.7), ("sum_pow", 2.0)]
_MAP_USES = {
    f"{use} of {kind} 2.0" for use in ("map", "gradient") for kind in ("sum_pow", "max_pow")
}
_MAPS_THOROUGHLY = {"float32", "channels_last, bfloat16"}
_DISTANCES = [
    ("sum_pow", 2.0, 2.0),
    ("max_pow", 2.7, 3.0),
    ("sum_pow", 2.0, 1.0),
    ("sum_pow", 2.0, math.inf),
    ("max_pow", 2.0, 2.0),
]

# Features and the dimension of their channels.
_FEATURES = {
    "float32": (_X, 1),
    "bfloat16": (_HALF, 1),
    "float16": (_HALF.to(float16), 1),
    "float64": (_DOUBLE, 1),
    "channels_last": (_channels_last(_X), 1),
    "channels_last, bfloat16": (_channels_last(_HALF), 1),
    "channels_last, float64": (_channels_last(_DOUBLE), 1),
    "tokens": (_features(64, 197, 768), 2),
    "few channels": (_features(64, 3, 56, 56), 1),
    "7 × 7": (_features(64, 512, 7, 7), 1),
    "14 × 14, bfloat16": (_features(64, 512, 14, 14, dtype=bfloat16), 1),
    "cropped": (_CROPPED, 1),
    "far apart": (_features(9, 2**31, dtype=bfloat16)[:, :4096].view(9, 64, 64), 1),
}
# Of which elements are accessed less than 16 bytes at a time.
_NARROW_FEATURES = {"7 × 7", "14 × 14, bfloat16", "cropped"}


def relation_regimes() -> Iterator[Regime]:
    for dtype in (float32, float64):
        loss, squares = _features(dtype=dtype), _features(500, 500, dtype=float64)
        rows, grams = _features(500, 70, dtype=dtype), squares.to(dtype)
        call: Callable[..., None] = functools.partial(rkd.squared_distances, rows, squares)
        yield Regime(f"{dtype}, squared distances", call)
        for uses, slopes in (("slopes", True), ("loss only", False)):
            to = squares if slopes else None
            for kind in (rkd.rkd_distance, rkd.rkd_angle):
                call = functools.partial(kind, squares, squares, loss, to, 1.0)
                yield Regime(f"{dtype}, {kind.__name__}, {uses}", call)
            call = functools.partial(
                similarity.similarity, grams, grams, loss, grams if slopes else None
            )
            yield Regime(f"{dtype}, similarity, {uses}", call)


@contextlib.contextmanager
def _caught(launches: list[_Launch]) -> Iterator[None]:
    def catch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_Launch(kernel, args, kwargs))

    with mock.patch.object(triton.JITFunction, "run", catch):
        yield


def _compile(launch: _Launch, capability: int) -> Any:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, debug=False, **launch.kwargs)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BIN / "cuobjdump", option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_all(capabilities: Sequence[int]) -> list[Compiled]:
    """Each kernel of each regime, once where several regimes share it."""
    jobs = []
    for regime in regimes():
        launches: list[_Launch] = []
        with _caught(launches):
            regime.launch()
        jobs += list(itertools.product([regime], launches, capabilities))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(lambda job: _compile(*job[1:]), jobs)
        unique: dict[str, tuple[Any, ...]] = {}
        for job, kernel in zip(jobs, kernels, strict=True):
            unique.setdefault(kernel.hash, (*job, kernel))
        return list(pool.map(lambda job: _inspected(*job), unique.values()))


def _inspected(regime: Regime, launch: _Launch, capability: int, kernel: Any) -> Compiled:
    cubin = kernel.asm["cubin"]
    usage = dict(re.findall(r"\b([A-Z]+):(\d+)", _cuobjdump("--dump-resource-usage", cubin)))
    code = _cuobjdump("-sass", cubin)
    narrow = regime.narrow if launch.kernel in _ELEMENTWISE else None
    return Compiled(
        launch.kernel.__name__,
        regime.name,
        capability,
        int(usage["REG"]),
        kernel.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        int(usage["STACK"]),
        None if narrow is None else _are_wide(code, narrow),
    )


def _are_wide(code: str, narrow: Narrow) -> bool:
    """Whether no more accesses move less than 16 bytes than may."""
    for kind, most in zip(("LDG", "STG"), narrow[:2], strict=True):
        accesses = re.findall(rf"\b{kind}\.[.\w]*", code)
        if sum([not access.endswith(".128") for access in accesses]) > most:
            return False
    return "LDG.E.128" in code or not narrow.has_elements

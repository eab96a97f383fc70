"""Attention maps and their transfer."""

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, bfloat16, float16

from fastkd.kernels.triton import attention
from fastkd.parameters import Map, Transfer
from fastkd.precision import compute_dtype

from .regime import CROPPED, DOUBLE, HALF, Narrow, Regime, X, channels_last, meta


def regimes() -> Iterator[Regime]:
    for name, (features, channel_dim) in _FEATURES.items():
        is_wide = name not in _NARROW_FEATURES
        for use, launch, narrow in _uses_of_features(features, channel_dim):
            if use in _MAP_USES or name in _MAPS_THOROUGHLY:
                yield Regime(f"{name}, {use}", launch, narrow if is_wide else None)
    for features in (X, DOUBLE, meta(64, 512, 7, 7)):
        for kind, p, order in _DISTANCES if features is X else _DISTANCES[:2]:
            name = f"{features.dtype}, {features.shape[2]}², {kind} {p}, order {order}"
            yield Regime(name, _transfer(features, kind, p, order))


def _map_sized(features: Tensor, channel_dim: int, dtype: torch.dtype) -> Tensor:
    batch, channels = len(features), features.shape[channel_dim]
    return features.new_empty(batch, features.numel() // (batch * channels), dtype=dtype)


def _transfer(features: Tensor, kind: str, p: float, order: float) -> Callable[[], None]:
    """Of features with themselves, with the teacher's slopes."""
    dtype = compute_dtype(features)
    slopes = [_map_sized(features, 1, dtype)] * 2
    argmax = [_map_sized(features, 1, torch.int32)] * 2 if kind == "max_pow" else []
    return lambda: attention.attention_transfer_forward(
        [features],
        [features],
        features.new_empty((), dtype=dtype),
        slopes,
        argmax,
        [],
        Transfer("norm", order, 1.0, "mean"),
        Map(kind, p, 1e-12, 1, "triton"),
    )


def _uses_of_features(features: Tensor, channel_dim: int) -> list[Regime]:
    """Maps and gradients of any kind; each is named after the use."""
    dtype = compute_dtype(features)
    slopes = _map_sized(features, channel_dim, dtype)
    argmax = _map_sized(features, channel_dim, torch.int32)
    scalar, row = (features.new_empty(x, dtype=dtype) for x in ((), (1, len(features))))
    uses = []
    for kind, p in _POWERS:
        parameters = Map(kind, p, 1e-12, channel_dim, "triton")
        gradient = [features], [slopes], [argmax], [torch.empty_like(features)], parameters
        backward = functools.partial(attention.attention_backward, scalar, *gradient)
        forward = functools.partial(
            attention.attention_map_forward, features, slopes, argmax, parameters
        )
        # Narrow is what there is one of a position: the map, argmax and their features, slopes.
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
    "float32": (X, 1),
    "bfloat16": (HALF, 1),
    "float16": (HALF.to(float16), 1),
    "float64": (DOUBLE, 1),
    "channels_last": (channels_last(X), 1),
    "channels_last, bfloat16": (channels_last(HALF), 1),
    "channels_last, float64": (channels_last(DOUBLE), 1),
    "tokens": (meta(64, 197, 768), 2),
    "few channels": (meta(64, 3, 56, 56), 1),
    "7 × 7": (meta(64, 512, 7, 7), 1),
    "14 × 14, bfloat16": (meta(64, 512, 14, 14, dtype=bfloat16), 1),
    "cropped": (CROPPED, 1),
    "far apart": (meta(9, 2**31, dtype=bfloat16)[:, :4096].view(9, 64, 64), 1),
}
# Of which elements are accessed less than 16 bytes at a time.
_NARROW_FEATURES = {"7 × 7", "14 × 14, bfloat16", "cropped"}

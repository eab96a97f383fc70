"""Attention maps and attention transfer (Zagoruyko & Komodakis 2017)."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastkd.dispatch import select
from fastkd.facts import Backend
from fastkd.losses import checks, pairs
from fastkd.ops.attention import (
    attention_transfer,
    raw_attention_map,
)
from fastkd.parameters import Map, Transfer
from fastkd.precision import compute_dtype
from fastkd.reference import attention as reference

_KINDS = ("sum", "sum_pow", "max_pow")
_DISTANCES = ("norm", "mse")
_REDUCTIONS = ("none", "sum", "mean")
_RESIZES = ("adaptive_avg_pool",)


@checks.keywords
def attention_map(
    features: Tensor,
    *,
    kind: str = "sum_pow",
    p: float | None = None,
    normalize: bool = True,
    eps: float = 1e-12,
    channel_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    r"""Compute spatial attention maps: the magnitude of features at each position.

    Over the channels `A_i`, `kind` is `"sum"` for `F = Σ|A_i|`, `"sum_pow"` for `Σ|A_i|^p`,
    `"max_pow"` for `max |A_i|^p`. The map is `Q = vec(F) / max(‖vec(F)‖₂, eps)`. Its gradient
    reaches a feature through `p · |A_i|^(p−1) · sign(A_i)`; at a tie of the maximum it goes to
    the lowest channel, and a sample whose map is all zero has a zero map and a zero gradient.
    `attention_transfer_loss` compares the maps of two networks.

    Args:
        features: `(B, C, *spatial)`, or with `channel_dim=-1` tokens `(B, N, C)`; float32,
            float16, bfloat16 or float64, in any memory layout.
        kind: `"sum"`, `"sum_pow"` or `"max_pow"`. Default: `"sum_pow"`.
        p: the exponent of the two pow kinds, any real number >= 1; `"sum"` takes None or 1.
            Default: None, which is 2 (1 for `"sum"`).
        normalize: divide each sample's map by its L2 norm. Default: True.
        eps: the least norm to divide by, above 0. Default: 1e-12.
        channel_dim: the dimension of the channels; not 0. Default: 1.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        The maps, `(B, positions)`, in float32 (float64 for float64 features). Positions are in
        the order of the features' dimensions: `.view(B, H, W)` makes images.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument is out of its range, or there are no channels or positions.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> maps = fastkd.attention_map(torch.randn(8, 64, 16, 16))
        >>> maps.shape
        torch.Size([8, 256])

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    checks.floating(("features", features))
    exponent = _exponent(kind, p)
    normalize = checks.flag("normalize", normalize)
    eps = checks.number("eps", eps, above=0)
    channel_dim = _check_features("features", features, channel_dim)
    chosen = select("attention_map", (features,), backend)
    if chosen == "reference":
        return reference.attention_map(
            features,
            kind=kind,
            p=exponent,
            normalize=normalize,
            eps=eps,
            channel_dim=channel_dim,
        )
    raw = raw_attention_map(features, Map(kind, exponent, eps, channel_dim, chosen))
    return reference.unit(raw, eps) if normalize else raw


@checks.keywords
def attention_transfer_loss(
    student: Tensor | Iterable[Tensor],
    teacher: Tensor | Iterable[Tensor],
    *,
    kind: str = "sum_pow",
    p: float | None = None,
    distance: str = "norm",
    order: float | None = None,
    beta: float = 1.0,
    pair_weights: Iterable[float] | None = None,
    resize: str | None = None,
    reduction: str = "mean",
    eps: float = 1e-12,
    channel_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    r"""Compute the distance between the student's and the teacher's normalised attention maps.

    `distance="norm"` is the paper's equation, `(beta/2) · Σ_j mean_b ‖Q_S − Q_T‖_order`;
    `distance="mse"` is the mean of squared differences, `beta · Σ_j mean_{b,i} (Q_S − Q_T)²`,
    without the half, as the authors' released code computes it. No constant converts one into the
    other. Maps are those of `attention_map`; the gradient of a norm at 0 is 0. The module is
    `fastkd.nn.AttentionTransferLoss`.

    Args:
        student: features `(B, C, *spatial)`, or a sequence (any iterable) of them: the pairs j.
            float32, float16, bfloat16 or float64, in any memory layout.
        teacher: as many features, on the same device, with the spatial sizes of the student's;
            channels, dtype and layout may differ within a pair. All pairs have one batch size B.
            They receive their gradient if they require one.
        kind: `"sum"`, `"sum_pow"` or `"max_pow"`, see `attention_map`. Default: `"sum_pow"`.
        p: the exponent of the map, any real number >= 1. Default: None, which is 2 (1 for
            `"sum"`).
        distance: `"norm"` or `"mse"`. Default: `"norm"`.
        order: of the norm, any real number >= 1 or `math.inf`; `"mse"` takes None or 2. At order
            infinity, positions that tie share the gradient. Default: None, which is 2.
        beta: the weight of the loss. Usual: 1000 with `"mse"`, near 1 with `"norm"`. Default: 1.0.
        pair_weights: one finite number for each pair, in a sequence or a NumPy array, which
            multiplies the pair's loss under every reduction. Default: None, 1 for each.
        resize: `"adaptive_avg_pool"` pools the larger features, `(B, C, H, W)`, to the smaller
            size before the map. Default: None, sizes that differ are an error.
        reduction: `"mean"` or `"sum"` over the batch, where pairs are summed; or `"none"` for one
            loss per sample (for `"mse"` the mean over its positions). Default: `"mean"`.
        eps: the least norm that a map is divided by, above 0. Default: 1e-12.
        channel_dim: the dimension of the channels; -1 for tokens `(B, N, C)`. Default: 1.
        backend: `"native"`, `"triton"` or `"reference"`, which is used or raises. Default: None,
            the best one that can serve the call; `fastkd.explain` tells which, and why. A slower
            one than the machine could offer warns with `FallbackWarning`, which says how to silence
            it.

    Returns:
        A scalar; with `reduction="none"` `(B,)` for tensors, `(pairs, B)` for sequences. In float32
        (float64 if an input is float64); 0 for an empty batch.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: sequences are of unequal length, batch or spatial sizes differ within a pair,
            or an argument is out of its range.
        BackendUnavailableError: the backend asked for cannot serve these tensors.

    Example:
        >>> student = [torch.randn(8, c, s, s, requires_grad=True) for c, s in ((16, 32), (32, 16))]
        >>> teacher = [torch.randn(8, c, s, s) for c, s in ((64, 32), (128, 16))]
        >>> loss = fastkd.attention_transfer_loss(student, teacher, distance="mse", beta=1000.0)
        >>> loss.backward()

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, equation 2; for
    `"mse"`, `at_loss` of their code (szagoruyko/attention-transfer, `utils.py`).
    """
    students, teachers, is_sequence = pairs.check(student, teacher)
    exponent = _exponent(kind, p)
    norm_order = _order(distance, order)
    beta = checks.number("beta", beta)
    weights = pairs.check_weights(pair_weights, len(students))
    eps = checks.number("eps", eps, above=0)
    channel_dim = checks.integer("channel_dim", channel_dim)
    if resize is not None:
        checks.choice("resize", resize, _RESIZES)
    checks.choice("reduction", reduction, _REDUCTIONS)
    _check_pairs(students, teachers, channel_dim, is_sequence)
    if resize is not None:
        students, teachers = _pool_larger(students, teachers, channel_dim, is_sequence)
    _check_positions(students, teachers, channel_dim, is_sequence)
    chosen = select("attention_transfer_loss", (*students, *teachers), backend)

    def of_pairs(students: list[Tensor], teachers: list[Tensor], factor: float) -> Tensor:
        # torch.compile of torch 2.8 compiles anew for each value of a number that is multiplied.
        scale = beta if weights is None else beta * factor
        if chosen == "reference":
            return reference.attention_transfer_loss(
                students,
                teachers,
                kind=kind,
                p=exponent,
                distance=distance,
                order=norm_order,
                beta=scale,
                reduction=reduction,
                eps=eps,
                channel_dim=channel_dim,
            )
        return attention_transfer(
            students,
            teachers,
            Transfer(distance, norm_order, scale, reduction),
            Map(kind, exponent, eps, channel_dim, chosen),
        )

    loss = pairs.total(of_pairs, students, teachers, weights)
    return loss if is_sequence or reduction != "none" else loss[0]


def _exponent(kind: str, p: float | None) -> float:
    checks.choice("kind", kind, _KINDS)
    if kind == "sum":
        if p is not None and checks.number("p", p, finite=False) != 1:
            raise ValueError(f'p must be None or 1 with kind="sum", got {p!r}')
        return 1.0
    return 2.0 if p is None else checks.number("p", p, at_least=1)


def _order(distance: str, order: float | None) -> float:
    checks.choice("distance", distance, _DISTANCES)
    if distance == "mse":
        if order is not None and checks.number("order", order, finite=False) != 2:
            raise ValueError(f'order must be None or 2 with distance="mse", got {order!r}')
        return 2.0
    return 2.0 if order is None else checks.number("order", order, at_least=1, finite=False)


def _check_features(name: str, features: Tensor, channel_dim: Any) -> int:
    if features.ndim < 3:
        raise ValueError(
            f"{name} must be (B, C, *spatial), or (B, *positions, C) with channel_dim=-1, of at "
            f"least 3 dimensions, got shape {tuple(features.shape)}"
        )
    axis = checks.dimension("channel_dim", channel_dim, features.ndim)
    if axis == 0:
        raise ValueError(f"channel_dim must not be the batch dimension 0, got {channel_dim}")
    if 0 in features.shape[1:]:
        raise ValueError(
            f"{name} must have at least one channel and one position, got {tuple(features.shape)}"
        )
    return axis


def _spatial(features: Tensor, channel_dim: int) -> tuple[int, ...]:
    axis = channel_dim % features.ndim
    return tuple(features.shape[1:axis]) + tuple(features.shape[axis + 1 :])


def _check_pairs(
    students: list[Tensor], teachers: list[Tensor], channel_dim: int, is_sequence: bool
) -> None:
    """Each feature map by itself, and the batch sizes."""
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        names = pairs.names(is_sequence, index)
        _check_features(names[0], student, channel_dim)
        _check_features(names[1], teacher, channel_dim)
        if student.shape[0] != teacher.shape[0] or student.shape[0] != students[0].shape[0]:
            raise ValueError(
                f"{names[0]} and {names[1]} must have the batch size {students[0].shape[0]} of "
                f"the first pair, got {tuple(student.shape)} and {tuple(teacher.shape)}"
            )


def _check_positions(
    students: list[Tensor], teachers: list[Tensor], channel_dim: int, is_sequence: bool
) -> None:
    for index, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        if _spatial(student, channel_dim) != _spatial(teacher, channel_dim):
            names = pairs.names(is_sequence, index)
            raise ValueError(
                f"{names[0]} and {names[1]} must have the same spatial size, "
                f"got {tuple(student.shape)} and {tuple(teacher.shape)}; "
                'resize="adaptive_avg_pool" pools the larger one'
            )


def _pool_larger(
    students: list[Tensor], teachers: list[Tensor], channel_dim: int, is_sequence: bool
) -> tuple[list[Tensor], list[Tensor]]:
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index, pair in enumerate(zip(students, teachers, strict=True)):
        sizes = [_spatial(features, channel_dim) for features in pair]
        if sizes[0] != sizes[1] and any(f.ndim != 4 or channel_dim % f.ndim != 1 for f in pair):
            names = pairs.names(is_sequence, index)
            raise ValueError(
                'resize="adaptive_avg_pool" needs features (B, C, H, W) with channel_dim=1, got '
                f"{names[0]} {tuple(pair[0].shape)} and {names[1]} {tuple(pair[1].shape)} with "
                f"channel_dim={channel_dim}"
            )
        smaller = tuple(map(min, *sizes))
        for side, features, size in zip(pooled, pair, sizes, strict=True):
            if size != smaller:
                features = F.adaptive_avg_pool2d(features.to(compute_dtype(features)), smaller)
            side.append(features)
    return pooled

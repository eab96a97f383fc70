"""Attention transfer between feature maps, and one attention map alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.workloads.workload import Argument, Shape, Workload, tensors, total
from fastkd.facts import Backend


def attention_map(features: Tensor, channel_dim: int = 1) -> Tensor:
    return F.normalize(features.float().pow(2).sum(channel_dim).flatten(1), dim=1)


def paper_loss(student: Argument, teacher: Argument, *, channel_dim: int = 1) -> Tensor:
    """Equation 2 of the paper, with beta 1."""
    return _norms(partial(attention_map, channel_dim=channel_dim), student, teacher)


def _norms(to_map: Callable[[Tensor], Tensor], student: Argument, teacher: Argument) -> Tensor:
    pairs = zip(tensors(student), tensors(teacher), strict=True)
    differences = (to_map(s) - to_map(t) for s, t in pairs)
    return total([d.norm(dim=1).mean() for d in differences]) / 2


def released_loss(
    student: Argument, teacher: Argument, *, distance: str, channel_dim: int = 1
) -> Tensor:
    """The authors' released code, whose maps are means over the channels."""
    assert distance == "mse"

    def released_map(features: Tensor) -> Tensor:
        return F.normalize(features.float().pow(2).mean(channel_dim).flatten(1))

    pairs = zip(tensors(student), tensors(teacher), strict=True)
    return total([F.mse_loss(released_map(s), released_map(t)) for s, t in pairs])


def max_loss(student: Argument, teacher: Argument, *, kind: str) -> Tensor:
    """Equation 2 on maxima over the channels, squared."""
    assert kind == "max_pow"

    def max_map(features: Tensor) -> Tensor:
        return F.normalize(features.float().abs().max(1).values.square().flatten(1))

    return _norms(max_map, student, teacher)


def eager_map_loss(features: Tensor, weights: Tensor) -> Tensor:
    """A map has no loss of its own: these weights give it one, to every contender alike."""
    return (attention_map(features) * weights).sum(1).mean()


def fused_map_loss(features: Tensor, weights: Tensor, *, backend: Backend) -> Tensor:
    return (fastkd.attention_map(features, backend=backend) * weights).sum(1).mean()


# A kernel must know a sample's norm before it can write its gradient: it reads the student twice,
# from memory if the sample does not stay on the chip. On a GPU that is the L2 cache.
_transfer = partial(Workload, "attention_transfer_loss", student_reads=2, student_reads_on_chip=1)


def _alone(family: str, shape: Shape, *, channel_dim: int = 1, headline: bool = False) -> Workload:
    return _transfer(
        f"attention, {family}",
        (shape,),
        (shape,),
        paper_loss,
        keywords={"channel_dim": channel_dim},
        headline=headline,
    )


def _in_mse(workload: Workload) -> Workload:
    """The same features in the convention of the released code."""
    return replace(
        workload,
        eager=released_loss,
        title=f"{workload.title}, mse".removeprefix(", "),
        keywords=workload.keywords | {"distance": "mse"},
        headline=False,
        devices=("cuda",),
    )


def _channels_last(workload: Workload, **others: Any) -> Workload:
    return replace(
        workload,
        title=f"{workload.title}, channels_last",
        memory_format=torch.channels_last,
        headline=False,
        **others,
    )


def _stages(batch: int, *maps: Shape) -> tuple[Shape, ...]:
    return tuple((batch, *shape) for shape in maps)


_WRN_16_2 = _stages(128, (32, 32, 32), (64, 16, 16), (128, 8, 8))
_WRN_40_1 = _stages(128, (16, 32, 32), (32, 16, 16), (64, 8, 8))
_RESNET_8X4 = _stages(64, (64, 32, 32), (128, 16, 16), (256, 8, 8))
_RESNET_18 = _stages(256, (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))
_PYRAMID = _stages(2, (256, 200, 336), (256, 100, 168), (256, 50, 84), (256, 25, 42), (256, 13, 21))

_WRN = _transfer(
    "attention, CIFAR",
    _WRN_16_2,
    _WRN_16_2,
    paper_loss,
    title="WRN-16-2 ← WRN-40-2",
    headline=True,
)
_CIFAR = (
    _transfer("attention, CIFAR", _WRN_40_1, _WRN_16_2, paper_loss, title="WRN-40-1 ← WRN-40-2"),
    _transfer(
        "attention, CIFAR", _RESNET_8X4, _RESNET_8X4, paper_loss, title="resnet8x4 ← resnet32x4"
    ),
)
_RESNET = _transfer(
    "attention, ImageNet",
    _RESNET_18,
    _RESNET_18,
    paper_loss,
    title="ResNet-18 ← ResNet-34",
    headline=True,
)
_DETECTOR = _transfer(
    "attention, detector",
    _PYRAMID,
    _PYRAMID,
    paper_loss,
    title="feature pyramid",
    headline=True,
)
_TOKENS = (
    _alone("ViT tokens", (64, 256, 768), channel_dim=-1, headline=True),
    _alone("ViT tokens", (64, 256, 1536), channel_dim=-1),
)
_RESNETS = (_RESNET, _channels_last(_RESNET))
_DETECTORS = (_DETECTOR, _channels_last(_DETECTOR, devices=("cuda",)))

WORKLOADS = (
    _WRN,
    replace(_in_mse(_WRN), devices=_WRN.devices),
    replace(
        _WRN,
        eager=max_loss,
        title=f"{_WRN.title}, max_pow",
        keywords={"kind": "max_pow"},
        student_reads=1,
        headline=False,
    ),
    *_CIFAR,
    *map(_in_mse, _CIFAR),
    *_RESNETS,
    *map(_in_mse, _RESNETS),
    *_DETECTORS,
    *map(_in_mse, _DETECTORS),
    *_TOKENS,
    *map(_in_mse, _TOKENS),
    _alone("one map", (128, 256, 8, 8)),
    _alone("one map", (128, 64, 32, 32)),
    _alone("one map", (64, 256, 56, 56)),
    Workload(
        "attention_map",
        "attention map",
        ((256, 64, 56, 56),),
        ((256, 56 * 56),),
        eager_map_loss,
        fused=fused_map_loss,
        student_reads=2,
        student_reads_on_chip=2,
    ),
)

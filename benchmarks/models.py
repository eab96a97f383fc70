"""The networks of a training step: they return their logits and the outputs of their stages."""

from collections.abc import Iterable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Output(NamedTuple):
    logits: Tensor
    features: list[Tensor]


class StagedNetwork(nn.Module):
    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.stages, self.head = stem, nn.ModuleList(stages), head

    def forward(self, images: Tensor) -> Output:
        x, features = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return Output(self.head(x), features)


class LinearHead(nn.Linear):
    """Of a language model: hidden states to logits."""

    def forward(self, hidden: Tensor) -> Output:
        return Output(super().forward(hidden), [])


class PreActivationBlock(nn.Module):
    """Normalisation and ReLU before each convolution (Zagoruyko & Komodakis 2016)."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        same = inputs == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm(x))
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


class BasicBlock(nn.Module):
    """Normalisation and ReLU after each convolution (He et al. 2016)."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        same = inputs == channels and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def wide_resnet(depth: int, width: int, *, classes: int = 100, base: int = 16) -> StagedNetwork:
    """WRN-`depth`-`width`; the paper's base is 16 channels."""
    blocks = (depth - 4) // 6
    channels = [base, *(base * width * factor for factor in (1, 2, 4))]
    stages = [
        _stage(PreActivationBlock, channels[i], channels[i + 1], blocks, stride)
        for i, stride in enumerate((1, 2, 2))
    ]
    stem = nn.Conv2d(3, base, 3, padding=1, bias=False)
    head = nn.Sequential(
        nn.BatchNorm2d(channels[-1]), nn.ReLU(), *_classifier(channels[-1], classes)
    )
    return StagedNetwork(stem, stages, head)


def resnet(
    blocks: tuple[int, int, int, int], *, classes: int = 1000, base: int = 64
) -> StagedNetwork:
    """ResNet-18 has (2, 2, 2, 2) basic blocks and ResNet-34 (3, 4, 6, 3); their base is 64."""
    channels = [base, *(base * factor for factor in (1, 2, 4, 8))]
    stages = [
        _stage(BasicBlock, channels[i], channels[i + 1], count, 1 if i == 0 else 2)
        for i, count in enumerate(blocks)
    ]
    stem = nn.Sequential(
        nn.Conv2d(3, base, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(base),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, padding=1),
    )
    return StagedNetwork(stem, stages, nn.Sequential(*_classifier(channels[-1], classes)))


def _stage(
    block: type[nn.Module], inputs: int, channels: int, count: int, stride: int
) -> nn.Sequential:
    others = (block(channels, channels, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, channels, stride), *others)


def _classifier(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]

"""Families of convnets: the demo's residual networks, and the two of the comparison."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from features import StagedNetwork


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == channels
            else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def residual_network(
    in_channels: int, image_size: int, classes: int, widths: tuple[int, int, int], blocks: int
) -> StagedNetwork:
    """Three stages of `blocks` residual blocks; stage i has `widths[i]` channels.

    The widths are all that a student needs to change: its features keep the teacher's sizes.
    Images of 8×8 pixels are halved once and not twice, so that a map has pixels left to show.
    """
    stages = []
    for width, stride in zip(widths, _strides(image_size), strict=True):
        stage = []
        for block in range(blocks):
            stage.append(ResidualBlock(in_channels, width, stride if block == 0 else 1))
            in_channels = width
        stages.append(nn.Sequential(*stage))
    return StagedNetwork(stages, _linear_head(in_channels, classes))


class PreActivationBlock(nn.Module):
    """A residual block whose convolutions come last (Zagoruyko & Komodakis 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        self.shortcut = (
            None
            if stride == 1 and in_channels == channels
            else nn.Conv2d(in_channels, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(x)
        return self.body(active) + (x if self.shortcut is None else self.shortcut(active))


def depthwise_block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """A 3×3 convolution of each channel by itself, then a 1×1 (Howard et al. 2017)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def wide_residual_network(
    in_channels: int, image_size: int, classes: int, depth: int, stem: int
) -> StagedNetwork:
    """WRN-`depth`-2: a stem of `stem` channels (16 in the paper), stages of 2, 4 and 8 times that.

    Depth 6n + 4 has n blocks a stage. The stem counts as the first stage.
    """
    stages, channels = _stages(PreActivationBlock, in_channels, image_size, stem, (depth - 4) // 6)
    stages[-1].extend([nn.BatchNorm2d(channels), nn.ReLU()])
    return StagedNetwork(stages, _linear_head(channels, classes))


def depthwise_network(
    in_channels: int, image_size: int, classes: int, blocks: int, stem: int
) -> StagedNetwork:
    """A plain network of depthwise separable convolutions, as wide as the WRN of that `stem`."""
    stages, channels = _stages(depthwise_block, in_channels, image_size, stem, blocks)
    stages[0].extend([nn.BatchNorm2d(stem), nn.ReLU()])
    return StagedNetwork(stages, _linear_head(channels, classes))


def _stages(
    block: Callable[[int, int, int], nn.Module],
    in_channels: int,
    image_size: int,
    stem: int,
    blocks: int,
) -> tuple[list[nn.Sequential], int]:
    stages = [nn.Sequential(nn.Conv2d(in_channels, stem, 3, padding=1, bias=False))]
    channels = stem
    for factor, stride in zip((2, 4, 8), _strides(image_size), strict=True):
        widths = [channels] + [stem * factor] * blocks
        strides = [stride] + [1] * (blocks - 1)
        stages.append(nn.Sequential(*map(block, widths, widths[1:], strides)))
        channels = widths[-1]
    return stages, channels


def _strides(image_size: int) -> tuple[int, int, int]:
    return (1, 2, 2) if image_size >= 16 else (1, 1, 2)


def _linear_head(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

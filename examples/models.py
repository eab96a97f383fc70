"""The teacher and the student: one family of residual networks, three stages each."""

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
    strides = (1, 2, 2) if image_size >= 16 else (1, 1, 2)
    stages = []
    for width, stride in zip(widths, strides, strict=True):
        stage = []
        for block in range(blocks):
            stage.append(ResidualBlock(in_channels, width, stride if block == 0 else 1))
            in_channels = width
        stages.append(nn.Sequential(*stage))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, classes))
    return StagedNetwork(stages, head)


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

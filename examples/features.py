"""How the features of a network reach a distillation loss: its forward returns them.

Forward hooks would work on any model unchanged, but `torch.compile(fullgraph=True)` may skip them
and DDP renames the modules they hang on: the list of features stays empty, and the loss silently
zero. A return value is part of the traced graph, keeps its gradient under DDP, and type-checks.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Output(NamedTuple):
    logits: Tensor  # (B, classes)
    features: list[Tensor]  # one (B, channels, height, width) per stage


class StagedNetwork(nn.Module):
    """Stages one after another, then a head; the output of every stage is returned as well."""

    def __init__(self, stages: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head = head

    def forward(self, images: Tensor) -> Output:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return Output(self.head(images), features)

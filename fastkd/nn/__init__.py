"""The losses as modules, with the keywords of the functions as attributes."""

from fastkd.nn.hint import HintLoss
from fastkd.nn.losses import (
    AttentionTransferLoss,
    DistillationLoss,
    FSPLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityPreservingLoss,
    SoftTargetLoss,
)

__all__ = [
    "AttentionTransferLoss",
    "DistillationLoss",
    "FSPLoss",
    "HintLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "SimilarityPreservingLoss",
    "SoftTargetLoss",
]

"""The losses as modules, with the keywords of the functions as attributes."""

from fastkd.nn.distillation import DistillationLoss
from fastkd.nn.hint import HintLoss
from fastkd.nn.losses import (
    AttentionTransferLoss,
    FSPLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    SimilarityPreservingLoss,
)
from fastkd.nn.soft_target import SoftTargetLoss

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

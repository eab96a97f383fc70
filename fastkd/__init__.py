"""fastkd: fused knowledge-distillation losses for PyTorch.

Names load on first use, so that ``import fastkd`` stays cheap and ``python -m fastkd.info`` can
report on an environment in which torch itself is broken.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd import nn as nn
    from fastkd.dispatch import (
        BackendUnavailableError,
        FallbackWarning,
        explain,
        use_backend,
    )
    from fastkd.logits import LinearHead, LogProbabilities, Probabilities, TopK
    from fastkd.losses.attention import attention_map, attention_transfer_loss
    from fastkd.losses.distillation import DistillationParts, distillation_loss
    from fastkd.losses.fsp import fsp_loss
    from fastkd.losses.hint import hint_loss
    from fastkd.losses.metrics import DistillationMetrics, distillation_metrics
    from fastkd.losses.rkd import rkd_angle_loss, rkd_distance_loss
    from fastkd.losses.similarity import similarity_preserving_loss
    from fastkd.losses.soft_target import soft_target_loss

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailableError",
    "DistillationMetrics",
    "DistillationParts",
    "FallbackWarning",
    "LinearHead",
    "LogProbabilities",
    "Probabilities",
    "TopK",
    "attention_map",
    "attention_transfer_loss",
    "distillation_loss",
    "distillation_metrics",
    "explain",
    "fsp_loss",
    "hint_loss",
    "nn",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "similarity_preserving_loss",
    "soft_target_loss",
    "use_backend",
]

_HOME = {
    "BackendUnavailableError": "dispatch",
    "FallbackWarning": "dispatch",
    "explain": "dispatch",
    "use_backend": "dispatch",
    "LinearHead": "logits",
    "LogProbabilities": "logits",
    "Probabilities": "logits",
    "TopK": "logits",
    "attention_map": "losses.attention",
    "attention_transfer_loss": "losses.attention",
    "fsp_loss": "losses.fsp",
    "hint_loss": "losses.hint",
    "rkd_angle_loss": "losses.rkd",
    "rkd_distance_loss": "losses.rkd",
    "similarity_preserving_loss": "losses.similarity",
    "DistillationMetrics": "losses.metrics",
    "distillation_metrics": "losses.metrics",
    "DistillationParts": "losses.distillation",
    "distillation_loss": "losses.distillation",
    "soft_target_loss": "losses.soft_target",
}


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("fastkd.nn")
    if name not in _HOME:
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastkd.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""TRL's `DistillationTrainer` on fastkd; the extra is `fastkd[trl]`.

`fastkd.integrations.trl_gkd` has `GKDTrainer`, which TRL calls experimental.
"""

from typing import Any
from unittest.mock import patch

import trl
from torch import Tensor
from trl.trainer import distillation_trainer

from fastkd.compat.trl import chunked_divergence_loss

__all__ = ["DistillationTrainer"]


class DistillationTrainer(trl.DistillationTrainer):
    """`trl.DistillationTrainer` whose divergence fastkd computes.

    The student writes the completions, and learns from the teacher's distribution of their tokens:
    a generalised Jensen-Shannon divergence, from hidden states and heads, without logits that exist
    as a whole. Arguments, `trl.DistillationConfig` and numbers are TRL's; see
    `fastkd.compat.trl.chunked_divergence_loss`, which takes the place of TRL's function while
    `_compute_loss` runs. Another divergence, or labels beside the teacher, are those of
    `fastkd.integrations.transformers.DistillationTrainer`.

    Example:
        >>> from fastkd.integrations.trl import DistillationTrainer
        >>> trainer = DistillationTrainer(
        ...     "Qwen/Qwen2.5-0.5B-Instruct",
        ...     teacher_model="Qwen/Qwen2.5-1.5B-Instruct",
        ...     train_dataset=prompts,
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def _compute_loss(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        with patch.object(
            distillation_trainer, "_chunked_divergence_loss", chunked_divergence_loss
        ):
            return super()._compute_loss(*args, **kwargs)

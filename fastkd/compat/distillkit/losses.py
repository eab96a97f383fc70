"""DistillKit's losses as classes, of a model's outputs and a signal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.compat.distillkit.functions import (
    MissingProbabilityHandling,
    dense_js_div,
    dense_kl_div,
    dense_tvd,
    sparse_js_div,
    sparse_kl_div,
    sparse_tvd,
)


class _Loss(torch.nn.Module):
    """`T² D / n` of a student's and a teacher's outputs, D being a sum over tokens.

    Args:
        temperature: T, above 0.
        missing_probability_handling: of a teacher that kept k classes. Default: `ZERO`.
        sparse_chunk_length: `chunk_length` of the function. Default: None.
    """

    _name: str
    _dense: Callable[..., Tensor]
    _sparse: Callable[..., Tensor]

    def __init__(
        self,
        temperature: float,
        missing_probability_handling: MissingProbabilityHandling = MissingProbabilityHandling.ZERO,
        sparse_chunk_length: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.missing = missing_probability_handling
        self.chunk_length = sparse_chunk_length

    @classmethod
    def name(cls) -> str:
        """The loss's name in a configuration."""
        return cls._name

    def requires_hidden_states(self) -> bool:
        """No."""
        return False

    def forward(
        self,
        student_outputs: Any,
        signal: Any,
        mask: Tensor | None = None,
        hidden_state_mapping: Any = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        """Of `student_outputs.logits` and a `DenseSignal` or `SparseSignal` a scalar.

        A signal with `logits` is dense. n is `num_items_in_batch`, or the sum of `mask`, or B·S.
        """
        logits = student_outputs.logits
        if num_items_in_batch is None:
            num_items_in_batch = logits[..., 0].numel() if mask is None else mask.float().sum()
        if hasattr(signal, "logits"):
            total = type(self)._dense(logits, signal.logits, mask, self.temperature)
        else:
            total = type(self)._sparse(
                logits,
                signal.sparse_ids,
                signal.sparse_values,
                mask,
                missing=self.missing,
                log_target=signal.log_values,
                temperature=self.temperature,
                target_generation_temperature=signal.generation_temperature,
                chunk_length=self.chunk_length,
            )
        return total * self.temperature**2 / num_items_in_batch


class KLDLoss(_Loss):
    """`T² KL(P‖Q) / n`; `kl.py`."""

    _name, _dense, _sparse = "kl", dense_kl_div, sparse_kl_div


class JSDLoss(_Loss):
    """`T² (½ KL(P‖M) + ½ KL(Q‖M)) / n`, `M = (P + Q) / 2`; `jsd.py`."""

    _name, _dense, _sparse = "jsd", dense_js_div, sparse_js_div


class TVDLoss(_Loss):
    """`T² ½ Σ |P − Q| / n`; `tvd.py`."""

    _name, _dense, _sparse = "tvd", dense_tvd, sparse_tvd

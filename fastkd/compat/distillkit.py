"""DistillKit's losses of logits (arcee-ai/DistillKit, `distillkit/lossfuncs`) on fastkd.

`KLDLoss`, `JSDLoss` and `TVDLoss`, with their functions of a whole teacher (`dense_kl_div`,
`dense_js_div`, `dense_tvd`) and of one that kept k classes (`sparse_kl_div`, `sparse_js_div`,
`sparse_tvd`). Its losses of rankings, hinges and hidden states stay DistillKit's. See
`fastkd.compat` for what all modules share.

The values v of k classes that a teacher computed at a temperature G are softened to T, with
`a = G/T`:

| missing | v | the teacher's p | `fastkd.TopK` |
|---|---|---|---|
| `ZERO` | any | `softmax(a v)`, and 0 for other classes | `tail="renormalize"` |
| `SYMMETRIC_UNIFORM` | log-probabilities | the ratios of all `exp(a v)` and, for all other \
classes as one, `(1 − Σ exp v)^a` | `tail="bucket"` |

`ZERO` is not what `TopK` calls `"zero"`. The power of the rest is not the sum of the powers of the
classes in it, unless a is 1. DistillKit leaves out what is below its `eps` of 1e-8; here that
counts. A teacher of k classes receives no gradient.

Example:
    >>> from types import SimpleNamespace
    >>> from fastkd.compat.distillkit import KLDLoss, sparse_js_div
    >>> logits = torch.randn(2, 8, 100, requires_grad=True)
    >>> values, ids = torch.randn(2, 8, 100).log_softmax(-1).topk(16)
    >>> sparse_js_div(logits, ids, values, temperature=2.0).backward()
    >>> signal = SimpleNamespace(logits=torch.randn(2, 8, 100))
    >>> loss = KLDLoss(temperature=2.0)(SimpleNamespace(logits=logits), signal)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.compat._distillkit_functions import (
    MissingProbabilityHandling,
    dense_js_div,
    dense_kl_div,
    dense_tvd,
    sparse_js_div,
    sparse_kl_div,
    sparse_tvd,
)

__all__ = [
    "JSDLoss",
    "KLDLoss",
    "MissingProbabilityHandling",
    "TVDLoss",
    "dense_js_div",
    "dense_kl_div",
    "dense_tvd",
    "sparse_js_div",
    "sparse_kl_div",
    "sparse_tvd",
]


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

"""What is measured, one file a loss: the loss as a user writes it without fastkd, and its shapes.

The eager statements compute in float32, also on bfloat16 inputs. That is what autocast does to
these operations, and without it softmax and norms of bfloat16 are wrong in the second digit.
"""

from benchmarks.workloads import (
    attention,
    divergence,
    fsp,
    hint,
    keywords,
    linear_head,
    rkd,
    similarity,
    soft_target,
    top_k,
)
from benchmarks.workloads.workload import Workload

__all__ = ["WORKLOADS", "Workload"]

WORKLOADS: tuple[Workload, ...] = (
    *soft_target.WORKLOADS,
    *divergence.WORKLOADS,
    *keywords.WORKLOADS,
    *linear_head.WORKLOADS,
    *top_k.WORKLOADS,
    *attention.WORKLOADS,
    *hint.WORKLOADS,
    *rkd.WORKLOADS,
    *similarity.WORKLOADS,
    *fsp.WORKLOADS,
)

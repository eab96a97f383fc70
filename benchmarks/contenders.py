"""Who computes a loss: each contender turns a workload into a function of its inputs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastkd
from benchmarks.workloads import Workload
from fastkd.dispatch import Explanation

Statement = Callable[..., Tensor]
Build = Callable[[Workload], Statement]


def _eager(workload: Workload) -> Statement:
    return partial(workload.eager, **workload.keywords)


def _compiled(workload: Workload) -> Statement:
    # As a process that never saw another shape: after a second one torch compiles for any size.
    torch._dynamo.reset()
    return partial(torch.compile(workload.eager, fullgraph=True), **workload.keywords)


def _fused(backend: str) -> Build:
    return lambda workload: partial(workload.function, backend=backend, **workload.keywords)


BACKENDS = ("native", "triton", "reference")

CONTENDERS: dict[str, Build] = {
    "eager": _eager,
    "compile": _compiled,
    **{backend: _fused(backend) for backend in BACKENDS},
}


def explain(device: str, backend: str | None = None) -> Explanation:
    """Which backend fastkd would use on this device, and why."""
    probe = torch.zeros(1, 1, device=device)
    return fastkd.explain(fastkd.hint_loss, probe, probe, backend=backend)

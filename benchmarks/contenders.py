"""Who computes a loss: each contender turns a workload into a function of its inputs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastkd
from benchmarks import liger, trl
from benchmarks.workloads import Workload, linear_head
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


# The best first.
KERNELS = ("native", "triton")
BACKENDS = (*KERNELS, "reference")

PEERS: dict[str, Build] = {**liger.CONTENDERS, **trl.CONTENDERS}

# No loss, but what any loss on linear heads takes at least; takes part where it is named.
BOUND = "products"

CONTENDERS: dict[str, Build] = {
    BOUND: lambda workload: linear_head.products,
    "eager": _eager,
    "compile": _compiled,
    **{backend: _fused(backend) for backend in BACKENDS},
    **PEERS,
}


def explain(
    workload: Workload, dtype: torch.dtype, device: str, backend: str | None = None
) -> Explanation:
    """Which backend fastkd would use for this workload on this device, and why."""
    one = workload.shrunk(workload.student[0][0]).inputs(dtype, device)
    return fastkd.explain(
        workload.function, *one.batch, **one.parameters, **workload.keywords, backend=backend
    )


def refusal(name: str, workload: Workload, dtype: torch.dtype, device: str) -> str | None:
    """Why a contender cannot take part, or None if it can."""
    if name == BOUND:
        has_heads = workload.family == linear_head.FAMILY
        return None if has_heads else f"{BOUND} are those of linear heads"
    if name in liger.CONTENDERS:
        return liger.refusal(name, workload, device)
    if name in trl.CONTENDERS:
        return trl.refusal(name, workload)
    if name not in BACKENDS:
        return None
    found = explain(workload, dtype, device, name)
    return None if found.chosen else found.reasons[name]


def lineup(
    workload: Workload, dtype: torch.dtype, device: str, wanted: list[str] | None
) -> list[str]:
    """Who takes part: of `wanted`, or by default all with kernels, those that can.

    Not every loss has kernels on every device; by default the reference then stands in for them.
    """

    def can(name: str) -> bool:
        return refusal(name, workload, dtype, device) is None

    if wanted is not None:
        return list(filter(can, dict.fromkeys(wanted)))
    kernels = list(filter(can, KERNELS)) or ["reference"]
    return ["eager", "compile", *kernels, *filter(can, PEERS)]

"""The workloads under pytest-benchmark: `pytest benchmarks --benchmark-only`.

One group a workload, one contender after another. For work on a kernel: `-k` chooses, and
`--benchmark-autosave` and `--benchmark-compare` compare with an earlier run. Claims about speed
come from `python -m benchmarks`, which measures the contenders in turns, so that a busy moment
slows all of them, and which flushes a GPU's cache before each step.
"""

from collections.abc import Callable

import torch

from benchmarks.conftest import Prepared
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import Device, Trial


def test_forward_and_backward(
    benchmark: Callable[..., None], prepared: Prepared, contender: str, device: Device
) -> None:
    benchmark.group = prepared.case.label
    trial = Trial(CONTENDERS[contender](prepared.case.workload), prepared.inputs)
    outcome = prepared.truth.judge(trial)
    assert outcome.status == "right", outcome

    def run() -> None:
        trial.prepare()
        trial.step()
        if device.name == "cuda":
            torch.cuda.synchronize()

    benchmark(run)

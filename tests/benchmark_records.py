"""Cases of the benchmarks, and records of runs that never were."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import measure, trl  # noqa: E402
from benchmarks.cpu import Cpu  # noqa: E402
from benchmarks.environment import versions  # noqa: E402
from benchmarks.record import SCHEMA, Case, Outcome, Record  # noqa: E402
from benchmarks.workloads import WORKLOADS  # noqa: E402

ALL_CASES = [(workload, dtype) for workload in WORKLOADS for dtype in workload.dtypes]
CASES = [(workload, dtype) for workload, dtype in ALL_CASES if "cpu" in workload.devices]
SMALL = WORKLOADS[0].shrunk(16)
FLOAT = torch.float32


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let `package` be missing, also where it is installed and has been imported."""
    loaded = [name for name in sys.modules if name.startswith(f"{package}.")]
    for name in (package, *loaded):
        monkeypatch.setitem(sys.modules, name, None)
    trl._generalized_jsd_loss.cache_clear()
    trl._chunked_divergence_loss.cache_clear()


def measured(names: list[str]) -> Case:
    return measure.measure(SMALL, FLOAT, names, Cpu(), 0.01, 2)


def record_of(*cases: Case, **changes) -> Record:
    fields = dict(
        schema=SCHEMA,
        device="cpu",
        date="2026-01-01T00:00+00:00",
        commit="0123456789ab",
        machine=Cpu().machine(),
        versions=versions(Cpu()),
        options={},
        complete=True,
        subject="native",
        copy_bandwidth={"warm": 2e10, "fresh": 1e10},
        cases=list(cases),
    )
    return Record(**(fields | changes))


def case_of(workload, dtype="float32", **seconds: float) -> Case:
    return Case(
        family=workload.family,
        loss=workload.loss,
        workload=workload.name,
        dtype=dtype,
        student=[list(shape) for shape in workload.student],
        teacher=[list(shape) for shape in workload.teacher],
        headline=workload.headline,
        ideal_bytes=10**7,
        gradient_bytes=10**6,
        rounding_error=2e-8,
        outcomes={
            name: Outcome("right", "", 1e-7, 1e-7, s, s * 0.9, s * 1.1, s * 0.8, 9, 10**6)
            for name, s in seconds.items()
        },
    )


def full_record(**changes) -> Record:
    cases = [
        case_of(workload, str(dtype).removeprefix("torch."), eager=4e-3, compile=2e-3, native=1e-3)
        for workload, dtype in CASES
    ]
    return record_of(*cases, **changes)

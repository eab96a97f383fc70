"""Options and parameters of `pytest benchmarks`: which workloads, and who computes them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from benchmarks.contenders import CONTENDERS, lineup
from benchmarks.environment import open_device
from benchmarks.measure import Device, Truth
from benchmarks.workloads import WORKLOADS, Workload
from benchmarks.workloads.workload import Inputs

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_QUICK_FRACTION = 32


class Case(NamedTuple):
    """A workload in one dtype. `name` is for -k: letters, digits, underscores and hyphens."""

    workload: Workload
    dtype: torch.dtype

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.workload.loss} {self.workload.name} {dtype}"

    @property
    def name(self) -> str:
        spelled = self.label.replace("←", "from").replace("×", "x")
        return re.sub(r"\W+", "-", spelled, flags=re.ASCII).strip("-")


class Prepared(NamedTuple):
    """A case with its inputs, and with what each contender must compute from them."""

    case: Case
    inputs: Inputs
    truth: Truth


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastkd")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    group.addoption(
        "--dtype", action="append", choices=_DTYPES, help="may be repeated; default: all"
    )
    group.addoption(
        "--quick",
        action="store_true",
        help=f"a smoke test on a {_QUICK_FRACTION}nd of each batch: its figures mean nothing",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    arguments = [
        pytest.param(case, contender, id=f"{case.name}-{contender}")
        for case in cases(options.device, options.dtype, options.quick)
        for contender in lineup(*case, options.device, list(CONTENDERS))
    ]
    metafunc.parametrize(("prepared", "contender"), arguments, indirect=["prepared"])


def cases(device: str, dtypes: list[str] | None, quick: bool) -> Iterator[Case]:
    for workload in WORKLOADS:
        if device in workload.devices:
            sized = workload.shrunk(_QUICK_FRACTION) if quick else workload
            for name in dict.fromkeys(dtypes or _DTYPES):
                if _DTYPES[name] in workload.dtypes:
                    yield Case(sized, _DTYPES[name])


@pytest.fixture(scope="module")
def device(pytestconfig: pytest.Config) -> Device:
    return open_device(pytestconfig.option.device)


@pytest.fixture(scope="module")
def prepared(request: pytest.FixtureRequest, device: Device) -> Prepared:
    """Kept from one contender to the next: the float64 oracle takes longer than they do."""
    case: Case = request.param
    inputs = case.workload.inputs(case.dtype, device.name)
    return Prepared(case, inputs, Truth(case.workload, inputs))

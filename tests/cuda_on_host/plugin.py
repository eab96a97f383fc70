"""Runs the tests of backend "native" on CUDA kernels, without a GPU.

Loaded by `pytest -p cuda_on_host.plugin`; FASTKD_NATIVE_PATH names the module that is built here.
Tensors on the CPU pass for those of a GPU: all of Python but the choice of device and stream, and
all of the kernels, are the real ones. Every test runs under several schedules of the GPU's threads,
drawn from FASTKD_TEST_SEED, and under the last of them as if into a CUDA graph.
"""

import random

import pytest

from fastkd.kernels import compiled, cuda, native

_SCHEDULES = 3


def pytest_configure():
    for function in ("hint_forward", "hint_backward", "multiply"):
        setattr(native, function, getattr(cuda, function))
    cuda._place = lambda tensor: (0, 0)


@pytest.fixture(autouse=True, params=range(_SCHEDULES))
def schedule(request):
    # Imported late: conftest is not yet importable when plugins are.
    from conftest import SEED

    seed = random.Random(f"{SEED} {request.node.nodeid}").getrandbits(64)
    compiled.loaded().set_schedule(seed)
    compiled.loaded().set_capturing(request.param == _SCHEDULES - 1)

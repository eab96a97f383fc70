"""Runs the tests of backend "native" on CUDA kernels, without a GPU.

Loaded by `pytest -p cuda_on_host.plugin`; FASTKD_NATIVE_PATH names the module that is built here.
Tensors on the CPU pass for those of a GPU: all of Python but the choice of device and stream, and
all of the kernels, are the real ones. Every test has its own schedule of the GPU's threads and its
own kind of GPU, and one in three runs as if into a CUDA graph; FASTKD_TEST_SEED brings them back.
"""

import functools
import random

import pytest

from fastkd.kernels import compiled, cuda, native
from fastkd.losses import logits
from fastkd.ops import attention, fsp
from fastkd.ops.soft_target import Parameters

# Half of the tests on the device that has clusters of blocks, half on one that has none.
_WITH_CLUSTERS = 0
_DEVICES = (_WITH_CLUSTERS, 1)


def pytest_configure():
    for loss in ("hint", "soft_target"):
        for function in (f"{loss}_forward", f"{loss}_backward"):
            setattr(native, function, getattr(cuda, function))
    for part in ("map_forward", "transfer_forward", "backward"):
        setattr(native, f"attention_{part}", getattr(cuda, f"attention_{part}"))
    attention.gradient_follows = lambda *_: False
    fsp.has_kernels = lambda *_: False
    native.multiply = cuda.multiply
    for function in ("squared_distances", "rkd_distance", "rkd_angle", "similarity"):
        setattr(native, function, getattr(cuda, function))
    native.soft_target_forward = _with_checked_labels(cuda.soft_target_forward, 2)
    native.soft_target_ensemble = _with_checked_labels(cuda.soft_target_ensemble, 3)


def _with_checked_labels(function, place):
    """On a CPU, where these tensors are, a label that is no class is an error."""

    @functools.wraps(function)
    def checked(student, *args):
        p = next(arg for arg in args if isinstance(arg, Parameters))
        labels = args[place - 1]
        if labels is not None:
            logits.check_label_range(labels, student.shape[p.dim], p.ignore_index)
        function(student, *args)

    return checked


@pytest.fixture(autouse=True)
def schedule(request, monkeypatch):
    # Imported late: conftest is not yet importable when plugins are.
    from conftest import SEED

    draw = random.Random(f"{SEED} {request.node.nodeid}")
    device = draw.choice(_DEVICES)
    if request.node.get_closest_marker("with_clusters"):
        device = _WITH_CLUSTERS
    monkeypatch.setattr(cuda, "_place", lambda tensor: (device, 0))
    compiled.loaded().set_schedule(draw.getrandbits(64))
    compiled.loaded().set_capturing(draw.random() < 1 / 3)

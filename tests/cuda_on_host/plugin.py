"""Runs the tests of backend "native" on CUDA kernels, without a GPU.

Loaded by `pytest -p cuda_on_host.plugin`; FASTKD_NATIVE_PATH names the module that is built here.
Tensors on the CPU pass for those of a GPU: all of Python but the choice of device and stream, and
all of the kernels, are the real ones. Every test has its own schedule of the GPU's threads and its
own kind of GPU, and one in three runs as if into a CUDA graph, with many ticket counters for such
launches or with few; FASTKD_TEST_SEED brings them back.
"""

import functools
import random

import pytest

from fastkd.kernels import compiled, native
from fastkd.losses import logits
from fastkd.ops import attention, fsp

# Half of the tests on the device that has clusters of blocks, half on one that has none.
_WITH_CLUSTERS = 0
_DEVICES = (_WITH_CLUSTERS, 1)


def pytest_configure():
    attention.gradient_follows = lambda *_: False
    fsp.has_kernels = lambda *_: False
    native.soft_target_forward = _with_checked_labels(native.soft_target_forward, 2)
    native.top_k_forward = _with_checked_labels(native.top_k_forward, 4)


def _with_checked_labels(function, place):
    """On a CPU, where these tensors are, a label that is no class is an error.

    Those of a shard may be another's, and have been checked before. Labels have this place among
    the arguments, the student is first and the parameters last.
    """

    @functools.wraps(function)
    def checked(*args, **others):
        student, labels, p = args[0], args[place], args[-1]
        if labels is not None and p.all_classes == 0:
            logits.check_label_range(labels, student.shape[p.dim], p.ignore_index)
        function(*args, **others)

    return checked


def use_device(index, monkeypatch, stream=0):
    """Calls run on this device and stream from now on."""
    monkeypatch.setattr(native, "place_of", lambda tensor: (index, stream))


@pytest.fixture(autouse=True)
def schedule(request, monkeypatch):
    # Imported late: conftest is not yet importable when plugins are.
    from conftest import SEED

    draw = random.Random(f"{SEED} {request.node.nodeid}")
    device = draw.choice(_DEVICES)
    if request.node.get_closest_marker("with_clusters"):
        device = _WITH_CLUSTERS
    use_device(device, monkeypatch)
    compiled.loaded().set_schedule(draw.getrandbits(64))
    compiled.loaded().set_capturing(draw.random() < 1 / 3)
    compiled.loaded().restart_captured_counters(draw.choice((0, 1, 20, 1 << 16)))

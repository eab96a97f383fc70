"""Which backends are tested, where, with what inputs; all that a test may change is put back."""

import itertools
import os
import secrets
import zlib

import cases
import numpy as np
import pytest
import shim
import shim_kernels
import thresholds
import torch
from split import LOSSES, Threads, whole

import fastkd
from fastkd import dispatch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401

# A backend that is named here and cannot run fails its tests: it is never skipped in silence.
BACKENDS = os.environ.get("FASTKD_TEST_BACKENDS", "native,reference").split(",")
KERNEL_BACKENDS = [name for name in BACKENDS if name != "reference"]

# Where tests put their tensors. What is about a CPU alone, and names no device, needs the default.
DEVICE = os.environ.get("FASTKD_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    # Before CUDA starts: without it cuBLAS may sum in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False

SEED = int(os.environ.get("FASTKD_TEST_SEED") or secrets.randbelow(2**32))
# The workers of pytest-xdist must collect the same tests, some of whose names show numbers.
os.environ["FASTKD_TEST_SEED"] = str(SEED)
torch.manual_seed(SEED)


CASES = int(os.environ.get("FASTKD_TEST_CASES") or 0)

# Of the CPU kernels, whose other ways small tensors must take, too: "default", "lowered", or for
# each test the one or the other.
THRESHOLDS = os.environ.get("FASTKD_TEST_THRESHOLDS") or "either"
assert THRESHOLDS in ("default", "lowered", "either"), THRESHOLDS


def pytest_report_header():
    return (
        f"fastkd: FASTKD_TEST_BACKENDS={','.join(BACKENDS)} FASTKD_TEST_DEVICE={DEVICE} "
        f"FASTKD_TEST_CASES={CASES or 'all'} FASTKD_TEST_THRESHOLDS={THRESHOLDS} "
        f"FASTKD_TEST_SEED={SEED}"
    )


def _has_gpu_kernels(parameters):
    """Whether what a test with these parameters tests is a GPU's kernels, wherever these run."""
    backend = parameters.get("backend") or parameters.get("kernel_backend") or "native"
    native = DEVICE != "cpu" or shim.module()
    return backend == "triton" or (backend == "native" and native)


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """Of each test's cases at most FASTKD_TEST_CASES run, which the seed draws.

    For what takes a GPU's place, and for sanitizers, where a case takes seconds.
    """
    if not CASES:
        return
    of_gpu = metafunc.definition.get_closest_marker("gpu_sizes")

    def runs(call):
        sized = of_gpu or any(mark.name == "gpu_sizes" for mark in call.marks)
        return not sized or _has_gpu_kernels(call.params)

    cases.draw(metafunc, CASES, SEED, runs)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Sizes at which only a GPU's kernels change are for those kernels."""
    parameters = [item.callspec.params if hasattr(item, "callspec") else {} for item in items]
    kept = [
        not item.get_closest_marker("gpu_sizes") or _has_gpu_kernels(of_item)
        for item, of_item in zip(items, parameters, strict=True)
    ]
    config.hook.pytest_deselected(
        items=[item for item, stays in zip(items, kept, strict=True) if not stays]
    )
    items[:] = itertools.compress(items, kept)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=KERNEL_BACKENDS)
def kernel_backend(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_inputs(request):
    """Other inputs in every run; the seed in the header brings them back."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def drawn_thresholds(request):
    """Lowered thresholds, or the defaults where a test is marked to be about those."""
    if "native" not in BACKENDS:
        yield
        return
    seed = SEED ^ zlib.crc32(request.node.nodeid.encode())
    lower = THRESHOLDS == "lowered" or (THRESHOLDS == "either" and seed % 2 == 0)
    thresholds.use(seed if lower and not request.node.get_closest_marker("at_defaults") else None)
    yield
    thresholds.use(None)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Uninitialised memory holds NaN, so that an element that no kernel writes shows.

    On a GPU some of torch's own operators, which the reference uses, have no deterministic form.
    """
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_dispatch(monkeypatch):
    monkeypatch.delenv("FASTKD_BACKEND", raising=False)
    dispatch._resolve.cache_clear()
    dispatch._warn_once.cache_clear()
    yield
    dispatch._resolve.cache_clear()
    dispatch._warn_once.cache_clear()


@pytest.fixture
def fresh_compiler():
    # Inductor has its own way with uninitialised memory under deterministic algorithms.
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def split(monkeypatch):
    """`split(ranks, cuts)`: from then on the losses that are checked are those of ranks."""

    def split(size, cuts=None):
        for name in LOSSES:
            monkeypatch.setattr(fastkd, name, whole(name, Threads(size), cuts))

    return split


@pytest.fixture
def numbers():
    """Normal random numbers of a shape, as a float64 array."""
    rng = np.random.default_rng(torch.initial_seed())
    return lambda *shape: rng.normal(size=shape)


@pytest.fixture(name="shim")
def kernels_of_the_shim():
    """The module of kernels that test the shim, with a schedule of the test's own."""
    if not shim_kernels.BUILT.exists():
        pytest.fail(
            f"{shim_kernels.BUILT} is missing: `make cuda-on-host` builds it", pytrace=False
        )
    module = shim_kernels.load()
    module.set_schedule(torch.initial_seed())
    yield module
    module.set_multiprocessors(2)
    module.set_capability(9, 0)

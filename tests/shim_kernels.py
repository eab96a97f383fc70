"""The kernels that test the shim (cuda_on_host), and how they are called."""

import functools
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch

BUILD = Path(__file__).parent.parent / "build" / "cuda_on_host"
BUILT = Path(
    os.environ.get("FASTKD_SHIM_TEST_PATH")
    or next(BUILD.glob("_shim_test*.so"), BUILD / "_shim_test*.so")
).resolve()
SEEDS = range(40)
THREAD = r"block \(\d, 0, 0\), thread \(\d+, 0, 0\)"


@functools.cache
def load():
    spec = importlib.util.spec_from_file_location("_shim_test", BUILT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrong(shim, expected, call, *args, **kwargs):
    """In how many of some schedules a kernel's result is not the expected one."""
    count = 0
    for seed in SEEDS:
        shim.set_schedule(seed)
        count += not np.array_equal(call(*args, **kwargs), expected)
    return count


def values(*shape):
    """Whole numbers, so that sums are exact in every order."""
    return torch.randint(1, 1000, shape).double().numpy()


def words(*shape):
    return torch.randint(2**32, shape).numpy().astype(np.uint32)


def results_of(shim, call, *args, **kwargs):
    """What becomes of a call in some schedules: the result, or why there is none."""
    for seed in SEEDS:
        shim.set_schedule(seed)
        try:
            yield call(*args, **kwargs)
        except RuntimeError as error:
            yield str(error)

"""What ends a process, in processes of its own: large gradients, and too little memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS

import fastkd

pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")
TESTS = Path(__file__).parent


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Of those that kernels write: the gradients of other relations are matrix products.
WRITTEN = ["soft targets", "soft targets of pixels", "ensemble", "distillation", "attention"]
WRITTEN += ["attention of maxima", "hint", "flows"]


@pytest.mark.thorough
def test_large_gradients_next_to_float64():
    script = TESTS / "large_gradients.py"
    python(script, "--few", "--sizes", "8 MiB", "--losses", *WRITTEN)


# Beside the gradient each of the threads takes 96 MB.
TOO_LITTLE = """
import resource, torch, fastkd
torch.set_num_threads(2)
few, many = (torch.randn(8, classes) for classes in (3000, 3_000_000))
fastkd.soft_target_loss(few.requires_grad_(), few.detach(), backend="native")
many.requires_grad_()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 120_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    fastkd.soft_target_loss(many, many.detach(), backend="native")
except MemoryError:
    pass
else:
    raise AssertionError("there was room")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_threads_without_memory_raise():
    python("-c", TOO_LITTLE)


def test_more_channels_than_winners_can_number():
    """Expanded: they take no memory."""
    maps = [torch.ones(1, 1, 1).expand(1, channels, 1) for channels in (2**31, 3)]
    with pytest.raises(ValueError, match="max_pow takes at most 2147483647 channels"):
        fastkd.attention_map(maps[0], kind="max_pow", backend="native")
    for sides in (maps, reversed(maps)):
        with pytest.raises(ValueError, match="at most 2147483647 channels, got 2147483648"):
            fastkd.attention_transfer_loss(*sides, kind="max_pow", backend="native")

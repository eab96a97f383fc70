"""Which calls Triton refuses, and why."""

import os
import sys

import pytest
import torch

from fastkd.facts import Facts
from fastkd.kernels import triton
from fastkd.tensors import TRANSFORM

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def fresh_triton():
    triton._cannot_load.cache_clear()
    yield
    triton._cannot_load.cache_clear()


def facts(device="cuda:0", loss="hint_loss", obstacle=None):
    return Facts(loss, device, (torch.float32, torch.float32), obstacle)


@pytest.fixture
def on_gpus(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def forget_triton(monkeypatch):
    for name in list(sys.modules):
        if name.split(".")[0] == "triton":
            monkeypatch.delitem(sys.modules, name)


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton was imported as an interpreter")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3", "xpu:0"])
def test_gpus_are_served(device):
    pytest.importorskip("triton")
    assert triton.refuse(facts(device)) is None


def test_cpu_tensors_are_not(on_gpus):
    refusal = triton.refuse(facts("cpu"))
    assert refusal.expected
    assert "on the CPU" in refusal.reason


def test_cpu_tensors_are_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refusal = triton.refuse(facts("cpu"))
    if IS_INTERPRETED:
        assert refusal is None
    else:
        pytest.importorskip("triton")
        assert "after Triton had been imported" in refusal.reason


def test_losses_without_kernels(on_gpus):
    refusal = triton.refuse(facts(loss="perfect_loss"))
    assert refusal.expected
    assert "perfect_loss" in refusal.reason


@pytest.mark.parametrize("device", ["mps:0", "meta", "hpu:0"])
def test_other_devices(on_gpus, device):
    refusal = triton.refuse(facts(device))
    assert not refusal.expected
    assert device.partition(":")[0] in refusal.reason
    assert 'backend="reference"' in refusal.remedy


def test_transformed_tensors(on_gpus):
    assert "torch.func" in triton.refuse(facts(obstacle=TRANSFORM)).reason


def test_triton_is_missing(on_gpus, monkeypatch):
    forget_triton(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton", None)
    refusal = triton.refuse(facts())
    assert "not installed" in refusal.reason
    assert "pip install triton" in refusal.remedy


def test_triton_is_broken(on_gpus, monkeypatch, tmp_path):
    forget_triton(monkeypatch)
    (tmp_path / "triton.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    refusal = triton.refuse(facts())
    assert "OSError: no driver" in refusal.reason
    assert refusal.remedy


def test_refused_calls_do_not_import_triton(on_gpus, monkeypatch):
    monkeypatch.setattr(triton.importlib, "import_module", lambda name: pytest.fail(name))
    for refused in (
        facts("cpu"),
        facts("mps"),
        facts(loss="perfect_loss"),
        facts("cuda", obstacle=TRANSFORM),
    ):
        assert triton.refuse(refused) is not None

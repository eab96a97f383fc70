"""`python -m fastkd.info` answers even where torch, Triton or the compiled module do not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd.info import collect, describe
from fastkd.kernels import compiled

LOSSES = {
    "soft_target_loss",
    "distillation_loss",
    "distillation_metrics",
    "attention_map",
    "attention_transfer_loss",
    "hint_loss",
    "fsp_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "similarity_preserving_loss",
}


def info(*args: str, first_on_path: Path | None = None, **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "FASTKD_BACKEND"} | variables
    if first_on_path:
        environment["PYTHONPATH"] = os.pathsep.join((str(first_on_path), *sys.path[1:]))
    done = subprocess.run(
        [sys.executable, "-m", "fastkd.info", *args],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def report(**keywords: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(info("--json", **keywords))
    return result


def test_prints_the_text_unless_json_is_asked_for() -> None:
    assert info() == describe(report()) + "\n"


def test_says_what_runs_and_why() -> None:
    found = report()
    assert found["fastkd"]["version"] == fastkd.__version__
    assert found["torch"] == {"version": torch.__version__}
    backends = found["devices"]["cpu"]["backends"]
    assert set(backends) == LOSSES
    x = torch.ones(2, 3)
    assert backends["soft_target_loss"] == {
        "backend": fastkd.explain(fastkd.soft_target_loss, x, x).chosen,
        "reasons": fastkd.explain(fastkd.soft_target_loss, x, x).reasons,
    }


def test_text_holds_what_the_json_does() -> None:
    found = report()
    text = describe(found)
    for part in (found["fastkd"]["version"], found["torch"]["version"], *found["build"]):
        assert part in text
    for reason in found["devices"]["cpu"]["backends"]["hint_loss"]["reasons"].values():
        assert reason in text


@pytest.mark.parametrize(
    ("cuda_archs", "text"),
    [([], "no CUDA kernels"), (["80", "90"], "CUDA kernels for sm_80, sm_90")],
)
def test_text_says_for_which_gpus_there_are_kernels(cuda_archs: list[str], text: str) -> None:
    found = report()
    assert found["native"]["cuda_archs"] == compiled.loaded().cuda_archs()
    found["native"]["cuda_archs"] = cuda_archs
    assert f"has {text}, from " in describe(found)


def test_every_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr("fastkd.info._backends", lambda torch, device: {"problem": device})
    found = collect()
    assert found["devices"]["cuda:1"] == {
        "name": "GPU 1, compute capability 9.1",
        "backends": {"problem": "cuda:1"},
    }
    assert "What runs on cuda:0 (GPU 0, compute capability 9.0):\n  cuda:0" in describe(found)


def test_a_backend_asked_for_shows() -> None:
    found = report(FASTKD_BACKEND="reference")
    assert found["environment"]["FASTKD_BACKEND"] == "reference"
    assert found["devices"]["cpu"]["backends"]["hint_loss"]["backend"] == "reference"


def test_a_setting_that_is_wrong_is_reported() -> None:
    found = report(FASTKD_BACKEND="gpu")
    assert "got 'gpu'" in found["devices"]["cpu"]["backends"]["problem"]


@pytest.mark.parametrize(
    ("name", "fault", "problem"),
    [
        ("torch", "raise ModuleNotFoundError(name='torch')", "not installed"),
        ("torch", "raise OSError('undefined symbol')", "OSError: undefined symbol"),
        ("torch", "import a_missing_dependency", "a_missing_dependency"),
        ("triton", "raise ModuleNotFoundError(name='triton')", "not installed"),
        ("triton", "raise RuntimeError('no driver')", "RuntimeError: no driver"),
    ],
)
def test_works_without(name: str, fault: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text(fault)
    found = report(first_on_path=tmp_path)
    assert problem in found[name]["problem"]
    assert problem in describe(found)
    if name == "triton":
        assert found["devices"]["cpu"]["backends"]["hint_loss"]["backend"]


def test_reports_a_compiled_module_that_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "_native.so"
    broken.write_text("not a library")
    found = report(FASTKD_NATIVE_PATH=str(broken))
    assert str(broken) in found["native"]["problem"]
    assert found["devices"]["cpu"]["backends"]["hint_loss"]["backend"] == "reference"

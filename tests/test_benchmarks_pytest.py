"""`pytest benchmarks`: its groups and parameters, and that no wrong contender is timed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich")
pytest.importorskip("pytest_benchmark")

from benchmarks.conftest import cases  # noqa: E402
from benchmarks.contenders import CONTENDERS, lineup  # noqa: E402
from benchmarks.workloads import WORKLOADS  # noqa: E402

# One that each contender of a CPU computes within a millisecond.
CHOSEN = "soft_target_loss-2-100-float32"
# What a worker of pytest-xdist has in its own would turn measuring off.
ENVIRONMENT = {name: value for name, value in os.environ.items() if "XDIST" not in name} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONIOENCODING": "utf-8",
}
BRIEF = ("--dtype", "float32", "--benchmark-max-time=0.01")


def run(*arguments: str, status: int = 0, **variables: str) -> str:
    command = (sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "--quick")
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_option_k_can_tell_all_cases_apart(device, quick):
    names = [case.name for case in cases(device, None, quick)]
    assert len(set(names)) == len(names) > 40
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)


def test_every_workload_has_every_contender_that_can_run_here():
    lines = run("--collect-only", "-q", "--dtype", "bfloat16").splitlines()
    names = [line.partition("[")[2].removesuffix("]") for line in lines if "[" in line]
    bfloat16 = torch.bfloat16
    assert [(name.partition("-")[0], *name.rsplit("-", 2)[1:]) for name in names] == [
        (workload.loss, "bfloat16", contender)
        for workload in WORKLOADS
        if "cpu" in workload.devices and bfloat16 in workload.dtypes
        for contender in lineup(workload, bfloat16, "cpu", list(CONTENDERS))
    ]


@pytest.mark.thorough
def test_groups_and_comparison_with_a_saved_run(tmp_path):
    options = (*BRIEF, f"--benchmark-storage={tmp_path}")
    run(*options, "-k", CHOSEN, "--benchmark-only", "--benchmark-autosave")
    (saved,) = tmp_path.rglob("*.json")
    results = json.loads(saved.read_text())["benchmarks"]
    workload = WORKLOADS[0].shrunk(32)
    contenders = lineup(workload, workload.dtypes[0], "cpu", list(CONTENDERS))
    assert {"eager", "compile", "reference"} <= set(contenders)
    assert [result["param"] for result in results] == [f"{CHOSEN}-{name}" for name in contenders]
    assert {result["group"] for result in results} == {"soft_target_loss (2,100) float32"}
    assert all(result["stats"]["min"] > 0 for result in results)
    again = run(*options, "--benchmark-compare", "-k", f"{CHOSEN}-eager")
    assert "-eager] (NOW)" in again
    assert "-eager] (0001_" in again


@pytest.mark.thorough
def test_a_wrong_contender_fails_and_is_not_timed(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "from benchmarks import contenders\n"
        "eager = contenders.CONTENDERS['eager']\n"
        "contenders.CONTENDERS['eager'] = lambda workload: (\n"
        "    lambda *batch: 1.001 * eager(workload)(*batch)\n"
        ")\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path[1:]])
    result = tmp_path / "result.json"
    options = (*BRIEF, "-p", "wrong", f"--benchmark-json={result}")
    output = run(*options, "-k", f"{CHOSEN}-eager or {CHOSEN}-reference", status=1, PYTHONPATH=path)
    assert "1 failed, 1 passed" in output
    assert "status='wrong'" in output
    (timed,) = json.loads(result.read_text())["benchmarks"]
    assert timed["param"] == f"{CHOSEN}-reference"

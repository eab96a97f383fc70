"""What a build with nvcc makes; it loads where there is no driver. Needs nvcc: run it by name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
# In any order, each written in either way.
ARCHITECTURES = os.environ.get("FASTKD_CUDA_ARCHS", "9.0,80")
NUMBERS = sorted(re.findall(r"\d+", ARCHITECTURES.replace(".", "")), key=int)


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | variables,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path, **variables: str) -> Path:
    # Into the folder, but from the ordinary build's objects.
    run("setup.py", "-q", "build_ext", "--build-lib", str(folder), **variables)
    return next((folder / "fastkd").glob("_native*"))


def report(module: Path) -> dict[str, Any]:
    return json.loads(run("-m", "fastkd.info", "--json", FASTKD_NATIVE_PATH=str(module)))


def test_kernels_that_do_not_compile_cost_the_cpu_nothing(tmp_path: Path) -> None:
    broken = "-include /no/such/header.h"
    module = build(tmp_path, FASTKD_BUILD="auto", NVCC_APPEND_FLAGS=broken)
    note = (module.parent / "_build.txt").read_text()
    assert note.startswith("CPU kernels: compiled\nCUDA kernels: left out: compiling failed\n")
    assert "/no/such/header.h: No such file" in note
    assert report(module)["native"]["cuda_archs"] == []


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("module")
    # In two thirds of the time: how well kernels are compiled is not what these tests are about.
    hasty = "-Xcicc -O1 -Xptxas -O1"
    return build(
        folder, FASTKD_BUILD="cuda", FASTKD_CUDA_ARCHS=ARCHITECTURES, NVCC_APPEND_FLAGS=hasty
    )


def test_says_what_it_holds(module: Path) -> None:
    note = (module.parent / "_build.txt").read_text()
    names = ", ".join(f"sm_{number}" for number in NUMBERS)
    assert f"CUDA kernels: compiled for {names}, and PTX of compute_{NUMBERS[-1]}, by " in note
    found = report(module)
    assert found["native"]["cuda_archs"] == NUMBERS
    assert found["devices"]["cpu"]["backends"]["hint_loss"]["backend"] == "native"


def test_needs_no_library_of_cuda(module: Path) -> None:
    needed = subprocess.check_output(["readelf", "-d", module], text=True)
    assert "libstdc++" in needed
    assert "cuda" not in needed


def test_keeps_its_runtime_to_itself(module: Path) -> None:
    symbols = subprocess.check_output(["nm", "-D", "--defined-only", module], text=True)
    assert "PyInit__native" in symbols
    assert "cuda" not in symbols


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_is_loaded_and_not_usable(module: Path) -> None:
    ask = "from fastkd.kernels import compiled; print(compiled.loaded().cuda_problem(0))"
    assert run("-c", ask, FASTKD_NATIVE_PATH=str(module)).startswith("CUDA, ")

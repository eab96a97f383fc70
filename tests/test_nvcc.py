"""Which nvcc the build takes, and which GPUs it compiles for.

Shown on toolkits of shell script, and on drivers of a few lines of C.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_toolkits import driver, script, toolkit

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))

import architectures
import nvcc

from fastkd.kernels import cuda


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing of CUDA is found, but for what a test puts into this folder."""
    for name in ("CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    return tmp_path


def test_no_nvcc(no_toolkit: Path) -> None:
    with pytest.raises(nvcc.UnusableError, match=r"^no nvcc was found; install NVIDIA"):
        nvcc.find()


def test_where_nvcc_is_looked_for(no_toolkit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_packages = "nvidia/cu13/bin/nvcc"
    places = [
        script(no_toolkit / place)
        for place in ("home/bin/nvcc", "path/nvcc", f"site/{in_packages}", f"purelib/{in_packages}")
    ]
    assert nvcc.candidates() == list(map(str, places[1:]))
    monkeypatch.setenv("CUDA_HOME", str(no_toolkit / "home"))
    assert nvcc.candidates() == list(map(str, places))
    monkeypatch.setenv("CUDACXX", "mine")
    assert nvcc.candidates() == ["mine"]


def test_nvcc_that_is_too_old_is_passed_over(
    no_toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(no_toolkit / "home"))
    old = toolkit(no_toolkit / "home", "11.8")
    with pytest.raises(nvcc.UnusableError, match=f"^{old} is of CUDA 11.8, older than 12.4; inst"):
        nvcc.find()
    new = toolkit(no_toolkit / "site/nvidia/cu13", "13.0")
    assert nvcc.find() == nvcc.Nvcc(
        str(new),
        (13, 0),
        frozenset({75, 80, 90}),
        str(no_toolkit / "site/nvidia/cu13/lib/libcudart_static.a"),
    )


KNOWN = frozenset({75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121})
USUAL = [80, 86, 89, 90, 100, 120]


def no_gpu() -> list[int]:
    raise architectures.NoGpuError("no driver")


def unasked() -> list[int]:
    raise AssertionError("the driver was asked")


@pytest.mark.parametrize(
    ("wanted", "known", "chosen"),
    [
        ("all", KNOWN, USUAL),
        (" all ", {75, 80, 86, 89, 90}, [80, 86, 89, 90]),
        ("90", KNOWN, [90]),
        ("9.0", KNOWN, [90]),
        ("12.0;80", KNOWN, [80, 120]),
        ("90, 8.6,90", KNOWN, [86, 90]),
        ("103", KNOWN, [103]),
    ],
)
def test_named_architectures(wanted: str, known: frozenset[int], chosen: list[int]) -> None:
    choice = architectures.choose(wanted, known, unasked)
    assert choice.architectures == chosen
    assert "FASTKD_CUDA_ARCHS" in choice.reason


@pytest.mark.parametrize(
    "wanted", ["75", "9", "sm_90", "90a", "9.0.0", "90;hopper", "99", ";", "native;90"]
)
def test_architectures_that_there_are_not(wanted: str) -> None:
    message = "'all', 'native' or a list of 80, 90, 120; got '" + re.escape(wanted)
    with pytest.raises(ValueError, match=message):
        architectures.choose(wanted, {75, 80, 90, 120}, unasked)


@pytest.mark.parametrize("wanted", ["", "native", " native\n"])
@pytest.mark.parametrize(
    ("gpus", "known", "chosen"),
    [
        ([90], KNOWN, [90]),
        ([80, 121], KNOWN, [80, 121]),
        # Newer than this nvcc: machine code for the newest before it, and PTX.
        ([103], {80, 90, 100}, [100]),
        ([90, 120], {75, 80, 90}, [90]),
        ([75, 86], KNOWN, [86]),
    ],
)
def test_gpus_of_this_machine(
    wanted: str, gpus: list[int], known: frozenset[int], chosen: list[int]
) -> None:
    choice = architectures.choose(wanted, known, lambda: gpus)
    assert choice == (chosen, "for the GPU of this machine")


def test_a_machine_without_a_gpu() -> None:
    choice = architectures.choose("", KNOWN, no_gpu)
    assert choice == (USUAL, "all, because no driver")
    with pytest.raises(architectures.UnsuitableError, match="=native, and no driver"):
        architectures.choose("native", KNOWN, no_gpu)


@pytest.mark.parametrize("wanted", ["", "native"])
def test_a_gpu_too_old_for_the_kernels(wanted: str) -> None:
    with pytest.raises(architectures.UnsuitableError, match=r"compute capability 7\.0, 7\.5, and"):
        architectures.choose(wanted, KNOWN, lambda: [70, 75])
    assert cuda.OLDEST_ARCHITECTURE == architectures.OLDEST


def test_the_driver_is_asked_for_its_gpus(tmp_path: Path) -> None:
    library = driver(tmp_path, "12.0", "8.6", "12.0")
    assert architectures.capabilities(str(library)) == [86, 120]
    # By itself it finds the one that programs would load.
    ask = "import architectures; print(architectures.capabilities())"
    found = subprocess.check_output(
        [sys.executable, "-c", ask],
        cwd=Path(architectures.__file__).parent,
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        text=True,
    )
    assert found == "[86, 120]\n"


def test_a_driver_that_shows_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(architectures.NoGpuError, match="no NVIDIA driver is installed"):
        architectures.capabilities("libno-such-driver.so.1")
    with pytest.raises(architectures.NoGpuError, match=r"shows no GPU$"):
        architectures.capabilities(str(driver(tmp_path)))
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    with pytest.raises(architectures.NoGpuError, match=r"shows no GPU \(cuInit returned 100\)"):
        architectures.capabilities(str(driver(hidden, "9.0", status=100)))

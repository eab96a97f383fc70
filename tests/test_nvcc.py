"""Which nvcc the build takes, and what it compiles for; shown on toolkits of shell script."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "csrc"))

import nvcc


def script(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(("#!/bin/sh", *lines)))
    file.chmod(0o755)
    return file


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


def toolkit(folder: Path, release: str) -> Path:
    """As much of one as is asked before anything is compiled."""
    script(folder / "lib/libcudart_static.a")
    return script(
        folder / "bin/nvcc",
        'case "$1" in',
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.1';;",
        "--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n';;",
        f"--dryrun) echo '#$ TOP={folder}';;",
        "esac",
    )


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


@pytest.mark.parametrize(
    ("wanted", "known", "chosen"),
    [
        ("", KNOWN, [80, 86, 89, 90, 100, 120]),
        (" ", {75, 80, 86, 89, 90}, [80, 86, 89, 90]),
        ("90", KNOWN, [90]),
        ("9.0", KNOWN, [90]),
        ("12.0;80", KNOWN, [80, 120]),
        ("90, 8.6,90", KNOWN, [86, 90]),
        ("103", KNOWN, [103]),
    ],
)
def test_architectures(wanted: str, known: frozenset[int], chosen: list[int]) -> None:
    assert nvcc.architectures(wanted, known) == chosen


@pytest.mark.parametrize("wanted", ["75", "9", "sm_90", "90a", "9.0.0", "90;hopper", "99", ";"])
def test_architectures_that_there_are_not(wanted: str) -> None:
    with pytest.raises(ValueError, match="a list of 80, 90, 120; got '" + re.escape(wanted)):
        nvcc.architectures(wanted, {75, 80, 90, 120})

"""What an install promises, shown by installing: with a compiler, without one, and on demand.

Everything installs from the unpacked sdist, so whatever the sdist lacks fails here too. Only torch
is lent from the environment that runs the tests, which would otherwise download it each time.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from fake_toolkits import driver, script, toolkit

ROOT = Path(__file__).parents[1]
SITE = Path(torch.__file__).parents[1]
# Nothing of these may reach an install from outside: not fastkd, nor what its build must bring.
NOT_LENT = ("fastkd", "__editable__", "pip", "setuptools", "pybind11", "cmake", "ninja")
NO_NVCC = "/no/such/nvcc"
NO_COMPILER = "CPU kernels: left out: no C++ compiler was found"


class Environment(NamedTuple):
    """A fresh virtual environment, and what it printed when fastkd was installed."""

    folder: Path
    install: subprocess.CompletedProcess[str] | None = None

    def run(self, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(str(self.folder / "bin/python"), *args, cwd=self.folder, **variables)

    @property
    def package(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages")) / "fastkd"

    @property
    def modules(self) -> list[str]:
        return [file.name for file in self.package.glob("_native*")]


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # The caller's own choices of build and compiler are not the ones under test.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FASTKD_", "PYTHON", "CMAKE_", "CUDA", "NVCC"))
        and name not in ("CC", "CXX")
    }
    return subprocess.run(
        command,
        cwd=cwd,
        env=kept | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    leftovers = shutil.ignore_patterns(
        ".*", "build", "*.egg-info", "_native*", "_build.txt", "__pycache__"
    )
    shutil.copytree(ROOT, folder / "checkout", ignore=leftovers)
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", build, str(folder), cwd=folder / "checkout")
    assert done.returncode == 0, done.stdout
    shutil.unpack_archive(next(folder.glob("fastkd-*.tar.gz")), folder)
    return next(path for path in folder.glob("fastkd-*") if path.is_dir())


def fresh_environment(folder: Path) -> Environment:
    venv.create(folder, with_pip=True)
    lent = folder / "lent"
    lent.mkdir()
    for entry in SITE.iterdir():
        if not entry.name.startswith(NOT_LENT):
            (lent / entry.name).symlink_to(entry)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(f"{lent}\n")
    return Environment(folder)


def install(environment: Environment, sources: Path, **variables: str) -> Environment:
    done = environment.run("-m", "pip", "install", "-v", str(sources), **variables)
    return environment._replace(install=done)


@pytest.fixture(scope="module")
def compiled(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = fresh_environment(tmp_path_factory.mktemp("compiled"))
    # In a fifth of the time: how well kernels are compiled is not what these tests are about.
    hasty = environment.folder / "c++"
    hasty.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    hasty.chmod(0o755)
    return install(environment, sdist, CUDACXX=NO_NVCC, CXX=str(hasty))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return fresh_environment(tmp_path_factory.mktemp("bare"))


# Empty but for Python itself. The compilers in /usr/bin stay where they are: nothing but PATH may
# lead to them.
def no_compiler(environment: Environment) -> dict[str, str]:
    return {"PATH": str(environment.folder / "bin")}


def test_sdist_holds_every_kernel_source(sdist: Path) -> None:
    def sources(root: Path) -> set[Path]:
        files = (file for file in root.glob("csrc/**/*") if file.is_file())
        return {file.relative_to(root) for file in files if file.suffix != ".pyc"}

    assert {Path("csrc/CMakeLists.txt"), Path("csrc/cuda/hint.cu")} <= sources(sdist)
    assert sources(sdist) == sources(ROOT)


@pytest.mark.thorough
def test_install_compiles_the_kernels(compiled: Environment) -> None:
    assert compiled.install is not None
    assert compiled.install.returncode == 0, compiled.install.stdout
    assert len(compiled.modules) == 1, compiled.install.stdout
    note = (compiled.package / "_build.txt").read_text()
    assert all(line in compiled.install.stdout for line in note.splitlines())
    assert note.startswith(
        f"CPU kernels: compiled\nCUDA kernels: left out: {NO_NVCC} does not run: No such file"
    )


@pytest.mark.thorough
def test_installed_package_runs_its_kernels_from_anywhere(compiled: Environment) -> None:
    done = compiled.run(
        "-W",
        "error",
        "-c",
        "import fastkd, torch\n"
        "student, teacher = torch.randn(2, 8, 10).requires_grad_(), torch.randn(2, 8, 10)\n"
        "losses = [fastkd.soft_target_loss(student, teacher, backend=b)\n"
        "          for b in (None, 'native', 'reference')]\n"
        "losses[0].backward()\n"
        "torch.testing.assert_close(losses[1], losses[2])\n"
        "assert losses[0] == losses[1] and student.grad.isfinite().all()\n"
        "print(fastkd.__file__)",
    )
    assert done.returncode == 0, done.stdout
    assert Path(done.stdout.strip()).parent == compiled.package


@pytest.mark.thorough
def test_wheel_holds_the_package_and_nothing_else(compiled: Environment) -> None:
    done = compiled.run(
        "-c", "from importlib.metadata import files; print(*files('fastkd'), sep='\\n')"
    )
    lines = (Path(line) for line in done.stdout.splitlines())
    files = {file for file in lines if "dist-info" not in file.parts[0] and file.suffix != ".pyc"}
    sources = {file.relative_to(ROOT) for file in ROOT.glob("fastkd/**/*.py")}
    extras = {"py.typed", "_build.txt", *compiled.modules}
    assert files == sources | {Path("fastkd", name) for name in extras}


@pytest.mark.thorough
def test_demanded_kernels_without_a_compiler_fail(sdist: Path, bare: Environment) -> None:
    done = install(bare, sdist, FASTKD_BUILD="cpu", **no_compiler(bare)).install
    assert done is not None
    assert done.returncode != 0
    assert "FASTKD_BUILD=cpu cannot be done: no C++ compiler was found; install one" in done.stdout
    assert not bare.package.exists()


@pytest.mark.thorough
def test_install_without_a_compiler_is_pure_python(
    sdist: Path, compiled: Environment, bare: Environment
) -> None:
    # After `compiled` in the same folder: what that build left there must not get in.
    done = install(bare, sdist, **no_compiler(bare)).install
    assert done is not None
    assert done.returncode == 0, done.stdout
    assert NO_COMPILER in done.stdout
    assert bare.modules == []

    used = bare.run(
        "-c",
        "import warnings, fastkd, torch\n"
        "student, teacher = torch.randn(2, 8, 10)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    loss = fastkd.soft_target_loss(student, teacher)\n"
        "assert loss == fastkd.soft_target_loss(student, teacher, backend='reference')\n"
        "assert [w.category for w in caught] == [fastkd.FallbackWarning], caught",
    )
    assert used.returncode == 0, used.stdout


def build(sources: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "-q", "build_ext", cwd=sources, **variables)


def test_failing_compiler_leaves_pure_python_and_its_error(sdist: Path) -> None:
    done = build(sdist, CXX="/no/such/compiler")
    assert done.returncode == 0, done.stdout
    assert "CPU kernels: left out: compiling failed" in done.stdout
    assert "/no/such/compiler" in done.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FASTKD_BUILD": "cpu", "CXX": "/no/such/compiler"}, "compiling failed"),
        ({"FASTKD_BUILD": "cuda", "CUDACXX": NO_NVCC}, f"{NO_NVCC} does not run: No such file"),
        ({"FASTKD_BUILD": "cuda", "CUDACXX": "/bin/false"}, "/bin/false fails"),
        ({"FASTKD_BUILD": "cuda", "CUDACXX": "/bin/true"}, "/bin/true does not tell its release"),
        ({"FASTKD_BUILD": "gpu"}, "must be one of auto, none, cpu, cuda; got 'gpu'"),
    ],
)
def test_demand_that_cannot_be_met_fails(
    sdist: Path, variables: dict[str, str], message: str
) -> None:
    done = build(sdist, **variables)
    assert done.returncode != 0
    assert message in done.stdout


def test_architectures_are_checked_before_anything_is_compiled(sdist: Path, tmp_path: Path) -> None:
    compiler = toolkit(tmp_path, "13.0")
    done = build(sdist, CUDACXX=str(compiler), FASTKD_CUDA_ARCHS="hopper")
    assert done.returncode != 0
    assert "FASTKD_CUDA_ARCHS must be 'all', 'native' or a list of 80, 90; got 'ho" in done.stdout


@pytest.mark.parametrize(
    ("capabilities", "wanted", "announced"),
    [
        (["9.0"], "", "for sm_90, and PTX of compute_90, by {nvcc} of CUDA 13.0; for the GPU of"),
        (["9.0"], "80", "for sm_80, and PTX of compute_80, by {nvcc} of CUDA 13.0; named by FASTK"),
        (["9.0"], "all", "for sm_80, sm_90, and PTX of compute_90, by {nvcc} of CUDA 13.0; all, b"),
        ([], "", "for sm_80, sm_90, and PTX of compute_90, by {nvcc} of CUDA 13.0; all, because"),
    ],
)
def test_the_build_says_for_which_gpus_and_why_before_it_compiles(
    sdist: Path, tmp_path: Path, capabilities: list[str], wanted: str, announced: str
) -> None:
    compiler = toolkit(tmp_path, "13.0")
    driver(tmp_path, *capabilities)
    done = build(
        sdist,
        CUDACXX=str(compiler),
        CXX="/no/such/compiler",
        FASTKD_BUILD="cuda",
        FASTKD_CUDA_ARCHS=wanted,
        LD_LIBRARY_PATH=str(tmp_path),
    )
    assert done.returncode != 0
    first = done.stdout.partition("\n")[0]
    kernels = announced.format(nvcc=compiler)
    assert first.startswith(f"fastkd: compiling CPU kernels, and CUDA kernels {kernels}"), first


def test_native_without_a_gpu_is_the_cpu_alone(sdist: Path, tmp_path: Path) -> None:
    variables = {
        "CUDACXX": str(toolkit(tmp_path, "13.0")),
        "CXX": "/no/such/compiler",
        "FASTKD_CUDA_ARCHS": "native",
        "LD_LIBRARY_PATH": str(driver(tmp_path).parent),
    }
    left_out = "FASTKD_CUDA_ARCHS=native, and the NVIDIA driver shows no GPU"
    done = build(sdist, **variables)
    assert done.stdout.startswith("fastkd: compiling CPU kernels alone\n")
    done = build(sdist, FASTKD_BUILD="cuda", **variables)
    assert done.returncode != 0
    assert left_out in done.stdout


@pytest.mark.parametrize(
    ("variables", "native"),
    [({}, True), ({"FASTKD_BUILD": "cpu"}, False), ({"FASTKD_CUDA_ARCHS": "90"}, False)],
)
def test_make_builds_for_this_machine_unless_told(variables: dict[str, str], native: bool) -> None:
    done = run("make", "-n", "--always-make", ".venv/native", cwd=ROOT, **variables)
    (line,) = (line for line in done.stdout.splitlines() if "setup.py" in line)
    assert line.startswith("FASTKD_CUDA_ARCHS=native ") == native


def test_progress_shows_while_the_build_runs(sdist: Path, tmp_path: Path) -> None:
    """With a CMake that waits, until its first line has been seen, before it goes on."""
    seen = tmp_path / "seen"
    script(
        tmp_path / "bin/cmake",
        '[ "$1" = --build ] || exit 0',
        'echo "${NINJA_STATUS}one object" | sed s/%f/1/\\;s/%t/2/',
        f"for i in $(seq 100); do [ -e {seen} ] && break; sleep 0.1; done",
        f"[ -e {seen} ] && echo '[2/2] another' && echo detail",
    )
    (tmp_path / "cmake").mkdir()
    (tmp_path / "cmake/__init__.py").write_text(f"CMAKE_BIN_DIR = {str(tmp_path / 'bin')!r}\n")
    with subprocess.Popen(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")],
        cwd=sdist,
        env=os.environ | {"FASTKD_BUILD": "cpu", "PYTHONPATH": str(tmp_path)},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "fastkd: compiling CPU kernels alone\n"
        assert running.stderr.readline() == "fastkd: [1/2] one object\n"
        seen.touch()
        assert running.stderr.readline() == "fastkd: [2/2] another\n"
        assert "detail" not in running.stderr.read()


def test_none_compiles_nothing(sdist: Path, tmp_path: Path) -> None:
    done = run(
        *(sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)),
        cwd=sdist,
        FASTKD_BUILD="none",
    )
    assert done.returncode == 0, done.stdout
    assert [wheel.name.split("-", 2)[2] for wheel in tmp_path.iterdir()] == ["py3-none-any.whl"]


def test_metadata_claims_what_docs_say_was_run() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (claim,) = (need for need in project["dependencies"] if need.startswith("torch"))
    rows = re.findall(
        r"^\| (\d[\d.]*) \| (\d[\d.]*) ", (ROOT / "docs/versions.md").read_text(), re.M
    )
    torches, pythons = zip(*rows, strict=True)
    oldest = min(torches, key=lambda version: tuple(map(int, version.split("."))))
    assert claim == f"torch>={oldest.removesuffix('.0')}"
    classifiers = [
        name.rpartition(" ")[2] for name in project["classifiers"] if "Python :: 3" in name
    ]
    assert classifiers == sorted({version.rpartition(".")[0] for version in pythons})

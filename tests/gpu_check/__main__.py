"""What half an hour on a GPU is for, in 8 minutes: builds, tests, sanitizers and benchmarks.

python -m tests.gpu_check --out DIR
python -m tests.gpu_check --out DIR --only hints logits

Parts of one stage run side by side, stages one after another, whatever became of those before.
When the time is nearly up, what is left is skipped; `--only` does it in another call.
DIR receives a log of each part, the tests' results as JUnit XML, the benchmarks' records, and
summary.json; a table of all parts is printed last.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]

_TESTS_LIMIT = 150

# Seconds to say something once the time is up.
GRACE = 3.0
# All in all, and what a part needs to be worth its start.
SECONDS = 470.0
_LEAST = 15.0

# Those whose tests follow FASTKD_TEST_DEVICE.
ON_THE_DEVICE = tuple(
    f"tests/test_{name}.py"
    for name in (
        *("hint", "soft_target", "distillation", "attention", "extreme_logits"),
        *("attention_regimes", "autograd"),
        *("soft_target_teachers", "soft_target_teachers_regimes"),
        *("linear_head", "softcap", "top_k", "top_k_edges", "top_k_regimes"),
        *("rkd", "similarity", "fsp", "relation_regimes"),
        *("metrics", "metrics_edges", "metrics_calls"),
        *("ranks", "ranks_calls", "ranks_linear_head", "ranks_linear_head_calls"),
        *("checks", "compile", "fuzz", "nn", "reference", "registry", "wrapped"),
    )
)
TRAINING = "tests/test_train_step.py"
# The losses that have kernels on a GPU, and what pytest and the benchmarks know them by.
FUSED = {
    "attention": "attention",
    "logits": "soft_target or distillation or divergence or mask or normalizer or "
    "row_weight or num_classes or inplace or temperature or probabilities or extreme or "
    "linear_head or softcap or top_k or metrics or ranks",
    "hints": "hint",
    "relations": "rkd or similarity or relation or fsp",
}
_WORKLOADS = {
    "attention": ("attention",),
    "logits": ("soft",),
    "hints": ("hint",),
    "relations": ("rkd", "similarity", "fsp"),
}
# Seconds of their benchmarks in bfloat16 and float32.
_LIMITS = {"attention": (75, 75), "logits": (90, 55), "hints": (35, 35), "relations": (40, 40)}
_DTYPES = ("bfloat16", "float32")
ONLY_ON_A_GPU = ("tests/test_cuda.py", "tests/test_cuda_large.py")
# One needs a network, and the others more time than there is.
NOT_ON_THE_CPU = (
    "tests/test_packaging.py",
    "tests/test_examples.py",
    "tests/test_examples_compare.py",
    "tests/test_examples_data.py",
    *ONLY_ON_A_GPU,
)


@dataclass(frozen=True)
class Part:
    """A command, the seconds that it may take, and a program without which it is skipped."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""


@dataclass(frozen=True)
class Result:
    """How a part ended, and the last line that it printed."""

    part: str
    status: Literal["ok", "failed", "timed out", "skipped"]
    seconds: float
    line: str


def stages(out: Path, capability: str) -> list[list[Part]]:
    """Everything, in its order. Nothing runs beside what is timed."""
    others = f"not ({' or '.join(FUSED.values())})"
    timed = [
        # One after the other, so that one that is cut short leaves the others their time.
        [_benchmarks(out, losses, dtype, limit)]
        for losses in FUSED
        for dtype, limit in zip(_DTYPES, _LIMITS[losses], strict=True)
    ]
    return [
        [Part("environment", ["bash", "-c", _ENVIRONMENT], 12)],
        [_build(capability)],
        [
            Part("info", [sys.executable, "-m", "fastkd.info"], 60),
            *(
                _tests(out, f"{losses} by {backend}", [*ON_THE_DEVICE, "-k", chosen], backend)
                for losses, chosen in FUSED.items()
                for backend in ("native", "triton", "reference")
            ),
            _tests(out, "cuda", list(ONLY_ON_A_GPU), "native,triton,reference"),
            _tests(out, "training", [TRAINING], "native,triton"),
            _tests(out, "other losses", [*ON_THE_DEVICE, "-k", others], "reference"),
            _tests_on_the_cpu(out),
            *(_sanitizer(tool, losses) for tool in ("memcheck", "racecheck") for losses in FUSED),
            _demo(out),
        ],
        *timed[: len(_DTYPES)],
        [_training_step(out)],
        *timed[len(_DTYPES) :],
    ]


_ENVIRONMENT = f"""
nvidia-smi
nvcc --version; cmake --version; ninja --version; {sys.executable} --version
{sys.executable} -c "import torch, triton; print('torch', torch.__version__, 'CUDA', \
torch.version.cuda, 'Triton', triton.__version__); print(torch.cuda.get_device_properties())"
"""


def _build(capability: str) -> Part:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {"FASTKD_BUILD": "cuda", "FASTKD_CUDA_ARCHS": capability}
    return Part("build", command, 110, environment)


def _tests(
    out: Path, name: str, chosen: list[str], backends: str, device: str = "cuda", workers: int = 3
) -> Part:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    command.append(f"--junitxml={out / _file(f'tests {name}')}.xml")
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--dist", "worksteal"]
    environment = {
        "FASTKD_TEST_BACKENDS": backends,
        "FASTKD_TEST_DEVICE": device,
        "OMP_NUM_THREADS": "2",
    }
    # Triton compiles a kernel for nearly every case.
    if backends == "triton":
        environment["FASTKD_TEST_CASES"] = "6"
    return Part(f"tests: {name}", command, _TESTS_LIMIT, environment)


def _tests_on_the_cpu(out: Path) -> Part:
    ignored = [f"--ignore={path}" for path in NOT_ON_THE_CPU]
    return _tests(out, "on the CPU", ["tests", *ignored], "native,reference", "cpu", workers=6)


def _sanitizer(tool: str, losses: str) -> Part:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    command += [sys.executable, str(Path(__file__).with_name("selection.py")), "native", losses]
    # Torch's own allocator would hide what lies beyond a tensor.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    name = f"{tool}, {losses}"
    return Part(name, command, _TESTS_LIMIT, environment, needs="compute-sanitizer")


def _benchmark(program: str, out: Path, *options: str) -> list[str]:
    """When its time is up, it writes what it has measured."""
    command = [sys.executable, "-m", program, "--device", "cuda", "--output", str(out)]
    return [*command, *options]


def _benchmarks(out: Path, losses: str, dtype: str, limit: float) -> Part:
    options = ("--filter", *_WORKLOADS[losses], "--dtype", dtype, "--seconds", "0.3")
    command = _benchmark("benchmarks", out / f"{losses}-{dtype}", *options)
    return Part(f"benchmarks: {losses}, {dtype}", command, limit)


def _training_step(out: Path) -> Part:
    command = _benchmark("benchmarks.train_step", out / "training-step", "--seconds", "2")
    return Part("benchmarks: training step", command, 75)


def _demo(out: Path) -> Part:
    command = [sys.executable, str(Path(__file__).with_name("demo.py")), str(out / "demo")]
    return Part("demo by native and reference", command, _TESTS_LIMIT, {"OMP_NUM_THREADS": "1"})


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).replace("--", "-")


def run(part: Part, out: Path) -> Result:
    """To its end, or to that of its time, then with all that it has started."""
    if part.needs and not shutil.which(part.needs):
        return Result(part.name, "skipped", 0.0, f"{part.needs} is not on PATH")
    start = time.monotonic()
    log = out / f"{_file(part.name)}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = "failed" if process.wait(part.limit) else "ok"
        except subprocess.TimeoutExpired:
            status = "timed out"
            # pytest then tells what it has found so far.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:
            # What it leaves behind would disturb the parts to come.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(part.name, status, round(time.monotonic() - start, 1), _last_line(log))


def _last_line(log: Path) -> str:
    lines = [line.strip(" =\t") for line in log.read_text(errors="replace").splitlines()]
    return next(filter(None, reversed(lines)), "")


def hear_interrupts() -> None:
    """A shell's background jobs do not, nor would the parts that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def only(todo: list[list[Part]], wanted: list[str]) -> list[list[Part]]:
    """The parts whose names contain one of these, and what they all need."""
    wanted = ["environment", "build", *wanted]
    chosen = [[part for part in stage if any(x in part.name for x in wanted)] for stage in todo]
    return list(filter(None, chosen))


def run_all(
    todo: list[list[Part]],
    out: Path,
    say: Callable[[str], None] = print,
    seconds: float = SECONDS,
) -> list[Result]:
    results = []
    end = time.monotonic() + seconds - GRACE

    def finish(part: Part) -> Result:
        left = end - time.monotonic()
        if left < min(_LEAST, part.limit):
            result = Result(part.name, "skipped", 0.0, "no time was left")
        else:
            result = run(replace(part, limit=min(part.limit, left)), out)
        say(f"{part.name}: {result.status}")
        return result

    for stage in todo:
        with ThreadPoolExecutor(len(stage)) as pool:
            results += pool.map(finish, stage)
        # After each stage, in case somebody stops this program.
        summary = json.dumps([asdict(result) for result in results], indent=1)
        (out / "summary.json").write_text(summary + "\n")
    return results


def table(results: list[Result]) -> str:
    width = max(len(result.part) for result in results)
    return "\n".join(
        f"{r.part:<{width}}  {r.status:<9}  {r.seconds:>5.0f} s  {r.line[:90]}" for r in results
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="only the build and parts whose names have it"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="all in all (default: %(default)g)"
    )
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    import torch

    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here")
    hear_interrupts()
    capability = "{}{}".format(*torch.cuda.get_device_capability())
    out.mkdir(parents=True, exist_ok=True)
    # Workers of one run draw the same inputs, and may do so again.
    os.environ.setdefault("FASTKD_TEST_SEED", str(secrets.randbelow(2**32)))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    todo = stages(out, capability)
    chosen = only(todo, options.only) if options.only else todo
    results = run_all(chosen, out, seconds=options.seconds)
    print(table(results), flush=True)
    return 1 if {r.status for r in results} & {"failed", "timed out"} else 0


if __name__ == "__main__":
    sys.exit(main())

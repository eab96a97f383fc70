"""What fastkd finds on this machine: `python -m fastkd.info`, or with `--json` for a script.

It is what to run when something is broken, so nothing here relies on torch, Triton or the compiled
module: each is tried, and what it says instead of loading is part of the report.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import fastkd

_VARIABLES = ("FASTKD_BACKEND", "FASTKD_NATIVE_PATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def collect() -> dict[str, Any]:
    """The report, as values that JSON can hold. A `problem` says why something is not there."""
    torch, torch_report = _load("torch")
    return {
        "fastkd": {"version": fastkd.__version__, "commit": _commit(), "path": str(_package())},
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch_report,
        "triton": _load("triton")[1],
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "build": _build_note(),
        "native": _native() if torch else {"problem": "needs torch"},
        "threads": torch.get_num_threads() if torch else None,
        "devices": _devices(torch) if torch else {},
    }


def _load(name: str) -> tuple[ModuleType | None, dict[str, str]]:
    try:
        module = importlib.import_module(name)
        return module, {"version": module.__version__}
    except ModuleNotFoundError as missing:
        if missing.name == name:
            return None, {"problem": "not installed"}
        return None, {"problem": f"broken: {missing}"}
    except Exception as error:
        return None, {"problem": f"broken: {_say(error)}"}


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _package() -> Path:
    return Path(__file__).parent


def _commit() -> str | None:
    # Only of a checkout: an installed package may lie inside someone else's repository.
    if not (_package().parent / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        describe = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
        return subprocess.check_output(
            describe, cwd=_package(), text=True, stderr=subprocess.DEVNULL
        ).strip()
    return None


def _build_note() -> list[str]:
    note = _package() / "_build.txt"
    if note.exists():
        return note.read_text().splitlines()
    return ["nothing was compiled (FASTKD_BUILD=none, or a checkout that was never built)"]


def _native() -> dict[str, Any]:
    try:
        from fastkd.kernels import compiled

        module = compiled.load()
        if isinstance(module, str):
            return {"problem": module}
        return {
            "path": module.__file__,
            "instruction_set": module.isa(),
            "instruction_sets": module.isas(),
            "openmp": module.openmp(),
            "cuda_archs": module.cuda_archs(),
        }
    except Exception as error:
        return {"problem": _say(error)}


def _devices(torch: Any) -> dict[str, Any]:
    names = {"cpu": _processor()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
            name = torch.cuda.get_device_name(index)
            names[f"cuda:{index}"] = f"{name}, compute capability {capability}"
    return {
        device: {"name": name, "backends": _backends(torch, device)}
        for device, name in names.items()
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _backends(torch: Any, device: str) -> dict[str, Any]:
    """For every loss the backend that small float32 tensors would get there, and why."""
    try:
        x = torch.ones(2, 3, 4, 4, device=device)
        labels = torch.ones(2, 3, 4, dtype=torch.int64, device=device)
        calls = {
            "soft_target_loss": (x, x),
            "distillation_loss": (x, x, labels),
            "distillation_metrics": (x, x),
            "attention_map": (x,),
            "attention_transfer_loss": (x, x),
            "hint_loss": (x, x),
            "fsp_loss": ((x, x), (x, x)),
            "rkd_angle_loss": (x[:, 0, 0], x[:, 0, 0]),
            "rkd_distance_loss": (x[:, 0, 0], x[:, 0, 0]),
            "similarity_preserving_loss": (x, x),
        }
        answers = {
            loss: fastkd.explain(getattr(fastkd, loss), *args) for loss, args in calls.items()
        }
    except Exception as error:
        return {"problem": _say(error)}
    return {
        loss: {"backend": answer.chosen, "reasons": answer.reasons}
        for loss, answer in answers.items()
    }


def describe(report: dict[str, Any]) -> str:
    """The report of `collect`, for a person."""
    own = report["fastkd"]
    commit = f", commit {own['commit']}" if own["commit"] else ""
    lines = [
        f"fastkd   {own['version']}{commit}, in {own['path']}",
        f"python   {report['python']}",
    ]
    for name in ("torch", "triton"):
        lines.append(f"{name:<8} {report[name].get('version') or report[name]['problem']}")
    if report["threads"]:
        lines.append(f"threads  {report['threads']} (torch.get_num_threads)")
    for name, value in report["environment"].items():
        lines.append(f"setting  {name}={value}")

    lines += ["", "Compiled when fastkd was installed:", *(f"  {line}" for line in report["build"])]
    lines += ["", "The compiled module:", f"  {_say_native(report['native'])}"]
    for device, found in report["devices"].items():
        lines += ["", f"What runs on {device} ({found['name']}):"]
        lines += [f"  {line}" for line in _say_backends(found["backends"])]
    if not report["devices"]:
        lines += ["", "Nothing runs without torch: install it, and ask again."]
    return "\n".join(lines)


def _say_native(native: dict[str, Any]) -> str:
    if "problem" in native:
        return str(native["problem"])
    openmp = "with" if native["openmp"] else "without"
    architectures = ", ".join(f"sm_{number}" for number in native["cuda_archs"])
    cuda = f"CUDA kernels for {architectures}" if architectures else "no CUDA kernels"
    return (
        f"uses {native['instruction_set']} (of {', '.join(native['instruction_sets'])}), "
        f"{openmp} OpenMP, and has {cuda}, from {native['path']}"
    )


def _say_backends(backends: dict[str, Any]) -> list[str]:
    if "problem" in backends:
        return [backends["problem"]]
    lines: list[str] = []
    # Losses with one answer are told together: nearly always that is all of them.
    for answer in {json.dumps(answer): answer for answer in backends.values()}.values():
        losses = [loss for loss, other in backends.items() if other == answer]
        lines.append("every loss:" if len(losses) == len(backends) else f"{', '.join(losses)}:")
        for name, reason in answer["reasons"].items():
            lines.append(f" {'->' if name == answer['backend'] else '  '} {name:<9} {reason}")
    return lines


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m fastkd.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, for a script")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args().json else describe(report))


if __name__ == "__main__":
    main()

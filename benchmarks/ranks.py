"""Soft targets whose classes are split over processes: `python -m benchmarks.ranks --help`."""

import argparse
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastkd
from benchmarks import report
from benchmarks.environment import open_device, origin
from benchmarks.workloads.divergence import divergence_loss

ROWS, CLASSES, TEMPERATURE = 1024, 32000, 2.0
# Relative, in the L2 norm, against float64; eager's own error is below a hundredth of it.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
LEGEND = (
    "Forward and backward on all processes, each of which has its part of the classes of both "
    "sides: the slowest one's time, medians, ± the interquartile range. error: of the student's "
    "gradient against float64, relative, in the L2 norm. memory: the peak of a process beyond its "
    "logits, in MB. gather: every process has all logits sent and computes the whole loss in eager "
    "PyTorch. parallel: eager PyTorch, with maxima, sums and losses of rows reduced over processes."
)

Loss = Callable[[Tensor, Tensor, str], Tensor]


class _Gather(torch.autograd.Function):
    """The logits of all ranks, whose gradient is cut to the rank's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output.chunk(dist.get_world_size(), -1)[dist.get_rank()].contiguous()


def gather(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    whole = _Gather.apply(student), _Gather.apply(teacher)
    return divergence_loss(*whole, temperature=TEMPERATURE, divergence=divergence)


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose losses add up: so do the gradients of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        found = x.clone()
        dist.all_reduce(found)
        return found

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return _Sum.apply(grad_output)


def _log_softmax(x: Tensor) -> Tensor:
    x = x.float() / TEMPERATURE
    top = x.detach().amax(-1, keepdim=True)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    x = x - top
    return x - _Sum.apply(x.exp().sum(-1, keepdim=True)).log()


def parallel(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    log_q, log_p = _log_softmax(student), _log_softmax(teacher)

    def kl(log_of: Tensor, log_from: Tensor) -> Tensor:
        return (log_of.exp() * (log_of - log_from)).sum()

    if divergence == "forward_kl":
        total = kl(log_p, log_q)
    else:
        log_m = torch.log((log_p.exp() + log_q.exp()) / 2)
        total = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    return total * TEMPERATURE**2 / len(student)  # of the classes here


def fused(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    return fastkd.soft_target_loss(
        student, teacher, temperature=TEMPERATURE, divergence=divergence, group=dist.group.WORLD
    )


CONTENDERS: dict[str, Loss] = {"gather": gather, "parallel": parallel, "fastkd": fused}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks",
        description="Measure soft targets whose classes are split over processes of this machine.",
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="a smoke test on few classes")
    parser.add_argument("--output", type=Path, default=Path("build/ranks"), metavar="DIR")
    return parser.parse_args(arguments)


def _measure(rank: int, options: argparse.Namespace, address: str, device: Any) -> None:
    dist.init_process_group("gloo", address, rank=rank, world_size=options.processes)
    torch.set_num_threads(max(torch.get_num_threads() // options.processes, 1))
    rows, classes = (16, 400) if options.small else (ROWS, CLASSES)
    cases = []
    for divergence in ("forward_kl", "jsd"):
        for dtype in TOLERANCES:
            torch.manual_seed(0)
            whole = [(3 * torch.randn(rows, classes)).to(dtype) for _ in range(2)]
            truth = _truth(*whole, divergence).chunk(options.processes, -1)[rank]
            own = [x.chunk(options.processes, -1)[rank].clone() for x in whole]
            del whole
            outcomes = _race(own[0].requires_grad_(), own[1], divergence, truth, options, device)
            name = str(dtype).removeprefix("torch.")
            case = {"divergence": divergence, "dtype": name, "shape": [rows, classes]}
            cases.append({**case, "outcomes": outcomes})
    if rank == 0:
        (options.output / "cases.json").write_text(json.dumps(cases))
    dist.destroy_process_group()


def _truth(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    student, teacher = student.double().requires_grad_(), teacher.double()
    keywords = {"temperature": TEMPERATURE, "divergence": divergence, "backend": "reference"}
    (found,) = torch.autograd.grad(fastkd.soft_target_loss(student, teacher, **keywords), student)
    return found


def _race(
    student: Tensor,
    teacher: Tensor,
    divergence: str,
    truth: Tensor,
    options: argparse.Namespace,
    device: Any,
) -> dict[str, dict[str, Any]]:
    """What each contender does, in turns."""

    def prepare() -> None:
        student.grad = None
        dist.barrier()

    steps = {
        name: functools.partial(lambda loss: loss(student, teacher, divergence).backward(), loss)
        for name, loss in CONTENDERS.items()
    }
    outcomes: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        peak = device.peak_extra_bytes(prepare, step)
        assert student.grad is not None
        error = (student.grad.double() - truth).norm() / truth.norm()
        outcomes[name] = {
            "gradient_error": _largest(error.item()),
            "peak_extra_bytes": None if peak is None else int(_largest(peak)),
        }
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            samples[name].append(_largest(device.time(prepare, step)))
    for name, outcome in outcomes.items():
        quarters = statistics.quantiles(samples[name])
        outcome |= dict(zip(("seconds_q25", "seconds", "seconds_q75"), quarters, strict=True))
        outcome["is_right"] = outcome["gradient_error"] < TOLERANCES[student.dtype]
    return outcomes


def _largest(x: float) -> float:
    """Of all processes."""
    found = torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def table(case: dict[str, Any]) -> Table:
    title = f"{case['divergence']}, {tuple(case['shape'])}, {case['dtype']}"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("contender")
    for name in ("ms", "±", "error", "memory"):
        table.add_column(name, justify="right")
    for name, of in case["outcomes"].items():
        spread = (of["seconds_q75"] - of["seconds_q25"]) / of["seconds"]
        time = f"{of['seconds'] * 1e3:.1f}" if of["is_right"] else "[bold red]wrong[/]"
        figures = report.percent(spread), report.error(of["gradient_error"])
        table.add_row(name, time, *figures, report.megabytes(of["peak_extra_bytes"]))
    return table


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    options.output.mkdir(parents=True, exist_ok=True)
    # An allocator that keeps its pages would keep those of every process.
    device = open_device("cpu", "system")
    found = origin(device, options)
    report.warn_of_load(found["machine"], console)
    with tempfile.TemporaryDirectory() as folder:
        inputs = options, f"file://{folder}/address", device
        torch.multiprocessing.spawn(_measure, inputs, options.processes)
    path = options.output / "cases.json"
    cases = json.loads(path.read_text())
    path.unlink()
    for case in cases:
        console.print(table(case))
    console.print(LEGEND, style="dim")
    path = options.output / f"cpu{'-small' if options.small else ''}.json"
    path.write_text(json.dumps({**found, "cases": cases}, indent=1) + "\n")
    console.print(f"\nwritten to {path}", highlight=False)
    wrong = [case for case in cases if not all(of["is_right"] for of in case["outcomes"].values())]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `python -m benchmarks --help`.

Contenders run in turns in one process, in a new order each round: whatever slows the machine for a
while slows all of them. Figures in the documents come from here, not from `pytest benchmarks`.
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.contenders import BACKENDS, CONTENDERS, lineup, refusal
from benchmarks.environment import open_device, origin
from benchmarks.measure import Device, measure
from benchmarks.record import SCHEMA, Case, Record
from benchmarks.workloads import WORKLOADS, Workload

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RESULTS = Path(__file__).parent / "results"
_QUICK_FRACTION = 32
_COPY_SECONDS = 2.0

Job = tuple[Workload, torch.dtype, list[str]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure fastkd against eager and torch.compile."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--filter",
        nargs="+",
        metavar="TEXT",
        help="only workloads whose function, family or name contains one of these",
    )
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=list(_DTYPES))
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        help="default: eager, compile, the kernels that a loss has here; where they are installed "
        "TRL's function, and on a GPU Liger-Kernel's",
    )
    parser.add_argument(
        "--seconds", type=report.positive, help="of timing for each workload (3; 0.2 with --quick)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a smoke test on a {_QUICK_FRACTION}nd of each batch: its figures mean nothing",
    )
    parser.add_argument(
        "--allocator",
        choices=("keep", "system"),
        default="keep",
        help="on the CPU; keep: large blocks stay with the process (default); "
        "system: each is mapped anew",
    )
    parser.add_argument("--output", type=Path, default=_RESULTS, metavar="DIR")
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and options.allocator != "keep":
        parser.error("--allocator is for --device cpu")
    return options


def chosen(options: argparse.Namespace) -> list[tuple[Workload, torch.dtype]]:
    wanted = [text.lower() for text in options.filter or [""]]
    return [
        (workload.shrunk(_QUICK_FRACTION) if options.quick else workload, dtype)
        for workload in WORKLOADS
        for dtype in map(_DTYPES.__getitem__, dict.fromkeys(options.dtype))
        if options.device in workload.devices
        and dtype in workload.dtypes
        and any(t in f"{workload.loss} {workload.family} {workload.name}".lower() for t in wanted)
    ]


def jobs(options: argparse.Namespace, device: Device) -> list[Job]:
    """What to measure and who takes part, or an exit if a contender cannot run here at all."""
    todo = [
        (workload, dtype, lineup(workload, dtype, device.name, options.contenders))
        for workload, dtype in chosen(options)
    ]
    taking_part = {name for _, _, names in todo for name in names}
    for name in options.contenders or ["native"]:
        if name in taking_part:
            continue
        reason = refusal(name, *todo[0][:2], device.name)
        if options.contenders:
            raise SystemExit(f"{name} cannot run here: {reason}")
        print(f"{name} is not measured: {reason}", file=sys.stderr)
    return todo


def run(todo: list[Job], device: Device, options: argparse.Namespace) -> list[Case]:
    """All of it, or what was measured when Ctrl-C or a time limit cut it short."""
    seconds = options.seconds or (0.2 if options.quick else 3.0)
    cases: list[Case] = []
    progress = report.progress()
    with contextlib.suppress(KeyboardInterrupt), progress:
        task = progress.add_task("", total=len(todo))
        for workload, dtype, contenders in todo:
            label = f"{workload.loss} {workload.name} {str(dtype).removeprefix('torch.')}"

            def announce(stage: str, label: str = label) -> None:
                progress.update(task, description=f"{label}: {stage}")

            case = measure(
                workload, dtype, contenders, device, seconds, 3 if options.quick else 7, announce
            )
            figures = [f"{n} {report.milliseconds(o)}" for n, o in case.outcomes.items()]
            progress.console.print(
                f"{label}: {', '.join(figures)} ms", highlight=False, soft_wrap=True
            )
            progress.advance(task)
            cases.append(case)
    return cases


def is_complete(options: argparse.Namespace) -> bool:
    """Whether the figures may stand in the documentation."""
    return not (options.filter or options.quick or options.contenders) and (
        set(options.dtype) == set(_DTYPES) and options.allocator == "keep"
    )


def draw(record: Record, path: Path, console: Console) -> None:
    """The picture; `python -m benchmarks.readme` draws it later where matplotlib is missing."""
    try:
        from benchmarks.plot import plot
    except ModuleNotFoundError as missing:
        console.print(f"no picture: {missing}", highlight=False)
        return
    plot(record, path)
    console.print(f"and {path}", highlight=False)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    wanted = chosen(options)
    if not wanted:
        console.print("no workload matches; --list names them", style="red")
        return 2
    if options.list:
        for workload, dtype in wanted:
            name = str(dtype).removeprefix("torch.")
            console.print(f"{workload.loss} {workload.name} {name}", highlight=False)
        return 0
    device = open_device(options.device, options.allocator)
    todo = jobs(options, device)
    taking_part = [name for _, _, names in todo for name in names]
    subject = next((name for name in BACKENDS if name in taking_part), taking_part[0])
    found = origin(device, options)
    report.warn_of_load(found["machine"], console)
    before = device.copy_bandwidth(0 if options.quick else _COPY_SECONDS)
    cases = run(todo, device, options)
    cut_short = len(cases) < len(todo)
    # Whoever cut it short will not wait for long.
    after = before if cut_short else device.copy_bandwidth(0 if options.quick else _COPY_SECONDS)
    record = Record(
        schema=SCHEMA,
        **found,
        complete=is_complete(options) and subject == "native" and not cut_short,
        subject=subject,
        # The better of the two: no share is flattered by a noisy minute.
        copy_bandwidth={kind: max(before[kind], after[kind]) for kind in before},
        cases=cases,
    )
    report.show(record, console)
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / (device.name if record.complete else f"{device.name}-partial")
    record.save(stem.with_suffix(".json"))
    console.print(f"\nwritten to {stem}.json", highlight=False)
    problems = report.complaints(record)
    if cut_short:
        problems.append(f"cut short: {len(cases)} of {len(todo)} workloads were measured")
    else:
        draw(record, stem.with_suffix(".png"), console)
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

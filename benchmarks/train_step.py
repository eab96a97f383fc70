"""What the losses cost within a training step: `python -m benchmarks.train_step --help`."""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.environment import open_device, origin
from benchmarks.measure import Device
from benchmarks.step import CONTENDERS, WITHOUT, StepCase, StepOutcome, StepRecord, measure
from benchmarks.tasks import TASKS

SCHEMA = 1
# Ignored by git.
_OUTPUT = Path("build/train_step")

LEGEND = (
    "One step: teacher, student, losses, backward, SGD with momentum. Medians, ± the interquartile "
    f"range. losses: the step less one that is given the gradients of the student's outputs "
    f"({WITHOUT}), the median of the differences round by round; share: of the step. error: of the "
    "student's gradient against eager's, relative, in the L2 norm. memory: the peak of a step "
    "beyond the networks, the batch and the optimizer's state, in MB. The networks are the same "
    "for all and not compiled; float32 products are true float32, not TF32."
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="Measure a training step with the losses of eager, torch.compile and fastkd.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--seconds", type=report.positive, help="of timing for each task (3; 0.2 with --small)"
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="a smoke test on narrow networks and small batches: its figures mean nothing",
    )
    parser.add_argument("--output", type=Path, default=_OUTPUT, metavar="DIR")
    return parser.parse_args(arguments)


def is_complete(options: argparse.Namespace) -> bool:
    everything = set(options.tasks) == set(TASKS) and set(options.contenders) == set(CONTENDERS)
    return everything and not options.small


def run(options: argparse.Namespace, device: Device) -> list[StepCase]:
    """All of it, or what was measured when Ctrl-C or a time limit cut it short."""
    seconds = options.seconds or (0.2 if options.small else 3.0)
    names, contenders = (dict.fromkeys(x) for x in (options.tasks, options.contenders))
    cases: list[StepCase] = []
    progress = report.progress()
    with contextlib.suppress(KeyboardInterrupt), progress:
        bar = progress.add_task("", total=len(names))
        for name in names:

            def announce(stage: str, name: str = name) -> None:
                progress.update(bar, description=f"{name}: {stage}")

            announce("networks")
            torch.manual_seed(0)
            task = TASKS[name](device.name, options.small)
            rounds_least = 3 if options.small else 7
            case = measure(task, contenders, device, seconds, rounds_least, announce)
            figures = [f"{n} {report.milliseconds(o)}" for n, o in case.outcomes.items()]
            progress.console.print(f"{name}: {', '.join(figures)} ms", highlight=False)
            progress.advance(bar)
            cases.append(case)
    return cases


def table(case: StepCase) -> Table:
    title = f"{case.task}, {case.dtype}: {case.title}"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("losses by")
    for name in ("ms", "±", "vs compile", "losses, ms", "±", "share", "error", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, outcome in case.outcomes.items():
        time = report.milliseconds(outcome)
        table.add_row(
            name,
            time if outcome.status == "right" else f"[bold red]{time}[/]",
            report.percent(outcome.spread),
            report.times(case.speedup(name, "compile")),
            report.duration(outcome.losses_seconds),
            report.duration(_spread(outcome)),
            report.percent(outcome.share),
            report.error(outcome.gradient_error),
            report.megabytes(outcome.peak_extra_bytes),
            end_section=name == WITHOUT,
        )
    return table


def _spread(outcome: StepOutcome) -> float | None:
    if outcome.losses_q25 is None or outcome.losses_q75 is None:
        return None
    return outcome.losses_q75 - outcome.losses_q25


def complaints(case: StepCase) -> list[str]:
    """Each contender that has no time, and why."""
    return [
        f"{name} is {outcome.status} on {case.task}: "
        + (
            outcome.message
            or f"gradient error {report.error(outcome.gradient_error)} (tolerance "
            f"{case.tolerance}), loss error {report.error(outcome.loss_error)}"
        )
        for name, outcome in case.outcomes.items()
        if outcome.status != "right"
    ]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = 120
    device = open_device(options.device)
    found = origin(device, options)
    report.warn_of_load(found["machine"], console)
    cases = run(options, device)
    cut_short = len(cases) < len(set(options.tasks))
    complete = is_complete(options) and not cut_short
    record = StepRecord(schema=SCHEMA, **found, complete=complete, cases=cases)
    console.print(report.origin(record), highlight=False)
    for case in cases:
        console.print()
        console.print(table(case))
        served = ", ".join(f"{loss} by {backend}" for loss, backend in case.backends.items())
        console.print(f"fastkd's {served}", highlight=False)
    console.print(LEGEND, style="dim")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{device.name}{'' if complete else '-partial'}.json"
    record.save(path)
    console.print(f"\nwritten to {path}", highlight=False)
    problems = [problem for case in cases for problem in complaints(case)]
    if cut_short:
        problems.append(f"cut short: {len(cases)} of {len(set(options.tasks))} tasks were measured")
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

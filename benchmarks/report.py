"""What the command lines share, and a record as tables in the terminal."""

import argparse
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.record import Case, Origin, Outcome, Record, geometric_mean

NONE = "–"


def times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}×"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"


def error(value: float | None) -> str:
    return NONE if value is None else f"{value:.1e}"


def milliseconds(outcome: Outcome | None) -> str:
    if outcome is None:
        return NONE
    return outcome.status if outcome.seconds is None else duration(outcome.seconds)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def megabytes(value: int | None) -> str:
    if value is None:
        return NONE
    return f"{value / 1e6:.0f}" if value >= 1e6 else "< 1"


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def progress() -> Progress:
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=Console(stderr=True))


def warn_of_load(machine: dict[str, Any], console: Console) -> None:
    if machine["load"] > machine["cores"] / 4:
        console.print(f"the machine is busy (load {machine['load']:.1f}): figures will be noisy")


def heading(record: Record) -> str:
    copy = record.copy_bandwidth
    bandwidth = f"copy bandwidth {copy['warm'] / 1e9:.1f} GB/s"
    if "fresh" in copy:
        bandwidth += f", into fresh memory {copy['fresh'] / 1e9:.1f} GB/s"
    return f"{origin(record)}\n{bandwidth}"


def origin(record: Origin) -> str:
    """The machine, the versions, the commit and the date, in two lines."""
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return (
        f"{machine['device']}, {_parts(machine)}, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}\n{versions}; commit {record.commit}, {record.date}"
    )


def _parts(machine: dict[str, Any]) -> str:
    if is_gpu(machine):
        return (
            f"{machine['multiprocessors']} multiprocessors of capability {machine['capability']}, "
            f"{machine['l2_bytes'] / 2**20:.0f} MiB of L2, driver {machine['driver']}"
        )
    return f"{machine['cores']} cores, {machine['threads']} threads, {machine['instruction_set']}"


def is_gpu(machine: dict[str, Any]) -> bool:
    return "multiprocessors" in machine


LEGEND = (
    "Forward and backward; medians, ± the interquartile range. GB/s counts the bytes that the best "
    "kernel would move, % copy is its share of the bandwidth of a large copy between mapped "
    "tensors: inputs that stay in a cache can exceed it. The gradient error is relative, in the "
    "L2 norm, against float64; rounding is what the exact gradient loses in its dtype. Memory is "
    "the peak beyond the inputs, in MB, the gradient included. trl is TRL's generalised "
    "Jensen-Shannon divergence, with beta 0 for forward KL and 1 for reverse KL."
)
GPU_LEGEND = (
    "On a GPU: ms is between two events, with the L2 flushed before, and is the host's time where "
    "that is more; host is how long a call keeps the host; graph is the time in a CUDA graph, "
    "without the host, as in training that captures its steps. GB/s and % copy are of the graph "
    "where there is one, else of ms. A graph of more than the L2 holds finds it flushed; of less, "
    "20 steps run one after another and find their inputs there. float32 products are true "
    "float32, not TF32, for every contender. Losses without kernels on the GPU are served by the "
    "reference, and it is what their ratios are about. liger is Liger-Kernel's KL divergence, and "
    "cross-entropy, behind torch's softmax; liger_jsd is its Jensen-Shannon divergence, with beta "
    "0 for forward KL and 1 for reverse KL, and liger_tvd its total variation."
)


def show(record: Record, console: Console) -> None:
    console.print(heading(record), highlight=False)
    for family in record.families():
        console.print()
        console.print(_family(record, family))
    console.print(LEGEND, style="dim")
    if is_gpu(record.machine):
        console.print(GPU_LEGEND, style="dim")
    for note in notes(record):
        console.print(note, highlight=False)
    console.print()
    console.print(_summary(record))


def _family(record: Record, family: str) -> Table:
    table = Table(title=family, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("workload", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("contender", no_wrap=True)
    columns = ["ms", "±", "vs eager", "vs compile"]
    columns += ["host", "graph", "vs compile"] if is_gpu(record.machine) else []
    columns += ["GB/s", "% copy", "error", "memory"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for case in record.cases:
        if case.family != family:
            continue
        labels = [case.workload, case.dtype]
        for name, outcome in case.outcomes.items():
            table.add_row(*labels, name, *_figures(record, case, name, outcome))
            labels = ["", ""]
        blank = [""] * (len(columns) - 2)
        table.add_row("", "", "rounding", *blank, error(case.rounding_error), style="dim")
        table.add_section()
    return table


def _figures(record: Record, case: Case, name: str, outcome: Outcome) -> list[str]:
    bandwidth = case.bandwidth(name)
    time = milliseconds(outcome)
    without_host = [
        duration(outcome.host_seconds),
        duration(outcome.graph_seconds),
        times(case.graph_speedup(name, "compile")),
    ]
    return [
        time if outcome.status == "right" else f"[bold red]{time}[/]",
        percent(outcome.spread),
        times(case.speedup(name, "eager")),
        times(case.speedup(name, "compile")),
        *(without_host if is_gpu(record.machine) else ()),
        NONE if bandwidth is None else f"{bandwidth / 1e9:.1f}",
        percent(record.share(case, name)),
        error(outcome.gradient_error),
        megabytes(outcome.peak_extra_bytes),
    ]


def _summary(record: Record) -> Table:
    title = f"{record.subject}: geometric means, and the least against torch.compile"
    table = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("workloads")
    for dtype in record.dtypes():
        for name in ("vs eager", "vs compile", "least"):
            table.add_column(f"{dtype}\n{name}", justify="right")
    columns = [list(record.groups(dtype)) for dtype in record.dtypes()]
    for group in zip(*columns, strict=True):
        figures = []
        for _, cases in group:
            ratios = record.speedups(cases, "compile")
            figures += [
                times(geometric_mean(record.speedups(cases, "eager"))),
                times(geometric_mean(ratios)),
                times(min(ratios, default=None)),
            ]
        table.add_row(group[0][0], *figures)
    return table


def notes(record: Record) -> list[str]:
    """What is to be said of contenders that are right."""
    return [
        f"{name}, {case.loss} {case.workload} {case.dtype}: {outcome.message}"
        for case in record.cases
        for name, outcome in case.outcomes.items()
        if outcome.status == "right" and outcome.message
    ]


def complaints(record: Record) -> list[str]:
    """Each contender that has no time, and why."""
    return [
        f"{name} is {outcome.status} on {case.loss} {case.workload} {case.dtype}"
        + (
            f": {outcome.message}"
            if outcome.message
            else f", gradient error "
            f"{error(outcome.gradient_error)}, loss error {error(outcome.loss_error)}"
        )
        for case in record.cases
        for name, outcome in case.outcomes.items()
        if outcome.status != "right"
    ]

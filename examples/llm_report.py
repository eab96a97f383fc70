"""What the distillation of language models found: as numbers, as a table and as a picture."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from llm_cache import TopKCache
from llm_memory import VOCABULARY, Memory
from llm_methods import ALONE, HARD_WEIGHT, SOFT_WEIGHT
from llm_training import METHOD, Result, Run, Trainer
from models import parameter_count
from pictures import BLUE, GREY, draw_methods, styled
from results import Spread, environment

NOTE = f"""\
bits per byte: of the files held out; less is better. ±: sample standard deviation.
gain: what the student alone of the same seed needs more.
tokens/s: per second of one core, forward passes of the teacher included.
loss, MB: peak memory of a batch at {VOCABULARY:,} tokens, from hidden states to their
gradients and the head's, in float32.
Every student takes the same steps, from the same seeds."""


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    recipe: str
    values: list[float]  # bits per byte, one per seed
    bits_per_byte: Spread
    gain: Spread | None  # over the student alone of the same seed
    tokens_per_second: float
    memory: Memory

    @classmethod
    def of(
        cls, name: str, runs: Sequence[Result], alone: Sequence[Result], memory: Memory
    ) -> "Row":
        values = [run.bits_per_byte for run in runs]
        gains = [
            base.bits_per_byte - run.bits_per_byte for run, base in zip(runs, alone, strict=False)
        ]
        return cls(
            name,
            METHOD[name].recipe,
            values,
            Spread.of(values),
            Spread.of(gains) if gains else None,
            statistics.mean(run.tokens_per_second for run in runs),
            memory,
        )


@dataclasses.dataclass(frozen=True)
class Report:
    trainer: Trainer
    backends: dict[str, str]  # of each method
    load: float  # of the machine in the minute before
    teacher: Result
    rows: list[Row]

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        backends: dict[str, str],
        load: float,
        teacher: Result,
        results: Mapping[Run, Result],
        memory: Mapping[str, Memory],
    ) -> "Report":
        found: dict[str, list[Result]] = {}
        for run, result in results.items():
            found.setdefault(run.method, []).append(result)
        alone = found.get(ALONE.name, [])
        rows = [
            Row.of(name, runs, [] if runs is alone else alone, memory[name])
            for name, runs in found.items()
        ]
        return cls(trainer, backends, load, teacher, rows)

    @property
    def parameters(self) -> tuple[int, int]:
        """Of a student and of the teacher."""
        experiment = self.trainer.experiment
        sizes = experiment.student.size, experiment.teacher.size
        student, teacher = (parameter_count(self.trainer.model(size)) for size in sizes)
        return student, teacher

    @property
    def title(self) -> str:
        student, teacher = self.parameters
        trained, held_out = self.trainer.text.sizes
        return (
            f"{trained / 1e6:.2f} MB of text, {held_out / 1e6:.2f} MB held out; "
            f"{self.trainer.text.vocabulary:,} tokens; "
            f"{teacher:,} parameters teach {student:,}"
        )

    def as_json(self) -> dict[str, Any]:
        trainer = self.trainer
        student, teacher = self.parameters
        cache = TopKCache(trainer.folder)
        return {
            "training_bytes": trainer.text.sizes[0],
            "held_out_bytes": trainer.text.sizes[1],
            "training_tokens": int((trainer.text.train[1] >= 0).sum()),
            **dataclasses.asdict(trainer.experiment),
            "vocabulary": trainer.text.vocabulary,
            "soft_weight": SOFT_WEIGHT,
            "hard_weight": HARD_WEIGHT,
            "cache_bytes": cache.bytes,
            "cached_probability": cache.probability,
            "memory_vocabulary": VOCABULARY,
            "backends": self.backends,
            "teacher_parameters": teacher,
            "student_parameters": student,
            "teacher_result": dataclasses.asdict(self.teacher),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "environment": {**environment(torch.device("cpu")), "load": self.load},
        }


def print_table(report: Report) -> None:
    # Piped output has no width of its own, and the default one would wrap the table.
    console = Console() if Console().is_terminal else Console(width=100)
    table = Table(title=report.title, title_justify="left")
    table.add_column("method")
    for heading in ("bits per byte", "gain", "tokens/s", "loss, MB: eager", "fastkd"):
        table.add_column(heading, justify="right")
    teacher = report.teacher
    table.add_row(
        "teacher",
        f"{teacher.bits_per_byte:.3f}",
        "",
        f"{teacher.tokens_per_second:,.0f}",
        *("", ""),
        end_section=True,
    )
    for row in report.rows:
        table.add_row(
            row.name,
            f"{row.bits_per_byte:.3f}",
            f"{row.gain:+.3f}" if row.gain else "",
            f"{row.tokens_per_second:,.0f}",
            *map(megabytes, (row.memory.eager, row.memory.fastkd)),
        )
    console.print(table)
    console.print(NOTE)
    for backend in dict.fromkeys(report.backends.values()):
        served = [method for method, name in report.backends.items() if name == backend]
        console.print(f"backend {backend}: {', '.join(served)}")


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.0f}"


@styled
def draw(report: Report, path: Path) -> None:
    """Every seed with mean and deviation of each method, and what their losses need."""
    rows = report.rows
    figure = Figure(figsize=(11, 0.55 * len(rows) + 1.6))
    left, right = figure.subplots(1, 2)
    draw_methods(
        left, {row.name: row.values for row in rows}, report.teacher.bits_per_byte, 3, "left"
    )
    left.set_xlabel("bits per byte of the text held out: mean ± sample standard deviation")
    _draw_memory(right, rows)
    figure.suptitle(report.title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path)


def _draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        pair = (-0.2, "eager", GREY, row.memory.eager), (0.2, "fastkd", BLUE, row.memory.fastkd)
        for offset, name, colour, count in pair:
            if count is not None:
                bar = axes.barh(place + offset, count / 1e6, 0.38, color=colour)
                axes.bar_label(bar, [f"{name} {megabytes(count)}"], padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [])
    axes.set_ylim(len(rows) - 0.4, -1)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.2)
    axes.set_xlabel(f"peak memory of the loss at {VOCABULARY:,} tokens, MB")

"""What the comparison found: as numbers, as a table and as a picture."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import compare_training as training
from compare_methods import ALONE, METHODS, PAIRS, TEACHER, Pair
from compare_training import TEACHER_RUN, Result, Run, Trainer
from pictures import draw_methods, styled
from results import Spread, environment

NOTE = """\
gain: over the student alone of the same seed. ±: sample standard deviation.
Every training takes the same steps, from the same seeds."""


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    accuracies: list[float]  # one per seed
    accuracy: Spread
    gain: Spread | None  # over the student alone of the same seed
    seconds: float  # of one training, the mean
    literature: float | None  # where the data is the literature's

    @classmethod
    def of(
        cls, name: str, runs: Sequence[Result], alone: Sequence[Result], literature: float | None
    ) -> "Row":
        accuracies = [run.accuracy for run in runs]
        gains = [run.accuracy - base.accuracy for run, base in zip(runs, alone, strict=False)]
        return cls(
            name,
            accuracies,
            Spread.of(accuracies),
            Spread.of(gains) if gains else None,
            statistics.mean(run.seconds for run in runs),
            literature,
        )


@dataclasses.dataclass(frozen=True)
class Comparison:
    trainer: Trainer
    backends: dict[str, str]  # of each method
    pairs: list[tuple[Pair, list[Row]]]  # the teacher's row first

    @classmethod
    def of(
        cls, results: Mapping[Run, Result], trainer: Trainer, backends: dict[str, str]
    ) -> "Comparison":
        found: dict[tuple[str, str], list[Result]] = {}
        for run, result in results.items():
            found.setdefault((run.network, run.method), []).append(result)
        pairs = []
        for pair in PAIRS.values():
            quoted = pair.literature if trainer.data.name == "cifar100" else {}
            rows = [Row.of("teacher", [results[TEACHER_RUN]], [], quoted.get("teacher"))]
            alone = found.get((pair.student, ALONE.name), [])
            for name in (method.name for method in METHODS):
                if runs := found.get((pair.student, name)):
                    baseline = [] if runs is alone else alone
                    rows.append(Row.of(name, runs, baseline, quoted.get(name)))
            if len(rows) > 1:
                pairs.append((pair, rows))
        return cls(trainer, backends, pairs)

    @property
    def title(self) -> str:
        data, seeds = self.trainer.data, len(self.pairs[0][1][1].accuracies)
        return (
            f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images,"
            f" {self.trainer.steps:,} steps, {seeds} seed{'s' * (seeds > 1)}"
        )

    def as_json(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "data": trainer.data.name,
            "training_images": len(trainer.data.train),
            "test_images": len(trainer.data.test),
            "epochs": trainer.experiment.epochs,
            "steps": trainer.steps,
            "recipe": {
                "batch_size": trainer.batch_size,
                "learning_rate": training.LEARNING_RATE,
                "momentum": training.MOMENTUM,
                "weight_decay": training.WEIGHT_DECAY,
                "drops": training.DROPS,
                "methods": {method.name: method.recipe for method in METHODS},
            },
            "backends": self.backends,
            "pairs": [
                {
                    "name": pair.name,
                    "teacher_parameters": trainer.parameters(TEACHER),
                    "student_parameters": trainer.parameters(pair.student),
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
                for pair, rows in self.pairs
            ],
            "environment": environment(trainer.device),
        }


def print_table(comparison: Comparison) -> None:
    # Piped output has no width of its own, and the default one would wrap the table.
    console = Console() if Console().is_terminal else Console(width=100)
    console.print(comparison.title)
    for pair, rows in comparison.pairs:
        quotes = any(row.literature for row in rows)
        note = f"CIFAR-100: the literature's {pair.quoted}" if quotes else None
        table = Table(title=pair.name, caption=note, title_justify="left", caption_justify="left")
        table.add_column("method")
        for heading in ("test accuracy %", "gain", "seconds", *["CIFAR-100"] * quotes):
            table.add_column(heading, justify="right")
        for row in rows:
            quoted = f"{row.literature:.2f}" if row.literature else "n/a"
            table.add_row(
                row.name,
                f"{row.accuracy:.2f}",
                f"{row.gain:+.2f}" if row.gain else "",
                f"{row.seconds:.1f}",
                *[quoted] * quotes,
                end_section=row is rows[0],
            )
        console.print(table)
    console.print(NOTE)
    for backend in dict.fromkeys(comparison.backends.values()):
        served = [method for method, name in comparison.backends.items() if name == backend]
        console.print(f"backend {backend}: {', '.join(served)}")


@styled
def draw(comparison: Comparison, path: Path) -> None:
    """For each pair: every seed, mean and deviation of each method; the teacher as a line."""
    count = len(comparison.pairs)
    tallest = max(len(rows) for _, rows in comparison.pairs)
    figure = Figure(figsize=(5.5 * count, 0.55 * tallest + 1.4))
    for axes, (pair, (teacher, *rows)) in zip(
        figure.subplots(1, count, squeeze=False)[0], comparison.pairs, strict=True
    ):
        draw_methods(axes, {row.name: row.accuracies for row in rows}, teacher.accuracy.mean)
        axes.set_xlabel("test accuracy, %")
        axes.set_title(pair.name, loc="left", fontsize=10)
    figure.suptitle(comparison.title, x=0.01, ha="left", fontsize=10)
    figure.savefig(path)

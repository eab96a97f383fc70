"""What an experiment found, as numbers: rows of accuracies and seconds, and all of it as JSON."""

import dataclasses
import os
import platform
import statistics
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import fastkd
from methods import ALONE
from models import parameter_count
from training import Trained, Trainer


@dataclasses.dataclass(frozen=True)
class Spread:
    mean: float
    std: float | None  # of the sample; None for a single value

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __format__(self, spec: str) -> str:
        """Both numbers to the digits of `spec`; a sign in it is for the mean."""
        deviation = "" if self.std is None else f" ± {self.std:{spec.lstrip('+')}}"
        return f"{self.mean:{spec}}{deviation}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of training. Its seconds are the mean of its runs."""

    name: str
    parameters: int
    accuracies: list[float]  # one per seed
    accuracy: Spread
    gain: Spread | None  # over the student alone of the same seed
    loss_seconds: float
    seconds: float

    @classmethod
    def of(cls, name: str, runs: Sequence[Trained], baseline: Sequence[Trained] = ()) -> "Row":
        accuracies = [run.accuracy for run in runs]
        gains = [run.accuracy - base.accuracy for run, base in zip(runs, baseline, strict=False)]
        return cls(
            name,
            parameter_count(runs[0].network),
            accuracies,
            Spread.of(accuracies),
            Spread.of(gains) if gains else None,
            statistics.mean(run.loss_seconds for run in runs),
            statistics.mean(run.seconds for run in runs),
        )


@dataclasses.dataclass(frozen=True)
class Results:
    trainer: Trainer
    backends: dict[str, str]  # of each loss
    teacher: Trained
    students: dict[str, list[Trained]]  # of each method, one per seed

    @property
    def title(self) -> str:
        data, seeds = self.trainer.data, len(self.students[ALONE.name])
        return (
            f"{data.name}: {len(data.train):,} training and {len(data.test):,} test"
            f" images, {self.trainer.recipe.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"
        )

    @cached_property
    def teacher_row(self) -> Row:
        return Row.of("teacher", [self.teacher])

    @cached_property
    def student_rows(self) -> list[Row]:
        alone = self.students[ALONE.name]
        return [
            Row.of(name, runs, () if runs is alone else alone)
            for name, runs in self.students.items()
        ]

    def as_json(self) -> dict[str, Any]:
        data, recipe = self.trainer.data, self.trainer.recipe
        return {
            "data": data.name,
            "training_images": len(data.train),
            "test_images": len(data.test),
            "steps": self.trainer.steps,
            "recipe": dataclasses.asdict(recipe),
            "backends": self.backends,
            "teacher": dataclasses.asdict(self.teacher_row),
            "students": [dataclasses.asdict(row) for row in self.student_rows],
            "environment": environment(self.trainer.device),
        }


def environment(device: torch.device) -> dict[str, Any]:
    """What else decides the seconds."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastkd": fastkd.__version__,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

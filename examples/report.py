"""What a run shows: progress bars while it lasts, and a table at its end."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from results import Results, Spread
from training import Trained

NOTE = """\
gain: over the student alone of the same seed. ±: sample standard deviation.
loss s: forward and backward of the loss alone, up to the outputs of the student.
total s: one whole training, forward passes of the teacher included.
Every method takes the same steps; a hint stage is part of them."""


class Bars(Progress):
    """One bar for each kind of training, with the mean of what was measured so far at its end."""

    def __init__(self, steps: dict[str, int], digits: int = 2, unit: str = "%") -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[measured]}"),
        )
        self._bars = {
            name: self.add_task(name, total=total, measured="", start=False)
            for name, total in steps.items()
        }
        self._current = next(iter(self._bars.values()))
        self._digits, self._unit = digits, unit

    def begin(self, name: str) -> None:
        self._current = self._bars[name]
        self.start_task(self._current)

    def step(self) -> None:
        self.advance(self._current)

    def steps(self, name: str, count: int) -> None:
        """Of a training that may be one of several at a time."""
        self.start_task(self._bars[name])
        self.advance(self._bars[name], count)

    def show(self, runs: Sequence[Trained]) -> None:
        self._show(self._current, [run.accuracy for run in runs])

    def show_values(self, name: str, values: Sequence[float]) -> None:
        self._show(self._bars[name], values)

    def _show(self, bar: TaskID, values: Sequence[float]) -> None:
        self.update(bar, measured=f"{Spread.of(values):.{self._digits}f} {self._unit}")


def print_table(results: Results) -> None:
    table = Table(title=results.title, caption=NOTE, title_justify="left", caption_justify="left")
    table.add_column("method")
    for heading in ("test accuracy %", "gain", "parameters", "loss s", "total s"):
        table.add_column(heading, justify="right")
    for row in (results.teacher_row, *results.student_rows):
        table.add_row(
            row.name,
            f"{row.accuracy:.2f}",
            f"{row.gain:+.2f}" if row.gain else "",
            f"{row.parameters:,}",
            f"{row.loss_seconds:.2f}",
            f"{row.seconds:.1f}",
            end_section=row is results.teacher_row,
        )
    # Piped output has no width of its own, and the default one would wrap the table.
    console = Console() if Console().is_terminal else Console(width=100)
    console.print(table)
    for backend in dict.fromkeys(results.backends.values()):
        losses = [loss for loss, name in results.backends.items() if name == backend]
        console.print(f"backend {backend}: {', '.join(losses)}")

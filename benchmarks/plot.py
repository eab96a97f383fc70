"""A record as a picture: how many times faster than torch.compile, one bar a workload."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.record import Record, geometric_mean

_COLOURS = {"float32": "#2f6db3", "bfloat16": "#e08a2e", "float16": "#6a9f58"}
_TICKS = [0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200]
_GAP = 0.9  # between families, in rows


def plot(record: Record, path: Path) -> None:
    rows = _rows(record)
    height = max(rows.values(), default=0) + 1
    figure, axes = plt.subplots(figsize=(10, 1.8 + 0.32 * height), layout="constrained")
    _headings(axes, record, rows)
    ratios = _bars(axes, record, rows)
    low, high = min([0.8, *ratios]), max([2.0, *ratios])
    axes.set_xscale("log")
    axes.set_xlim(low * 0.9, high * 1.25)
    axes.xaxis.set_major_locator(FixedLocator([t for t in _TICKS if low * 0.9 <= t <= high * 1.2]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}×"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="#333333", linewidth=1.2)
    axes.set_xlabel("times faster than torch.compile, forward + backward (log scale)")
    axes.set_ylim(height - 0.4, -1.1)
    axes.set_yticks(list(rows.values()), [label for _, label in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    title = f"fastkd ({record.subject}) against torch.compile\n{_machine(record)}"
    axes.set_title(title, loc="left", pad=28, fontsize=12)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rows(record: Record) -> dict[tuple[str, str], float]:
    """Where each workload stands, with room for the name of its family above the first."""
    rows: dict[tuple[str, str], float] = {}
    y, family = -_GAP, None
    for case in record.cases:
        key = (case.family, case.workload)
        if key in rows:
            continue
        if case.family != family:
            y, family = y + _GAP, case.family
        rows[key] = y
        y += 1
    return rows


def _bars(axes: Axes, record: Record, rows: dict[tuple[str, str], float]) -> list[float]:
    dtypes = record.dtypes()
    thickness = 0.78 / max(len(dtypes), 1)
    drawn = []
    for index, dtype in enumerate(dtypes):
        offset = (index - (len(dtypes) - 1) / 2) * thickness
        bars = []
        for case in record.cases:
            if case.dtype != dtype:
                continue
            y = rows[case.family, case.workload] + offset
            subject = record.subject_of(case)
            ratio = case.speedup(subject, "compile")
            if ratio is not None:
                bars.append((y, ratio))
                _label(axes, y, ratio, f"{ratio:.1f}×" if ratio >= 1.95 else f"{ratio:.2f}×")
            elif subject in case.outcomes and case.outcomes[subject].status != "right":
                _label(axes, y, 1, case.outcomes[subject].status)
        mean = geometric_mean([ratio for _, ratio in bars])
        axes.barh(
            [y for y, _ in bars],
            [ratio - 1 for _, ratio in bars],
            left=1,
            height=thickness,
            color=_COLOURS.get(dtype, "#777777"),
            label=dtype if mean is None else f"{dtype}, geometric mean {mean:.2f}×",
        )
        drawn += [ratio for _, ratio in bars]
    return drawn


def _label(axes: Axes, y: float, ratio: float, text: str) -> None:
    side = "left" if ratio >= 1 else "right"
    offset = (3 if ratio >= 1 else -3, 0)
    axes.annotate(
        text, (ratio, y), offset, textcoords="offset points", ha=side, va="center", fontsize=7
    )


def _headings(axes: Axes, record: Record, rows: dict[tuple[str, str], float]) -> None:
    for family in record.families():
        first = min(y for (name, _), y in rows.items() if name == family)
        axes.annotate(
            family,
            (0, first - 0.72),
            xytext=(-6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def _machine(record: Record) -> str:
    machine = record.machine
    if "capability" in machine:
        return f"{machine['device']}, compute capability {machine['capability']}"
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['device']}, {threads}, {machine['instruction_set']}"

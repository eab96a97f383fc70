"""The two pictures: how accurate each method is, and where teacher and students look."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

import fastkd
from data import Images
from features import StagedNetwork
from methods import ALONE, ATTENTION
from results import Results, Spread

GREY, BLUE, ORANGE = "#7d7d7d", "#2f6db2", "#d9822b"
styled = rc_context(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "savefig.dpi": 150,
        "figure.constrained_layout.use": True,
    }
)
SHOWN, COMPARED = 5, 500  # test images


@styled
def draw_accuracy(results: Results, path: Path) -> None:
    rows, teacher = results.student_rows, results.teacher_row.accuracy.mean
    figure = Figure(figsize=(8, 0.65 * len(rows) + 1.4))
    axes = figure.subplots()
    draw_methods(axes, {row.name: row.accuracies for row in rows}, teacher)
    axes.set_xlabel("test accuracy, %: mean ± sample standard deviation, and every seed")
    axes.set_title(results.title, loc="left", fontsize=10)
    figure.savefig(path)


def draw_methods(
    axes: Axes,
    methods: Mapping[str, Sequence[float]],
    teacher: float,
    digits: int = 1,
    teacher_on: Literal["left", "right"] = "right",
) -> None:
    """Mean and standard deviation of each method, every seed as a point, the teacher as a line."""
    for place, values in enumerate(methods.values()):
        colour, spread = GREY if place == 0 else BLUE, Spread.of(values)
        axes.scatter(values, [place + 0.25] * len(values), s=22, color=colour, alpha=0.5, lw=0)
        axes.errorbar(spread.mean, place, xerr=spread.std, fmt="o", ms=8, capsize=5, color=colour)
        axes.annotate(
            f"{spread.mean:.{digits}f}",
            (spread.mean, place),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.axvline(teacher, color=ORANGE, lw=2, zorder=0)
    label = f" teacher {teacher:.{digits}f} "
    axes.text(teacher, -0.75, label, color=ORANGE, ha=teacher_on, va="center")
    axes.set_yticks(range(len(methods)), list(methods))
    axes.set_ylim(len(methods) - 0.4, -1)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)


@styled
def draw_attention(results: Results, path: Path) -> None:
    """One test image a row; for each stage the maps of three networks side by side, upsampled.

    The three share a colour scale, so that equal colours are equal attention. The numbers are the
    mean cosines between a student's maps and the teacher's, over the first `COMPARED` images.
    """
    networks = {
        "\n\nteacher": results.teacher.network,
        "attention\ntransfer": results.students[ATTENTION.name][0].network,
        "student\nalone": results.students[ALONE.name][0].network,
    }
    test = next(results.trainer.data.test.batches(COMPARED))
    images = results.trainer.normalize(test.pixels)
    stages = list(zip(*(attention_maps(n, images) for n in networks.values()), strict=True))
    shown = _one_of_each_class(test)[:SHOWN]

    widths = [1.1] + [len(networks)] * len(stages)
    figure = Figure(figsize=(1.2 * sum(widths), 1.1 * len(shown) + 1.2))
    parts = figure.subfigures(1, len(widths), squeeze=False, width_ratios=widths, wspace=0.02)
    left, *others = parts[0]
    left.suptitle(" ")
    for image, (axes,) in zip(shown, _axes(left, len(shown), ["\n\nimage"]), strict=True):
        picture = test.pixels[image].permute(1, 2, 0).cpu().numpy()
        axes.imshow(picture, cmap="gray_r" if picture.shape[2] == 1 else None)
    for number, (part, stage) in enumerate(zip(others, stages, strict=True), 1):
        part.suptitle(f"stage {number}: {stage[0].shape[1]}×{stage[0].shape[2]}")
        grid = _axes(part, len(shown), _headings(networks, stage))
        for image, line in zip(shown, grid, strict=True):
            brightest = max(maps[image].max() for maps in stage)
            for axes, maps in zip(line, stage, strict=True):
                axes.imshow(maps[image], "magma", vmin=0, vmax=brightest, interpolation="bilinear")
    figure.savefig(path)


@torch.no_grad()
def attention_maps(network: StagedNetwork, images: Tensor) -> list[np.ndarray]:
    """For each stage the maps that attention transfer compares, (B, height, width)."""
    return [
        fastkd.attention_map(feature).unflatten(1, feature.shape[2:]).cpu().numpy()
        for feature in network.eval()(images).features
    ]


def _headings(names: Iterable[str], stage: Sequence[np.ndarray]) -> list[str]:
    """Each name with the cosine between its maps, of norm 1, and those of the first."""
    first, *others = names
    cosines = [(maps * stage[0]).sum((1, 2)).mean() for maps in stage[1:]]
    rest = [f"{name}\ncosine {cosine:.2f}" for name, cosine in zip(others, cosines, strict=True)]
    return [first, *rest]


def _one_of_each_class(images: Images) -> list[int]:
    labels = images.labels.tolist()
    return [labels.index(label) for label in sorted(set(labels))]


def _axes(figure: SubFigure, rows: int, headings: list[str]) -> np.ndarray:
    grid = figure.subplots(rows, len(headings), squeeze=False)
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    return grid

"""Distils a convnet teacher into a small student on real images, in five ways.

The student is trained alone, with soft targets, with hints and then soft targets (FitNets), with
attention transfer, and with attention transfer and soft targets: as many steps each, from the same
seeds. Prints a table and writes accuracy.png, attention.png and results.json.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import fastkd
from data import NAMES, load
from formats import DataError
from methods import METHODS
from options import backend, device, positive
from pictures import draw_accuracy, draw_attention
from report import Bars, print_table
from results import Results
from training import RECIPES, Trained, Trainer

SEEDS = 5
QUICK_SEEDS, QUICK_EPOCHS, QUICK_IMAGES = 2, 10, 500


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    chosen = arguments.backend
    try:
        with fastkd.use_backend(chosen) if chosen else contextlib.nullcontext():
            run(arguments)
    except (DataError, fastkd.BackendUnavailableError) as error:
        sys.exit(f"distill.py: error: {error}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=NAMES, default="digits", help="default: digits")
    add("--data-dir", type=Path, metavar="DIR", help="where the files of the other data are")
    add("--backend", type=backend, help="of fastkd (default: as fastkd chooses)")
    add("--device", type=device, default="cpu", help="of torch (default: cpu)")
    add("--channels-last", action="store_true", help="store images and features channels_last")
    add("--amp", action="store_true", help="compute networks and losses under bfloat16 autocast")
    add("--seeds", type=positive, metavar="N", help=f"students per method (default: {SEEDS})")
    add("--epochs", type=positive, metavar="N", help="default: depends on the data")
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seeds, {QUICK_EPOCHS} epochs, at most {QUICK_IMAGES} images a split",
    )
    add("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="for the pictures")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    data = load(arguments.data, arguments.data_dir)
    recipe = RECIPES[data.name]
    seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
    epochs = arguments.epochs or (QUICK_EPOCHS if arguments.quick else recipe.epochs)
    if arguments.quick:
        data = data.at_most(QUICK_IMAGES)
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    recipe = dataclasses.replace(
        recipe, epochs=epochs, channels_last=arguments.channels_last, amp=arguments.amp
    )
    results = train(Trainer(data, recipe, arguments.device), seeds)
    print_table(results)
    draw_accuracy(results, output / "accuracy.png")
    draw_attention(results, output / "attention.png")
    (output / "results.json").write_text(json.dumps(results.as_json(), indent=2) + "\n")
    print(f"accuracy.png, attention.png and results.json are in {output}")


def train(trainer: Trainer, seeds: int) -> Results:
    """One teacher; from it, for each method, one student per seed."""
    backends = trainer.backends()
    students: dict[str, list[Trained]] = {method.name: [] for method in METHODS}
    with Bars({"teacher": trainer.steps, **dict.fromkeys(students, trainer.steps * seeds)}) as bars:
        trainer.on_step = bars.step
        bars.begin("teacher")
        teacher = trainer.teacher(seed=0)
        bars.show([teacher])
        for method in METHODS:
            bars.begin(method.name)
            for seed in range(seeds):
                students[method.name].append(trainer.student(method, seed, teacher.network))
                bars.show(students[method.name])
    return Results(trainer, backends, teacher, students)


if __name__ == "__main__":
    main()

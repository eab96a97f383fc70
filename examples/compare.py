"""Compare six methods of distillation: one teacher, two students, seven ways to train each.

A WRN-40-2 teaches a WRN-16-2 of its own family and a depthwise network of another one, narrowed to
what the images need. Each student is trained alone, with soft targets (KD), hints (FitNet),
attention transfer (AT), similarities (SP), relations (RKD) and flow (FSP), with the weights of the
literature: as many steps each, from the same seeds. A finished training is kept in the output
folder and not repeated: what was interrupted goes on where it stopped. Prints a table and writes
comparison.png and results.json.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import fastkd
from compare_methods import METHODS, PAIRS
from compare_report import Comparison, draw, print_table
from compare_training import TEACHER_RUN, Experiment, Result, Run, Trainer
from data import NAMES
from formats import DataError
from options import backend, device, positive
from report import Bars
from workers import side_by_side

SEEDS, QUICK_SEEDS = 3, 1
QUICK_EPOCHS, QUICK_IMAGES = 10, 300
# What two cores finish in 20 minutes on Fashion-MNIST, and a GPU in 8.
CPU_IMAGES, CPU_EPOCHS, CUDA_EPOCHS = 4000, 15, 5
# The digits are few. The networks for CIFAR are of full width, and in the papers take 240 epochs.
EPOCHS = {"digits": 60, "cifar10": 60, "cifar100": 60}
STEM, FULL_STEM = 4, 16
# A small network leaves a GPU idle while Python launches its next kernel; others fill the gaps.
CUDA_WORKERS = 6


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (DataError, fastkd.BackendUnavailableError) as error:
        sys.exit(f"compare.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("compare.py: interrupted; the same command goes on from here")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = [method.name for method in METHODS]
    add = parser.add_argument
    add("--data", choices=NAMES, default="digits", help="default: digits")
    add("--data-dir", type=Path, metavar="DIR", help="where the files of the other data are")
    add("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="students (default: both)")
    add("--methods", nargs="+", choices=methods, default=methods, help="default: all")
    add("--backend", type=backend, help="of fastkd (default: as fastkd chooses)")
    add("--device", type=device, default="cpu", help="of torch (default: cpu)")
    add("--seeds", type=positive, metavar="N", help=f"students per method (default: {SEEDS})")
    add("--epochs", type=positive, metavar="N", help="default: depends on data and device")
    add(
        "--subset",
        type=positive,
        metavar="N",
        help=f"training images (default: {CPU_IMAGES:,} on a CPU, all elsewhere)",
    )
    add(
        "--workers",
        type=positive,
        metavar="N",
        help=f"trainings side by side (default: one per core, {CUDA_WORKERS} on a GPU)",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seed, {QUICK_EPOCHS} epochs, at most {QUICK_IMAGES} images a split",
    )
    add("--output", type=Path, default=Path("compare-output"), metavar="DIR", help="for all files")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    output = arguments.output
    trainer = Trainer(_experiment(arguments), output / "runs")
    backends = trainer.backends()
    seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
    students = [
        Run(PAIRS[pair].student, method.name, seed)
        for pair in arguments.pairs
        for method in METHODS
        if method.name in arguments.methods
        for seed in range(seeds)
    ]
    results = train([TEACHER_RUN, *students], trainer, _workers(arguments))
    comparison = Comparison.of(results, trainer, backends)
    print_table(comparison)
    draw(comparison, output / "comparison.png")
    (output / "results.json").write_text(json.dumps(comparison.as_json(), indent=2) + "\n")
    print(f"comparison.png and results.json are in {output}")


def train(runs: Sequence[Run], trainer: Trainer, workers: int) -> dict[Run, Result]:
    """The results of `runs`, in their order; those that are kept already are not trained again."""
    kept = {run: result for run in runs if (result := trainer.store.result(run))}
    missing = [run for run in runs if run not in kept]
    # The teacher, and beside it those who do not need it.
    rounds = [[run for run in missing if run.needs_teacher is later] for later in (False, True)]
    results = dict(kept)
    count = Counter(run.label for run in runs)
    with Bars({label: count[label] * trainer.steps for label in count}) as bars:

        def on_steps(run: Run, steps: int) -> None:
            bars.steps(run.label, steps)

        def show(run: Run) -> None:
            alike = [result for other, result in results.items() if other.label == run.label]
            bars.show_values(run.label, [result.accuracy for result in alike])

        for run in kept:
            on_steps(run, trainer.steps)
            show(run)
        with side_by_side(trainer, min(workers, len(runs)), on_steps) as finished:
            for some in rounds:
                for run, result in finished(some):
                    results[run] = result
                    show(run)
    return {run: results[run] for run in runs}


def _experiment(arguments: argparse.Namespace) -> Experiment:
    on_cpu, quick = arguments.device.type == "cpu", arguments.quick
    epochs = EPOCHS.get(arguments.data, CPU_EPOCHS if on_cpu else CUDA_EPOCHS)
    images = CPU_IMAGES if on_cpu else None
    return Experiment(
        data=arguments.data,
        data_dir=arguments.data_dir,
        training_images=arguments.subset or (QUICK_IMAGES if quick else images),
        test_images=QUICK_IMAGES if quick else None,
        epochs=arguments.epochs or (QUICK_EPOCHS if quick else epochs),
        stem=FULL_STEM if arguments.data.startswith("cifar") and not quick else STEM,
        device=arguments.device,
        backend=arguments.backend,
    )


def _workers(arguments: argparse.Namespace) -> int:
    default = torch.get_num_threads() if arguments.device.type == "cpu" else CUDA_WORKERS
    return arguments.workers or default


if __name__ == "__main__":
    main()

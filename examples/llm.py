"""Distil a language model: one teacher, and a smaller student trained in six ways.

The text is the documentation strings of Python's standard library, one file in ten held out, in
tokens of a byte-pair vocabulary that is learnt at the start. A transformer learns it; then smaller
ones learn alone, from its logits with three divergences, from its most likely tokens, which are
cached on disk, and through linear heads, without logits. Prints a table and writes llm.png and
results.json. Everything runs on the CPU, and nothing is downloaded.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import fastkd
from llm_memory import Memory, measure
from llm_methods import METHODS
from llm_model import Size
from llm_report import Report, draw, print_table
from llm_text import standard_library
from llm_tokens import BYTES, Vocabulary
from llm_training import Experiment, Recipe, Result, Run, Text, Trainer
from options import backend, positive
from report import Bars
from workers import side_by_side

SEEDS, QUICK_SEEDS = 3, 1
# Of a batch: windows, and tokens in each.
BATCH, LENGTH = 8, 128
# What two cores finish in five minutes. A token is three bytes on average: as many steps see three
# times the text that they would see of single bytes.
VOCABULARY = 2048
TEACHER = Recipe(Size(layers=4, width=128, heads=4), 2 * BATCH, 600, 3e-3)
STUDENT = Recipe(Size(layers=2, width=64, heads=4), BATCH, 300, 4e-3)
QUICK = Experiment(
    vocabulary=320,
    text_bytes=100_000,
    length=32,
    teacher=Recipe(Size(layers=2, width=32, heads=2), BATCH, 20, 3e-3),
    student=Recipe(Size(layers=1, width=16, heads=2), BATCH, 10, 4e-3),
    backend=None,
)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except fastkd.BackendUnavailableError as error:
        sys.exit(f"llm.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("llm.py: interrupted")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = [method.name for method in METHODS]
    add = parser.add_argument
    add("--methods", nargs="+", choices=methods, default=methods, help="default: all")
    add("--backend", type=backend, help="of fastkd (default: as fastkd chooses)")
    add("--seeds", type=positive, metavar="N", help=f"students per method (default: {SEEDS})")
    add("--steps", type=positive, metavar="N", help=f"of a student (default: {STUDENT.steps})")
    add("--teacher-steps", type=positive, metavar="N", help=f"default: {TEACHER.steps}")
    add(
        "--vocabulary",
        type=_vocabulary,
        metavar="N",
        help=f"tokens, from {BYTES} (bytes) to {1 << 16} (default: {VOCABULARY})",
    )
    add("--workers", type=positive, metavar="N", help="trainings side by side (default: cores)")
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_SEEDS} seed, {QUICK.student.steps} steps of tiny models on little text",
    )
    add("--output", type=Path, default=Path("llm-output"), metavar="DIR", help="for all files")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    load, output = os.getloadavg()[0], arguments.output
    experiment = _experiment(arguments)
    with Console().status("collecting the text, learning the vocabulary"):
        corpus = standard_library(experiment.text_bytes)
        vocabulary = Vocabulary.learn(corpus.train, experiment.vocabulary)
        text = Text.of(corpus, vocabulary, experiment.length)
    trainer = Trainer.on(text, experiment, output / "run")
    backends = trainer.backends()
    seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else SEEDS)
    # Round by round of seeds: the last trainings are then of all kinds, and end at about one time.
    runs = [Run(method, seed) for seed in range(seeds) for method in arguments.methods]
    teacher, results, memory = train(runs, trainer, arguments.workers or torch.get_num_threads())
    report = Report.of(trainer, backends, load, teacher, results, memory)
    print_table(report)
    draw(report, output / "llm.png")
    (output / "results.json").write_text(json.dumps(report.as_json(), indent=2) + "\n")
    print(f"llm.png and results.json are in {output}")


def train(
    runs: Sequence[Run], trainer: Trainer, workers: int
) -> tuple[Result, dict[Run, Result], dict[str, Memory]]:
    """The teacher with all cores, its cache, then `runs` side by side; last what losses need."""
    experiment = trainer.experiment
    methods = list(dict.fromkeys(run.method for run in runs))
    seeds = len(runs) // len(methods)
    steps = {
        "teacher": experiment.teacher.steps,
        "cache": len(trainer.text.train[0]),
        **{method: seeds * experiment.student.steps for method in methods},
        "memory": len(METHODS),
    }
    with Bars(steps, 3, "bits per byte") as bars:

        def on_steps(run: Run, count: int) -> None:
            bars.steps(run.method, count)

        trainer.on_steps = lambda count: bars.steps("teacher", count)
        teacher = trainer.train_teacher()
        bars.show_values("teacher", [teacher.bits_per_byte])
        trainer.on_steps = lambda count: bars.steps("cache", count)
        trainer.write_cache()
        results: dict[Run, Result] = {}
        with side_by_side(trainer, min(workers, len(runs)), on_steps) as finished:
            for run, result in finished(runs):
                results[run] = result
                alike = [found for other, found in results.items() if other.method == run.method]
                bars.show_values(run.method, [found.bits_per_byte for found in alike])
        memory = {}
        widths = experiment.student.size.width, experiment.teacher.size.width
        for method, found in measure(experiment.student.batch, experiment.length, widths):
            memory[method] = found
            bars.steps("memory", 1)
    return teacher, {run: results[run] for run in runs}, memory


def _experiment(arguments: argparse.Namespace) -> Experiment:
    whole = Experiment(VOCABULARY, None, LENGTH, TEACHER, STUDENT, arguments.backend)
    chosen = QUICK if arguments.quick else whole
    teacher, student = chosen.teacher, chosen.student
    return Experiment(
        vocabulary=arguments.vocabulary or chosen.vocabulary,
        text_bytes=chosen.text_bytes,
        length=chosen.length,
        teacher=replace(teacher, steps=arguments.teacher_steps or teacher.steps),
        student=replace(student, steps=arguments.steps or student.steps),
        backend=arguments.backend,
    )


def _vocabulary(text: str) -> int:
    size = positive(text)
    if not BYTES <= size <= 1 << 16:
        raise argparse.ArgumentTypeError(f"expected {BYTES} to {1 << 16} tokens, got {size}")
    return size


if __name__ == "__main__":
    main()

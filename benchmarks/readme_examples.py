"""The sentences and tables of the examples, from their result files, for `benchmarks.readme`."""

import textwrap
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def demo(results: dict[str, Any]) -> str:
    """What the demo compares, and how it came out."""
    teacher, students = results["teacher"], results["students"]
    seeds = len(students[0]["accuracies"])
    sentence = (
        f"A teacher of {teacher['parameters']:,} parameters learns from "
        f"{results['training_images']:,} images, then students of {students[0]['parameters']:,} "
        f"parameters do in {len(students)} ways, {seeds} seeds each; all are tested on the other "
        f"{results['test_images']:,} images."
    )
    head = ["method", "test accuracy, %", "gain", "seconds in the loss", "seconds in all"]
    rows = [
        [
            row["name"],
            _spread(row["accuracy"], ""),
            _spread(row["gain"], "+"),
            f"{row['loss_seconds']:.2f}",
            f"{row['seconds']:.1f}",
        ]
        for row in (teacher, *students)
    ]
    return f"{textwrap.fill(sentence, 100)}\n\n{table(head, rows)}"


def comparison(results: dict[str, Any]) -> str:
    """The methods of the literature, for each pair of a teacher and a student."""
    pairs = results["pairs"]
    by_name = [{row["name"]: row for row in pair["rows"]} for pair in pairs]
    seeds = len(by_name[0]["student"]["accuracies"])
    students = " and ".join(f"{pair['student_parameters']:,}" for pair in pairs)
    sentence = (
        f"A teacher of {pairs[0]['teacher_parameters']:,} parameters, students of {students}, "
        f"{results['training_images']:,} training images of {results['data']}, "
        f"{results['test_images']:,} test images; {results['steps']:,} steps and {seeds} seeds for "
        "each method."
    )
    head = ["test accuracy, %"]
    for pair in pairs:
        head += [pair["name"], "gain"]
    rows = []
    for name in by_name[0]:
        cells = [name]
        for row in (rows_of_pair[name] for rows_of_pair in by_name):
            cells += [_spread(row["accuracy"], ""), _spread(row["gain"], "+")]
        rows.append(cells)
    return f"{textwrap.fill(sentence, 100)}\n\n{table(head, rows)}"


def language(results: dict[str, Any]) -> str:
    """How well students of a language model learnt, and what their losses need."""
    rows, machine = results["rows"], results["environment"]
    sentence = (
        f"A teacher of {results['teacher_parameters']:,} parameters learns from "
        f"{results['training_bytes'] / 1e6:.2f} MB of text, {results['training_tokens']:,} tokens "
        f"of {results['vocabulary']:,}, in {results['teacher']['steps']:,} steps. Students of "
        f"{results['student_parameters']:,} parameters take {results['student']['steps']:,} steps, "
        f"{len(rows[0]['values'])} seeds for each method. {results['held_out_bytes'] / 1e6:.2f} MB "
        f"are held out. The cache has {results['cache_bytes'] / 1e6:.0f} MB, and "
        f"{results['cached_probability']:.0%} of the teacher's probability in the mean. "
        f"Measured on {machine['cpus']} cores ({machine['device']}, load "
        f"{machine['load']:.1f} at the start), Python {machine['python']}, "
        f"torch {machine['torch']}."
    )
    head = ["method", "bits per byte", "gain", "tokens/s", "loss, MB: eager", "fastkd"]
    teacher = results["teacher_result"]
    table_rows = [
        [
            "teacher",
            f"{teacher['bits_per_byte']:.3f}",
            "",
            f"{teacher['tokens_per_second']:,.0f}",
            *("", ""),
        ]
    ]
    for row in rows:
        needed = (row["memory"][name] for name in ("eager", "fastkd"))
        table_rows.append(
            [
                row["name"],
                _spread(row["bits_per_byte"], "", 3),
                _spread(row["gain"], "+", 3),
                f"{row['tokens_per_second']:,.0f}",
                *("" if count is None else f"{count / 1e6:,.0f}" for count in needed),
            ]
        )
    return f"{textwrap.fill(sentence, 100)}\n\n{table(head, table_rows)}"


def language_gain(results: dict[str, Any]) -> str:
    """For the README: what distillation gave a small language model, and what its loss needed."""
    rows = {row["name"]: row for row in results["rows"]}
    alone, forward, heads = (rows[name] for name in ("student alone", "forward KL", "linear heads"))
    logits, chunks = forward["memory"], heads["memory"]
    sentence = (
        f"`make llm` distils a small transformer on Python's documentation strings. As many steps "
        f"lead to {_spread(alone['bits_per_byte'], '', 3)} bits per byte of held-out text alone "
        f"and to {_spread(forward['bits_per_byte'], '', 3)} with a teacher of "
        f"{results['teacher_result']['bits_per_byte']:.3f}. At {results['memory_vocabulary']:,} "
        f"tokens the loss of one batch needs {logits['eager'] / 1e6:,.0f} MB in eager PyTorch, "
        f"{logits['fastkd'] / 1e6:,.0f} MB in fastkd, and {chunks['fastkd'] / 1e6:,.0f} MB with "
        f"linear heads; [docs/results.md](docs/results.md#a-language-model) has every method."
    )
    return textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)


def _spread(value: dict[str, float | None] | None, sign: str, digits: int = 2) -> str:
    if value is None:
        return ""
    mean = f"{value['mean']:{sign}.{digits}f}".replace("-", "−")
    return mean if value["std"] is None else f"{mean} ± {value['std']:.{digits}f}"

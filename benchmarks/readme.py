"""Write the figures of the documents from the committed result files.

python -m benchmarks.readme            write them, and draw the plots anew
python -m benchmarks.readme --check    only say whether they are up to date
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.readme_examples import comparison, demo, language, language_gain, table
from benchmarks.record import Case, Record, geometric_mean
from benchmarks.report import (
    duration,
    error,
    heading,
    is_gpu,
    megabytes,
    milliseconds,
    percent,
    times,
)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What `make demo` wrote to demo-output/results.json.
DEMO = "docs/demo-results.json"
# What `make compare` on Fashion-MNIST wrote to compare-output/results.json.
COMPARISON = "docs/compare-results.json"
# What `make llm` wrote to llm-output/results.json.
LANGUAGE = "docs/llm-results.json"
# Of the README's table: the result file, the loss, the workload and the dtype. One is a defeat.
FIRST_ROWS = [
    ("cpu.json", "soft_target_loss", "(1024,32000)", "float32"),
    ("cpu.json", "attention_transfer_loss", "WRN-16-2 ← WRN-40-2, batch 128", "float32"),
    ("cpu.json", "hint_loss", "(64,256,56,56)", "float32"),
    ("h200/large-logits-bfloat16.json", "soft_target_loss", "(8192,128256)", "bfloat16"),
    (
        *("h200/attention-cifar-bfloat16.json", "attention_transfer_loss"),
        *("WRN-16-2 ← WRN-40-2, batch 128", "bfloat16"),
    ),
    (
        *("h200/maps-bfloat16-beside-tests.json", "attention_transfer_loss"),
        *("ResNet-18 ← ResNet-34, channels_last, batch 256", "bfloat16"),
    ),
]


def first_rows(results: Path) -> str:
    """For the README: a few workloads on a CPU and a GPU, and the means over all of the CPU."""
    head = ["forward and backward, ms", "on", "eager", "torch.compile", "fastkd", "ratio"]
    records = {file: Record.load(results / file) for file, *_ in FIRST_ROWS}
    rows = []
    for file, loss, workload, dtype in FIRST_ROWS:
        record = records[file]
        case = next(
            case
            for case in record.cases
            if (case.loss, case.workload, case.dtype) == (loss, workload, dtype)
        )
        label = f"`{loss}` {workload}, {dtype}"
        rows.append([label, record.machine["device"], *_row(record, case)[:-1]])
    means = "\n".join(f"- CPU, {sentence}" for sentence in _ratios(records["cpu.json"]))
    return f"{table(head, rows)}\n\n{means}"


def summary(record: Record, plot: str) -> str:
    """The workloads that most readers have, and the means over all."""
    head = ["float32, ms", "eager", "torch.compile", "fastkd", "ratio", "of copy bandwidth"]
    rows = [
        [f"{case.loss} {case.workload}", *_row(record, case)]
        for case in record.cases
        if case.headline and case.dtype == "float32"
    ]
    return f"{table(head, rows)}\n\n{_means(record)}\n\n![Ratios to torch.compile]({plot})"


def details(record: Record, plot: str) -> str:
    """For the documentation: everything."""
    parts = [f"![Ratios to torch.compile]({plot})", _means(record)]
    for dtype in record.dtypes():
        head = [f"{dtype}, ms", "eager", "torch.compile", "fastkd", "ratio", "of copy bandwidth"]
        head += ["gradient error (rounding)", "MB: eager", "torch.compile", "fastkd"]
        if is_gpu(record.machine):
            head += ["in a CUDA graph: eager", "torch.compile", "fastkd", "host: fastkd"]
        rows = []
        for case in record.cases:
            if case.dtype != dtype:
                continue
            names = ("eager", "compile", record.subject_of(case))
            subject = case.outcomes[names[-1]]
            memory = [megabytes(case.outcomes[name].peak_extra_bytes) for name in names]
            errors = f"{error(subject.gradient_error)} ({error(case.rounding_error)})"
            label = f"{case.loss} {case.workload}"
            rows.append([label, *_row(record, case), errors, *memory])
            if is_gpu(record.machine):
                rows[-1] += [duration(case.graph_seconds(name)) for name in names]
                rows[-1].append(duration(subject.host_seconds))
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _row(record: Record, case: Case) -> list[str]:
    subject = record.subject_of(case)
    return [
        *(milliseconds(case.outcomes.get(name)) for name in ("eager", "compile", subject)),
        f"**{times(case.speedup(subject, 'compile'))}**",
        percent(record.share(case, subject)),
    ]


def _means(record: Record) -> str:
    return "\n".join(f"- {line}" for line in [*heading(record).splitlines(), *_ratios(record)])


def _ratios(record: Record) -> list[str]:
    sentences = []
    for dtype in record.dtypes():
        cases = [case for case in record.cases if case.dtype == dtype]
        ratios = record.speedups(cases, "compile")
        sentences.append(
            f"{dtype}, {len(cases)} workloads: {times(geometric_mean(ratios))} against "
            f"torch.compile in the geometric mean, {times(min(ratios, default=None))} at the "
            f"least; {times(geometric_mean(record.speedups(cases, 'eager')))} against eager."
        )
    return sentences


DOCUMENTS: dict[str, Callable[[Record, str], str]] = {
    "docs/results.md": summary,
    "docs/performance.md": details,
}


def markers(section: str) -> tuple[str, str]:
    return f"<!-- {section}:begin -->", f"<!-- {section}:end -->"


def filled(text: str, section: str, content: str) -> str:
    """`text` with everything between the two markers of the section replaced."""
    opening, closing = markers(section)
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        raise ValueError(f"no {opening} ... {closing} to fill")
    return f"{before}{opening}\n\n{content}\n\n{closing}{after}"


def complete_records(folder: Path) -> list[tuple[Path, Record]]:
    found = [(path, Record.load(path)) for path in sorted(folder.glob("*.json"))]
    return [(path, record) for path, record in found if record.complete]


def sections(
    root: Path, results: Path, records: list[tuple[Path, Record]]
) -> Iterator[tuple[str, str, str]]:
    """The document, the section and the content of everything that is written."""
    yield "README.md", "benchmarks", first_rows(results)
    for name, write in DOCUMENTS.items():
        parts = [
            write(record, Path(os.path.relpath(path, (root / name).parent)).as_posix())
            for path, record in ((source.with_suffix(".png"), record) for source, record in records)
        ]
        yield name, "benchmarks", "\n\n".join(parts)
    found = [json.loads((root / path).read_text()) for path in (DEMO, COMPARISON, LANGUAGE)]
    yield "docs/results.md", "demo", demo(found[0])
    yield "docs/results.md", "comparison", comparison(found[1])
    yield "docs/results.md", "language", language(found[2])
    yield "README.md", "language", language_gain(found[2])


def update(root: Path, results: Path, check: bool) -> list[str]:
    """Write the documents, or with `check` only name those that are out of date."""
    records = complete_records(results)
    if not records:
        return [f"{results} holds no complete record; run python -m benchmarks"]
    problems = []
    for name, section, content in sections(root, results, records):
        path = root / name
        try:
            old = path.read_text()
            new = filled(old, section, content)
        except (OSError, ValueError) as problem:
            problems.append(f"{name}: {problem}")
            continue
        if check and new != old:
            problems.append(f"{name}, {section}: out of date; run python -m benchmarks.readme")
        elif new != old:
            path.write_text(new)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if out of date")
    arguments = parser.parse_args()
    problems = update(ROOT, RESULTS, arguments.check)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not arguments.check:
        from benchmarks.plot import plot

        for path, record in complete_records(RESULTS):
            plot(record, path.with_suffix(".png"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the figures of README.md and docs/performance.md from the committed records.

python -m benchmarks.readme            write them, and draw the plots anew
python -m benchmarks.readme --check    only say whether they are up to date
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import Case, Record, geometric_mean
from benchmarks.report import error, heading, megabytes, milliseconds, percent, times

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def summary(record: Record, plot: str) -> str:
    """For the README: the workloads that most readers have, and the means over all."""
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
        rows = []
        for case in record.cases:
            if case.dtype != dtype:
                continue
            subject = case.outcomes[record.subject]
            memory = [
                megabytes(case.outcomes[name].peak_extra_bytes)
                for name in ("eager", "compile", record.subject)
            ]
            errors = f"{error(subject.gradient_error)} ({error(case.rounding_error)})"
            label = f"{case.loss} {case.workload}"
            rows.append([label, *_row(record, case), errors, *memory])
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def _row(record: Record, case: Case) -> list[str]:
    names = ("eager", "compile", record.subject)
    return [
        *(milliseconds(case.outcomes.get(name)) for name in names),
        f"**{times(case.speedup(record.subject, 'compile'))}**",
        percent(record.share(case, record.subject)),
    ]


def _means(record: Record) -> str:
    sentences = []
    for dtype in record.dtypes():
        cases = [case for case in record.cases if case.dtype == dtype]
        ratios = record.speedups(cases, "compile")
        sentences.append(
            f"{dtype}, {len(cases)} workloads: {times(geometric_mean(ratios))} against "
            f"torch.compile in the geometric mean, {times(min(ratios, default=None))} at the "
            f"least; {times(geometric_mean(record.speedups(cases, 'eager')))} against eager."
        )
    lines = [*heading(record).splitlines(), *sentences]
    return "\n".join(f"- {line}" for line in lines)


DOCUMENTS: dict[str, Callable[[Record, str], str]] = {
    "README.md": summary,
    "docs/performance.md": details,
}


def filled(text: str, content: str) -> str:
    """`text` with everything between the two markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} ... {END} to fill")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def complete_records(folder: Path) -> list[tuple[Path, Record]]:
    found = [(path, Record.load(path)) for path in sorted(folder.glob("*.json"))]
    return [(path, record) for path, record in found if record.complete]


def update(root: Path, results: Path, check: bool) -> list[str]:
    """Write the documents, or with `check` only name those that are out of date."""
    records = complete_records(results)
    if not records:
        return [f"{results} holds no complete record; run python -m benchmarks"]
    problems = []
    for name, write in DOCUMENTS.items():
        path = root / name
        plots = [
            Path(os.path.relpath(source.with_suffix(".png"), path.parent)).as_posix()
            for source, _ in records
        ]
        content = "\n\n".join(
            write(record, plot) for (_, record), plot in zip(records, plots, strict=True)
        )
        try:
            old = path.read_text()
            new = filled(old, content)
        except (OSError, ValueError) as problem:
            problems.append(f"{name}: {problem}")
            continue
        if check and new != old:
            problems.append(f"{name} is out of date; run python -m benchmarks.readme")
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

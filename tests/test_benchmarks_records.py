"""Records, and what is shown of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmark_records import (
    CASES,
    ROOT,
    full_record,
)

from benchmarks import readme
from benchmarks.plot import plot
from benchmarks.record import SCHEMA, Record


def test_derived_figures():
    record = full_record()
    case = record.cases[0]
    assert case.speedup("native", "compile") == pytest.approx(2)
    assert case.outcomes["native"].spread == pytest.approx(0.2)
    assert record.share(case, "native") == pytest.approx(0.5)
    groups = dict(record.groups("bfloat16"))
    assert len(groups["all"]) == sum(dtype == torch.bfloat16 for _, dtype in CASES)
    assert {case.loss for case in groups["hint_loss"]} == {"hint_loss"}


def test_record_survives_the_file_and_refuses_another_schema(tmp_path):
    record, path = full_record(), tmp_path / "cpu.json"
    record.save(path)
    assert Record.load(path) == record
    path.write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(ValueError, match=f"expected {SCHEMA}"):
        Record.load(path)


def documents(folder: Path) -> list[Path]:
    paths = [folder / name for name in ("README.md", *readme.DOCUMENTS)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        more = ("demo", "comparison") if path.name == "results.md" else ()
        if path.name != "performance.md":
            more = (*more, "language")
        marks = [mark for section in ("benchmarks", *more) for mark in readme.markers(section)]
        path.write_text("\n".join(["before", *marks, "after", ""]))
    for results in (readme.DEMO, readme.COMPARISON, readme.LANGUAGE):
        (folder / results).write_text((ROOT / results).read_text())
    return paths


def test_readme_is_filled_and_checked(tmp_path):
    paths, results = documents(tmp_path), tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert "no complete record" in readme.update(tmp_path, results, check=True)[0]

    full_record().save(results / "cpu.json")
    full_record(complete=False).save(results / "cpu-partial.json")
    shutil.copytree(ROOT / "benchmarks/results/h200", results / "h200")
    assert len(readme.update(tmp_path, results, check=True)) == 7
    assert readme.update(tmp_path, results, check=False) == []
    assert readme.update(tmp_path, results, check=True) == []
    texts = [path.read_text() for path in paths]
    assert all(text.startswith("before\n") and text.endswith("\nafter\n") for text in texts)
    assert [min(text.count("**2.00×**"), 5) for text in texts] == [3, 5, 5]
    assert "| NVIDIA H200 |" in texts[0]
    assert "| student alone | 9" in texts[1]
    assert "| FitNet | " in texts[1]
    assert "| linear heads | " in texts[1]
    assert "bits per byte" in texts[0]
    assert all("(../benchmarks/results/cpu.png)" in text for text in texts[1:])

    paths[0].write_text(texts[0].replace("**2.00×**", "**3.00×**", 1))
    assert readme.update(tmp_path, results, check=True) == [
        "README.md, benchmarks: out of date; run python -m benchmarks.readme"
    ]
    paths[0].write_text("no markers")
    paths[2].unlink()
    assert len(readme.update(tmp_path, results, check=False)) == 3
    assert paths[0].read_text() == "no markers"


def test_plot_is_drawn_also_where_a_contender_is_wrong(tmp_path):
    record = full_record()
    wrong = replace(record.cases[0].outcomes["native"], status="wrong", seconds=None)
    outcomes = record.cases[0].outcomes | {"native": wrong}
    cases = [replace(record.cases[0], outcomes=outcomes), *record.cases[1:]]
    plot(replace(record, cases=cases), tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")

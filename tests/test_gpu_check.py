"""The runner of `make gpu-check`, on parts that need no GPU."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_check import __main__ as gpu_check
from gpu_check import demo, selection
from gpu_check.__main__ import (
    FUSED,
    GRACE,
    SECONDS,
    Part,
    hear_interrupts,
    only,
    run,
    run_all,
    stages,
    table,
)

ROOT = Path(__file__).resolve().parent.parent


def python(code, name="part", limit=30.0, **others):
    return Part(name, [sys.executable, "-c", code], limit, **others)


@pytest.fixture(autouse=True)
def interrupts():
    before = signal.getsignal(signal.SIGINT)
    hear_interrupts()
    yield
    signal.signal(signal.SIGINT, before)


def test_how_a_part_ends(tmp_path):
    fine = run(python("print('12 passed'); print('==== done ====\\n')"), tmp_path)
    assert (fine.status, fine.line) == ("ok", "done")
    assert (tmp_path / "part.log").read_text().startswith("12 passed")
    broken = run(python("print('half way'); raise SystemExit('no kernel')"), tmp_path)
    assert (broken.status, broken.line) == ("failed", "no kernel")
    assert run(python("", needs="no-such-tool"), tmp_path).status == "skipped"
    seen = python("import os; print(os.environ['COLOUR'])", environment={"COLOUR": "blue"})
    assert run(seen, tmp_path).line == "blue"


@pytest.mark.thorough
@pytest.mark.parametrize("ends", [False, True])
def test_nothing_survives_a_part(tmp_path, ends):
    """Neither where its time is up nor where it ends and leaves a process behind."""
    child = "import time, pathlib; time.sleep(2); pathlib.Path('{}').touch()"
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child.format(tmp_path / 'late')!r}])\n"
        f"print('started', flush=True); time.sleep({0 if ends else 60})"
    )
    result = run(python(code, limit=1.5), tmp_path)
    assert result.status == ("ok" if ends else "timed out")
    assert result.line == ("started" if ends else "KeyboardInterrupt")
    assert result.seconds < 10
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_each_part_goes_on_when_an_earlier_one_failed(tmp_path):
    meet = (
        "import pathlib, sys, time\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "(here / sys.argv[2]).touch()\n"
        "while not (here / sys.argv[3]).exists(): time.sleep(0.01)"
    )
    together = [
        Part(a, [sys.executable, "-c", meet, str(tmp_path), a, b], 30) for a, b in ("xy", "yx")
    ]
    said = []
    todo = [[python("raise SystemExit(3)", "first")], together, [python("print('end')", "last")]]
    results = run_all(todo, tmp_path, said.append)
    assert [(r.part, r.status) for r in results] == [
        ("first", "failed"), ("x", "ok"), ("y", "ok"), ("last", "ok"),
    ]  # fmt: skip
    assert said[0] == "first: failed"
    assert said[-1] == "last: ok"
    written = json.loads((tmp_path / "summary.json").read_text())
    assert [part["status"] for part in written] == ["failed", "ok", "ok", "ok"]
    lines = table(results).splitlines()
    assert len(lines) == 4
    assert lines[-1].split() == ["last", "ok", lines[-1].split()[2], "s", "end"]


def test_the_whole_ends_in_time(tmp_path, monkeypatch):
    assert SECONDS <= 480
    monkeypatch.setattr(gpu_check, "_LEAST", 1.0)
    todo = [[python("import time; time.sleep(60)", "first")], [python("", "second")]]
    first, second = run_all(todo, tmp_path, seconds=GRACE + 1.5)
    assert (first.status, second.status) == ("timed out", "skipped")
    assert first.seconds < 1.5 + GRACE
    assert second.line == "no time was left"


def test_another_call_does_what_was_left(tmp_path):
    todo = only(stages(tmp_path, "90"), ["benchmarks: hints", "training step"])
    assert [part.name for stage in todo for part in stage] == [
        "environment",
        "build",
        "benchmarks: training step",
        "benchmarks: hints, bfloat16",
        "benchmarks: hints, float32",
    ]


def test_correctness_comes_first_and_what_is_timed_runs_alone(tmp_path):
    todo = stages(tmp_path, "90")
    # The first benchmark has its time even where everything before takes all of its own.
    longest = [max(part.limit for part in stage) + GRACE for stage in todo]
    assert sum(longest[:4]) <= SECONDS
    parts = [part for stage in todo for part in stage]
    assert len({part.name for part in parts}) == len(parts)
    for stage in todo:
        is_timed = [part.name.startswith("benchmarks: ") for part in stage]
        assert len(stage) == 1 or not any(is_timed)
    files = [arg for part in parts for arg in part.command if arg.startswith("tests/")]
    assert [name for name in files if not (ROOT / name).exists()] == []
    order = [part.name for part in parts if part.name.startswith("benchmarks: ")]
    assert order.pop(2) == "benchmarks: training step"
    assert order == [f"benchmarks: {x}, {d}" for x in FUSED for d in ("bfloat16", "float32")]
    assert [part.name for part in todo[3]] == order[:1]
    builds = [part for part in parts if part.name == "build"]
    assert builds[0].environment == {"FASTKD_BUILD": "cuda", "FASTKD_CUDA_ARCHS": "90"}


def test_the_whole_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def few(out, capability):
        code = (
            "import os, fastkd, benchmarks; print(os.environ['FASTKD_TEST_SEED'].isdigit(), "
            f"{capability!r})"
        )
        return [[python(code, "one")]]

    monkeypatch.setattr(gpu_check, "stages", few)
    assert gpu_check.main(["--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.endswith("True 120\n")
    monkeypatch.setattr(gpu_check, "stages", lambda *_: [[python("1 / 0", "one")]])
    assert gpu_check.main(["--out", str(tmp_path / "new")]) == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert gpu_check.main(["--out", str(tmp_path / "new"), "--seconds", str(GRACE)]) == 0
    assert "no time was left" in capsys.readouterr().out


@pytest.mark.parametrize("losses", FUSED)
def test_the_selection_for_the_sanitizer_agrees_with_float64(losses, monkeypatch, capsys):
    monkeypatch.setattr(selection, "DEVICE", "cpu")
    monkeypatch.setattr(selection, "SHAPES", selection.SHAPES[:2])
    monkeypatch.setattr(selection, "LOGITS", selection.LOGITS[::4])
    monkeypatch.setattr(selection, "MAPS", selection.MAPS[1:3])
    monkeypatch.setattr(selection, "BATCHES", selection.BATCHES[:1])
    selection.main("reference", losses)
    assert "calls agree with float64" in capsys.readouterr().out


def trained(*accuracies):
    rows = [{"name": "hints", "accuracy": {"mean": mean, "std": std}} for mean, std in accuracies]
    return {"students": rows}


def test_the_demo_is_as_accurate_as_its_seeds_are_alike():
    one, other = trained((90.0, 1.0), (80.0, 1.0)), trained((91.9, 1.0), (80.0, 1.0))
    assert demo.compare(one, other) == []
    (problem,) = demo.compare(one, trained((92.1, 1.0), (80.0, 1.0)))
    assert problem.startswith("hints: 90.00 % and 92.10 %")


@pytest.mark.thorough
def test_the_demo_trains_with_the_backend(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BACKENDS", ("reference",))
    (found,) = demo.train(tmp_path, "--quick", "--epochs", "1", *demo.OPTIONS[:2])
    assert set(found["backends"].values()) == {"reference"}
    assert found["recipe"]["amp"]
    with pytest.raises(SystemExit):
        demo.train(tmp_path, "--no-such-option")


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])
    assert "no GPU" in capsys.readouterr().err

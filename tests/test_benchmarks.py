import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from benchmark_records import (
    ALL_CASES,
    CASES,
    FLOAT,
    ROOT,
    SMALL,
    full_record,
    hide,
    measured,
    record_of,
)
from calls import public_losses

from benchmarks import __main__ as cli
from benchmarks import contenders, measure, readme, report
from benchmarks.cpu import Cpu
from benchmarks.plot import plot
from benchmarks.record import SCHEMA, Record
from benchmarks.workloads import WORKLOADS, linear_head
from fastkd.dispatch import Explanation

DEVICES = ("cpu", "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_every_public_loss_has_a_workload(device):
    assert {*public_losses()} == {w.loss for w in WORKLOADS if device in w.devices}


@pytest.mark.parametrize("device", DEVICES)
def test_workloads_are_told_apart_by_family_and_name(device):
    names = [(w.family, w.name) for w in WORKLOADS if device in w.devices]
    assert len(set(names)) == len(names)


# Newer than the committed record. Nothing is here once a whole `make bench` is committed.
NOT_YET_MEASURED = tuple(
    f"soft targets, {topic}"
    for topic in ("divergences", "keywords", "linear heads", "mask", "top-k teachers")
)


def test_the_committed_record_has_the_workloads_of_the_cpu():
    record = Record.load(ROOT / "benchmarks" / "results" / "cpu.json")
    recorded = [(c.family, c.workload, c.dtype, c.headline) for c in record.cases]
    assert recorded == [
        (w.family, w.name, str(dtype).removeprefix("torch."), w.headline)
        for w, dtype in CASES
        if w.family not in NOT_YET_MEASURED
    ]


def test_workloads_of_a_gpu_leave_room_for_every_contender():
    """Bytes for each logit: inputs and gradient, a float64 gradient, and five in float32."""
    logits = [(w, dtype) for w, dtype in ALL_CASES if "cuda" in w.devices and "soft" in w.family]
    most = max(
        torch.Size(w.student[0]).numel() * (3 * dtype.itemsize + 8 + 5 * 4) for w, dtype in logits
    )
    assert most < 70 * 2**30


def torch_differentiates_pooling(first, second, dtype):
    """Torch 2.8 gives the gradients of large maps in bfloat16 to other positions."""
    x = torch.randn(first).to(dtype)
    gradients = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        F.adaptive_max_pool2d(leaf, second[2:]).sum().backward()
        gradients.append(leaf.grad.double())
    return torch.equal(*gradients)


@pytest.mark.parametrize(
    ("workload", "dtype"),
    [pytest.param(w, d, id=f"{w.loss}-{w.name}-{d}-{'-'.join(w.devices)}") for w, d in ALL_CASES],
)
def test_eager_statement_is_the_loss_that_fastkd_computes(workload, dtype):
    small = workload.shrunk(10**6)
    if small.family == "attention, detector":
        pyramid = tuple((2, 16, *shape[2:]) for shape in small.student)
        small = replace(small, student=pyramid, teacher=pyramid)
    inputs = small.inputs(dtype)
    assert all(leaf.dtype == dtype for leaf in inputs.leaves())
    truth = measure.Truth(small, inputs)
    outcome = truth.judge(measure.Trial(contenders.CONTENDERS["eager"](small), inputs))
    is_wrong = small.loss == "fsp_loss" and not torch_differentiates_pooling(*small.student, dtype)
    assert outcome.status == ("wrong" if is_wrong else "right"), outcome


def test_inputs_are_the_same_each_time_and_only_the_student_learns():
    first, second = (SMALL.inputs(FLOAT) for _ in range(2))
    for one, other in zip(first.batch, second.batch, strict=True):
        assert torch.equal(one, other)
    assert [x.requires_grad for x in first.batch] == [True, False]


@pytest.mark.parametrize("name", ["three in one call", "regressor", "channels_last"])
def test_oracle_is_the_same_in_pieces(name, monkeypatch):
    workload = next(w for w in WORKLOADS if name in w.name)
    small = workload.shrunk(workload.student[0][0] // 4)
    inputs = small.inputs(FLOAT)
    whole = measure.Truth(small, inputs)
    monkeypatch.setattr(measure, "_ORACLE_ELEMENTS", 1)
    pieces = measure.Truth(small, inputs)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-12)
    assert pieces.gradient_error(whole.gradients) < 1e-12


def test_ideal_bytes_count_what_must_move():
    logits = next(w for w in WORKLOADS if w.name == "(256,1000)")
    assert logits.ideal_bytes(FLOAT, 0) == 3 * 256 * 1000 * 4
    assert logits.ideal_bytes(torch.bfloat16, 0) == 3 * 256 * 1000 * 2
    maps = next(w for w in WORKLOADS if w.name == "(128,256,8,8)")
    sample = 256 * 8 * 8 * 4
    assert maps.ideal_bytes(FLOAT, sample) == 3 * 128 * sample
    assert maps.ideal_bytes(FLOAT, sample - 1) == 4 * 128 * sample
    heads = next(w for w in WORKLOADS if w.family == linear_head.FAMILY)
    # Hidden states of both sides and the student's gradient; two weights and a gradient.
    assert heads.ideal_bytes(FLOAT, 0) == 3 * (2048 + 32000) * 1024 * 4


def scaled(workload):
    return lambda *batch: 1.001 * contenders.CONTENDERS["eager"](workload)(*batch)


def broken(workload):
    def statement(*batch):
        raise RuntimeError("no kernel\nwith details")

    return statement


def not_a_number(workload):
    return lambda student, teacher: (student * torch.nan).sum()


def without_gradient(workload):
    spare = torch.zeros((), requires_grad=True)
    return lambda *batch: contenders.CONTENDERS["eager"](workload)(*batch).detach() + spare


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("contender", "status", "message"),
    [
        (scaled, "wrong", "gradient error 1.0e-03"),
        (broken, "failed", "RuntimeError: no kernel"),
        (not_a_number, "wrong", "not finite"),
        (without_gradient, "wrong", "a gradient is missing"),
    ],
)
def test_a_wrong_contender_has_no_time(contender, status, message, monkeypatch):
    monkeypatch.setitem(contenders.CONTENDERS, "other", contender)
    case = measured(["eager", "other"])
    assert case.outcomes["eager"].status == "right"
    assert case.outcomes["other"].status == status
    assert case.seconds("other") is None
    assert case.speedup("other", "eager") is None
    assert report.milliseconds(case.outcomes["other"]) == status
    (complaint,) = report.complaints(record_of(case))
    assert message in complaint


def test_race_takes_turns_and_respects_the_least_number_of_rounds():
    order = []

    class Clock:
        def time(self, prepare, step):
            order.append(step())
            return 1.0

    class Trial:
        def __init__(self, name):
            self.prepare, self.step = (lambda: None), (lambda: name)

    samples = measure.race(Clock(), {"a": Trial("a"), "b": Trial("b")}, 0.0, 5)
    assert samples == {"a": [1.0] * 5, "b": [1.0] * 5}
    rounds = [order[i : i + 2] for i in range(4, len(order), 2)]
    assert all(sorted(names) == ["a", "b"] for names in rounds)


def test_peak_memory_sees_what_is_freed_again():
    cpu = Cpu()
    size = 64 << 20
    peak = cpu.peak_extra_bytes(lambda: None, lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert size * 0.95 < peak < size * 1.3


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


def test_only_a_whole_run_may_stand_in_the_documentation():
    assert cli.is_complete(cli.parse([]))
    for arguments in (["--quick"], ["--filter", "hint"], ["--dtype", "float32"]):
        assert not cli.is_complete(cli.parse(arguments))
    assert not cli.is_complete(cli.parse(["--contenders", "eager"]))


def test_workloads_follow_the_options():
    assert cli.chosen(cli.parse([])) == CASES
    large = cli.chosen(cli.parse(["--device", "cuda", "--filter", "(8192,128256)"]))
    assert [(w.loss, dtype) for w, dtype in large] == [
        ("soft_target_loss", torch.bfloat16),
        ("distillation_loss", torch.bfloat16),
    ]
    options = ["--filter", "REGRESSOR", "channels_last", "--dtype", "bfloat16"]
    chosen = cli.chosen(cli.parse(options))
    assert [(w.name, dtype) for w, dtype in chosen] == [
        ("ResNet-18 ← ResNet-34, channels_last, batch 256", torch.bfloat16),
        ("1×1 regressor to 128 channels, (64,64,16,16)", torch.bfloat16),
    ]
    system = ["--device", "cuda", "--allocator", "system"]
    for bad in (["--seconds", "0"], ["--seconds", "nan"], ["--dtype", "int8"], system):
        with pytest.raises(SystemExit):
            cli.parse(bad)


def test_a_backend_that_cannot_run_is_refused_by_name():
    with pytest.raises(SystemExit, match="triton cannot run here: "):
        cli.jobs(cli.parse(["--contenders", "eager", "triton", "--filter", "hint"]), Cpu())
    assert "no workload" in bench("--filter", "no such workload", status=2)


KERNELS_OF = {"hint_loss": {"native", "triton"}, "attention_map": {"triton"}}


@pytest.fixture
def some_kernels(monkeypatch):
    """Losses have kernels as the table above says, and the reference."""

    def explain(workload, dtype, device, name):
        can = name == "reference" or name in KERNELS_OF.get(workload.loss, ())
        return Explanation(workload.loss, name if can else None, {name: "no kernels"})

    monkeypatch.setattr(contenders, "explain", explain)


def test_all_kernels_take_part_and_the_reference_where_there_are_none(some_kernels, capsys):
    jobs = {w.loss: names for w, _, names in cli.jobs(cli.parse([]), Cpu())}
    assert jobs == {
        **{loss: ["eager", "compile", "reference"] for loss in jobs},
        "attention_map": ["eager", "compile", "triton"],
        "hint_loss": ["eager", "compile", "native", "triton"],
    }
    assert capsys.readouterr().err == ""
    wanted = cli.parse(["--contenders", "triton", "eager", "--filter", "map"])
    jobs = {w.loss: names for w, _, names in cli.jobs(wanted, Cpu())}
    assert jobs["attention_map"] == ["triton", "eager"]
    cli.jobs(cli.parse(["--filter", "map"]), Cpu())
    assert capsys.readouterr().err == "native is not measured: no kernels\n"


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch):
    cases = iter([measured(["eager"])])

    def one_and_no_more(*arguments):
        if case := next(cases, None):
            return case
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "measure", one_and_no_more)
    options = ["--quick", "--filter", "(64,100)", "--contenders", "eager"]
    assert cli.main([*options, "--output", str(tmp_path)]) == 1
    record = Record.load(tmp_path / "cpu-partial.json")
    assert (len(record.cases), record.complete) == (1, False)


def test_every_workload_can_be_explained(monkeypatch):
    hide(monkeypatch, "trl")
    for workload in WORKLOADS:
        names = contenders.lineup(workload, FLOAT, "cpu", None)
        assert names == ["eager", "compile", str(contenders.explain(workload, FLOAT, "cpu").chosen)]


def bench(*arguments: str, status: int = 0) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout


@pytest.mark.thorough
def test_command_line_end_to_end(tmp_path):
    output = bench(
        *("--quick", "--filter", "(128,100)", "--dtype", "float32"),
        *("--contenders", "eager", "reference", "--output", str(tmp_path)),
    )
    assert "reference: geometric means" in output
    record = Record.load(tmp_path / "cpu-partial.json")
    assert not record.complete
    assert record.subject == "reference"
    assert {"device", "cores", "threads", "instruction_set", "memory_bytes", "system"} <= set(
        record.machine
    )
    assert {"fastkd", "torch", "python", "compiler"} == set(record.versions)
    assert record.options["filter"] == ["(128,100)"]
    assert record.copy_bandwidth["fresh"] > 0
    assert [case.loss for case in record.cases] == ["soft_target_loss", "distillation_loss"]
    for case in record.cases:
        assert case.student == [[4, 100]]
        assert set(case.outcomes) == {"eager", "reference"}
        for outcome in case.outcomes.values():
            assert outcome.repetitions >= 3
            assert outcome.seconds_least <= outcome.seconds_q25 <= outcome.seconds
            assert outcome.seconds <= outcome.seconds_q75
    assert (tmp_path / "cpu-partial.png").exists()


@pytest.mark.thorough
def test_torch_compile_takes_part():
    case = measured(["eager", "compile"])
    compiled = case.outcomes["compile"]
    if compiled.status == "failed":
        pytest.skip(f"torch.compile does not work here: {compiled.message}")
    assert compiled.status == "right"
    assert case.speedup("compile", "eager") > 0

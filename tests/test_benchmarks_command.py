"""The command `python -m benchmarks`."""

import os
import subprocess
import sys

import pytest
import torch
from benchmark_records import (
    CASES,
    FLOAT,
    ROOT,
    hide,
    measured,
)

from benchmarks import __main__ as cli
from benchmarks import contenders
from benchmarks.cpu import Cpu
from benchmarks.record import Record
from benchmarks.workloads import WORKLOADS
from fastkd.dispatch import Explanation


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
    for package in ("trl", "liger_kernel"):
        hide(monkeypatch, package)
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

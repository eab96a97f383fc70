"""What is measured, and how."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from benchmark_records import (
    ALL_CASES,
    CASES,
    FLOAT,
    ROOT,
    SMALL,
    measured,
    record_of,
)
from calls import public_losses

from benchmarks import contenders, measure, report
from benchmarks.cpu import Cpu
from benchmarks.record import Record
from benchmarks.workloads import WORKLOADS, linear_head

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

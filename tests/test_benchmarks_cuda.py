"""The benchmarks of a GPU, on a fake one."""

import contextlib
from dataclasses import replace
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from benchmark_records import ROOT, full_record, measured, record_of
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import cuda, readme, report
from benchmarks.cpu import Cpu
from benchmarks.cuda import Cuda
from benchmarks.plot import plot
from benchmarks.record import Record
from benchmarks.workloads import WORKLOADS


class Event:
    """Of a GPU whose clock is the number of seconds that a test has let pass."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.clock

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Graph:
    """Replays as many steps as were captured, one a second."""

    steps = 0

    def replay(self):
        Event.clock += self.steps


PROPERTIES = SimpleNamespace(
    name="NVIDIA Fake",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    L2_cache_size=1000,
)


@pytest.fixture
def gpu(monkeypatch):
    """A `Cuda` whose tensors are on the CPU, and whose GPU is the two classes above."""
    monkeypatch.setattr(Event, "clock", 0.0)
    modes = []
    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "get_device_properties": lambda: PROPERTIES,
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: modes.append(mode),
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
        "reset_peak_memory_stats": lambda: None,
    }
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Cuda, "name", "cpu")
    monkeypatch.setattr(cuda, "_COPY_BYTES", 1 << 10)
    gpu = Cuda()
    gpu.modes = modes
    return gpu


def test_gpu_times_leave_preparation_and_flush_out(gpu):
    order = []

    def prepare():
        order.append("prepare")
        gpu.flusher.fill_(1)
        Event.clock += 5.0

    def step():
        order.append("step")
        assert not gpu.flusher.any(), "not flushed"
        Event.clock += 2.0

    assert gpu.time(prepare, step) == 2.0
    assert order == ["prepare", "step"]
    assert len(gpu.flusher) >= 2 * PROPERTIES.L2_cache_size


@pytest.mark.parametrize(("ideal_bytes", "steps"), [(1001, 1), (1000, 20)])
def test_gpu_graph_time_is_of_one_step(gpu, ideal_bytes, steps):
    prepared = []

    def step():
        assert prepared.pop()
        Graph.steps += 1

    def prepare():
        prepared[:] = [True]

    Graph.steps = -cuda._CAPTURE_WARMUPS - 1
    assert gpu.graph_seconds(prepare, step, ideal_bytes) == 1.0
    assert Graph.steps == steps


def test_what_waits_for_the_gpu_is_not_captured(gpu, monkeypatch):
    """It fails before the capture does."""

    def step():
        if gpu.modes and gpu.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "graph", lambda graph: pytest.fail("captured"))
    with pytest.raises(RuntimeError, match="synchronizing"):
        gpu.graph_seconds(lambda: None, step, 1000)
    assert gpu.modes == ["error", "default"]


def test_gpu_memory_machine_and_copy(gpu):
    assert gpu.peak_extra_bytes(lambda: None, lambda: None) == 250
    assert gpu.machine()["capability"] == "9.0"
    assert set(gpu.versions()) == {"cuda", "triton", "liger-kernel"}
    assert 0 <= gpu.host_seconds(lambda: None, lambda: None) < 1
    gpu._between_events = lambda step: (step(), 4.0)[1]
    assert gpu.copy_bandwidth(0) == {"warm": 2 * 1024 / 4.0}
    assert not torch.backends.cudnn.allow_tf32


def test_a_sample_of_a_mebibyte_is_read_again_from_the_cache_of_an_h100():
    h100 = SimpleNamespace(properties=SimpleNamespace(L2_cache_size=50 << 20))
    on_chip = Cuda.on_chip_bytes(h100)
    (pyramid,) = (w for w in WORKLOADS if w.name == "feature pyramid, batch 2")
    reads = [
        replace(pyramid, student=(s,), teacher=(s,)).ideal_bytes(torch.float32, on_chip)
        // (4 * torch.Size(s).numel())
        - 2
        for s in pyramid.student
    ]
    assert reads == [2, 2, 2, 1, 1]


def test_attention_is_measured_in_both_conventions_on_a_gpu():
    names = {w.name for w in WORKLOADS if "cuda" in w.devices and w.family.startswith("attention,")}
    paper = {name for name in names if "mse" not in name and "max_pow" not in name}
    released = {name.replace("mse, ", "").replace(", mse", "") for name in names if "mse" in name}
    assert len(released) == 9
    assert released < paper
    assert sum("channels_last" in name for name in names) == 4


def gpu_record() -> Record:
    cases = []
    for case in full_record().cases:
        outcomes = {
            name: replace(outcome, host_seconds=1e-3, graph_seconds=outcome.seconds / 2)
            for name, outcome in case.outcomes.items()
        }
        if case.loss != "hint_loss":
            outcomes["reference"] = outcomes.pop("native")
        cases.append(replace(case, outcomes=outcomes))
    fake = SimpleNamespace(properties=PROPERTIES, on_chip_bytes=lambda: 0)
    return record_of(
        *cases, device="cuda", machine=Cuda.machine(fake), copy_bandwidth={"warm": 4e10}
    )


def test_a_record_of_a_gpu_is_shown_with_host_and_graph(tmp_path):
    record = gpu_record()
    hint = next(case for case in record.cases if case.loss == "hint_loss")
    other = record.cases[0]
    assert (record.subject_of(hint), record.subject_of(other)) == ("native", "reference")
    assert hint.graph_speedup("native", "compile") == pytest.approx(2)
    # The graph's time, where there is one, says what the kernels do with the memory.
    assert record.share(hint, "native") == pytest.approx(10**7 / 0.5e-3 / 4e10)
    assert record.speedups(record.cases, "compile") == pytest.approx([2] * len(record.cases))
    output = StringIO()
    report.show(record, Console(file=output, width=150))
    for text in ("host", "graph", "NVIDIA Fake, 132 multiprocessors", "not TF32"):
        assert text in output.getvalue()
    assert "fresh" not in report.heading(record)
    assert "in a CUDA graph" in readme.details(record, "plot.png")
    record.save(tmp_path / "cuda.json")
    assert Record.load(tmp_path / "cuda.json") == record
    plot(record, tmp_path / "cuda.png")


def test_a_record_from_before_there_were_graphs_still_loads():
    record = Record.load(ROOT / "benchmarks" / "results" / "cpu.json")
    assert all(o.graph_seconds is None for case in record.cases for o in case.outcomes.values())


def test_what_cannot_be_captured_keeps_its_time_and_says_why(monkeypatch):
    def graph_seconds(self, prepare, step, ideal_bytes):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Cpu, "graph_seconds", graph_seconds)
    record = record_of(measured(["eager"]))
    outcome = record.cases[0].outcomes["eager"]
    assert (outcome.status, outcome.graph_seconds) == ("right", None)
    assert outcome.seconds > 0
    (note,) = report.notes(record)
    assert note.endswith(
        "no CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    )
    assert report.complaints(record) == []


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no GPU"):
        cli.main(["--device", "cuda"])

"""The training step of `benchmarks/`, and that training goes the same way with every backend."""

import functools
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("rich")

import fastkd  # noqa: E402
from benchmarks import step, tasks, train_step  # noqa: E402
from benchmarks.environment import open_device  # noqa: E402
from benchmarks.models import resnet, wide_resnet  # noqa: E402
from benchmarks.step import WITHOUT, StepRecord  # noqa: E402
from benchmarks.workloads import attention  # noqa: E402

STEPS = 200
# Of the deviation that rounding to float32 gives the reference.
FACTOR = 3

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def curve(backend: str, dtype: torch.dtype) -> torch.Tensor:
    """Losses of 200 steps; the networks are narrow, the batches of 4 images of 16×16.

    A ReLU that rounding switches on or off moves all that follows, by up to a percent in the loss.
    With SiLU in its place rounding stays rounding, and the curves can be compared at every step.
    """
    torch.manual_seed(0)
    task = tasks.cifar(DEVICE, True, dtype)
    task.optimizer.param_groups[0]["lr"] = 0.01
    one = step.Step(task, step.CONTENDERS["fastkd"](task))
    losses = []
    smooth = mock.patch.object(F, "relu", lambda x, inplace=False: F.silu(x))
    with fastkd.use_backend(backend), smooth:
        for number in range(STEPS):
            torch.manual_seed(number)
            images = torch.randn_like(task.student_input, dtype=torch.float32).to(dtype)
            task.student_input = task.teacher_input = images
            one.prepare()
            losses.append(one.step().detach())
    return torch.stack(losses).double().cpu()


def deviation(backend: str, dtype: torch.dtype) -> float:
    expected = curve("reference", torch.float64)
    return ((curve(backend, dtype) - expected) / expected).abs().max().item()


def test_training_in_float64_follows_the_reference_to_rounding(kernel_backend):
    losses = curve("reference", torch.float64)
    assert losses[-20:].mean() < losses[0] / 2, "it learns"
    assert deviation(kernel_backend, torch.float64) < 1e-10


@pytest.mark.thorough
def test_training_in_float32_is_as_close_to_float64_as_the_reference(kernel_backend):
    assert 0 < deviation("reference", torch.float32) < 1e-4
    assert deviation(kernel_backend, torch.float32) < FACTOR * deviation("reference", torch.float32)


def small(name: str) -> tasks.Task:
    return tasks.TASKS[name](DEVICE, True)


def measured(name: str, *contenders: str) -> step.StepCase:
    return step.measure(small(name), contenders, open_device(DEVICE), 0.01, 3)


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda: wide_resnet(16, 2), 703_284),
        (lambda: wide_resnet(40, 2), 2_255_156),
        (lambda: resnet((2, 2, 2, 2)), 11_689_512),
        (lambda: resnet((3, 4, 6, 3)), 21_797_672),
    ],
)
def test_the_networks_are_those_of_the_literature(network, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in network().parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "shapes"), [("cifar", attention._WRN_16_2), ("imagenet", attention._RESNET_18)]
)
def test_the_full_tasks_have_the_maps_of_the_workloads(name, shapes):
    with torch.device("meta"):
        student, teacher = tasks.TASKS[name]("meta", False).outputs()
    for side in (student, teacher):
        assert tuple(tuple(x.shape) for x in side.features) == shapes
    assert student.logits.shape == teacher.logits.shape


@pytest.mark.thorough
def test_command_line_end_to_end(tmp_path, capsys):
    options = ["--small", "--seconds", "0.01", "--contenders", "eager", "fastkd"]
    options += ["--device", DEVICE, "--output", str(tmp_path / "new")]
    assert train_step.main(options) == 0
    found = (tmp_path / "new" / f"{DEVICE}-partial.json").read_text()
    assert '"commit"' in found
    record = StepRecord(**json.loads(found))
    assert {"fastkd", "torch", "python"} <= set(record.versions)
    assert not record.complete
    assert [case["task"] for case in record.cases] == list(tasks.TASKS)
    for case in record.cases:
        assert list(case["outcomes"]) == [WITHOUT, "eager", "fastkd"]
        for name, outcome in case["outcomes"].items():
            assert outcome["status"] == "right"
            assert 0 < outcome["seconds_q25"] <= outcome["seconds"] <= outcome["seconds_q75"]
            assert (outcome["losses_seconds"] is None) == (name == WITHOUT)
    assert [len(case["backends"]) for case in record.cases] == [3, 2, 1]
    output = capsys.readouterr().out
    assert "no losses" in output
    assert "distillation_loss by " in output


@pytest.mark.thorough
def test_torch_compile_takes_part():
    outcome = measured("tokens", "compile").outcomes["compile"]
    if outcome.status == "failed":
        pytest.skip(f"torch.compile does not work here: {outcome.message}")
    assert outcome.status == "right"
    assert outcome.share < 1


def scaled(task):
    return lambda *outputs: 1.001 * task.criterion(tasks.EAGER, *outputs)


def biased(task):
    """The loss is right, and its gradient is not."""
    eager = step.CONTENDERS["eager"](task)
    return lambda *outputs: (lambda loss: loss * 1.1 - loss.detach() * 0.1)(eager(*outputs))


def broken(task):
    def loss(*outputs):
        raise RuntimeError("no kernel\nwith details")

    return loss


def without_gradient(task):
    return lambda student, *others: student.features[0].square().mean()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("contender", "status", "message"),
    [
        (scaled, "wrong", "loss error 1.0e-03"),
        (biased, "wrong", "gradient error 1.0e-01"),
        (broken, "failed", "RuntimeError: no kernel"),
        (without_gradient, "wrong", "a gradient is missing"),
    ],
)
def test_a_wrong_contender_has_no_time(contender, status, message, monkeypatch):
    monkeypatch.setitem(step.CONTENDERS, "other", contender)
    case = measured("cifar", "other")
    outcome = case.outcomes["other"]
    assert (outcome.status, outcome.seconds, outcome.share) == (status, None, None)
    (complaint,) = train_step.complaints(case)
    assert message in complaint
    train_step.table(case)


def test_what_the_losses_take_is_the_difference_round_by_round():
    samples = {WITHOUT: [1.0, 2.0, 9.0], "fastkd": [1.5, 2.5, 9.5], "eager": [3.0, 3.0, 12.0]}
    assert step._losses(samples, "fastkd")["losses_seconds"] == pytest.approx(0.5)
    assert step._losses(samples, "eager") == {
        "losses_q25": 1.5, "losses_seconds": 2.0, "losses_q75": 2.5,
    }  # fmt: skip
    assert step._losses(samples, WITHOUT) == {}
    assert step.StepOutcome("right", seconds=2.0, losses_seconds=0.5).share == 0.25


def test_the_step_without_losses_has_the_gradients_of_the_losses():
    task = small("cifar")
    gradients = []
    for one in (step.Step(task, step.CONTENDERS["eager"](task)), step.StepWithoutLosses(task)):
        one.prepare()
        one.backward()
        gradients.append([learner.grad for learner in task.learners()])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.thorough
def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch):
    cases = iter([measured("cifar", "eager")])

    def one_and_no_more(*arguments):
        if case := next(cases, None):
            return case
        raise KeyboardInterrupt

    monkeypatch.setattr(train_step, "measure", one_and_no_more)
    assert train_step.main(["--small", "--device", DEVICE, "--output", str(tmp_path)]) == 1
    assert (tmp_path / f"{DEVICE}-partial.json").exists()


def test_only_a_whole_run_is_complete():
    assert train_step.is_complete(train_step.parse([]))
    for arguments in (["--small"], ["--tasks", "cifar"], ["--contenders", "eager"]):
        assert not train_step.is_complete(train_step.parse(arguments))
    with pytest.raises(SystemExit):
        train_step.parse(["--seconds", "0"])

"""A training step with each form of the losses: whether it is right, its time, its memory."""

import gc
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Device, race, said, timed
from benchmarks.models import Output
from benchmarks.record import Origin, Outcome
from benchmarks.tasks import EAGER, FASTKD, Losses, Task

Loss = Callable[[Output, Output, Tensor], Tensor]

# Of the student's gradient, relative and in the L2 norm: the forms round the gradients of the
# outputs differently, by one unit of the dtype, and the layers below amplify that.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# The losses compute in float32 at least, whatever the dtype of what they see.
LOSS_TOLERANCE = 1e-4
# No contender: it takes part for the sake of the difference.
WITHOUT = "no losses"


class Step:
    """Teacher, student, losses, backward and optimizer, as `race` takes it."""

    def __init__(self, task: Task, loss: Loss) -> None:
        self.task, self.loss = task, loss

    def prepare(self) -> None:
        for learner in self.task.learners():
            learner.grad = None

    def backward(self) -> Tensor | None:
        with self.task.casting():
            loss = self.loss(*self.task.outputs(), self.task.labels)
        loss.backward()
        return loss

    def step(self) -> Tensor | None:
        loss = self.backward()
        self.task.optimizer.step()
        return loss


class StepWithoutLosses(Step):
    """The same step with the gradients of the student's outputs given.

    What a step takes beyond this is what its losses take: their kernels, their launches, and the
    waiting that they cause. The losses alone, between two events, would count launches that the
    host makes ahead of time while the GPU is busy with the networks, and leave out that the
    networks find their activations gone from the cache. The given gradients are those of the eager
    losses, in their layout, so that the student's backward is the same.
    """

    def __init__(self, task: Task) -> None:
        with task.casting():
            student, teacher = task.outputs()
            cut = Output(_leaf(student.logits), list(map(_leaf, student.features)))
            loss = task.criterion(EAGER, cut, teacher, task.labels)
        loss.backward()
        self.task = task
        self.gradients = [output.grad for output in (cut.logits, *cut.features)]

    def backward(self) -> None:
        with self.task.casting():
            student, _ = self.task.outputs()
        torch.autograd.backward([student.logits, *student.features], self.gradients)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _form(losses: Losses) -> Callable[[Task], Loss]:
    def loss_of(task: Task) -> Loss:
        return lambda student, teacher, labels: task.criterion(losses, student, teacher, labels)

    return loss_of


def _compiled(task: Task) -> Loss:
    torch._dynamo.reset()
    compiled: Loss = torch.compile(_form(EAGER)(task), fullgraph=True)
    return compiled


CONTENDERS: dict[str, Callable[[Task], Loss]] = {
    "eager": _form(EAGER),
    "compile": _compiled,
    "fastkd": _form(FASTKD),
}


@dataclass(frozen=True)
class StepOutcome(Outcome):
    """One form of the losses. Theirs are the differences to the step without, round by round."""

    losses_seconds: float | None = None
    losses_q25: float | None = None
    losses_q75: float | None = None

    @property
    def share(self) -> float | None:
        """Of the losses in the step."""
        if self.seconds is None or self.losses_seconds is None:
            return None
        return self.losses_seconds / self.seconds


@dataclass(frozen=True)
class StepCase:
    """One task. `backends` are those that served fastkd's losses."""

    task: str
    title: str
    dtype: str
    tolerance: float
    backends: dict[str, str]
    outcomes: dict[str, StepOutcome]

    def speedup(self, contender: str, over: str) -> float | None:
        own, other = (self.outcomes.get(name) for name in (contender, over))
        if own is None or other is None or own.seconds is None or other.seconds is None:
            return None
        return other.seconds / own.seconds


@dataclass(frozen=True)
class StepRecord(Origin):
    """One run on one machine."""

    cases: list[StepCase]


class Truth:
    """The loss and the gradients of the eager form, before the first step."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.loss, self.gradients = self._found(Step(task, CONTENDERS["eager"](task)))

    def _found(self, step: Step) -> tuple[float, list[Tensor | None]]:
        step.prepare()
        loss = step.backward().item()
        gradients = [learner.grad for learner in self.task.learners()]
        step.prepare()
        return loss, gradients

    def judge(self, step: Step) -> StepOutcome:
        try:
            loss, gradients = self._found(step)
        except Exception as error:
            return StepOutcome("failed", said(error))
        pairs = list(zip(gradients, self.gradients, strict=True))
        if any(own is None for own, _ in pairs):
            return StepOutcome("wrong", "a gradient is missing")
        loss_error = abs(loss - self.loss) / abs(self.loss)
        error = math.hypot(*(torch.dist(own.float(), exact.float()).item() for own, exact in pairs))
        size = math.hypot(*(exact.float().norm().item() for _, exact in pairs))
        within = loss_error <= LOSS_TOLERANCE and error <= TOLERANCES[self.task.dtype] * size
        return StepOutcome("right" if within else "wrong", "", loss_error, error / size)


def measure(
    task: Task,
    contenders: Iterable[str],
    device: Device,
    seconds: float,
    rounds_least: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> StepCase:
    progress("eager, to compare with")
    truth = Truth(task)
    outcomes: dict[str, StepOutcome] = {WITHOUT: StepOutcome("right")}
    steps: dict[str, Step] = {WITHOUT: StepWithoutLosses(task)}
    steps[WITHOUT].prepare()
    for name in contenders:
        progress(f"checking {name}")
        step = Step(task, CONTENDERS[name](task))
        outcomes[name] = truth.judge(step)
        if outcomes[name].status == "right":
            steps[name] = step
    del truth
    gc.collect()
    progress("timing")
    samples = race(device, steps, seconds, rounds_least)
    progress("memory")
    for name, step in steps.items():
        outcome = timed(outcomes[name], samples[name])
        peak = device.peak_extra_bytes(step.prepare, step.step)
        outcomes[name] = replace(outcome, peak_extra_bytes=peak, **_losses(samples, name))
        step.prepare()
    return StepCase(
        task=task.name,
        title=task.title,
        dtype=str(task.dtype).removeprefix("torch."),
        tolerance=TOLERANCES[task.dtype],
        backends={found.loss: str(found.chosen) for found in task.explanations()},
        outcomes=outcomes,
    )


def _losses(samples: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Quartiles of the differences; what disturbs a whole round is in neither."""
    if name == WITHOUT:
        return {}
    pairs = zip(samples[name], samples[WITHOUT], strict=True)
    found = statistics.quantiles((own - less for own, less in pairs), n=4, method="inclusive")
    return dict(zip(("losses_q25", "losses_seconds", "losses_q75"), found, strict=True))

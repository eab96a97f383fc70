"""One workload: first whether each contender is right, then its time, then its memory."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.contenders import BOUND, CONTENDERS, Statement
from benchmarks.record import Case, Outcome
from benchmarks.workloads import Workload
from benchmarks.workloads.workload import Inputs, tensors

Action = Callable[[], Any]

_ORACLE_ELEMENTS = 1 << 23
_WARMUPS = 2
_REPETITIONS_MOST = 2000
# Beyond what rounding the exact gradient to its dtype costs; a float32 sum over 262,144 classes
# stays well below it, and arithmetic in half precision does not.
_TOLERANCE = 1e-4
_OF_ROUNDED_LOGITS = 1e-2


class Device(Protocol):
    """What a kind of device must offer to be measured."""

    name: str

    def time(self, prepare: Action, step: Action) -> float: ...
    def host_seconds(self, prepare: Action, step: Action) -> float | None: ...
    def graph_seconds(self, prepare: Action, step: Action, ideal_bytes: int) -> float | None: ...
    def peak_extra_bytes(self, prepare: Action, step: Action) -> int | None: ...
    def copy_bandwidth(self, seconds: float) -> dict[str, float]: ...
    def on_chip_bytes(self) -> int: ...
    def machine(self) -> dict[str, Any]: ...
    def versions(self) -> dict[str, str]: ...


class Runnable(Protocol):
    """What can be timed: a step, and what is to be done before each."""

    def prepare(self) -> None: ...
    def step(self) -> Any: ...


class Trial:
    """A contender's forward and backward on some inputs."""

    def __init__(self, statement: Statement, inputs: Inputs) -> None:
        self.statement, self.inputs = statement, inputs

    def prepare(self) -> None:
        """Forget the gradients, so that backward allocates them anew as a training step does."""
        for leaf in self.inputs.leaves():
            leaf.grad = None

    def step(self) -> Tensor:
        loss = self.statement(*self.inputs.batch, **self.inputs.parameters)
        loss.backward()
        return loss


class Truth:
    """The float64 loss and gradients of a workload, by the reference.

    Losses are means over dimension 0: a few samples at a time give the whole of it. Those on
    relations between samples are not, and their inputs are small enough to be one piece.
    """

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        leaves = inputs.leaves()
        count = len(tensors(inputs.batch[0]))
        # Of half precision, whose logits a head rounds before any loss sees them.
        rounds_logits = workload.classes is not None and leaves[0].dtype.itemsize == 2
        self.tolerance = _OF_ROUNDED_LOGITS if rounds_logits else _TOLERANCE
        self.gradients = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
        self.loss, start = 0.0, 0
        elements = _ORACLE_ELEMENTS
        if (
            workload.classes is not None
        ):  # of the logits, which the reference makes of hidden states
            elements = elements * workload.student[0][1] // workload.classes
        for chunk in inputs.chunks(elements, torch.float64):
            for part in workload.exact(chunk):
                loss = part * (chunk.samples() / inputs.samples())
                loss.backward()
                self.loss += loss.item()
            stop = start + chunk.samples()
            for index, leaf in enumerate(chunk.leaves()):
                part = self.gradients[index]
                (part[start:stop] if index < count else part).add_(leaf.grad)
            start = stop
        self.rounding_error = self.gradient_error(
            gradient.to(leaf.dtype) for gradient, leaf in zip(self.gradients, leaves, strict=True)
        )

    def gradient_error(self, found: Iterable[Tensor]) -> float:
        """The relative error in the L2 norm, over all gradients together."""
        pairs = list(zip(found, self.gradients, strict=True))
        error = sum(torch.dist(one.double(), exact).item() ** 2 for one, exact in pairs)
        return (error / sum(exact.norm().item() ** 2 for exact in self.gradients)) ** 0.5

    def judge(self, trial: Trial) -> Outcome:
        """Run once and compare."""
        try:
            trial.prepare()
            loss = trial.step().item()
        except Exception as error:
            return Outcome("failed", said(error))
        leaves = trial.inputs.leaves()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        if len(gradients) < len(leaves):
            return Outcome("wrong", "a gradient is missing")
        loss_error = abs(loss - self.loss) / abs(self.loss)
        gradient_error = self.gradient_error(gradients)
        if not math.isfinite(loss_error + gradient_error):
            return Outcome("wrong", "the loss or the gradient is not finite")
        within = (
            loss_error <= self.tolerance
            and gradient_error <= 2 * self.rounding_error + self.tolerance
        )
        return Outcome("right" if within else "wrong", "", loss_error, gradient_error)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def race(
    device: Device, trials: Mapping[str, Runnable], seconds: float, rounds_least: int
) -> dict[str, list[float]]:
    """Seconds of each contender, taken in turns, in a new order each round.

    What slows the machine down for a while then slows all of them down.
    """
    names, shuffler = list(trials), random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for trial in trials.values():
        for _ in range(_WARMUPS):
            device.time(trial.prepare, trial.step)
    gc.collect()
    gc.disable()
    try:
        deadline, rounds = time.monotonic() + seconds, 0
        while rounds < rounds_least or (time.monotonic() < deadline and rounds < _REPETITIONS_MOST):
            shuffler.shuffle(names)
            for name in names:
                samples[name].append(device.time(trials[name].prepare, trials[name].step))
            rounds += 1
    finally:
        gc.enable()
    return samples


def timed(outcome: Outcome, samples: list[float]) -> Outcome:
    q25, median, q75 = statistics.quantiles(samples, n=4, method="inclusive")
    return replace(
        outcome,
        seconds=median,
        seconds_q25=q25,
        seconds_q75=q75,
        seconds_least=min(samples),
        repetitions=len(samples),
    )


def measure(
    workload: Workload,
    dtype: torch.dtype,
    contenders: Iterable[str],
    device: Device,
    seconds: float,
    rounds_least: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> Case:
    inputs = workload.inputs(dtype, device.name)
    progress("float64 oracle")
    truth = Truth(workload, inputs)
    outcomes: dict[str, Outcome] = {}
    trials: dict[str, Trial] = {}
    for name in contenders:
        progress(f"checking {name}")
        trial = Trial(CONTENDERS[name](workload), inputs)
        outcomes[name] = Outcome("right", "no loss") if name == BOUND else truth.judge(trial)
        if outcomes[name].status == "right":
            trials[name] = trial
    rounding_error = truth.rounding_error
    del truth
    progress("timing")
    for name, samples in race(device, trials, seconds, rounds_least).items():
        outcomes[name] = timed(outcomes[name], samples)
    progress("memory")
    for name, trial in trials.items():
        outcomes[name] = replace(
            outcomes[name],
            peak_extra_bytes=device.peak_extra_bytes(trial.prepare, trial.step),
            host_seconds=device.host_seconds(trial.prepare, trial.step),
        )
    # Last, because a capture that fails may leave the allocator in disorder.
    progress("graph")
    ideal_bytes = workload.ideal_bytes(dtype, device.on_chip_bytes())
    for name, trial in trials.items():
        try:
            found = device.graph_seconds(trial.prepare, trial.step, ideal_bytes)
            outcomes[name] = replace(outcomes[name], graph_seconds=found)
        except Exception as error:
            message = f"no CUDA graph: {said(error)}"
            outcomes[name] = replace(outcomes[name], message=message)
    return Case(
        family=workload.family,
        loss=workload.loss,
        workload=workload.name,
        dtype=str(dtype).removeprefix("torch."),
        student=[list(shape) for shape in workload.student],
        teacher=[list(shape) for shape in workload.teacher],
        headline=workload.headline,
        ideal_bytes=ideal_bytes,
        gradient_bytes=sum(leaf.nbytes for leaf in inputs.leaves()),
        rounding_error=rounding_error,
        outcomes=outcomes,
    )

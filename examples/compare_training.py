"""One training of the comparison, and the folder in which finished ones are kept."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastkd
from compare_methods import ALONE, METHODS, PAIRS, TEACHER
from data import Dataset, Normalize, load, random_crop_and_flip
from fastkd.facts import Backend
from features import Output, StagedNetwork
from methods import Loss
from models import depthwise_network, parameter_count, wide_residual_network
from training import NO_TEACHER, accuracy

# The literature's, but for mobile students, which it trains at 0.01 for 240 epochs: within the few
# thousand steps of this comparison they would learn half of what they can.
LEARNING_RATE = 0.05
BATCH_SIZE, MOMENTUM, WEIGHT_DECAY = 64, 0.9, 5e-4
# The steps at which the learning rate drops to a tenth, as shares: 150, 180 and 210 of 240 epochs.
DROPS = (0.625, 0.75, 0.875)
# Steps between two reports of progress.
REPORT_EVERY = 20


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All that the trainings of one comparison share, small enough to hand to a process."""

    data: str
    data_dir: Path | None
    training_images: int | None  # at most
    test_images: int | None
    epochs: int
    stem: int  # channels of the first stage; the others have 2, 4 and 8 times as many
    device: torch.device
    backend: Backend | None

    def dataset(self) -> Dataset:
        data = load(self.data, self.data_dir)
        return dataclasses.replace(
            data,
            train=data.train.at_most(self.training_images),
            test=data.test.at_most(self.test_images),
        )


@dataclasses.dataclass(frozen=True)
class Run:
    network: str
    method: str
    seed: int

    @property
    def label(self) -> str:
        return self.network if self == TEACHER_RUN else f"{self.network}: {self.method}"

    @property
    def needs_teacher(self) -> bool:
        return self != TEACHER_RUN and self.method != ALONE.name


TEACHER_RUN = Run(TEACHER, "teacher", 0)


@dataclasses.dataclass(frozen=True)
class Result:
    accuracy: float  # on the test images, in percent
    seconds: float


class Store:
    """Finished trainings, one file each; a file is there whole or not at all.

    Its name holds a digest of what decides the result, so that no other settings' is found.
    """

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment = experiment
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def result(self, run: Run) -> Result | None:
        path = self._path(run, "json")
        return Result(**json.loads(path.read_text())["result"]) if path.exists() else None

    def keep(self, run: Run, result: Result) -> None:
        content = {
            "run": dataclasses.asdict(run),
            "settings": self._settings(run),
            "result": dataclasses.asdict(result),
        }
        with _replacing(self._path(run, "json")) as path:
            path.write_text(json.dumps(content, indent=2) + "\n")

    def keep_weights(self, run: Run, network: nn.Module) -> None:
        with _replacing(self._path(run, "pt")) as path:
            torch.save(network.state_dict(), path)

    def weights(self, run: Run) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = torch.load(self._path(run, "pt"), map_location="cpu")
        return loaded

    def _path(self, run: Run, suffix: str) -> Path:
        settings = json.dumps(self._settings(run), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
        return self.folder / f"{run.network}-{run.method}-{run.seed}-{digest}.{suffix}".lower()

    def _settings(self, run: Run) -> dict[str, Any]:
        shared = dataclasses.asdict(self.experiment)
        del shared["data_dir"]
        return {
            **shared,
            "device": self.experiment.device.type,
            "method": next((m.recipe for m in METHODS if m.name == run.method), None),
            "optimizer": [BATCH_SIZE, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, *DROPS],
            "version": fastkd.__version__,
        }


@contextlib.contextmanager
def _replacing(path: Path):
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    yield partial
    partial.replace(path)


class Trainer:
    """What one process trains with; it reads the teacher's weights when it first needs them."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.store = experiment, Store(experiment, folder)
        self.device = experiment.device
        self.data = experiment.dataset().to(self.device)
        self.normalize = Normalize(self.data.train)
        self.batch_size = min(BATCH_SIZE, len(self.data.train))
        self.steps = experiment.epochs * (len(self.data.train) // self.batch_size)
        self.on_steps: Callable[[int], None] = lambda steps: None

    def anew(self) -> "Callable[[], Trainer]":
        return partial(Trainer, self.experiment, self.store.folder)

    def network(self, name: str, seed: int) -> StagedNetwork:
        torch.manual_seed(seed)
        _, channels, size, _ = self.data.train.pixels.shape
        inputs = (channels, size, self.data.classes)
        network = (
            depthwise_network(*inputs, 2, self.experiment.stem)
            if name == "depthwise"
            else wide_residual_network(*inputs, int(name.split("-")[1]), self.experiment.stem)
        )
        return network.to(self.device, memory_format=torch.channels_last)

    def parameters(self, name: str) -> int:
        return parameter_count(self.network(name, 0))

    def backends(self) -> dict[str, str]:
        """Which backend will serve each method; raises before any work if one cannot."""
        batch = self.data.train[torch.arange(2)]
        images = self.images(batch.pixels)
        served = {}
        with self._backend():
            for method in METHODS:
                if method is ALONE:
                    continue
                outputs = [self.network(name, 0)(images) for name in (next(iter(PAIRS)), TEACHER)]
                loss = self._on_device(method.loss_for(*outputs))
                explanation = fastkd.explain(loss, *outputs, batch.labels)
                if explanation.chosen is None:
                    raise fastkd.BackendUnavailableError(str(explanation))
                served[method.name] = str(explanation.chosen)
        return served

    def train(self, run: Run) -> Result:
        """Students of one seed start alike and see the images in one order, whatever the method."""
        network = self.network(run.network, run.seed)
        start = time.perf_counter()
        with self._backend():
            self._fit(network, self._loss(run, network), run)
        result = Result(self.accuracy(network), time.perf_counter() - start)
        if run == TEACHER_RUN:
            self.store.keep_weights(run, network)
        self.store.keep(run, result)
        return result

    def accuracy(self, network: StagedNetwork) -> float:
        network.eval()
        return accuracy(
            lambda batch: network(self.images(batch.pixels)).logits.argmax(1), self.data.test
        )

    def images(self, pixels: Tensor) -> Tensor:
        return self.normalize(pixels).to(memory_format=torch.channels_last)

    @cached_property
    def teacher(self) -> StagedNetwork:
        network = self.network(TEACHER, 0)
        network.load_state_dict(self.store.weights(TEACHER_RUN))
        return network.eval().requires_grad_(False)

    def _loss(self, run: Run, network: StagedNetwork) -> Loss:
        method = next((method for method in METHODS if method.name == run.method), ALONE)
        if method is ALONE:
            return method.loss
        example = self.images(self.data.train.pixels[:2])
        with torch.no_grad():
            outputs = network.eval()(example), self.teacher(example)
        torch.manual_seed(run.seed)
        loss = method.loss_for(*outputs)
        return self._on_device(loss)

    def _on_device(self, loss: Loss) -> Loss:
        return loss.to(self.device) if isinstance(loss, nn.Module) else loss

    def _backend(self) -> contextlib.AbstractContextManager[None]:
        name = self.experiment.backend
        return fastkd.use_backend(name) if name else contextlib.nullcontext()

    def _fit(self, network: StagedNetwork, loss: Loss, run: Run) -> None:
        extra = loss.parameters() if isinstance(loss, nn.Module) else ()
        optimizer = torch.optim.SGD(
            [*network.parameters(), *extra],
            LEARNING_RATE,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=WEIGHT_DECAY,
        )
        drops = [round(share * self.steps) for share in DROPS]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops)
        train = self.data.train
        torch.manual_seed(run.seed)  # of the augmentation
        network.train()
        for step, chosen in enumerate(train.shuffled(self.batch_size, self.steps, run.seed), 1):
            images = self.images(train.pixels[chosen])
            if self.data.augment:
                images = random_crop_and_flip(images)
            target = NO_TEACHER if loss is ALONE.loss else self._target(images, chosen)
            optimizer.zero_grad()
            loss(network(images), target, train.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
            if step % REPORT_EVERY == 0:
                self.on_steps(REPORT_EVERY)
        self.on_steps(self.steps % REPORT_EVERY)

    def _target(self, images: Tensor, chosen: Tensor) -> Output:
        if self.data.augment:
            with torch.no_grad():
                return self.teacher(images)
        logits, features = self._remembered
        return Output(logits[chosen], [feature[chosen] for feature in features])

    @cached_property
    @torch.no_grad()
    def _remembered(self) -> Output:
        """The teacher's outputs for every training image: unaugmented, they never change."""
        batches = self.data.train.batches(500)
        outputs = [self.teacher(self.images(batch.pixels)) for batch in batches]
        features = zip(*(output.features for output in outputs), strict=True)
        return Output(torch.cat([o.logits for o in outputs]), [torch.cat(f) for f in features])

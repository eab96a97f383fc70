"""One loop trains the teacher and every student; it also times the loss."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastkd.nn
from data import Dataset, Images, Normalize, random_crop_and_flip
from features import Output, StagedNetwork
from methods import HINT_SHARE, HINT_STAGE, Loss, Method, backends, cross_entropy
from models import residual_network

NO_TEACHER = Output(torch.empty(0), [])


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how long: the same epochs for the teacher and for every method."""

    epochs: int
    batch_size: int
    student_widths: tuple[int, int, int]
    student_blocks: int
    teacher_widths: tuple[int, int, int]
    teacher_blocks: int
    learning_rate: float = 5e-3
    threads: int | None = None  # of the CPU; None leaves torch its choice
    channels_last: bool = False
    amp: bool = False  # networks and losses under bfloat16 autocast


RECIPES = {
    # On images this small, threads wait for one another longer than they work.
    "digits": Recipe(60, 50, (4, 8, 16), 1, (16, 32, 64), 1, threads=1),
    "mnist": Recipe(5, 128, (4, 8, 16), 1, (16, 32, 64), 2),
    "fashion-mnist": Recipe(10, 128, (4, 8, 16), 1, (16, 32, 64), 2),
    "cifar10": Recipe(60, 128, (8, 16, 32), 1, (32, 64, 128), 3),
    "cifar100": Recipe(100, 128, (16, 32, 64), 1, (64, 128, 256), 3),
}


@dataclass(frozen=True)
class Trained:
    network: StagedNetwork
    accuracy: float  # on the test images, in percent
    loss_seconds: float
    seconds: float


class Trainer:
    """All that the networks of one experiment share: images, recipe, device."""

    def __init__(self, data: Dataset, recipe: Recipe, device: torch.device) -> None:
        self.data = data.to(device)
        self.normalize = Normalize(self.data.train)
        self.recipe = recipe
        self.device = device
        self.memory_format = (
            torch.channels_last if recipe.channels_last else torch.contiguous_format
        )
        self.batch_size = min(recipe.batch_size, len(data.train))
        self.steps = recipe.epochs * (len(data.train) // self.batch_size)
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.on_step: Callable[[], None] = lambda: None

    def backends(self) -> dict[str, str]:
        """Which backend will serve each loss; raises before any work if one cannot."""
        batch = next(self._batches(1, seed=0))
        images = self.images(batch)
        with self.autocast():
            return backends(self._student(0)(images), self._teacher(0)(images), batch.labels)

    def images(self, batch: Images) -> Tensor:
        """The pixels as the networks take them."""
        return self.normalize(batch.pixels).to(memory_format=self.memory_format)

    def autocast(self) -> torch.autocast:
        """Around networks and losses; backward follows what forward did."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp)

    def teacher(self, seed: int) -> Trained:
        network = self._teacher(seed)
        start = time.perf_counter()
        loss_seconds = self._fit(network, cross_entropy, self.steps, seed)
        seconds = time.perf_counter() - start
        network.requires_grad_(False)
        return Trained(network, self.accuracy(network), loss_seconds, seconds)

    def student(self, method: Method, seed: int, teacher: StagedNetwork) -> Trained:
        """Students of one seed start alike and see the images in one order, whatever the method."""
        network = self._student(seed)
        start = time.perf_counter()
        hint_steps = round(HINT_SHARE * self.steps) if method.hint_first else 0
        loss_seconds = self._fit_hint(network, teacher, hint_steps, seed) if hint_steps else 0.0
        source = teacher if method.needs_teacher else None
        loss_seconds += self._fit(network, method.loss, self.steps - hint_steps, seed, source)
        seconds = time.perf_counter() - start
        return Trained(network, self.accuracy(network), loss_seconds, seconds)

    def accuracy(self, network: nn.Module) -> float:
        def predict(batch: Images) -> Tensor:
            with self.autocast():
                logits: Tensor = network(self.images(batch)).logits
            return logits.argmax(1)

        network.eval()
        return accuracy(predict, self.data.test)

    def _teacher(self, seed: int) -> StagedNetwork:
        return self._network(self.recipe.teacher_widths, self.recipe.teacher_blocks, seed)

    def _student(self, seed: int) -> StagedNetwork:
        return self._network(self.recipe.student_widths, self.recipe.student_blocks, seed)

    def _network(self, widths: tuple[int, int, int], blocks: int, seed: int) -> StagedNetwork:
        torch.manual_seed(seed)
        _, channels, size, _ = self.data.train.pixels.shape
        network = residual_network(channels, size, self.data.classes, widths, blocks)
        return network.to(self.device, memory_format=self.memory_format)

    def _fit_hint(
        self, network: StagedNetwork, teacher: StagedNetwork, steps: int, seed: int
    ) -> float:
        """FitNets' first stage: the student up to its guided stage learns to predict the hint."""
        guided = StagedNetwork(list(network.stages)[: HINT_STAGE + 1], nn.Identity())
        hinting = StagedNetwork(list(teacher.stages)[: HINT_STAGE + 1], nn.Identity())
        hint = fastkd.nn.HintLoss(
            self.recipe.student_widths[HINT_STAGE], self.recipe.teacher_widths[HINT_STAGE]
        ).to(self.device)

        def loss(student: Output, target: Output, labels: Tensor) -> Tensor:
            value: Tensor = hint(student.features[HINT_STAGE], target.features[HINT_STAGE])
            return value

        return self._fit(guided, loss, steps, seed, hinting, extra=hint)

    def _fit(
        self,
        network: nn.Module,
        loss: Loss,
        steps: int,
        seed: int,
        teacher: nn.Module | None = None,
        extra: nn.Module | None = None,
    ) -> float:
        """Trains `network` (and the parameters of the loss, `extra`); returns seconds in the loss.

        Adam, since it does not see the scale of a loss: a hint is summed over all of the features
        and thousands of times larger than a cross-entropy.
        """
        parameters = [*network.parameters(), *(extra.parameters() if extra else ())]
        optimizer = torch.optim.AdamW(parameters, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.recipe.learning_rate, total_steps=steps
        )
        network.train()
        if teacher is not None:
            teacher.eval()
        loss_seconds = 0.0
        for batch in self._batches(steps, seed):
            images = self.images(batch)
            if self.data.augment:
                images = random_crop_and_flip(images)
            with torch.no_grad(), self.autocast():
                target = teacher(images) if teacher is not None else NO_TEACHER
            optimizer.zero_grad()
            with self.autocast():
                output = network(images)
            loss_seconds += self._backward(output, target, batch.labels, loss)
            optimizer.step()
            schedule.step()
            self.on_step()
        return loss_seconds

    def _batches(self, steps: int, seed: int) -> Iterator[Images]:
        train = self.data.train
        return (train[chosen] for chosen in train.shuffled(self.batch_size, steps, seed))

    def _backward(self, output: Output, target: Output, labels: Tensor, loss: Loss) -> float:
        """Backward through loss and network; returns the seconds of the loss, forward and backward.

        The graph is cut where the network ends, so that the loss can be timed by itself, and on a
        GPU the clock waits for the kernels at both ends.
        """
        cut = Output(_leaf(output.logits), [_leaf(feature) for feature in output.features])
        self._synchronize()
        start = time.perf_counter()
        with self.autocast():
            value = loss(cut, target, labels)
        value.backward()
        self._synchronize()
        seconds = time.perf_counter() - start
        ends = zip((output.logits, *output.features), (cut.logits, *cut.features), strict=True)
        used = [(end, leaf.grad) for end, leaf in ends if leaf.grad is not None]
        torch.autograd.backward([end for end, _ in used], [gradient for _, gradient in used])
        return seconds

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def accuracy(predict: Callable[[Images], Tensor], test: Images) -> float:
    """In percent."""
    hits = [(predict(batch) == batch.labels).sum() for batch in test.batches(500)]
    return 100 * int(torch.stack(hits).sum()) / len(test)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()

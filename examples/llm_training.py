"""One training of a language model, and what all trainings of a run share."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd.facts import Backend
from llm_cache import TopKCache
from llm_methods import METHODS, TOP_K, Cached, Head, Loss, cross_entropy
from llm_model import LanguageModel, Size
from llm_text import Corpus
from llm_tokens import PADDING, Vocabulary, windows

BETAS, WEIGHT_DECAY, LARGEST_GRADIENT = (0.9, 0.95), 0.1, 1.0
WARM_UP = 0.1  # of all steps
# Windows in a forward pass without gradients.
AT_A_TIME = 16
# Steps between two reports of progress.
REPORT_EVERY = 10
METHOD = {method.name: method for method in METHODS}


@dataclass(frozen=True)
class Recipe:
    size: Size
    batch: int  # windows
    steps: int
    learning_rate: float  # the highest; a cosine leads down from it


@dataclass(frozen=True)
class Experiment:
    """All that the trainings of one run share, small enough to hand to a process."""

    vocabulary: int  # tokens; 256 are the bytes alone
    text_bytes: int | None  # at most
    length: int  # of a window
    teacher: Recipe
    student: Recipe
    backend: Backend | None


@dataclass(frozen=True)
class Run:
    method: str
    seed: int

    @property
    def label(self) -> str:
        return self.method


@dataclass(frozen=True)
class Result:
    bits_per_byte: float  # of the text held out
    tokens_per_second: float


@dataclass(frozen=True)
class Text:
    """The windows of the corpus: inputs and labels, (windows, length) each."""

    vocabulary: int
    sizes: tuple[int, int]  # bytes of the training text and of what is held out
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, corpus: Corpus, vocabulary: Vocabulary, length: int) -> "Text":
        parts = (
            windows(map(vocabulary.encode, part), length)
            for part in (corpus.train, corpus.held_out)
        )
        return cls(len(vocabulary), corpus.sizes, *parts)


class Trainer:
    """What one process trains with. `folder` has the text, then the teacher and its cache."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.text = Text(**torch.load(folder / "text.pt"))
        self.on_steps: Callable[[int], None] = lambda steps: None

    @classmethod
    def on(cls, text: Text, experiment: Experiment, folder: Path) -> "Trainer":
        """Put the text where other processes find it."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(vars(text), folder / "text.pt")
        return cls(experiment, folder)

    def anew(self) -> "Callable[[], Trainer]":
        return partial(Trainer, self.experiment, self.folder)

    def model(self, size: Size) -> LanguageModel:
        return LanguageModel(self.text.vocabulary, self.experiment.length, size)

    def train_teacher(self) -> Result:
        torch.manual_seed(0)
        teacher = self.model(self.experiment.teacher.size)
        result = self._fit(teacher, self.experiment.teacher, cross_entropy, None, 0)
        torch.save(teacher.state_dict(), self.folder / "teacher.pt")
        return result

    def write_cache(self) -> None:
        """Of every training window, once; whoever needs no more of the teacher never runs it."""
        inputs, _ = self.text.train
        TopKCache.write(self.folder, self._teacher_logits(inputs), *inputs.shape, TOP_K)

    def train(self, run: Run) -> Result:
        """Students of one seed start alike and see the windows in one order."""
        method = METHOD[run.method]
        torch.manual_seed(run.seed)
        student = self.model(self.experiment.student.size)
        with self._backend():
            return self._fit(
                student, self.experiment.student, method.loss, method.teacher, run.seed
            )

    def bits_per_byte(self, model: LanguageModel) -> float:
        """Of the text held out. Per byte, since vocabularies of other sizes have other tokens."""
        nats = 0.0
        with torch.no_grad():
            for inputs, labels in zip(
                *(x.split(AT_A_TIME) for x in self.text.held_out), strict=True
            ):
                nats += F.cross_entropy(
                    Head(model(inputs), model.head).logits.flatten(0, 1),
                    labels.flatten(),
                    ignore_index=PADDING,
                    reduction="sum",
                ).item()
        return nats / math.log(2) / self.text.sizes[1]

    def backends(self) -> dict[str, str]:
        """Which backend will serve each method; raises before any work if one cannot."""
        inputs, labels = (x[:1] for x in self.text.train)
        student = self.model(self.experiment.student.size)
        teacher = self.model(self.experiment.teacher.size)
        targets = {
            "head": Head(teacher(inputs).detach(), teacher.head.detach()),
            "cache": Cached(
                torch.full((*inputs.shape, TOP_K), -10.0, dtype=torch.float16),
                torch.arange(TOP_K, dtype=torch.int32).expand(*inputs.shape, TOP_K),
            ),
        }
        served = {}
        with self._backend():
            for method in METHODS:
                if method.teacher is None:
                    continue
                explanation = fastkd.explain(
                    method.loss,
                    Head(student(inputs), student.head),
                    targets[method.teacher],
                    labels,
                )
                if explanation.chosen is None:
                    raise fastkd.BackendUnavailableError(str(explanation))
                served[method.name] = str(explanation.chosen)
        return served

    def _backend(self) -> contextlib.AbstractContextManager[None]:
        name = self.experiment.backend
        return contextlib.nullcontext() if name is None else fastkd.use_backend(name)

    def _fit(
        self, model: LanguageModel, recipe: Recipe, loss: Loss, target: str | None, seed: int
    ) -> Result:
        optimizer = torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, BETAS, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, recipe.steps))
        inputs, labels = self.text.train
        tokens = 0
        # Of the processor, for one thread: what other programs do on the machine does not count.
        start = time.process_time()
        for step, chosen in enumerate(self._batches(recipe, seed), 1):
            optimizer.zero_grad()
            student = Head(model(inputs[chosen]), model.head)
            loss(student, self._target(target, chosen), labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            tokens += int((labels[chosen] != PADDING).sum())
            if step % REPORT_EVERY == 0:
                self.on_steps(REPORT_EVERY)
        seconds = time.process_time() - start
        self.on_steps(recipe.steps % REPORT_EVERY)
        return Result(self.bits_per_byte(model), tokens / seconds)

    def _batches(self, recipe: Recipe, seed: int) -> Iterator[Tensor]:
        """Which windows make up each step: epochs without their incomplete batch."""
        generator = torch.Generator().manual_seed(seed)
        order: list[Tensor] = []
        for _ in range(recipe.steps):
            if not order:
                everyone = torch.randperm(len(self.text.train[0]), generator=generator)
                order = [some for some in everyone.split(recipe.batch) if len(some) == recipe.batch]
            yield order.pop()

    def _target(self, needed: str | None, chosen: Tensor) -> Head | Cached | None:
        if needed is None:
            return None
        if needed == "cache":
            return self._cache[chosen]
        with torch.no_grad():
            return Head(self._teacher(self.text.train[0][chosen]), self._teacher.head.detach())

    @cached_property
    def _cache(self) -> TopKCache:
        return TopKCache(self.folder)

    @cached_property
    def _teacher(self) -> LanguageModel:
        teacher = self.model(self.experiment.teacher.size)
        teacher.load_state_dict(torch.load(self.folder / "teacher.pt"))
        return teacher.eval()

    def _teacher_logits(self, inputs: Tensor) -> Iterator[Tensor]:
        with torch.no_grad():
            for some in inputs.split(AT_A_TIME):
                yield Head(self._teacher(some), self._teacher.head).logits
                self.on_steps(len(some))


def _share(steps: int, step: int) -> float:
    """Of the highest learning rate: a linear warm-up under a cosine."""
    return min((step + 1) / (WARM_UP * steps), (1 + math.cos(math.pi * step / steps)) / 2)

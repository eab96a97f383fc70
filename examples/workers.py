"""Trainings side by side, each in a process: networks this small cannot use several cores."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import Queue
from threading import Thread
from typing import Any, Protocol

import torch


class Trainer(Protocol):
    on_steps: Callable[[int], None]

    def train(self, run: Any) -> Any: ...

    def anew(self) -> Callable[[], "Trainer"]:
        """What makes such a trainer in another process, to which it is sent."""


OnSteps = Callable[[Any, int], None]
# Trains some, and yields each with its result when it is finished.
Train = Callable[[Sequence[Hashable]], Iterator[tuple[Any, Any]]]

_trainer: Trainer  # of a worker
_progress: "Queue[tuple[Hashable, int] | None]"


@contextmanager
def side_by_side(trainer: Trainer, workers: int, on_steps: OnSteps) -> Iterator[Train]:
    if workers == 1:
        yield partial(_one_by_one, trainer, on_steps)
        return
    context = get_context("spawn")
    progress: Queue[tuple[Hashable, int] | None] = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(workers, context, _begin, (trainer.anew(), threads, progress))

    def train(runs: Sequence[Hashable]) -> Iterator[tuple[Any, Any]]:
        futures = {pool.submit(_train, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future.result()

    def listen() -> None:
        for news in iter(progress.get, None):
            on_steps(*news)

    listener = Thread(target=listen)
    listener.start()
    try:
        yield train
    finally:
        pool.shutdown(cancel_futures=True)
        progress.put(None)
        listener.join()


def _one_by_one(
    trainer: Trainer, on_steps: OnSteps, runs: Sequence[Hashable]
) -> Iterator[tuple[Any, Any]]:
    for run in runs:
        trainer.on_steps = partial(on_steps, run)
        yield run, trainer.train(run)


def _begin(
    make: Callable[[], Trainer], threads: int, progress: "Queue[tuple[Hashable, int] | None]"
) -> None:
    global _trainer, _progress
    torch.set_num_threads(threads)
    _trainer, _progress = make(), progress


def _train(run: Hashable) -> Any:
    _trainer.on_steps = lambda steps: _progress.put((run, steps))
    return _trainer.train(run)

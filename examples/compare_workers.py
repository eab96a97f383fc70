"""Trainings side by side, each in a process: networks this small cannot use several cores."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Thread

import torch

from compare_training import Experiment, Result, Run, Trainer

OnSteps = Callable[[Run, int], None]
# Trains some, and yields each when it is finished.
Train = Callable[[Sequence[Run]], Iterator[tuple[Run, Result]]]

_trainer: Trainer  # of a worker
_progress: "Queue[tuple[Run, int] | None]"


@contextmanager
def side_by_side(trainer: Trainer, workers: int, on_steps: OnSteps) -> Iterator[Train]:
    if workers == 1:
        yield partial(_one_by_one, trainer, on_steps)
        return
    context = get_context("spawn")
    progress: Queue[tuple[Run, int] | None] = context.Queue()
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(
        workers, context, _begin, (trainer.experiment, trainer.store.folder, threads, progress)
    )

    def train(runs: Sequence[Run]) -> Iterator[tuple[Run, Result]]:
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
    trainer: Trainer, on_steps: OnSteps, runs: Sequence[Run]
) -> Iterator[tuple[Run, Result]]:
    for run in runs:
        trainer.on_steps = partial(on_steps, run)
        yield run, trainer.train(run)


def _begin(
    experiment: Experiment,
    folder: Path,
    threads: int,
    progress: "Queue[tuple[Run, int] | None]",
) -> None:
    global _trainer, _progress
    torch.set_num_threads(threads)
    _trainer, _progress = Trainer(experiment, folder), progress


def _train(run: Run) -> Result:
    _trainer.on_steps = lambda steps: _progress.put((run, steps))
    return _trainer.train(run)

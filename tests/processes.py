"""Processes that stay for many jobs, each a function of `jobs_of_ranks` that all of them run."""

import datetime
import importlib
import socket
import traceback

import torch
import torch.distributed
import torch.multiprocessing

TIMEOUT = 60  # of a job, in seconds


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _serve(rank, size, port, jobs, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    module = importlib.import_module("jobs_of_ranks")
    while True:
        name, arguments, seed = jobs.get()
        torch.manual_seed(seed)
        try:
            getattr(module, name)(rank, size, *arguments)
            results.put((rank, None))
        except BaseException:
            results.put((rank, traceback.format_exc()))


class Pool:
    """`run(job, *arguments)` runs it in all processes, and raises what any of them raised."""

    def __init__(self, size):
        self.size = size
        context = torch.multiprocessing.get_context("spawn")
        self.jobs = [context.SimpleQueue() for _ in range(size)]
        self.results = context.Queue()
        port = free_port()
        self.processes = [
            context.Process(target=_serve, args=(rank, size, port, jobs, self.results), daemon=True)
            for rank, jobs in enumerate(self.jobs)
        ]
        for process in self.processes:
            process.start()

    def run(self, job, *arguments):
        seed = torch.initial_seed()
        for jobs in self.jobs:
            jobs.put((job, arguments, seed))
        found = [self.results.get(timeout=2 * TIMEOUT) for _ in range(self.size)]
        errors = [
            f"rank {rank}: {error}" for rank, error in sorted(found, key=lambda x: x[0]) if error
        ]
        assert not errors, "\n".join(errors)

    def close(self):
        for process in self.processes:
            process.terminate()
            process.join()

"""The command line: `python -m tests.cuda_check`, with nvcc found as the build finds it."""

import argparse
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from csrc import nvcc
from csrc.architectures import USUAL

from . import compile_triton
from .compile import FOLDER, SOURCES, compiled
from .kernels import Kernel, memory_problems, occupancy, problems

TRITON_ARCHITECTURES = (80, 90, 100)

Problems = dict[str, list[int]]  # and the architectures that have them


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda_check",
        description="Compile every kernel for every chip, and fail where it spills registers, "
        "keeps a stack frame, does not move 16 bytes at a time, has a sequentially "
        "consistent fence, or takes more instructions or barriers for a row than it may.",
    )
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        choices=USUAL,
        default=USUAL,
        help="to compile for; of these Triton takes 80, 90 and 100",
    )
    architectures = parser.parse_args().architectures
    toolkit = nvcc.find()
    table = Table("kernel", "threads", "shared", *(f"sm_{number}" for number in architectures))
    table.title = "Registers of a thread, and the share of a chip's warps that can be resident"
    FOLDER.mkdir(parents=True, exist_ok=True)
    jobs = list(product(SOURCES, architectures))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        from_nvcc = pool.map(lambda job: compiled(toolkit.path, *job), jobs)
        from_triton = compile_triton.compile_all(
            [number for number in TRITON_ARCHITECTURES if number in architectures]
        )
        kernels = dict(zip(jobs, from_nvcc, strict=True))
    found: Problems = defaultdict(list)
    check_cuda(kernels, table, found)
    table.add_section()
    check_triton(from_triton, architectures, table, found)
    # As wide as it is: CI's output is no terminal.
    console = Console(width=160)
    console.print(table)
    for problem, chips in found.items():
        names = ", ".join(f"sm_{chip}" for chip in chips)
        console.print(f"{problem} ({names})", style="red", markup=False, soft_wrap=True)
    raise SystemExit(bool(found))


def check_cuda(
    kernels: dict[tuple[Path, int], list[Kernel]], table: Table, found: Problems
) -> None:
    for (source, architecture), made in kernels.items():
        for problem in problems(source.stem, made):
            found[problem].append(architecture)
    every = sorted(chain.from_iterable(kernels.values()))
    for name, same in groupby(every, key=lambda kernel: kernel.name):
        rows = list(same)
        cells = (f"{kernel.registers:3}  {occupancy(kernel):4.0%}" for kernel in rows)
        table.add_row(name, str(rows[0].threads), f"{rows[0].shared_bytes:,}", *cells)


def check_triton(
    kernels: list[compile_triton.Compiled],
    architectures: list[int],
    table: Table,
    found: Problems,
) -> None:
    """Adds one row a kernel: from the fewest registers of its regimes to the most."""
    every = sorted(kernels, key=lambda one: one.kernel)
    for kernel, same in groupby(every, key=lambda one: one.kernel):
        regimes = list(same)
        for one in regimes:
            name = f"Triton's {kernel}, {one.regime}"
            wrong = memory_problems(name, one.stack, one.spills)
            if one.wide_loads is False:
                wrong.append(f"{name}: accesses of less than 16 bytes")
            for problem in wrong:
                found[problem].append(one.capability)
        cells = []
        for architecture in architectures:
            registers = [one.registers for one in regimes if one.capability == architecture]
            cells.append(f"{min(registers)}–{max(registers)}" if registers else "")
        count = len({one.regime for one in regimes})
        shared = max(one.shared_bytes for one in regimes)
        table.add_row(f"Triton's {kernel}, {count} regimes", "", f"{shared:,}", *cells)


if __name__ == "__main__":
    main()

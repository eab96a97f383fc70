"""Compiles a CUDA source to machine code, and reads what came of it."""

import re
import subprocess
from pathlib import Path

import triton

from csrc import nvcc

from . import listings, row_path
from .kernels import DEMANDS, Kernel, demand_of

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
FOLDER = ROOT / "build/cuda_check"

_CUOBJDUMP = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
_SIZE_OF = "fastkd_size_of_"
_NO_BOUNDS = 1024


def compiled(compiler: str, source: Path, architecture: int) -> list[Kernel]:
    """The kernels of a source, for one architecture."""
    cubin = str(FOLDER / f"{source.stem}.sm_{architecture}.cubin")
    usage = listings.usage(
        _run(
            *(compiler, *nvcc.FLAGS, "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"),
            *("-o", cubin, str(_with_sizes(source, architecture))),
        )
    )
    elf = _run(_CUOBJDUMP, "-elf", cubin)
    functions = listings.functions(_run(_CUOBJDUMP, "-sass", cubin))
    threads, sizes = listings.threads(elf), listings.sizes(elf, _SIZE_OF)
    kernels = []
    for symbol, used in usage.items():
        name = _short(symbol)
        demand = demand_of(source.stem, name)
        if demand and demand.shared:
            used["shared_bytes"] += sizes[demand.shared]
        code = functions[symbol]
        bounds = threads.get(symbol, _NO_BOUNDS)
        is_bounded = demand and demand.most_of_row and architecture >= demand.since
        kernels.append(
            Kernel(
                *(name, architecture, bounds),
                **(used | listings.accesses(code) | listings.ordering(code)),
                instructions=listings.length(code),
                row=row_path.row(code) if is_bounded else None,
            )
        )
    return sorted(kernels)


def _with_sizes(source: Path, architecture: int) -> Path:
    """The source, and variables as large as its kernels' shared memory, which launches choose."""
    structs = sorted({demand.shared for demand in DEMANDS.get(source.stem, []) if demand.shared})
    lines = [f'#include "{source}"', 'extern "C" {']
    lines += [
        f"__device__ char {_SIZE_OF}{name}[sizeof(fastkd::cuda::{name})];" for name in structs
    ]
    # One for each architecture: these are compiled side by side.
    sized = FOLDER / f"{source.stem}.sm_{architecture}.cu"
    sized.write_text("\n".join([*lines, "}", ""]))
    return sized


def _short(symbol: str) -> str:
    """A kernel's name and what its template was given, without namespaces."""
    name = _run("c++filt", "--no-params", symbol).strip()
    return re.sub(r"\(anonymous namespace\)::|\w+::", "", name).replace(" >", ">")


def _run(*command: str) -> str:
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout

"""Every Triton kernel in each of its regimes, compiled for NVIDIA chips where there is none.

The launches that a regime makes are caught and specialised by Triton's own code, so that what is
compiled is what a GPU would run.
"""

import contextlib
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastkd.kernels.triton import (
    attention,
    hint,
    metrics,
    multiply,
    shards,
    soft_target,
    top_k,
    top_k_sums,
)

from .triton_regimes import Narrow, Regime, regimes

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    kernel: str
    regime: str
    capability: int
    registers: int
    shared_bytes: int
    spills: int  # instructions that access local memory
    stack: int  # bytes
    wide_loads: bool | None  # 16 bytes at a time; None where that is not promised


# The kernels that go over elements; others add up what these found.
_ELEMENTWISE = {
    attention.channel_map,
    attention.channel_gradient,
    hint.squared_difference,
    metrics.metrics,
    multiply.scale,
    shards.shard_terms,
    soft_target.logits_forward,
    soft_target.logits_backward,
    top_k.top_k,
    top_k_sums.shard_sums,
}


class _Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def _caught(launches: list[_Launch]) -> Iterator[None]:
    def catch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_Launch(kernel, args, kwargs))

    with mock.patch.object(triton.JITFunction, "run", catch):
        yield


def _compile(launch: _Launch, capability: int) -> Any:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, debug=False, **launch.kwargs)
    options, signature, constexprs, attributes = kernel._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_BIN / "cuobjdump", option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_all(capabilities: Sequence[int]) -> list[Compiled]:
    """Each kernel of each regime, once where several regimes share it."""
    jobs = []
    for regime in regimes():
        launches: list[_Launch] = []
        with _caught(launches):
            regime.launch()
        jobs += list(itertools.product([regime], launches, capabilities))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = pool.map(lambda job: _compile(*job[1:]), jobs)
        unique: dict[str, tuple[Any, ...]] = {}
        for job, kernel in zip(jobs, kernels, strict=True):
            unique.setdefault(kernel.hash, (*job, kernel))
        return list(pool.map(lambda job: _inspected(*job), unique.values()))


def _inspected(regime: Regime, launch: _Launch, capability: int, kernel: Any) -> Compiled:
    cubin = kernel.asm["cubin"]
    usage = dict(re.findall(r"\b([A-Z]+):(\d+)", _cuobjdump("--dump-resource-usage", cubin)))
    code = _cuobjdump("-sass", cubin)
    narrow = regime.narrow if launch.kernel in _ELEMENTWISE else None
    return Compiled(
        launch.kernel.__name__,
        regime.name,
        capability,
        int(usage["REG"]),
        kernel.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        int(usage["STACK"]),
        None if narrow is None else _are_wide(code, narrow),
    )


def _are_wide(code: str, narrow: Narrow) -> bool:
    """Whether no more accesses move less than 16 bytes than may."""
    for kind, most in zip(("LDG", "STG"), narrow[:2], strict=True):
        accesses = re.findall(rf"\b{kind}\.[.\w]*", code)
        if sum([not access.endswith(".128") for access in accesses]) > most:
            return False
    return "LDG.E.128" in code or not narrow.has_elements

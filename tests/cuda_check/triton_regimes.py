"""Every Triton kernel in each of its regimes, compiled for NVIDIA chips where there is none.

A regime is a call of a launcher on tensors without memory. The launches it makes are caught and
specialised by Triton's own code, so that what is compiled is what a GPU would run.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, bfloat16, float16, float32, float64
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastkd.kernels.triton import hint, multiply
from fastkd.ops.hint import Parameters
from fastkd.reference.precision import compute_dtype

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


class Regime(NamedTuple):
    name: str
    launch: Callable[[], None]
    is_wide: bool = False


class _Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _uses(student: Tensor, teacher: Tensor) -> list[Regime]:
    """Of a pair; each is named after the use."""
    dtype = compute_dtype(student, teacher)
    gradient, to_teacher = torch.empty_like(student), torch.empty_like(teacher)
    scalar, row = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((), (1, len(student)))
    )

    def forward(loss: Tensor, reduction: str, *gradients: Tensor) -> None:
        p = Parameters(0.5, reduction, "triton")
        hint.hint_forward([student], [teacher], loss, gradients, p)

    def backward(
        upstream: Tensor, reduction: str, *gradients: Tensor, in_place: bool = False
    ) -> None:
        p = Parameters(0.5, reduction, "triton")
        hint.hint_backward(upstream, [student], [teacher], gradients, p, in_place)

    return [
        Regime("forward", lambda: forward(scalar, "batchmean", gradient), True),
        Regime("backward", lambda: backward(scalar, "sum", gradient, to_teacher), True),
        Regime("per sample", lambda: forward(row, "none"), True),
        Regime("in place", lambda: backward(scalar, "sum", gradient, in_place=True), True),
        Regime("loss only", lambda: forward(scalar, "mean"), True),
        Regime("per sample, backward", lambda: backward(row, "none", gradient, to_teacher)),
    ]


def _features(*shape: int, dtype: torch.dtype = float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


_SHAPE = 64, 256, 56, 56
_X, _HALF, _DOUBLE = (_features(*_SHAPE, dtype=dtype) for dtype in (float32, bfloat16, float64))
_CROPPED = _features(64, 256, 9, 9)[..., 1:-1, 1:-1]

# Pairs whose every element is accessed 16 bytes at a time.
_WIDE = {
    "float32": (_X, _X),
    "bfloat16": (_HALF, _HALF),
    "float16": (_HALF.to(float16), _HALF.to(float16)),
    "float64": (_DOUBLE, _DOUBLE),
    "bfloat16 and float32": (_HALF, _X),
    "bfloat16 and float64": (_HALF, _DOUBLE),
    "channels_last": (_channels_last(_X), _channels_last(_X)),
    "slices of channels": (_HALF, _features(64, 512, 56, 56, dtype=bfloat16)[:, :256]),
}
_OTHERS = {
    "channels_last and NCHW": (_channels_last(_X), _X),
    "NCHW and channels_last, bfloat16": (_HALF, _channels_last(_HALF)),
    "channels_last and NCHW, bfloat16 and float32": (_channels_last(_HALF), _X),
    "channels_last and NCHW, float64": (_channels_last(_DOUBLE), _DOUBLE),
    "cropped": (_CROPPED, _features(64, 256, 7, 7)),
    "stepped": (_features(64, 512, 14, 14)[:, ::2, ::2, ::2], _features(64, 256, 7, 7)),
    "expanded": (_features(1, 256, 56, 56).expand(_SHAPE), _X),
    "permuted": (
        _features(6, 10, 3, 18, 35).permute(3, 1, 4, 0, 2),
        _features(18, 35, 10, 3, 6).permute(0, 2, 1, 4, 3),
    ),
    "unaligned": (_features(3, 33, 7, 7), _features(3, 33, 7, 7)),
    "far apart": (_features(9, 2**31, dtype=bfloat16)[:, :4096], _features(9, 4096)),
}
# All uses of these pairs are compiled, and the first three of the others.
_THOROUGHLY = {"float32", "bfloat16", "channels_last and NCHW", "cropped"}

_GRADIENTS = {"float32": _X, "float64": _DOUBLE, "channels_last": _channels_last(_X)}


def regimes() -> Iterator[Regime]:
    for pairs in (_WIDE, _OTHERS):
        for layout, pair in pairs.items():
            for use, launch, is_wide in _uses(*pair)[: None if layout in _THOROUGHLY else 3]:
                yield Regime(f"{layout}, {use}", launch, is_wide and pairs is _WIDE)
    for name, gradient in {**_GRADIENTS, "cropped": _CROPPED}.items():
        call = functools.partial(multiply.multiply, [gradient], _features())
        yield Regime(f"{name}, multiply", call, name in _GRADIENTS)


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
    found, seen = [], set()
    for regime in regimes():
        launches: list[_Launch] = []
        with _caught(launches):
            regime.launch()
        for launch in launches:
            for capability in capabilities:
                kernel = _compile(launch, capability)
                if kernel.hash not in seen:
                    seen.add(kernel.hash)
                    found.append(_inspected(regime, launch, capability, kernel))
    return found


def _inspected(regime: Regime, launch: _Launch, capability: int, kernel: Any) -> Compiled:
    cubin = kernel.asm["cubin"]
    usage = dict(re.findall(r"\b([A-Z]+):(\d+)", _cuobjdump("--dump-resource-usage", cubin)))
    code = _cuobjdump("-sass", cubin)
    is_wide = regime.is_wide and launch.kernel is not hint.add_up
    return Compiled(
        launch.kernel.__name__,
        regime.name,
        capability,
        int(usage["REG"]),
        kernel.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        int(usage["STACK"]),
        _are_wide(code) if is_wide else None,
    )


def _are_wide(code: str) -> bool:
    """Whether the only narrower accesses are one load, of grad_output, and one store, of a sum."""
    for kind in ("LDG", "STG"):
        accesses = re.findall(rf"\b{kind}\.[.\w]*", code)
        if sum([not access.endswith(".128") for access in accesses]) > 1:
            return False
    return "LDG.E.128" in code

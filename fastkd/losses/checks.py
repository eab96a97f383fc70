"""Checks that the losses share. Each raises in the user's words, before any kernel runs."""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def keywords(
    function: Callable[P, R],
    instead: Callable[..., Callable[[], R] | None] | None = None,
) -> Callable[P, R]:
    """`function`, whose error names the keywords where too much comes by position.

    What `instead(function, args, kwargs)` returns is called in its place, if that is anything.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    most = len(positional)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > most:
            raise TypeError(
                f"{function.__name__}() takes {most} positional arguments "
                f"({', '.join(positional)}), got {len(args)}; the others are given by name, as "
                f"{named[0]}=...: {', '.join(named)}"
            )
        call = None if instead is None else instead(function, args, kwargs)
        return function(*args, **kwargs) if call is None else call()

    return checked


def floating(*named: tuple[str, Any]) -> None:
    """Dense tensors of floating-point dtypes that the kernels know."""
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in _FLOATING:
            raise TypeError(
                f"{name} must be float32, float16, bfloat16 or float64, got {value.dtype}"
            )
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got {value.layout}")
        if value.is_nested:
            raise TypeError(f"{name} must be a dense (strided) tensor, got a nested tensor")


def same_device(first_name: str, first: Tensor, name: str, value: Tensor) -> None:
    """Two tensors that one kernel reads lie on one device."""
    if first.device != value.device:
        raise ValueError(
            f"{first_name} and {name} must be on the same device, "
            f"got {first.device} and {value.device}"
        )


def same_shape(student_name: str, student: Tensor, teacher_name: str, teacher: Tensor) -> None:
    """Student and teacher are compared element by element."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{student_name} and {teacher_name} must have the same shape, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )


def choice(name: str, value: Any, options: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def integer(name: str, value: Any) -> int:
    """An int that the kernels can hold, of Python or of NumPy."""
    # Python's own first: under torch.compile they may be symbols, of which no more can be asked.
    is_int = isinstance(value, int) and not isinstance(value, bool)
    result = value if is_int else _as_int(name, value)
    if not -(2**63) <= result < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return result


def flag(name: str, value: Any) -> bool:
    """A bool of Python or of NumPy, and no number or tensor in its place."""
    if isinstance(value, bool):
        return value
    if _is_bool(value):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}")


def number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    finite: bool = True,
) -> float:
    """A real number within bounds, and never NaN."""
    # Python's own first: under torch.compile they may be symbols, of which no more can be asked.
    result = value if type(value) is float else _as_float(name, value)
    is_finite = -math.inf < result < math.inf
    if result > above and at_least <= result <= at_most and (is_finite or not finite):
        return result
    bounds = []
    if above > -math.inf:
        bounds.append(f"> {above:g}")
    if at_least > -math.inf:
        bounds.append(f">= {at_least:g}")
    if at_most < math.inf:
        bounds.append(f"<= {at_most:g}")
    wanted = " and ".join(bounds)
    raise ValueError(
        f"{name} must be a {'finite ' if finite else ''}number {wanted}".rstrip()
        + f", got {value!r}"
    )


def _as_float(name: str, value: Any) -> float:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int and not _is_real(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        # The method by name: torch.compile of torch 2.8 has no float() of a Fraction.
        return float(value if is_int else value.__float__())
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except TypeError:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def _as_int(name: str, value: Any) -> int:
    try:
        if _is_bool(value) or isinstance(value, Tensor):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or _numpy_kind(value) == "b"


def _is_real(value: Any) -> bool:
    """Whether it is one real number, also of NumPy, `fractions` or `decimal`."""
    if isinstance(value, (bool, Tensor, str)) or not hasattr(value, "__float__"):
        return False
    return _numpy_kind(value) not in ("b", "c") and getattr(value, "ndim", 0) == 0


def _numpy_kind(value: Any) -> str:
    """NumPy's letter for the kind of its own scalars; NumPy need not be there."""
    return getattr(getattr(value, "dtype", None), "kind", "")


def dimension(name: str, value: Any, ndim: int) -> int:
    """An axis, counted from either end; returned counted from the front."""
    value = integer(name, value)
    if not -ndim <= value < ndim:
        raise ValueError(
            f"{name} must lie in [{-ndim}, {ndim - 1}] for tensors of {ndim} dimensions, "
            f"got {value}"
        )
    return value % ndim


# Iterable, but what they hold are letters, keys, or in no order.
_NO_SEQUENCES = (Tensor, str, bytes, bytearray, Mapping, Set)


def items(value: Any) -> list[Any] | None:
    """What a sequence or any other iterable holds, once; None where the value is neither."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, _NO_SEQUENCES):
        return None
    try:
        iterator = iter(value)
    except TypeError:
        return None
    return list(iterator)

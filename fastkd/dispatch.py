"""Which implementation serves a call, and why.

A choice rests on facts only: the device, the dtypes, what is loaded, and what stands between the
tensors and their memory. A backend refuses a call with a `Refusal`; the first backend of
`ORDER` that does not refuse serves it. To add one, register its refusal function in `_REFUSE`.
"""

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.facts import ORDER, Backend, Facts, Refusal
from fastkd.tensors import obstacle_to_kernels, obstacle_while_compiling


class FallbackWarning(UserWarning):
    """Warns that a slower implementation serves a call than the machine could offer.

    The message gives the reason and the remedy, once in the process for each reason. To silence it,
    ask for the implementation by name (`backend="reference"`, `use_backend`, or FASTKD_BACKEND), or
    filter it.

    Example:
        >>> import warnings
        >>> warnings.filterwarnings("ignore", category=fastkd.FallbackWarning)
    """


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve this call; the message says why.

    Example:
        >>> rows = torch.randn(4, 10, device="meta")
        >>> try:
        ...     fastkd.soft_target_loss(rows, rows, backend="native")
        ... except fastkd.BackendUnavailableError:
        ...     print("no kernels for meta tensors")
        no kernels for meta tensors
    """


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`; `print` shows it as a table.

    Attributes:
        loss: the name of the function.
        chosen: the backend that serves the call; None where the one asked for cannot.
        reasons: for each backend why it serves the call or does not.
    """

    loss: str
    chosen: Backend | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.loss}: {self.chosen or 'no backend can serve this call'}"]
        for name, reason in self.reasons.items():
            mark = "->" if name == self.chosen else "  "
            lines.append(f" {mark} {name:<9} {reason}")
        return "\n".join(lines)


def _refuse_native(facts: Facts) -> Refusal | None:
    from fastkd.kernels import native

    return native.refuse(facts)


def _refuse_triton(facts: Facts) -> Refusal | None:
    from fastkd.kernels import triton

    return triton.refuse(facts)


def _refuse_reference(_: Facts) -> Refusal | None:
    return None


_REFUSE: dict[str, Callable[[Facts], Refusal | None]] = {
    "native": _refuse_native,
    "triton": _refuse_triton,
    "reference": _refuse_reference,
}

# A plain global, because torch.compile guards on it: a compiled function follows `use_backend`.
_override: Backend | None = None

# The dictionary under os.environ, private to Python, and the name as it is written there.
# os.environ itself finds out by an exception that a variable is absent, which takes 3 to 12 µs.
_environment: Any = getattr(os.environ, "_data", os.environ)
_VARIABLE: Any = getattr(os.environ, "encodekey", str)("FASTKD_BACKEND")

# Not one: a loss in another thread, while this one asks for an explanation, is a call like any.
_explaining = contextvars.ContextVar("fastkd_explaining", default=False)


class _Explained(Exception):
    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


def select(
    loss: str,
    tensors: tuple[Tensor, ...],
    backend: Backend | None,
    others: tuple[Tensor | None, ...] = (),
) -> Backend:
    """The backend that serves `loss` on these tensors.

    `others` are tensors whose dtype does not matter: labels, a regressor.

    Precedence: the argument, `use_backend`, the environment variable FASTKD_BACKEND, the best one
    available.

    Raises:
        ValueError: the name asked for is not a backend.
        BackendUnavailableError: the backend asked for cannot serve this call.
    """
    name: object = _override if backend is None else backend
    if name is None and _VARIABLE in _environment:
        name = os.environ["FASTKD_BACKEND"] or None
    requested = None if name is None else known_backend(name)
    first = tensors[0]
    device = "cpu" if first.is_cpu else f"{first.device.type}:{first.device.index}"
    dtypes = tuple([t.dtype for t in tensors])
    if torch.compiler.is_compiling():
        kinds = tuple([type(t) for t in tensors])
        return _resolve_compiled(loss, device, dtypes, kinds, requested)
    obstacle = obstacle_to_kernels((*tensors, *others))
    if _explaining.get():
        facts = Facts(loss, device, dtypes, obstacle)
        raise _Explained(_explain(facts, requested))
    return _resolve(loss, device, dtypes, obstacle, requested)


def _resolve_compiled(
    loss: str,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    kinds: tuple[type[Tensor], ...],
    requested: Backend | None,
) -> Backend:
    obstacle = obstacle_while_compiling(kinds)
    return _resolve(loss, device, dtypes, obstacle, requested)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler.
_resolve_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


# Keyed by facts, so that a small loss does not pay for the search, and each reason warns once.
@functools.lru_cache(maxsize=1024)
def _resolve(
    loss: str,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    obstacle: str | None,
    requested: Backend | None,
) -> Backend:
    facts = Facts(loss, device, dtypes, obstacle)
    if requested is not None:
        refusal = _REFUSE[requested](facts)
        if refusal is not None:
            raise BackendUnavailableError(
                f"backend {requested!r} was asked for and cannot serve {facts.loss}: {refusal}"
            )
        return requested
    for name in ORDER:
        refusal = _REFUSE[name](facts)
        if refusal is None:
            return name
        if not refusal.expected:
            _warn_once(f"fastkd does not use its {name} kernels here: {refusal}")
    raise AssertionError("the reference refuses nothing")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=6)


def known_backend(name: object) -> Backend:
    """`name` itself, if it names a backend.

    Raises:
        ValueError: it does not.
    """
    for known in ORDER:
        if name == known:
            return known
    raise ValueError(f"backend must be one of {', '.join(map(repr, ORDER))}, got {name!r}")


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Use this backend in every call within the context that names none, or raise.

    The setting belongs to the process, not to the thread, as torch's own backend flags do. An
    argument `backend=` beats it, and it beats the environment variable FASTKD_BACKEND.

    Args:
        name: `"native"`, `"triton"` or `"reference"`.

    Raises:
        ValueError: the name is not a backend's.

    Example:
        >>> student, teacher = torch.randn(2, 64, 100)
        >>> with fastkd.use_backend("reference"):
        ...     loss = fastkd.soft_target_loss(student, teacher)
    """
    global _override
    previous, _override = _override, known_backend(name)
    try:
        yield
    finally:
        _override = previous


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tell which backend would serve `function(*args, **kwargs)`, and why the others would not.

    The arguments, but not the values in labels, are checked as in a real call, and raise as they
    would there; no kernel runs.

    Args:
        function: a loss, or a module of `fastkd.nn`.
        args: its arguments by position.
        kwargs: its keywords.

    Returns:
        An `Explanation` with the attributes `loss`, `chosen` and `reasons`, a dictionary from each
        backend to its reason. As a string it is a table.

    Raises:
        TypeError: the function is no loss of fastkd.

    Example:
        >>> student, teacher = torch.randn(2, 64, 100)
        >>> answer = fastkd.explain(fastkd.soft_target_loss, student, teacher, backend="reference")
        >>> answer.chosen
        'reference'
        >>> answer.reasons["reference"]
        'asked for'
    """
    token = _explaining.set(True)
    try:
        function(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _explaining.reset(token)
    raise TypeError(f"explain expects a loss of fastkd, got {function!r}")


def _explain(facts: Facts, requested: Backend | None) -> Explanation:
    reasons: dict[str, str] = {}
    chosen: Backend | None = None
    for name in ORDER:
        refusal = _REFUSE[name](facts)
        if refusal is not None:
            reasons[name] = str(refusal)
        elif requested is not None and name != requested:
            reasons[name] = f"available; {requested!r} was asked for"
        elif chosen is not None:
            reasons[name] = f"available; {chosen!r} is preferred"
        else:
            chosen = name
            reasons[name] = "asked for" if requested else "the first that can serve this call"
    return Explanation(facts.loss, chosen, reasons)

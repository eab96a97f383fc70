"""Triton kernels, one file a loss, for GPUs of any maker."""

import functools
import importlib
import os

from fastkd.facts import OBSTACLES, ON_GPUS, USE_REFERENCE, Facts, Refusal

_DEVICES = frozenset({"cuda", "xpu"})


def refuse(facts: Facts) -> Refusal | None:
    """Why Triton does not serve a call, or None if it does.

    Triton is imported only when nothing else stands in the way.
    """
    device = facts.device.partition(":")[0]
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interprets:
        return Refusal(
            "Triton kernels run on GPUs, and these tensors are on the CPU", expected=True
        )
    if facts.loss not in ON_GPUS:
        return Refusal(
            f"this release of fastkd has no Triton kernels for {facts.loss}", expected=True
        )
    if device != "cpu" and device not in _DEVICES:
        return Refusal(f"fastkd's Triton kernels do not run on {device} devices", USE_REFERENCE)
    if facts.obstacle is not None:
        return OBSTACLES[facts.obstacle]
    return _cannot_load(interprets)


@functools.cache
def _cannot_load(interprets: bool) -> Refusal | None:
    try:
        language = importlib.import_module("triton.language")
    except ModuleNotFoundError as error:
        return Refusal(f"Triton is not installed ({error})", "Install it: `pip install triton`.")
    except Exception as error:
        return Refusal(
            f"Triton does not load ({type(error).__name__}: {error})",
            "Reinstall it: `pip install --force-reinstall triton`.",
        )
    # Triton decides which of the two its own functions are when it is imported.
    if interprets != (type(language.cdiv).__name__ == "InterpretedFunction"):
        return Refusal(
            "TRITON_INTERPRET was changed after Triton had been imported",
            "Set it before Python starts.",
        )
    return None

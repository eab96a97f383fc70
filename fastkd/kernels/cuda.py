"""Why the compiled module does not serve a call on a GPU, if it does not."""

from typing import Any

import torch

from fastkd.facts import ON_GPUS, USE_REFERENCE, Facts, Refusal

OLDEST_ARCHITECTURE = 80  # what csrc/architectures.py allows


def refuse(module: Any, facts: Facts) -> Refusal | None:
    """Why the compiled module does not serve a call on a CUDA device, or None if it does."""
    if torch.version.hip is not None:
        return Refusal("the compiled module is for NVIDIA's GPUs, not AMD's", expected=True)
    if facts.loss not in ON_GPUS:
        return Refusal(f"this release has no CUDA kernels for {facts.loss}", USE_REFERENCE)
    archs = module.cuda_archs()
    if not archs:
        return Refusal(
            "the compiled module was built without CUDA kernels",
            "`python -m fastkd.info` tells why; with a CUDA compiler, reinstall fastkd with "
            "FASTKD_BUILD=cuda.",
        )
    index = torch.device(facts.device).index
    problem = module.cuda_problem(index)
    return _cannot_run(archs, facts.device, index, problem) if problem else None


def _cannot_run(archs: list[str], device: str, index: int, problem: str) -> Refusal:
    """The module holds no kernels for this GPU, or its driver does not take them."""
    capability = "{}{}".format(*torch.cuda.get_device_capability(index))
    reason = (
        f"the compiled module's CUDA kernels, for sm_{', sm_'.join(archs)}, do not run on "
        f"{device}, which is sm_{capability} ({problem})"
    )
    if int(capability) < OLDEST_ARCHITECTURE:
        return Refusal(f"{reason}; they need sm_{OLDEST_ARCHITECTURE} or newer", expected=True)
    if capability in archs:
        remedy = "Update the driver, or reinstall fastkd with a CUDA compiler as old as the driver."
    else:
        wanted = ";".join([*archs, capability])
        remedy = f'Reinstall fastkd with FASTKD_CUDA_ARCHS="{wanted}".'
    return Refusal(reason, remedy)

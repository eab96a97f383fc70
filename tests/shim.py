"""The module that runs CUDA kernels on the CPU (cuda_on_host), where it is the one under test."""

from fastkd.kernels import compiled


def module():
    """That module, or None."""
    loaded = compiled.load()
    return loaded if hasattr(loaded, "set_schedule") else None


def set_schedule(seed):
    """Threads of the kernels to come run in an order that the seed decides."""
    if module():
        module().set_schedule(seed)

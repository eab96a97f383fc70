"""What the choice of an implementation may depend on, and how one says that it cannot serve."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Backend = Literal["native", "triton", "reference"]

# The best first.
ORDER: tuple[Backend, ...] = ("native", "triton", "reference")


class Facts(NamedTuple):
    """All that a choice may depend on."""

    loss: str
    device: str  # with its index: cuda:0
    dtypes: tuple[torch.dtype, ...]
    obstacle: str | None  # one of those below


# What stands between tensors and their memory where a kernel cannot serve, and the reference can.
TRANSFORM = "transform"  # of torch.func
FORWARD_MODE = "forward mode"
TRACE = "trace"  # of torch.jit
DTENSOR = "DTensor"
# And what kernels of shards of the classes do not have.
ONE_TEACHER = "one teacher"


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not serve a call, and what would change that.

    `expected` marks a backend that was never meant for such tensors (Triton on a CPU): passing it
    over is no step down and warns nobody.
    """

    reason: str
    remedy: str = ""
    expected: bool = False

    def __str__(self) -> str:
        return f"{self.reason}. {self.remedy}".strip() if self.remedy else self.reason


USE_REFERENCE = 'Pass backend="reference" to use plain PyTorch without this warning.'

# What no kernel can serve, whatever the device.
OBSTACLES = {
    TRANSFORM: Refusal(
        "a torch.func transform is active, and a kernel cannot be transformed", USE_REFERENCE
    ),
    FORWARD_MODE: Refusal(
        "a tensor carries a tangent (torch.autograd.forward_ad), and kernels have no derivatives "
        "in forward mode",
        USE_REFERENCE,
    ),
    TRACE: Refusal("torch.jit.trace cannot record what a kernel does", USE_REFERENCE),
    DTENSOR: Refusal(
        "a DTensor may hold a part of the values only, and kernels need all of a row",
        "Where each rank has whole samples, pass `x.to_local()`. " + USE_REFERENCE,
    ),
    ONE_TEACHER: Refusal(
        "the kernels of shards take the logits of a student and of one teacher, or the classes "
        "that it kept",
        USE_REFERENCE,
    ),
}

# The losses that have CUDA and Triton kernels; one to come may have none.
ON_GPUS = frozenset(
    {
        "attention_map",
        "attention_transfer_loss",
        "distillation_loss",
        "distillation_metrics",
        "fsp_loss",
        "hint_loss",
        "rkd_angle_loss",
        "rkd_distance_loss",
        "similarity_preserving_loss",
        "soft_target_loss",
    }
)

"""Refusals that several backends share, and what they serve on GPUs."""

from fastkd import tensors
from fastkd.dispatch import Refusal

USE_REFERENCE = 'Pass backend="reference" to use plain PyTorch without this warning.'

# The losses that have CUDA and Triton kernels; one to come may have none.
ON_GPUS = frozenset(
    {
        "attention_map",
        "attention_transfer_loss",
        "distillation_loss",
        "fsp_loss",
        "hint_loss",
        "rkd_angle_loss",
        "rkd_distance_loss",
        "similarity_preserving_loss",
        "soft_target_loss",
    }
)

# What no kernel can serve, whatever the device.
OBSTACLES = {
    tensors.TRANSFORM: Refusal(
        "a torch.func transform is active, and a kernel cannot be transformed", USE_REFERENCE
    ),
    tensors.FORWARD_MODE: Refusal(
        "a tensor carries a tangent (torch.autograd.forward_ad), and kernels have no derivatives "
        "in forward mode",
        USE_REFERENCE,
    ),
    tensors.TRACE: Refusal("torch.jit.trace cannot record what a kernel does", USE_REFERENCE),
    tensors.DTENSOR: Refusal(
        "a DTensor may hold a part of the values only, and kernels need all of a row",
        "Where each rank has whole samples, pass `x.to_local()`. " + USE_REFERENCE,
    ),
}

"""Refusals that several backends share, and what they serve on GPUs."""

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

TRANSFORMED = Refusal(
    "a torch.func transform or a lazy negation stands between the tensors and their memory",
    USE_REFERENCE,
)

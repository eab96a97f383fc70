"""Refusals that several backends share."""

from fastkd.dispatch import Refusal

USE_REFERENCE = 'Pass backend="reference" to use plain PyTorch without this warning.'

TRANSFORMED = Refusal(
    "a torch.func transform or a lazy negation stands between the tensors and their memory",
    USE_REFERENCE,
)

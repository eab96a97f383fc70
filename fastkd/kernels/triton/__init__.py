"""Triton kernels, one file a loss. This release has none yet: every call is refused."""

from fastkd.dispatch import Facts, Refusal


def refuse(facts: Facts) -> Refusal | None:
    """Why Triton does not serve a call, or None if it does."""
    if facts.device == "cpu":
        return Refusal(
            "Triton kernels run on GPUs, and these tensors are on the CPU", expected=True
        )
    return Refusal("this release of fastkd has no Triton kernels", expected=True)

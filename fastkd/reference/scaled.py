"""Logits less their maximum, and their exponentials."""

from torch import Tensor

from fastkd.reference.classes import HERE, Classes

# Logits are multiplied by this where their maximum is subtracted, as in the kernels. Any two finite
# logits then have a finite difference, and a probability of 0 is never multiplied by infinity. A
# power of 2 rounds nothing.
LOGIT_SCALE = 2.0**-24


def shifted(logits: Tensor, maximum: Tensor) -> Tensor:
    """`logits - max`, scaled."""
    return logits * LOGIT_SCALE - maximum * LOGIT_SCALE


def largest(logits: Tensor) -> Tensor:
    """The maximum of each row, which no gradient goes through."""
    return HERE.largest(logits)


def exp(x: Tensor) -> Tensor:
    """`exp(x)`; what is 0 has a gradient of 0, and not of 0 times infinity."""
    e = x.exp()
    return e.masked_fill(e == 0, 0)


def log_sum(exponentials: Tensor, classes: Classes = HERE) -> Tensor:
    """Of each row, by `torch.sum`, which pairs its terms.

    The sum of `F.log_softmax` loses digits on the CPU where terms are very many.
    """
    return classes.total(exponentials, keepdim=True).log()

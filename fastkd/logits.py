"""What may stand in the place of a teacher's logits in the losses on logits."""

import dataclasses

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True, eq=False)
class Probabilities:
    """A teacher's probabilities, which a loss uses as they are.

    As the teacher of `soft_target_loss` or `distillation_loss`, with `q = softmax(student/T)`, the
    row's loss is `T^2 * sum(p * (log p - log q))` and its gradient `T * (q * sum(p) - p)`, or what
    `divergence` makes of p and q. T softens the student alone, and a `teacher_temperature` is an
    error. Nothing normalises p: rows need not sum to 1, and may sum to more. Except for `"tvd"` a
    divergence of such rows can be negative. Several such teachers are an error; one with their
    mean, `Probabilities(w1 * p1 + w2 * p2)`, is their ensemble.

    A class of probability 0 is excluded: `0 * log 0` is 0, and the gradient that p receives there
    is 0. A negative probability makes its row's loss NaN, and the student's gradient of the row:
    looking for one would cost a pass over p.

    Args:
        probabilities: p, of the student's logits' shape (but see `num_classes`) and device, in
            float32, float16, bfloat16 or float64. The loss checks it. It receives its gradient if
            it requires one: with forward KL `T^2 * (log p - log q + 1)`.

    Raises:
        TypeError: in a loss, it holds no tensor of such a dtype, or stands in a sequence.
        ValueError: in a loss, shapes or devices differ, or there is a `teacher_temperature`.

    Example:
        >>> student = torch.randn(64, 100, requires_grad=True)
        >>> p = torch.randn(64, 100).softmax(-1)
        >>> fastkd.soft_target_loss(student, fastkd.Probabilities(p)).backward()
    """

    probabilities: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class LogProbabilities:
    """The logarithms of a teacher's probabilities, which a loss uses as they are.

    `Probabilities` has the formulas, of `p = exp(log_p)`; nothing normalises p here either. What is
    written as logarithms keeps small probabilities apart that round to 0 otherwise. `-inf` excludes
    a class: it contributes 0, and its gradient is 0. Above 0 a logarithm is that of more than 1,
    which is as good as any.

    Args:
        log_probabilities: log p, of the student's logits' shape (but see `num_classes`) and device,
            in float32, float16, bfloat16 or float64. The loss checks it. It receives its gradient
            if it requires one: with forward KL `T^2 * p * (log p - log q + 1)`.

    Raises:
        TypeError: in a loss, it holds no tensor of such a dtype, or stands in a sequence.
        ValueError: in a loss, shapes or devices differ, or there is a `teacher_temperature`.

    Example:
        >>> student = torch.randn(64, 100, requires_grad=True)
        >>> log_p = torch.randn(64, 100).log_softmax(-1)
        >>> fastkd.soft_target_loss(student, fastkd.LogProbabilities(log_p)).backward()
    """

    log_probabilities: Tensor


def _register(kind: type, name: str) -> None:
    """As a pytree it passes through torch.export, and `tree_map` moves its tensor."""
    pytree.register_pytree_node(
        kind,
        lambda side: ([getattr(side, name)], None),
        lambda tensors, _: kind(*tensors),
        serialized_type_name=f"fastkd.{kind.__name__}",
        flatten_with_keys_fn=lambda side: ([(pytree.GetAttrKey(name), getattr(side, name))], None),
    )


_register(Probabilities, "probabilities")
_register(LogProbabilities, "log_probabilities")

# What a loss uses as it is.
STATED = (Probabilities, LogProbabilities)

"""What may stand in the place of a teacher's logits in the losses on logits."""

import dataclasses
from collections.abc import Iterable
from typing import Any

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


@dataclasses.dataclass(frozen=True, eq=False)
class TopK:
    """The k classes of each row that a teacher kept, such as a cache on a disk has them.

    As the teacher of `soft_target_loss` or `distillation_loss`, with p_j the teacher's probability
    of a slot j and q_j the student's of the same class, the row's loss is `T^2 * sum(p_j * (log p_j
    - log q_j))` over the slots, or what `divergence` makes of p and q. `tail` says what p and q
    are. What it costs is one read of the student's logits, of which `"renormalize_both"` reads k
    alone.

    | tail | p | q | divergences |
    |---|---|---|---|
    | `"renormalize"` | its k probabilities sum to 1 | over all classes | `"forward_kl"` |
    | `"zero"` | true probabilities, as they are | over all classes | `"forward_kl"` |
    | `"bucket"` | true; the rest is one class more | the same classes | all |
    | `"renormalize_both"` | its k probabilities sum to 1 | over the slots | all |

    With `"zero"` the loss can be negative. With `"bucket"` the rest of a row counts as 1e-7 at
    least, because rounded probabilities may sum to more than 1; it is not there where the slots
    list every class.

    Args:
        values: of shape `(*rows, k)`, the shape of the rows and k at the end, whatever `dim` is, in
            float32, float16, bfloat16 or float64 and any memory layout. It receives its gradient
            if it requires one. A slot of `-inf` is padding.
        indices: the classes of the slots, in any order, integers of the same shape, such as int64
            or int32. A negative index is padding. Two slots of one class are two terms. A row of
            nothing but padding has the loss 0.
        values_are: `"logits"`, up to a constant of the row, which the teacher's temperature
            softens: logits and log-probabilities at temperature 1 alike. `"log_probs"` are
            log-probabilities at the temperature of the loss, used as they are; a
            `teacher_temperature` is an error then. Default: `"logits"`.
        tail: see above. Default: `"renormalize"`.
        lse: of the rows' shape, the log-sum-exp of all of the teacher's logits over the teacher's
            temperature, which makes true probabilities of logits: `"zero"` and `"bucket"` need it
            with `values_are="logits"`, and nothing else takes it. It receives its gradient, too.
            Default: None.

    Raises:
        TypeError: in a loss, a tensor is none, or of another dtype.
        ValueError: in a loss, shapes or devices differ, the tail does not go with the divergence or
            with what is given, or an index is no class: on a CPU. A GPU would have to be waited
            for: there the row's loss and gradient are NaN.

    Example:
        >>> student = torch.randn(64, 1000, requires_grad=True)
        >>> values, indices = torch.randn(64, 1000).topk(32)
        >>> fastkd.soft_target_loss(student, fastkd.TopK(values, indices)).backward()
        >>> teacher = torch.randn(64, 1000).log_softmax(-1).topk(32)
        >>> kept = fastkd.TopK(*teacher, values_are="log_probs", tail="bucket")
        >>> loss = fastkd.soft_target_loss(student, kept, divergence="jsd")
    """

    values: Tensor
    indices: Tensor
    _: dataclasses.KW_ONLY
    values_are: str = "logits"
    tail: str = "renormalize"
    lse: Tensor | None = None


def _register(kind: type, *tensors: str, others: tuple[str, ...] = ()) -> None:
    """As a pytree it passes through torch.export, and `tree_map` moves its tensors."""

    def flatten(side: Any) -> tuple[list[Any], Any]:
        return [getattr(side, name) for name in tensors], [getattr(side, name) for name in others]

    def flatten_with_keys(side: Any) -> tuple[list[Any], Any]:
        values, context = flatten(side)
        keys = map(pytree.GetAttrKey, tensors)
        return list(zip(keys, values, strict=True)), context

    def unflatten(values: Iterable[Any], context: Any) -> Any:
        named = zip((*tensors, *others), (*values, *context), strict=True)
        return kind(**dict(named))

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"fastkd.{kind.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(Probabilities, "probabilities")
_register(LogProbabilities, "log_probabilities")
_register(TopK, "values", "indices", "lse", others=("values_are", "tail"))

# What a loss uses as it is.
STATED = (Probabilities, LogProbabilities)
# What may stand in the place of a teacher's logits.
SIDES = (*STATED, TopK)

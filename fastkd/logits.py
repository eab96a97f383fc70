"""What may stand in the place of logits in the losses on logits."""

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
class LinearHead:
    """Logits that a linear layer would compute, and that never exist as a whole.

    As the student or the teacher of `soft_target_loss` or `distillation_loss` it stands for the
    logits `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`, without the outer part
    where there is no softcap. The loss computes them for some rows at a time (`chunk_size`), turns
    them into their gradient at once, and that into the gradients of hidden, weight and bias: of the
    logits nothing is kept for backward. `dim` must be the last one; `inplace` is an error.

    With `group` each rank has its rows of weight and bias, and the same hidden states, whose
    gradient is then that of all classes on every rank.

    Under `torch.autocast` the products are computed in its dtype, otherwise in the dtype of
    `hidden`, or on a CPU in float32 where that is float16. What sums over rows, the gradients of
    weight and bias, is accumulated in float32 (float64 for float64).

    Args:
        hidden: `(*rows, H)`, such as a model's last hidden states, in float32, float16, bfloat16 or
            float64. Rows that do not count (`mask`, `ignore_index`, a `row_weight` of 0) are left
            out before the products, and may hold NaN.
        weight: `(V, H)` for V classes, such as `lm_head.weight`, of the dtype of `hidden` unless
            autocast is on. Student and teacher may have other H, and may share a weight.
        bias: `(V,)`. Default: None.
        scale: a finite number that multiplies the logits. Default: 1.0.
        softcap: a number above 0 that bounds them. Default: None.

    Raises:
        TypeError: in a loss, a tensor is none or of a wrong dtype, or a head stands in a sequence.
        ValueError: in a loss, shapes or devices do not fit, or a number is out of its range.

    Example:
        >>> hidden = torch.randn(2, 8, 16, requires_grad=True)
        >>> weight = torch.randn(100, 16, requires_grad=True)
        >>> teacher = fastkd.LinearHead(torch.randn(2, 8, 32), torch.randn(100, 32), softcap=30.0)
        >>> fastkd.soft_target_loss(fastkd.LinearHead(hidden, weight), teacher).backward()
        >>> weight.grad.shape
        torch.Size([100, 16])
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    _: dataclasses.KW_ONLY
    scale: float = 1.0
    softcap: float | None = None


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


def _register(kind: type, *names: str) -> None:
    """As a pytree it passes through torch.export, and `tree_map` moves its tensors.

    What is no tensor, such as a bias that is None, is its context.
    """
    every = [field.name for field in dataclasses.fields(kind)]

    def present(side: Any) -> list[str]:
        return [name for name in names if getattr(side, name) is not None]

    def flatten(side: Any) -> tuple[list[Any], Any]:
        tensors = present(side)
        context = {name: getattr(side, name) for name in every if name not in tensors}
        return [getattr(side, name) for name in tensors], [tensors, context]

    def unflatten(tensors: Any, context: Any) -> Any:
        return kind(**dict(zip(context[0], tensors, strict=True)), **context[1])

    def flatten_with_keys(side: Any) -> tuple[list[Any], Any]:
        tensors, context = flatten(side)
        keys = [pytree.GetAttrKey(name) for name in context[0]]
        return list(zip(keys, tensors, strict=True)), context

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"fastkd.{kind.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


_register(Probabilities, "probabilities")
_register(LogProbabilities, "log_probabilities")
_register(LinearHead, "hidden", "weight", "bias")
_register(TopK, "values", "indices", "lse")

# What a loss takes as its student, and as its teacher.
Student = Tensor | LinearHead
Teacher = Tensor | Probabilities | LogProbabilities | TopK | LinearHead | Iterable[Tensor]

# What a loss uses as it is.
STATED = (Probabilities, LogProbabilities)
# What may stand in the place of a teacher's logits.
SIDES = (*STATED, TopK)

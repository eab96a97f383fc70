"""The methods compared: how each turns the student's and the teacher's outputs into a loss."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

import fastkd
from features import Output

Loss = Callable[[Output, Output, Tensor], Tensor]  # (student, teacher, labels)

# The paper's equation, each stage adding at most beta / sqrt(2) to the cross-entropy: three stages
# together about match that of an untrained network on ten classes. On images held out of the
# training digits, 0.1 and 10 did worse; so did the mean squared difference times 1000 of other
# code, which drowns the labels where a map has as few positions as here.
ATTENTION_BETA = 1.0

# The middle of the network, as in FitNets: the student is first trained up to this stage.
HINT_STAGE = 1
# The hint stage is taken out of the method's training steps, not added to them.
HINT_SHARE = 0.25


def cross_entropy(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.logits, labels)


def soft_targets(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return fastkd.distillation_loss(
        student.logits,
        teacher.logits,
        labels,
        temperature=4.0,
        soft_weight=0.9,
        hard_weight=0.1,
    )


def attention(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Cross-entropy plus attention transfer at every stage."""
    return cross_entropy(student, teacher, labels) + attention_term(student, teacher)


def attention_and_soft_targets(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return soft_targets(student, teacher, labels) + attention_term(student, teacher)


def attention_term(student: Output, teacher: Output) -> Tensor:
    return fastkd.attention_transfer_loss(student.features, teacher.features, beta=ATTENTION_BETA)


class Method(NamedTuple):
    name: str
    loss: Loss
    needs_teacher: bool = True
    hint_first: bool = False


ALONE = Method("student alone", cross_entropy, needs_teacher=False)
ATTENTION = Method("attention transfer", attention)
METHODS = (
    ALONE,
    Method("soft targets", soft_targets),
    Method("hints, then soft targets", soft_targets, hint_first=True),
    ATTENTION,
    Method("attention + soft targets", attention_and_soft_targets),
)


def backends(student: Output, teacher: Output, labels: Tensor) -> dict[str, str]:
    """Which backend serves each of the losses on such outputs.

    Raises:
        fastkd.BackendUnavailableError: the backend asked for cannot serve one of them.
    """
    guided, hint = student.features[HINT_STAGE], teacher.features[HINT_STAGE]
    hint_loss = fastkd.nn.HintLoss(guided.shape[1], hint.shape[1]).to(guided.device)
    explanations = (
        fastkd.explain(fastkd.distillation_loss, student.logits, teacher.logits, labels),
        fastkd.explain(fastkd.attention_transfer_loss, student.features, teacher.features),
        fastkd.explain(hint_loss, guided, hint),
    )
    for explanation in explanations:
        if explanation.chosen is None:
            raise fastkd.BackendUnavailableError(str(explanation))
    return {explanation.loss: str(explanation.chosen) for explanation in explanations}

"""The methods of the comparison, with the weights of the literature, and what it found with them.

The networks have four stages, the stem being the first. Weights are those of RepDistiller (Tian et
al., "Contrastive Representation Distillation", ICLR 2020), whose table is the one quoted here.
"""

import itertools
from typing import NamedTuple

from torch import Tensor, nn

import fastkd
from features import Output
from methods import Loss, cross_entropy, soft_targets

ATTENTION_BETA = 1000.0
HINT_WEIGHT, HINT_STAGE = 100.0, 2
SIMILARITY_WEIGHT = 3000.0
DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0
# The released code first trains with this loss alone, at weight 1, then without it. Added to a
# cross-entropy, 1 made the residual student diverge within a few hundred steps, and 0.1 did not.
FSP_WEIGHT = 0.1


class Hint(nn.Module):
    """FitNets in one stage: the regressor learns along with the student.

    It ends in a batch normalisation, as that of the released code does: the features of a residual
    stream are large, and a weight of 100 lets a regressor that grows with them diverge.
    """

    def __init__(self, student: Output, teacher: Output) -> None:
        super().__init__()
        ours, theirs = (output.features[HINT_STAGE].shape[1] for output in (student, teacher))
        self.regressor = nn.Sequential(nn.Conv2d(ours, theirs, 1), nn.BatchNorm2d(theirs))

    def forward(self, student: Output, teacher: Output, labels: Tensor) -> Tensor:
        guided = self.regressor(student.features[HINT_STAGE])
        hint = fastkd.hint_loss(guided, teacher.features[HINT_STAGE], half=False, reduction="mean")
        return cross_entropy(student, teacher, labels) + HINT_WEIGHT * hint


def attention(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    return cross_entropy(student, teacher, labels) + fastkd.attention_transfer_loss(
        student.features[1:], teacher.features[1:], distance="mse", beta=ATTENTION_BETA
    )


def similarity(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    term = fastkd.similarity_preserving_loss(student.features[-1], teacher.features[-1])
    return cross_entropy(student, teacher, labels) + SIMILARITY_WEIGHT * term


def relations(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    embeddings = [output.features[-1].mean((2, 3)) for output in (student, teacher)]
    distance = fastkd.rkd_distance_loss(*embeddings)
    angle = fastkd.rkd_angle_loss(*embeddings)
    return (
        cross_entropy(student, teacher, labels) + DISTANCE_WEIGHT * distance + ANGLE_WEIGHT * angle
    )


def flow(student: Output, teacher: Output, labels: Tensor) -> Tensor:
    """Between what enters a stage and what leaves it.

    The weight belongs to a mean over the entries of a matrix, which the loss sums.
    """
    loss = cross_entropy(student, teacher, labels)
    pairs = (itertools.pairwise(output.features) for output in (student, teacher))
    for ours, theirs in zip(*pairs, strict=True):
        entries = ours[0].shape[1] * ours[1].shape[1]
        loss = loss + FSP_WEIGHT / entries * fastkd.fsp_loss(ours, theirs)
    return loss


class Method(NamedTuple):
    name: str
    recipe: str
    loss: Loss | type[Hint]

    def loss_for(self, student: Output, teacher: Output) -> Loss:
        """The loss for networks with such outputs."""
        return self.loss(student, teacher) if isinstance(self.loss, type) else self.loss


ALONE = Method("student", "cross-entropy alone", cross_entropy)
METHODS = (
    ALONE,
    Method("KD", "T = 4; 0.1 cross-entropy, 0.9 soft targets", soft_targets),
    Method("FitNet", f"+ {HINT_WEIGHT:g} × hint on stage {HINT_STAGE}, mean; BN", Hint),
    Method("AT", f"+ attention maps of all stages, β = {ATTENTION_BETA:g}, mse", attention),
    Method("SP", f"+ {SIMILARITY_WEIGHT:g} × similarities of the last stage", similarity),
    Method("RKD", f"+ {DISTANCE_WEIGHT:g} × distances + {ANGLE_WEIGHT:g} × angles", relations),
    Method("FSP", f"+ {FSP_WEIGHT:g} × flow through each stage", flow),
)


class Pair(NamedTuple):
    name: str
    student: str
    # The literature's, of the pair that comes nearest: top-1 on CIFAR-100 at full width.
    quoted: str
    literature: dict[str, float]


TEACHER = "WRN-40-2"
PAIRS = {
    pair.student: pair
    for pair in (
        Pair(
            "WRN-40-2 → WRN-16-2",
            "WRN-16-2",
            "WRN-40-2 → WRN-16-2",
            {
                **{"teacher": 75.61, "student": 73.26, "KD": 74.92, "FitNet": 73.58},
                **{"AT": 74.08, "SP": 73.83, "RKD": 73.35, "FSP": 72.91},
            },
        ),
        Pair(
            "WRN-40-2 → depthwise",
            "depthwise",
            "WRN-40-2 → ShuffleNetV1",
            {
                **{"teacher": 75.61, "student": 70.50, "KD": 74.83, "FitNet": 73.73},
                **{"AT": 73.32, "SP": 74.52, "RKD": 72.21},
            },
        ),
    )
}

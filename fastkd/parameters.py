"""The parameters of the operators: what a call is, besides its tensors.

Each class is the one description of its parameters. The operators' schemas follow from it, and so
does what the compiled module receives: its struct of the same name has the same fields, and takes
them by name. It has none of `OF_OPERATORS`, which no kernel sees. No field has a default: where
shapes are dynamic `torch.compile` takes one for an input, and of the first call's graph alone.
"""

from typing import Any, NamedTuple, get_type_hints

# Whose kernels run, and the part of the logits that operators hand to them.
OF_OPERATORS = ("backend", "num_classes")

_IN_SCHEMA = {
    bool: "bool",
    float: "float",
    int: "int",
    str: "str",
    tuple[float, ...]: "float[]",
    int | None: "int?",
}


# Of a shard of the classes: in place of a label whose class another shard has.
ELSEWHERE = -2


class SoftTarget(NamedTuple):
    """Of losses on logits: `soft_weight · divergence + hard_weight · CE` of each row, reduced.

    `soft_weight` holds T² where that is wanted, T being the student's; with an operand of
    temperatures it does not, and both temperatures here are 1. `beta` is that of a divergence which
    mixes both sides, and never one at which it is another divergence. `weights` are the teachers',
    and sum to 1. Labels are classes, or only tell which rows count. Where `num_classes` is a
    number, only the first so many classes of either side exist. `teacher_is` tells what the
    teacher's numbers are: logits, probabilities or log_probabilities, the last two of which are
    used as they are, and whose temperature is 1; or top_k, which has operators of its own, to
    which no temperature of the teacher comes. Where the tensors are a shard of the classes,
    `all_classes` is how many all shards have, and a label may be `ELSEWHERE`. Where a softcap is
    above 0 a side's logits were capped, and its gradient is that of what they were before.
    """

    temperature: float
    teacher_temperature: float
    soft_weight: float
    hard_weight: float
    label_smoothing: float
    ignore_index: int
    labels_are_classes: bool
    divergence: str
    beta: float
    reduction: str
    dim: int
    weights: tuple[float, ...]
    num_classes: int | None
    backend: str
    teacher_is: str
    all_classes: int
    softcap: float
    teacher_softcap: float


class Heads(NamedTuple):
    """Of the sides that are linear heads: what stands between products and logits of each.

    A side that is none has a scale of 1. The dtypes are those of the products, by name; of a side
    of logits it is the logits' own. The softcaps are in `SoftTarget`. Where the teacher kept k
    classes, `listed_only` says that the student's softmax is over these. At most `chunk_size` rows
    have logits at a time, and 0 leaves the choice to the operator.
    """

    student_is_head: bool
    scale: float
    dtype: str
    teacher_is_head: bool
    teacher_scale: float
    teacher_dtype: str
    listed_only: bool
    chunk_size: int


class Metrics(NamedTuple):
    """Of a look at both sides, without a loss."""

    temperature: float
    teacher_temperature: float
    dim: int
    backend: str


class Map(NamedTuple):
    """Of attention maps."""

    kind: str
    p: float
    eps: float
    channel_dim: int
    backend: str


class Transfer(NamedTuple):
    """Of the distance between attention maps."""

    distance: str
    order: float
    beta: float
    reduction: str


class Hint(NamedTuple):
    """Of hints; `scale` is ½ or 1."""

    scale: float
    reduction: str
    backend: str


class Rkd(NamedTuple):
    """Of relations between samples; `kind` is distance or angle."""

    kind: str
    delta: float
    backend: str


def in_schema(kind: type[tuple[Any, ...]]) -> str:
    """The fields as the end of an operator's schema."""
    hints = get_type_hints(kind)
    return ", ".join(f"{_IN_SCHEMA[hints[name]]} {name}" for name in hints)


def from_schema(kind: type[tuple[Any, ...]], fields: Any) -> Any:
    """The parameters of fields as torch's dispatcher hands them on: its lists are tuples here."""
    return kind(*[tuple(field) if isinstance(field, list) else field for field in fields])

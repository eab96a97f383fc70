"""One small valid call of every public loss, for the tests that treat all of them alike."""

import dataclasses
import inspect
from collections.abc import Callable

import temperatures
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd

# The shapes of the tensors, student first; the keywords; and keywords that take other paths.
_SAMPLES = {
    "soft_target_loss": (
        [(4, 10), (4, 10)],
        {"temperature": 2.0},
        [
            {"reduction": "none"},
            {"teacher_weights": [1, 3]},
            {"mask": [True, False, True, True]},
            {"row_weight": [0.5, 0, 2, 1]},
            {"num_classes": 7},
            {"num_classes": 7, "reduction": "none", "teacher_weights": [1, 3]},
            {"divergence": "reverse_kl"},
            {"divergence": "jsd", "beta": 0.3},
            {"divergence": "skew_kl", "reduction": "none"},
            {"divergence": "jsd", "beta": 0.3, "teacher_weights": [1, 3]},
            {"temperature": [1.0, 2.0, 0.5, 3.0]},
            {"temperature": 3.0, "teacher_temperature": 1.5, "reduction": "none"},
            {"teacher_temperature": [1.0, 2.0, 0.5, 3.0], "teacher_weights": [1, 3]},
            {"temperature": [3.0, 1.0, 0.5, 2.0], "divergence": "jsd", "beta": 0.3},
            {"teacher_is": "probabilities"},
            {"teacher_is": "log_probabilities", "divergence": "reverse_kl", "reduction": "none"},
            {"teacher_is": "probabilities", "divergence": "skew_kl", "mask": [True, False] * 2},
            {"tail": "renormalize"},
            {"tail": "renormalize", "row_weight": [0.5, 0, 2, 1], "num_classes": 9},
            {"tail": "bucket", "divergence": "reverse_kl", "reduction": "none"},
            {"tail": "renormalize_both", "divergence": "jsd", "mask": [True, False] * 2},
            {"tail": "zero", "temperature": [1.0, 2.0, 0.5, 3.0]},
        ],
    ),
    "distillation_loss": (
        [(4, 10), (4, 10)],
        {"labels": [1, 9, -100, 0], "temperature": 2.0},
        [
            {"label_smoothing": 0.1},
            {"teacher_weights": [0.5, 0.25, 0.25]},
            {"reduction": "sum"},
            {"reduction": "none"},
            {"reduction": "none", "teacher_weights": [1, 3]},
            {"mask": [True, True, True, False], "reduction": "none"},
            {"row_weight": [0.5, 0, 2, 1], "num_classes": 10},
            {"divergence": "reverse_kl", "reduction": "none"},
            {"divergence": "skew_reverse_kl", "beta": 0.1, "label_smoothing": 0.1},
            {"divergence": "tvd", "reduction": "sum"},
            {"teacher_temperature": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.1},
            {"teacher_is": "log_probabilities", "label_smoothing": 0.1},
            {"teacher_is": "probabilities", "divergence": "jsd", "temperature": [3.0, 1, 0.5, 2]},
            {"tail": "renormalize", "label_smoothing": 0.1, "teacher_temperature": 3.0},
            {"tail": "bucket", "divergence": "skew_kl", "reduction": "none"},
            {"tail": "renormalize_both"},
        ],
    ),
    "attention_map": (
        [(2, 3, 4, 5)],
        {},
        [{"kind": "max_pow"}, {"kind": "sum"}],
    ),
    "attention_transfer_loss": (
        [(2, 3, 4, 5), (2, 6, 4, 5)],
        {"beta": 10.0},
        [
            {"reduction": "none"},
            {"kind": "max_pow"},
            {"distance": "mse"},
            {"pair_weights": [0.5, 2]},
            {"pair_weights": [0.5, 2], "reduction": "none"},
        ],
    ),
    "hint_loss": (
        [(2, 3, 4, 5), (2, 3, 4, 5)],
        {},
        [
            {"reduction": "none"},
            {"pair_weights": [0.5, 2]},
            {"pair_weights": [0.5, 2], "reduction": "none"},
        ],
    ),
    "rkd_distance_loss": ([(4, 6), (4, 5)], {}, [{"delta": 0.1}]),
    "rkd_angle_loss": ([(4, 6), (4, 5)], {}, [{"delta": 0.1}]),
    "similarity_preserving_loss": ([(4, 3, 5), (4, 7)], {}, [{"pair_weights": [0.5, 2]}]),
    "fsp_loss": (
        [(2, 3, 4, 5), (2, 4, 2, 5), (2, 3, 3, 3), (2, 4, 3, 3)],
        {},
        [{"pair_weights": [0.5, 2]}],
    ),
}
# How many of the tensors are the student's, where it is not one.
_STUDENTS = {"fsp_loss": 2}
LOSSES = tuple(_SAMPLES)
# The keywords that are tensors with one number for each row.
OF_ROWS = ("labels", "mask", "row_weight")
# A public function that is no loss, and has neither gradient nor module; tests/test_metrics.py and
# its neighbours check it.
METRICS = "distillation_metrics"
# HintLoss aside, which is made with channels.
MODULES = {
    fastkd.nn.SoftTargetLoss: fastkd.soft_target_loss,
    fastkd.nn.DistillationLoss: fastkd.distillation_loss,
    fastkd.nn.AttentionTransferLoss: fastkd.attention_transfer_loss,
    fastkd.nn.RKDDistanceLoss: fastkd.rkd_distance_loss,
    fastkd.nn.RKDAngleLoss: fastkd.rkd_angle_loss,
    fastkd.nn.SimilarityPreservingLoss: fastkd.similarity_preserving_loss,
    fastkd.nn.FSPLoss: fastkd.fsp_loss,
}


# Not a NamedTuple: within compiled code torch 2.8 calls none that holds tensors.
@dataclasses.dataclass(frozen=True)
class Call:
    """`function(*tensors, **keywords)`; any of the tensors may require grad."""

    function: Callable
    tensors: tuple
    keywords: dict
    students: int = 1
    refused: frozenset = frozenset()  # keywords that do not go with these
    slots: int = 0  # classes that a teacher kept of each row

    def __call__(self, *tensors, **keywords):
        return self.function(*(tensors or self.tensors), **{**self.keywords, **keywords})

    def _replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def leaves(self):
        return [x.clone().requires_grad_() for x in self.tensors]


def ensemble(function):
    """A loss on logits whose teachers come one by one."""
    return lambda student, *teachers, **keywords: function(student, list(teachers), **keywords)


def stating(function, teacher_is):
    """A loss on logits whose teacher states its probabilities, or their logarithms.

    Probabilities are made from any numbers.
    """

    def flat(student, teacher, **keywords):
        if teacher_is == "log_probabilities":
            return function(student, fastkd.LogProbabilities(teacher), **keywords)
        return function(student, fastkd.Probabilities(teacher.abs()), **keywords)

    return flat


# Classes of four rows, of which the last slot of two is padding.
_KEPT = [[8, 0, 5], [1, 9, -1], [3, 2, 7], [0, 4, -1]]


def keeping(function, tail):
    """A loss on logits whose teacher kept three classes, with the logits of all in its place."""

    def flat(student, teacher, **keywords):
        indices = torch.tensor(_KEPT).clamp(max=keywords.get("num_classes", 10) - 1)
        indices = indices.repeat(len(teacher) // len(_KEPT), 1)
        if hasattr(teacher, "device_mesh"):
            from torch.distributed.tensor import Replicate, distribute_tensor

            rows = [p if p.is_shard(0) else Replicate() for p in teacher.placements]
            indices = distribute_tensor(indices, teacher.device_mesh, rows)
        values = teacher.gather(-1, indices.clamp(min=0))
        lse = 2 + teacher.logsumexp(-1) if tail in ("zero", "bucket") else None
        return function(student, fastkd.TopK(values, indices, tail=tail, lse=lse), **keywords)

    return flat


def pair(function):
    """A loss on one pair of layers, whose tensors come one by one."""

    def flat(first, second, *teacher, **keywords):
        return function((first, second), teacher, **keywords)

    return flat


def several(function, count, size):
    """A loss of several pairs, whose tensors come one by one: `size` of each side of a pair."""

    def flat(*tensors, **keywords):
        items = tensors if size == 1 else list(zip(tensors[::2], tensors[1::2], strict=True))
        return function(items[:count], items[count:], **keywords)

    return flat


def variants(name, dtype=torch.float32):
    """The loss on fresh random tensors, plainly and then with each of the other keywords."""
    shapes, keywords, others = _SAMPLES[name]
    function = getattr(fastkd, name)
    if "labels" in keywords:
        keywords = {**keywords, "labels": torch.tensor(keywords["labels"])}

    def draw(shapes):
        return tuple(torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes)

    tensors, count = draw(shapes), _STUDENTS.get(name, 1)
    calls = []
    for other in ({}, *others):
        changed, drawn, students, refused, slots = function, tensors, count, frozenset(), 0
        of_rows = {*OF_ROWS, *temperatures.NAMES}
        other = {k: torch.tensor(v) if k in of_rows else v for k, v in other.items()}
        if name == "fsp_loss":
            changed = pair(function)
        if "teacher_is" in other:
            changed = stating(function, other.pop("teacher_is"))
            refused = frozenset({"teacher_temperature"})
        if "tail" in other:
            changed, slots = keeping(function, other.pop("tail")), len(_KEPT[0])
        if "teacher_weights" in other:
            changed = ensemble(function)
            drawn = tensors + draw(shapes[1:] * (len(other["teacher_weights"]) - 1))
        if "pair_weights" in other:
            copies = len(other["pair_weights"])
            changed, students = several(function, copies, count), copies * count
            drawn = draw(shapes[:count] * copies + shapes[count:] * copies)
        calls.append(Call(changed, drawn, {**keywords, **other}, students, refused, slots))
    return calls


def sample(name, dtype=torch.float32):
    return variants(name, dtype)[0]


def public_losses():
    """The functions that take a backend, whether the table above has them or not.

    Without the one that has no gradient.
    """
    return sorted(
        name
        for name in fastkd.__all__
        if name != METRICS
        and inspect.isfunction(value := getattr(fastkd, name))
        and "backend" in inspect.signature(value).parameters
    )


class Recorder(TorchDispatchMode):
    """The operators of fastkd that run, each with its arguments as they were before."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastkd":
            self.calls.append((function, torch.utils._pytree.tree_map(copied, args)))
        return function(*args, **(kwargs or {}))

    def opcheck(self):
        """Each call is what torch wants of an operator."""
        for function, args in self.calls:
            torch.library.opcheck(function, args)


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def operators_of(name, backend):
    """All operator calls of a loss: with every variant, by the student alone and by all."""
    with Recorder() as recorder:
        # In half precision a gradient is computed again for another grad_output.
        for call in (*variants(name), *variants(name, torch.bfloat16)):
            for count in {call.students, len(call.tensors)}:
                leaves = [
                    x.clone().requires_grad_(index < count) for index, x in enumerate(call.tensors)
                ]
                call(*leaves, backend=backend).sum().mul(3).backward()
    return recorder.calls


def keyword_defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

"""Any iterable serves where a call takes a sequence: of teachers, weights, pairs, layers."""

import collections
import decimal
import fractions

import numpy as np
import pytest
import torch
from agreement_features import features
from agreement_logits import logits

import fastkd

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CLASSES = 10
LABELS = [0, 9, 3, 5]


class Sequence(collections.abc.Sequence):
    """As configuration libraries have them: a sequence that is no list."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Indexed:
    """What was iterable before there were iterators."""

    def __init__(self, values):
        self.values = list(values)

    def __getitem__(self, index):
        return self.values[index]


def dict_values(values):
    return dict(enumerate(values)).values()


ITERABLES = [
    list,
    tuple,
    dict_values,
    collections.deque,
    Sequence,
    Indexed,
    iter,
    lambda values: (value for value in values),
    lambda values: map(torch.Tensor.detach, values),
]


@pytest.mark.parametrize("iterable", [*ITERABLES, torch.nn.ParameterList])
def test_teachers(backend, iterable):
    student, teachers = logits(4, CLASSES), [logits(4, CLASSES) for _ in range(3)]
    labels = torch.tensor(LABELS)
    for weights in ([1, 2, 3], None):
        keywords = {"teacher_weights": weights, "backend": backend}
        for function, others in (
            (fastkd.soft_target_loss, ()),
            (fastkd.distillation_loss, (labels,)),
        ):
            assert torch.equal(
                function(student, iterable(teachers), *others, **keywords),
                function(student, teachers, *others, **keywords),
            )


@pytest.mark.parametrize(
    "weights",
    [
        *(kind([1.0, 3.0, 0.5]) for kind in (list, tuple, collections.deque, Sequence, Indexed)),
        {"a": 1, "b": 3, "c": 0.5}.values(),
        [np.float32(1), np.int64(3), fractions.Fraction(1, 2)],
        [decimal.Decimal(1), 3, decimal.Decimal("0.5")],
        *(np.array([1, 3, 0.5], dtype) for dtype in (np.float64, np.float32, np.float16)),
        np.array([2, 6, 1], np.int32),
    ],
    ids=lambda weights: type(weights).__name__,
)
def test_teacher_weights(backend, weights):
    student, teachers = logits(4, CLASSES), [logits(4, CLASSES) for _ in range(3)]
    losses = [
        loss(student, teachers)
        for loss in (
            fastkd.nn.SoftTargetLoss(teacher_weights=w, backend=backend)
            for w in (weights, [1, 3, 0.5])
        )
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("iterable", [*ITERABLES, torch.nn.ParameterList])
@pytest.mark.parametrize("name", ["attention_transfer_loss", "hint_loss"])
def test_pairs(backend, name, iterable):
    students, teachers = ([features(2, 3, 4), features(2, 5, 6)] for _ in range(2))
    function = getattr(fastkd, name)
    assert torch.equal(
        function(iterable(students), iterable(teachers), backend=backend),
        function(students, tuple(teachers), backend=backend),
    )
    one = function(iterable(students[:1]), teachers[:1], reduction="none", backend=backend)
    assert one.shape == (1, 2)


@pytest.mark.parametrize("iterable", [*ITERABLES, torch.nn.ParameterList])
def test_pairs_of_layers(backend, iterable):
    first, second, third, last = (features(2, c, 4, 4) for c in (3, 5, 3, 5))
    one = fastkd.fsp_loss((first, second), (third, last), backend=backend)
    two = fastkd.fsp_loss([(first, second)] * 2, [(third, last)] * 2, backend=backend)

    def call(*sides):
        return fastkd.fsp_loss(*sides, backend=backend)

    assert torch.equal(call(iterable([first, second]), iterable([third, last])), one)
    pairs = [iterable([first, second]) for _ in range(2)], [iterable([third, last])] * 2
    if iterable not in (iter, *ITERABLES[-2:]):
        assert torch.equal(call(*pairs), two)
    outer = list if iterable in (ITERABLES[-1], torch.nn.ParameterList) else iterable
    pairs = [[iterable(pair) for _ in range(2)] for pair in ((first, second), (third, last))]
    assert torch.equal(call(*map(outer, pairs)), two)


@pytest.mark.parametrize("iterable", ITERABLES)
def test_modules_take_them(iterable):
    students, teachers = ([features(2, 3, 4, 4), features(2, 3, 5, 5)] for _ in range(2))
    loss = fastkd.nn.HintLoss(3, 3)
    torch.testing.assert_close(
        loss(iterable(students), iterable(teachers)), loss(students, teachers)
    )
    loss.regressor.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(
        loss(iterable(students), iterable(teachers)), loss(students, teachers)
    )


def test_an_error_inside_of_an_iterable_is_its_own():
    def broken():
        yield torch.randn(4, CLASSES)
        raise TypeError("of the user's own")

    with pytest.raises(TypeError, match="of the user's own"):
        fastkd.soft_target_loss(torch.randn(4, CLASSES), broken())


@pytest.mark.thorough
@pytest.mark.parametrize("iterable", [list, tuple, collections.deque, Sequence, dict_values])
def test_sequences_in_compiled_code(backend, iterable):
    """Values of a dictionary only where it is looked into inside, which is dynamo's own limit."""
    sides = {"one": features(2, 3, 4, 4), "two": features(2, 5, 4, 4)}
    other = [features(2, 3, 4, 4), features(2, 5, 4, 4)]

    def losses(student, teacher):
        student, teacher = iterable(student.values()), iterable(teacher)
        return (
            fastkd.fsp_loss(student, teacher, backend=backend)
            + fastkd.hint_loss(student, teacher, backend=backend)
            + fastkd.attention_transfer_loss(student, teacher, backend=backend)
        )

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sides, other), losses(sides, other))

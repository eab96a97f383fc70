"""The flow between layers against the oracle."""

import math

import agreement
import layouts
import pytest
import torch
from agreement import DTYPES
from agreement_features import distinct, features
from agreement_relations import check_flow, in_pairs

import fastkd

# Of the student's two layers and the teacher's: channels, heights and widths.
SHAPES = [
    [(4, 5, 6), (7, 5, 6), (4, 5, 6), (7, 5, 6)],
    [(4, 8, 8), (3, 4, 4), (4, 6, 9), (3, 3, 3)],  # the first is larger
    [(1, 3, 2), (2, 7, 5), (1, 4, 4), (2, 5, 7)],  # the second is, and bins overlap
    [(3, 6, 2), (2, 4, 5), (3, 1, 1), (2, 5, 5)],  # each in one dimension
    [(37, 9, 70), (5, 4, 33), (37, 8, 8), (5, 2, 4)],  # wider than vectors are
    [(3, 27, 36), (2, 13, 18), (3, 13, 18), (2, 13, 18)],  # more bins than are done together
]


@pytest.fixture(autouse=True)
def promised(monkeypatch):
    for tolerance in (agreement.LOSS_TOLERANCE, agreement.GRADIENT_TOLERANCE):
        monkeypatch.setitem(tolerance, torch.float32, 1e-6)


def draw(shapes, batch=3, dtype=torch.float32):
    """A pair of the student's and one of the teacher's."""

    def size(student, teacher):
        """Of sums of terms of either sign, which cancel."""
        nothing = [torch.zeros_like(x) for x in teacher]
        magnitudes = [x.abs() for x in student]
        terms = math.prod(map(min, zip(*(x.shape[2:] for x in student), strict=True)))
        return 10 * fastkd.fsp_loss(magnitudes, nothing, backend="reference") / terms

    def sides():
        return in_pairs([features(batch, *shape, dtype=dtype) for shape in shapes])

    return distinct(sides, fastkd.fsp_loss, size)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(backend, shapes, dtype):
    student, teacher = draw(shapes, dtype=dtype)
    check_flow([student], [teacher], backend)
    check_flow([student], [teacher], backend, grad_output=3.7)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches(backend, batch):
    for shapes in SHAPES:
        student, teacher = draw(shapes, batch)
        check_flow([student], [teacher], backend)


def test_several_pairs_are_summed(backend):
    students, teachers = zip(*map(draw, SHAPES), strict=True)
    check_flow(students, teachers, backend)
    losses = [fastkd.fsp_loss(*pairs) for pairs in zip(students, teachers, strict=True)]
    total = fastkd.fsp_loss([list(s) for s in students], tuple(teachers), backend=backend)
    torch.testing.assert_close(total, sum(losses))


def test_one_pair_is_a_sequence_of_one(backend):
    student, teacher = draw(SHAPES[1])
    alone = fastkd.fsp_loss(student, list(teacher), backend=backend)
    assert torch.equal(alone, fastkd.fsp_loss([student], [teacher], backend=backend))


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(backend, dtype, other):
    student, teacher = draw(SHAPES[1])
    check_flow([(student[0].to(dtype), student[1].to(other))], [teacher], backend)


@pytest.mark.parametrize("layout", layouts.FEATURES)
def test_layouts(backend, layout):
    for shapes in (*SHAPES[:2], *SHAPES[-2:]):
        student, teacher = draw(shapes)
        student, teacher = tuple(map(layout, student)), (teacher[0], layout(teacher[1]))
        check_flow([student], [teacher], backend)


def test_half_precision_beyond_its_squares(backend):
    pair, other = draw(SHAPES[0])
    pair = tuple((300 + x).half() for x in pair)
    check_flow([pair], [tuple((280 + x).half() for x in other)], backend)


@pytest.mark.parametrize("layout", layouts.FEATURES[:2])
def test_ties_of_the_maximum(backend, layout):
    """The gradient goes to the first of them in memory."""
    for shapes in SHAPES[1:]:
        student, teacher = (tuple(layout(x.round()) for x in pair) for pair in draw(shapes))
        check_flow([student], [teacher], backend)


def test_nan_is_a_maximum(backend):
    student, teacher = draw(SHAPES[1])
    for pair in (student, teacher):
        first = pair[0].clone()
        first[0, 0, 3, 2] = torch.nan
        sides = ((first, pair[1]), teacher) if pair is student else (student, (first, pair[1]))
        assert fastkd.fsp_loss(*sides, backend=backend).isnan()


def test_under_autocast(backend):
    results = []
    (first, second), teacher = draw(SHAPES[0])
    for enabled in (False, True):
        leaf = first.clone().requires_grad_()
        with torch.autocast(first.device.type, dtype=torch.bfloat16, enabled=enabled):
            loss = fastkd.fsp_loss((leaf, second), teacher, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    assert all(map(torch.equal, *results))

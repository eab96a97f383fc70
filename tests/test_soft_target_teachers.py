"""Soft targets from several teachers, against the oracle."""

import math

import layouts
import numpy as np
import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, edge_labels, logits, some_labels
from calls import ensemble
from torch.autograd import gradcheck, gradgradcheck
from wrapped import Wrapped, plain

import fastkd


def teachers(count, *shape, dtype=torch.float32):
    """Some more certain than others; none so much that float32 does not hold its gradient."""
    return [logits(*shape, dtype=dtype, scale=1.0 + i % 3) for i in range(count)]


@pytest.mark.parametrize("classes", [2, 31, 256, 1025, 4097])
@pytest.mark.parametrize("dtype", DTYPES)
def test_class_counts(backend, dtype, classes):
    student, sides = logits(5, classes, dtype=dtype), teachers(3, 5, classes, dtype=dtype)
    check_soft_target(student, sides, backend, temperature=2.0, teacher_weights=[1, 0.5, 2])
    labels = some_labels(5, classes=classes)
    check_distillation(student, sides, labels, backend, label_smoothing=0.1, teachers=False)


@pytest.mark.filterwarnings("ignore:logits with a single class")
def test_one_class(backend):
    loss = fastkd.soft_target_loss(torch.randn(3, 1), [torch.randn(3, 1)] * 3, backend=backend)
    assert loss.abs() < 1e-6


@pytest.mark.parametrize("count", [2, 5, 64])
def test_numbers_of_teachers(backend, count):
    check_soft_target(logits(9, 40), teachers(count, 9, 40), backend)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(backend, dtype, reduction, temperature):
    sides = logits(8, 50, dtype=dtype), *teachers(2, 8, 50, dtype=dtype)
    student, *sides = (min(temperature, 1) * x for x in sides)
    upstream = torch.randn(8) if reduction == "none" else 3.7
    check_soft_target(
        student, sides, backend, upstream, temperature=temperature, reduction=reduction,
        scale_t2=temperature < 1,
    )  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (-0.5, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_the_terms(backend, dtype, weights, smoothing):
    student, sides = logits(6, 50, dtype=dtype), teachers(2, 6, 50, dtype=dtype)
    soft, hard = weights
    check_distillation(
        student, sides, some_labels(6, classes=50), backend, 3.0,
        soft_weight=soft, hard_weight=hard, label_smoothing=smoothing, temperature=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("layout", layouts.GENERAL)
def test_layouts_and_dims(backend, layout):
    for shape, dim in [((9, 37), -1), ((2, 5, 3, 4), 1), ((5, 30), 0)]:
        student, sides = logits(*shape), teachers(2, *shape)
        rows = [size for axis, size in enumerate(shape) if axis != dim % len(shape)]
        labels = some_labels(*rows, classes=shape[dim])
        check_distillation(layout(student), sides, labels, backend, dim=dim)
        check_distillation(student, [sides[0], layout(sides[1])], labels, backend, dim=dim)


@pytest.mark.parametrize("dtypes", [(0, 2, 3), (2, 0, 3), (3, 3, 0), (0, 1, 0), (3, 1, 2)])
def test_mixed_dtypes(backend, dtypes):
    student, *sides = (logits(8, 65, dtype=DTYPES[i]) for i in dtypes)
    check_soft_target(student, sides, backend, teacher_weights=(1, 2))


@pytest.mark.parametrize("shape", [(40, 30), (3, 5, 70), (2, 5, 9, 8), (1, 4, 33), (5, 3, 24)])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float64, torch.float32)])
def test_a_grad_output_for_each_row(backend, shape, dtypes):
    student, sides = logits(*shape, dtype=dtypes[0]), teachers(2, *shape, dtype=dtypes[1])
    check_soft_target(student, sides, backend, dim=1, reduction="none", temperature=2.0)


@pytest.mark.parametrize("shape", [(6, 40), (3, 1100), (3, 6, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_excluded_classes(backend, dtype, shape):
    """By one teacher, by all, by all and the student."""
    student, sides = logits(*shape, dtype=dtype), teachers(2, *shape, dtype=dtype)
    sides[0][:, ::2] = -math.inf
    sides[1][:, 2::4] = -math.inf
    student[:, 2::4] = -math.inf
    check_soft_target(student, sides, backend, dim=1, teachers=False)
    # The whole second block of 1,024 classes, too.
    for x in (student, *sides):
        x[:, 1024:] = -math.inf
    check_soft_target(student, sides, backend, dim=1, teachers=False)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_class_that_the_student_alone_excludes(backend, dim):
    """It is infinitely wrong, also where every teacher's probability underflows."""
    student, sides = logits(9, 9), teachers(2, 9, 9)
    student[:, 3] = -math.inf
    sides[0][:, 3] = -math.inf
    sides[1][0, 3] = -1e4
    sides[1][1, 3] = -math.inf
    arguments = [x.T.contiguous() if dim == 0 else x for x in (student, *sides)]
    check_soft_target(
        arguments[0], arguments[1:], backend, dim=dim, reduction="none", teachers=False
    )
    loss = ensemble(fastkd.soft_target_loss)(*arguments, dim=dim, reduction="none", backend=backend)
    assert loss.isinf().tolist() == [True, False] + [True] * 7


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_nan_stays_in_its_row(backend, dim, position, value):
    tensors = [logits(9, 9), *teachers(2, 9, 9)]
    for x in tensors:
        x[2, 4] = -math.inf
    tensors[position][2, 4] = value
    tensors = [x.T.contiguous() if dim == 0 else x for x in tensors]
    check_soft_target(tensors[0], tensors[1:], backend, dim=dim, reduction="none", teachers=False)


@pytest.mark.parametrize("position", [0, 1])
def test_a_row_that_one_side_excludes_is_nan(backend, position):
    tensors = [logits(3, 6), *teachers(2, 3, 6)]
    tensors[position][1] = -math.inf
    loss = ensemble(fastkd.soft_target_loss)(*tensors, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dim", [0, 1])
def test_ignored_rows_may_hold_anything(backend, dim, poison):
    tensors = [logits(9, 12), *teachers(2, 9, 12)]
    labels = torch.tensor([1, -100, 2, 4, -100, 5, 0, 3, -100])
    for x in tensors:
        x[1], x[4, 2] = poison, poison
    tensors = [x.T.contiguous() if dim == 0 else x for x in tensors]
    check_distillation(tensors[0], tensors[1:], labels, backend, dim=dim)


def test_soft_weight_0_does_not_look_at_the_teachers(backend):
    student, sides = logits(4, 10), teachers(2, 4, 10)
    sides[0][1, 3], sides[1][2, 4] = math.nan, math.inf
    labels = torch.tensor([3, 1, 2, -100])
    check_distillation(student, sides, labels, backend, soft_weight=0.0, hard_weight=1.0)


@pytest.mark.parametrize("shape", [(5, 10), (0, 10), (2, 10, 0)])
def test_all_ignored_and_empty(backend, shape):
    student, sides = logits(*shape), teachers(2, *shape)
    student[:1], sides[0][:1], sides[1][:1] = math.nan, math.inf, math.nan
    labels = torch.full((shape[0], *shape[2:]), -100)
    parts = fastkd.distillation_loss(
        student, sides, labels, dim=1, return_parts=True, backend=backend
    )
    assert [part.item() for part in parts] == [0.0, 0.0, 0.0]
    check_distillation(student, sides, labels, backend, dim=1)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_parts(backend, needs_grad):
    student, sides, labels = logits(6, 30), teachers(3, 6, 30), some_labels(6, classes=30)
    keywords = {"teacher_weights": [3, 0, 1], "backend": backend}
    loss, hard, soft = fastkd.distillation_loss(
        student.requires_grad_(needs_grad), sides, labels, return_parts=True, **keywords
    )
    assert loss.requires_grad == needs_grad
    assert not soft.requires_grad
    torch.testing.assert_close(loss.detach(), 0.1 * hard + 0.9 * soft)
    keywords["hard_weight"] = 0.0
    alone = fastkd.distillation_loss(student.detach(), sides, labels, soft_weight=1.0, **keywords)
    torch.testing.assert_close(soft, alone)


def test_it_is_the_mean_of_probabilities(backend):
    """Not of logits: so says `torch`'s divergence from it."""
    student, sides = logits(8, 30), teachers(3, 8, 30)
    p = torch.stack([(x / 2).softmax(-1) for x in sides]).mean(0)
    expected = torch.nn.functional.kl_div((student / 2).log_softmax(-1), p, reduction="batchmean")
    actual = fastkd.soft_target_loss(student, sides, temperature=2.0, backend=backend)
    torch.testing.assert_close(actual, 4 * expected)


def test_a_sequence_of_one_is_the_plain_loss(backend):
    student, teacher, labels = logits(8, 30), logits(8, 30), some_labels(8, classes=30)
    for sequence in ([teacher], (teacher,)):
        for weights in (None, [0.3], (7,)):
            keywords = {"backend": backend, "teacher_weights": weights}
            assert torch.equal(
                fastkd.soft_target_loss(student, sequence, **keywords),
                fastkd.soft_target_loss(student, teacher, backend=backend),
            )
            assert torch.equal(
                fastkd.distillation_loss(student, sequence, labels, **keywords),
                fastkd.distillation_loss(student, teacher, labels, backend=backend),
            )


@pytest.mark.parametrize("weights", [[0, 1, 2], [0, 1, 0], [0, 1e308, 1e308]])
def test_a_teacher_of_weight_0_is_not_looked_at(backend, weights):
    """It gets a gradient of 0 if it requires one, whatever it holds."""
    student, sides = logits(8, 30), teachers(3, 8, 30)
    sides[0][0], sides[0][1] = math.nan, -math.inf
    check_soft_target(student, sides, backend, teacher_weights=weights)
    check_distillation(student, sides, some_labels(8, classes=30), backend, teacher_weights=weights)


def test_only_the_ratio_of_weights_counts(backend):
    student, sides = logits(8, 30), teachers(2, 8, 30)
    first, *others = (
        fastkd.soft_target_loss(student, sides, teacher_weights=w, backend=backend)
        for w in ([1, 3], (0.5, 1.5), [5e307, 1.5e308])
    )
    assert torch.equal(first, others[0])
    assert fastkd.soft_target_loss(student, sides, backend=backend) == fastkd.soft_target_loss(
        student, sides, teacher_weights=[5, 5], backend=backend
    )


@pytest.mark.parametrize("keywords", [{}, {"reduction": "none", "dim": 1}, {"temperature": 3.0}])
def test_derivatives_of_the_reference(keywords):
    inputs = [torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def loss(*x):
        call = ensemble(fastkd.soft_target_loss)
        return call(*x, teacher_weights=[1, 2], backend="reference", **keywords)

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("keywords", [{}, {"reduction": "none", "dim": 1}, {"temperature": 3.0}])
def test_derivatives_of_a_kernel(kernel_backend, keywords):
    """Also the teachers', alone and together with the student's."""
    inputs = [torch.randn(1, 3, 3, dtype=torch.float64) for _ in range(3)]

    def loss(*x):
        call = ensemble(fastkd.soft_target_loss)
        return call(*x, teacher_weights=[1, 2], backend=kernel_backend, **keywords)

    for wanted in ([0], [2], [0, 1], [0, 1, 2]):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        assert gradcheck(loss, leaves)


@pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")
@pytest.mark.parametrize("position", [0, 2])
def test_tensors_whose_memory_is_not_theirs(backend, position):
    tensors = [logits(4, 10), *teachers(2, 4, 10)]
    call = ensemble(fastkd.soft_target_loss)
    expected = call(*tensors, backend=backend)
    x = tensors[position]
    wrapped = [*tensors[:position], Wrapped(x), *tensors[position + 1 :]]
    torch.testing.assert_close(plain(call(*wrapped, backend=backend)), expected)
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    torch.testing.assert_close(
        call(*tensors[:position], negated, *tensors[position + 1 :]), expected
    )
    stacked = torch.stack([x, x + 1])
    mapped = torch.func.vmap(lambda one: call(*tensors[:position], one, *tensors[position + 1 :]))(
        stacked
    )
    torch.testing.assert_close(mapped[0], expected)


def test_explain_names_the_backend(kernel_backend):
    tensors = logits(4, 10), teachers(2, 4, 10)
    found = fastkd.explain(fastkd.soft_target_loss, *tensors, backend=kernel_backend)
    assert found.chosen == kernel_backend


def test_compiled_with_other_weights(backend):
    student, sides = logits(4, 10), teachers(2, 4, 10)
    torch._dynamo.reset()
    compiled = torch.compile(fastkd.soft_target_loss, fullgraph=True, backend="aot_eager")
    for weights in (None, [1.0, 2.0], [1.0, 3.0], [2, 0], (4.0, 1.0)):
        keywords = {"teacher_weights": weights, "backend": backend}
        actual = compiled(student, sides, **keywords)
        torch.testing.assert_close(actual, fastkd.soft_target_loss(student, sides, **keywords))
    torch._dynamo.reset()


def test_modules(backend):
    student, sides, labels = logits(8, 30), teachers(2, 8, 30), some_labels(8, classes=30)
    keywords = {"teacher_weights": [1.0, 3.0], "backend": backend}
    soft, both = fastkd.nn.SoftTargetLoss(**keywords), fastkd.nn.DistillationLoss(**keywords)
    assert torch.equal(soft(student, sides), fastkd.soft_target_loss(student, sides, **keywords))
    assert torch.equal(
        both(student, sides, labels),
        fastkd.distillation_loss(student, sides, labels, **keywords),
    )


X, Y = torch.randn(4, 10), torch.randn(4, 11)
BAD = [
    ([], None, ValueError, ["1 to 64 teachers", "got 0"]),
    ([X] * 65, None, ValueError, ["1 to 64 teachers", "got 65"]),
    ([X, Y], None, ValueError, ["teacher_logits[1]", "same shape", "(4, 10)", "(4, 11)"]),
    ([X, X.int()], None, TypeError, ["teacher_logits[1]", "int32"]),
    ([X, None], None, TypeError, ["teacher_logits[1]", "tensor", "NoneType"]),
    ([[X], X], None, TypeError, ["teacher_logits[0]", "tensor", "list"]),
    ([X, X.to("meta")], None, ValueError, ["teacher_logits[1]", "same device", "meta"]),
    ("teachers", None, TypeError, ["teacher_logits", "tensor", "str"]),
    ({"a": X}, None, TypeError, ["teacher_logits", "tensor", "dict"]),
    (iter([]), None, ValueError, ["1 to 64 teachers", "got 0"]),
    (X, [1.0], ValueError, ["teacher_weights", "sequence of teachers", "one tensor"]),
    ([X, X], [1.0], ValueError, ["teacher_weights", "each of 2 teachers", "got 1"]),
    ([X, X], [], ValueError, ["teacher_weights", "each of 2 teachers", "got 0"]),
    ([X, X], [0, 0.0], ValueError, ["teacher_weights", "not all be 0", "[0, 0.0]"]),
    ([X], [0], ValueError, ["teacher_weights", "not all be 0", "[0]"]),
    ([X, X], [1, -0.5], ValueError, ["teacher_weights[1]", ">= 0", "-0.5"]),
    ([X, X], [math.nan, 1], ValueError, ["teacher_weights[0]", "finite", "nan"]),
    ([X, X], [math.inf, 1], ValueError, ["teacher_weights[0]", "finite", "inf"]),
    ([X, X], ["1", 1], TypeError, ["teacher_weights[0]", "number", "str"]),
    ([X, X], [True, 1], TypeError, ["teacher_weights[0]", "number", "bool"]),
    ([X, X], torch.ones(2), TypeError, ["teacher_weights", "sequence", "Tensor"]),
    ([X, X], 1.0, TypeError, ["teacher_weights", "sequence", "float"]),
    ([X, X], "12", TypeError, ["teacher_weights", "sequence", "str"]),
    ([X, X], {0: 1, 1: 2}, TypeError, ["teacher_weights", "sequence", "dict"]),
    ([X, X], np.ones((2, 2)), TypeError, ["teacher_weights[0]", "number", "ndarray"]),
    ([X, X], np.array([True, True]), TypeError, ["teacher_weights[0]", "number", "bool"]),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: " ".join(case[3])[:40])
def test_bad_arguments(case):
    teacher, weights, error, words = case
    for call in (
        lambda **k: fastkd.soft_target_loss(X, teacher, **k),
        lambda **k: fastkd.distillation_loss(X, teacher, torch.zeros(4, dtype=torch.int64), **k),
    ):
        with pytest.raises(error) as caught:
            call(teacher_weights=weights)
        assert [word for word in words if word not in str(caught.value)] == []


def test_many_axes(backend):
    """Axes of which no two are one stretch in every tensor."""
    shape = (2, 3, 2, 5, 2)
    student, *sides = (logits(*shape) for _ in range(3))
    turned = sorted(range(5), key=lambda axis: (axis % 2, axis))
    back = [turned.index(axis) for axis in range(5)]
    sides[1] = sides[1].permute(turned).contiguous().permute(back)
    for dim in (1, 3):
        check_soft_target(student, sides, backend, dim=dim, teachers=False)


@pytest.mark.parametrize("classes", [40, 1200])
def test_as_many_teachers_as_there_can_be(backend, classes):
    student = logits(3, classes, dtype=torch.bfloat16)
    sides = [logits(3, classes, dtype=DTYPES[i % 4]) for i in range(64)]
    labels = edge_labels(3, classes)
    check_distillation(student, sides, labels, backend, teachers=False)


def test_offsets_beyond_32_bits(backend):
    near, other = (logits(4, 520, dtype=torch.bfloat16) for _ in range(2))
    far = layouts.far_apart(logits(4, 520, dtype=torch.bfloat16), 2**30 + 65)
    check_soft_target(near, [other, far], backend, teachers=False)
    check_soft_target(far, [other, other], backend, teachers=False)

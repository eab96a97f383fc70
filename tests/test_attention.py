"""Attention maps and attention transfer against the oracle."""

import itertools
import math

import layouts
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from agreement import DTYPES, array
from agreement_features import check_map, check_transfer, features

import fastkd

KINDS = [
    *[("sum", 1.0)],
    *[("sum_pow", p) for p in (1.0, 1.5, 2.0, 2.7, 3.0, 4.0)],
    *[("max_pow", p) for p in (1.0, 1.5, 2.0, 2.7, 3.0)],
]
DISTANCES = [
    *[("norm", order) for order in (1.0, 1.5, 2.0, 3.0, math.inf)],
    *[("mse", 2.0)],
]


def distinct_features(student_shape, teacher_shape, dtype=torch.float32, **map_keywords):
    """A pair whose maps differ at every position by far more than rounding.

    The gradient of a norm of order below 2 is that of |d|^order: where d is nearly 0 no precision
    is enough for it, and once in some thousands of random pairs a test would measure that.
    """
    while True:
        pair = [features(*shape, dtype=dtype) for shape in (student_shape, teacher_shape)]
        q_s, q_t = (oracle.attention_map(array(x), **map_keywords)[0] for x in pair)
        if (np.abs(q_s - q_t) > 1e-4 * np.maximum(q_s, q_t)).all():
            return pair


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("kind", "p"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps(backend, dtype, kind, p, normalize):
    check_map(features(3, 16, 5, 7, dtype=dtype), backend, kind=kind, p=p, normalize=normalize)


# Every kind with every distance; in the other dtypes, which change neither, each once.
KINDS_AND_DISTANCES = [
    *[(torch.float32, *both) for both in itertools.product(KINDS, DISTANCES)],
    *[(dtype, kind, ("norm", 2.0)) for dtype in DTYPES[1:] for kind in KINDS],
    *[(dtype, ("sum_pow", 2.0), other) for dtype in DTYPES[1:] for other in DISTANCES],
]


@pytest.mark.parametrize(
    ("dtype", "kind", "p", "distance", "order"),
    [(dtype, *kind, *distance) for dtype, kind, distance in dict.fromkeys(KINDS_AND_DISTANCES)],
)
def test_kinds_and_distances(backend, dtype, kind, p, distance, order):
    student, teacher = distinct_features((4, 16, 7, 7), (4, 24, 7, 7), dtype, kind=kind, p=p)
    check_transfer(student, teacher, backend, kind=kind, p=p, distance=distance, order=order)


@pytest.mark.parametrize("distance", ["norm", "mse"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(backend, dtype, reduction, distance):
    student, teacher = features(5, 8, 6, 6, dtype=dtype), features(5, 12, 6, 6, dtype=dtype)
    keywords = {"reduction": reduction, "distance": distance, "beta": 1e3}
    check_transfer(student, teacher, backend, **keywords)
    if reduction == "none":
        check_transfer(student, teacher, backend, torch.randn(5), **keywords)


@pytest.mark.parametrize("order", [20.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_high_orders(backend, dtype, order):
    """Powers of numbers below 1 that no float holds: the norm is nearly the largest of them."""
    check_transfer(features(5, 6, 7, dtype=dtype), features(5, 4, 7), backend, order=order)


@pytest.mark.parametrize("beta", [-0.5, 0.0])
@pytest.mark.parametrize(("distance", "order"), DISTANCES)
def test_beta_of_any_sign(backend, beta, distance, order):
    student, teacher = distinct_features((5, 8, 6, 6), (5, 12, 6, 6))
    check_transfer(student, teacher, backend, beta=beta, distance=distance, order=order)


@pytest.mark.parametrize("grad_output", [3.7, 1 / 3, 65536.0, 0.0])
@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output(backend, dtype, kind, grad_output):
    student, teacher = features(32, 16, 8, 8, dtype=dtype), features(32, 16, 8, 8, dtype=dtype)
    check_transfer(student, teacher, backend, grad_output, kind=kind)


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences(backend, dtype, reduction, kind):
    students = [features(3, 16, 8, 8, dtype=dtype), features(3, 32, 4, 4, dtype=dtype)]
    teachers = [features(3, 24, 8, 8, dtype=dtype), features(3, 8, 4, 4, dtype=dtype)]
    keywords = {"kind": kind, "reduction": reduction}
    check_transfer(students, teachers, backend, **keywords)
    check_transfer(
        students, teachers, backend, torch.randn(2, 3) if reduction == "none" else -2.5, **keywords
    )


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
@pytest.mark.parametrize("student_layout", layouts.FEATURES)
@pytest.mark.parametrize("teacher_layout", layouts.FEATURES)
def test_layouts(backend, student_layout, teacher_layout, kind):
    for dtype in (torch.float32, torch.bfloat16):
        student = student_layout(features(3, 17, 5, 6, dtype=dtype))
        teacher = teacher_layout(features(3, 9, 5, 6, dtype=dtype))
        check_transfer(student, teacher, backend, kind=kind)


@pytest.mark.parametrize("layout", layouts.FEATURES)
@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_map_layouts(backend, dtype, kind, layout):
    check_map(layout(features(3, 17, 5, 6, dtype=dtype)), backend, kind=kind)
    check_map(layout(features(3, 5, 17, dtype=dtype)), backend, kind=kind)
    check_map(layout(features(2, 3, 4, 5, 3, dtype=dtype)), backend, kind=kind)


@pytest.mark.parametrize("layout", layouts.FEATURES)
@pytest.mark.parametrize("channel_dim", [-1, 2, 3])
@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_dims(backend, dtype, kind, channel_dim, layout):
    shapes = ((3, 5, 48), (3, 5, 32)) if channel_dim == 2 else ((3, 4, 5, 12), (3, 4, 5, 7))
    student, teacher = (layout(features(*s, dtype=dtype, channel_dim=-1)) for s in shapes)
    check_transfer(student, teacher, backend, kind=kind, channel_dim=channel_dim)
    check_map(student, backend, kind=kind, channel_dim=channel_dim)


@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_other_ranks_count_channels_from_their_own_end(backend, dtype, kind):
    shapes = [(3, 5, 12), (3, 4, 6, 12), (3, 2, 3, 4, 7)]
    students, teachers = ([features(*x, dtype=dtype, channel_dim=-1) for x in shapes] for _ in "st")
    check_transfer(students, teachers, backend, kind=kind, channel_dim=-1)


@pytest.mark.parametrize("student_dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
def test_mixed_dtypes(backend, student_dtype, teacher_dtype):
    student = features(3, 8, 6, 6, dtype=student_dtype)
    teacher = layouts.channels_last(features(3, 8, 6, 6, dtype=teacher_dtype))
    check_transfer(student, teacher, backend)
    check_transfer([student, teacher], [teacher, student], backend)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_one_pair_of_another_dtype(backend, reduction):
    for dtype in DTYPES:
        students = [features(3, 4, 5), features(3, 4, 5, dtype=dtype)]
        teachers = [features(3, 4, 5), features(3, 4, 5)]
        check_transfer(students, teachers, backend, grad_output=2.0, reduction=reduction)
        check_transfer(teachers, students, backend, grad_output=2.0, reduction=reduction)


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last])
@pytest.mark.parametrize("channels", [1, 2, 3, 31, 33, 512, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_channel_counts(backend, dtype, channels, layout):
    student = layout(features(2, channels, 5, 5, dtype=dtype))
    check_transfer(student, features(2, 8, 5, 5, dtype=dtype), backend)
    check_map(student, backend, kind="max_pow")


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last])
@pytest.mark.parametrize("spatial", [(1,), (2, 1), (7, 7), (25, 42), (31,), (33,), (1000,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_spatial_sizes(backend, dtype, spatial, layout):
    student, teacher = (layout(features(8, 6, *spatial, dtype=dtype)) for _ in range(2))
    if spatial == (1,):
        # The map of one position is the constant 1: exactly 0 in the oracle, nearly so elsewhere.
        loss = fastkd.attention_transfer_loss(student, teacher, backend=backend)
        assert loss.item() <= 1e-6
        return
    check_transfer(student, teacher, backend)
    check_transfer(student, teacher, backend, kind="max_pow", distance="mse")


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
@pytest.mark.parametrize(("distance", "order"), DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_maps(backend, dtype, kind, distance, order):
    student, teacher = distinct_features((4, 8, 5, 5), (4, 8, 5, 5), dtype, kind=kind)
    student[0], teacher[1], student[2], teacher[2] = 0, 0, 0, 0
    keywords = {"kind": kind, "distance": distance, "order": order}
    check_transfer(student, teacher, backend, **keywords)
    leaves = student.requires_grad_(), teacher.requires_grad_()
    fastkd.attention_transfer_loss(*leaves, backend=backend, **keywords).backward()
    assert (student.grad[[0, 2]] == 0).all()
    assert (teacher.grad[[1, 2]] == 0).all()


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
@pytest.mark.parametrize("normalize", [True, False])
def test_zero_features_have_zero_gradient(backend, kind, normalize):
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    q = fastkd.attention_map(x, kind=kind, normalize=normalize, backend=backend)
    q.sum().backward()
    assert (q == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_of_the_maximum_go_to_the_lowest_channel(backend, dtype, p, layout):
    x = torch.randint(-2, 3, (4, 40, 5, 5)).to(dtype)
    x[0] = -1
    x[1, 3:] = x[1, :1]
    check_map(layout(x), backend, kind="max_pow", p=p)
    check_transfer(layout(x), features(4, 8, 5, 5, dtype=dtype), backend, kind="max_pow", p=p)


@pytest.mark.parametrize(("distance", "order"), DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_norm_at_0_is_0(backend, dtype, distance, order):
    student = features(3, 4, 5, 5, dtype=dtype).requires_grad_()
    loss = fastkd.attention_transfer_loss(
        student, student.detach(), distance=distance, order=order, backend=backend
    )
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_ties_of_the_infinity_norm_share_the_gradient(backend):
    student = torch.tensor([[[3.0, 4.0]]])
    teacher = torch.tensor([[[4.0, 3.0]]])
    check_transfer(student, teacher, backend, order=math.inf, p=1.0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("kind", ["sum_pow", "max_pow"])
def test_half_precision_does_not_overflow_or_underflow(backend, kind, p):
    for scale in (300.0, 6e4, 1e-4):
        student, teacher = ((features(2, 8, 5, 5).clamp(-1, 1) * scale).half() for _ in range(2))
        check_transfer(student, teacher, backend, kind=kind, p=p)


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
@pytest.mark.parametrize("scale", [1e-4, 1e9, 1e12])
def test_scale_of_float32(backend, kind, scale):
    """|x|^p is representable; its square, inside the norm of the map, need not be."""
    student, teacher = (features(2, 8, 5, 5) * scale for _ in range(2))
    check_transfer(student, teacher, backend, kind=kind)
    check_map(student, backend, kind=kind)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_below_eps(backend, dtype, eps):
    student, teacher = features(3, 4, 5, 5, dtype=dtype), features(3, 4, 5, 5, dtype=dtype)
    student[1] *= 0.01
    check_transfer(student, teacher, backend, eps=eps)
    check_map(student, backend, eps=eps)


@pytest.mark.parametrize("sizes", [((8, 8), (4, 4)), ((7, 5), (14, 13)), ((9, 4), (6, 8))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_resize(backend, dtype, sizes):
    student = features(2, 6, *sizes[0], dtype=dtype)
    teacher = features(2, 9, *sizes[1], dtype=dtype)
    equal = features(2, 5, 3, 3, dtype=dtype)
    check_transfer(student, teacher, backend, resize="adaptive_avg_pool")
    check_transfer(
        [layouts.channels_last(student), equal], [teacher, equal.flip(1)], backend,
        resize="adaptive_avg_pool", kind="max_pow",
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(backend, dtype, reduction):
    student, teacher = features(0, 6, 4, 4, dtype=dtype), features(0, 9, 4, 4, dtype=dtype)
    check_transfer(student, teacher, backend, reduction=reduction)
    check_transfer([student] * 2, [teacher] * 2, backend, reduction=reduction)
    check_map(student, backend, kind="max_pow")


def test_a_list_of_one_is_a_pair(backend):
    student, teacher = features(2, 6, 4, 4), features(2, 9, 4, 4)
    one = fastkd.attention_transfer_loss(student, teacher, backend=backend)
    assert fastkd.attention_transfer_loss((student,), [teacher], backend=backend) == one


def test_nan_in_one_sample_spares_the_others(backend):
    student, teacher = features(4, 6, 4, 4), features(4, 9, 4, 4)
    student[2, 3, 1, 1] = math.nan
    for kind in ("sum", "sum_pow", "max_pow"):
        loss = fastkd.attention_transfer_loss(
            student, teacher, kind=kind, reduction="none", backend=backend
        )
        assert loss.isnan().tolist() == [False, False, True, False]


def test_coincides_with_the_released_code(backend):
    """`at(x)` and `at_loss` of the authors' repository."""

    def at(x):
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    student, teacher = features(4, 16, 8, 8), features(4, 24, 8, 8)
    expected = (at(student) - at(teacher)).pow(2).mean()
    actual = fastkd.attention_transfer_loss(student, teacher, distance="mse", backend=backend)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=0)


def test_coincides_with_the_equation_of_the_paper(backend):
    student, teacher = features(4, 16, 8, 8), features(4, 24, 8, 8)
    maps = [F.normalize(x.pow(2).sum(1).flatten(1)) for x in (student, teacher)]
    expected = 500 * (maps[0] - maps[1]).norm(dim=1).mean()
    actual = fastkd.attention_transfer_loss(student, teacher, beta=1e3, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=0)

"""What it means that a loss agrees with the oracle, in value and gradients."""

import functools
import math

import numpy as np
import oracle
import oracle_metrics
import oracle_rows
import torch
from torch import float32, float64

import fastkd

# What holds a teacher that states its probabilities.
GIVEN = {
    "probabilities": fastkd.Probabilities,
    "log_probabilities": fastkd.LogProbabilities,
}
RELATIONS = ["rkd_distance_loss", "rkd_angle_loss"]
DTYPES = [float32, float64, torch.float16, torch.bfloat16]

# Of the loss, or of the loss's natural size where that is larger; of the gradient's norm.
LOSS_TOLERANCE = {float32: 2e-6, float64: 1e-12}
GRADIENT_TOLERANCE = {float32: 3e-6, float64: 1e-12}
# Half precision: the error of rounding the exact gradient, and no more than 5% of error besides.
HALF_TOLERANCE = 1.05
# Of the norm of the terms of a gradient, added up where they are subtracted: what is left of terms
# that cancel. It counts where it is larger than the tolerance above; half precision adds the two.
CANCELLED_TOLERANCE = {float32: 5e-7, float64: 5e-15}


def array(x):
    """Exact, whatever the dtype and the device."""
    x = x.detach().cpu()
    return x.double().numpy() if x.is_floating_point() else x.numpy()


def leaf(x, requires_grad=True):
    """A leaf that shares values and strides with `x`."""
    return x.detach().requires_grad_(requires_grad)


def check(
    loss, expected, tensors, *, students=1, grad_output=None, size=0.0, teachers=True, terms=None
):
    """`loss(*tensors)` and its gradients are those of `expected(*arrays, grad_output=...)`.

    The first `students` tensors require grad alone (kernels compute that gradient in forward), and
    then together with all others unless `teachers` is False. `size` is what the loss may be
    rounded against where it is smaller. `terms(*arrays, grad_output=...)` is what gradients may be
    rounded against.
    """
    upstream = 1.0 if grad_output is None else array(torch.as_tensor(grad_output, dtype=float64))
    arrays = [*map(array, tensors)]
    value, expected_gradients = expected(*arrays, grad_output=upstream)
    of_terms = terms and functools.cache(lambda: terms(*arrays, grad_output=upstream))
    for wanted in {students, len(tensors) if teachers else students}:
        leaves = [leaf(x, index < wanted) for index, x in enumerate(tensors)]
        actual = loss(*leaves)
        assert_loss(actual, value, tensors, size)
        if grad_output is None:
            cotangent = torch.ones_like(actual)
        else:
            cotangent = torch.as_tensor(grad_output, dtype=actual.dtype).expand_as(actual)
        gradients = torch.autograd.grad(actual, leaves[:wanted], cotangent)
        compute = float64 if any(x.dtype == float64 for x in tensors) else float32
        for index, gradient in enumerate(gradients):
            assert gradient.dtype == tensors[index].dtype
            cancelled = CANCELLED_TOLERANCE[compute], of_terms and (lambda i=index: of_terms()[i])
            assert_gradient(gradient, expected_gradients[index], *cancelled)


def assert_loss(actual, expected, tensors, size=0.0):
    expected = np.asarray(expected)
    # What the dtype does not hold is infinite.
    limit = torch.finfo(actual.dtype).max
    expected = np.where(np.abs(expected) > limit, np.copysign(np.inf, expected), expected)
    is_double = any(x.dtype == float64 for x in tensors)
    assert actual.dtype == (float64 if is_double else float32)
    assert tuple(actual.shape) == expected.shape
    bound = LOSS_TOLERANCE[actual.dtype] * np.maximum(np.abs(expected), size)
    actual = array(actual)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        wrong = ~(same | (np.isfinite(expected) & (np.abs(actual - expected) <= bound)))
    assert not wrong.any(), (actual[wrong], expected[wrong], (actual - expected)[wrong])


def assert_gradient(actual, expected, cancelled=0.0, terms=None):
    """Infinite and NaN elements are where they should be; the others are close in norm.

    Where they are not, `cancelled` times the norm of `terms()` is allowed.
    """
    assert tuple(actual.shape) == expected.shape
    dtype, actual = actual.dtype, array(actual)
    rounded = array(torch.from_numpy(np.array(expected)).to(dtype))
    is_finite = np.isfinite(rounded)
    np.testing.assert_array_equal(actual[~is_finite], rounded[~is_finite])

    def norm(x):
        """Of what is finite; squares of finite numbers may not be."""
        x = x[is_finite]
        largest = np.abs(x).max(initial=0)
        return largest * np.linalg.norm(x / largest) if largest else 0.0

    if dtype in GRADIENT_TOLERANCE:
        bound = GRADIENT_TOLERANCE[dtype] * norm(expected)
    else:
        bound = HALF_TOLERANCE * norm(rounded - expected)
    error = norm(actual - expected)
    if error > bound and terms is not None:
        rest = cancelled * norm(terms())
        bound = max(bound, rest) if dtype in GRADIENT_TOLERANCE else bound + rest
    assert error <= bound, (
        f"error {error:.3g} > {bound:.3g}, ratio {error / max(bound, 1e-300):.3g}"
    )


def logits(*shape, dtype=torch.float32, scale=3.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def pair(rows, classes, dtypes=(float32, float32)):
    return tuple(logits(rows, classes, dtype=dtype) for dtype in dtypes)


def some_labels(*shape, classes, ignored=0.3, ignore_index=-100):
    labels = torch.randint(classes, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, ignore_index)


def edge_labels(rows, classes, phase=0):
    """First and last classes of what a vector, a thread, a warp or a block takes."""
    ends = [size * 2**i - phase for size in (4, 3 * 2**10) for i in range(16)]
    ends = [x for end in ends for x in (end - 1, end) if 0 < x < classes - 1]
    chosen = torch.tensor(ends or [0])[torch.randint(len(ends) or 1, (rows,))]
    chosen[0], chosen[-1] = 0, classes - 1
    return chosen


def _size(
    shape, temperature=1.0, scale_t2=True, reduction="batchmean", dim=-1, mask=None,
    row_weight=None, **_,
):  # fmt: skip
    """T² of each row, reduced as the loss is: what a row's loss is rounded against."""
    rows = math.prod(shape) / shape[dim] if mask is None else max(mask.sum().item(), 1)
    per_row = float(torch.as_tensor(temperature).max()) ** 2 if scale_t2 else 1.0
    if row_weight is not None and row_weight.numel():
        per_row *= row_weight.abs().max().item()
    return per_row * {"sum": rows, "mean": 1 / shape[dim]}.get(reduction, 1)


def given(teacher, teacher_is="logits", **keywords):
    """A loss's teacher and keywords, of those that the oracle takes."""
    if teacher_is == "logits":
        return teacher, keywords
    del keywords["teacher_temperature"]
    return GIVEN[teacher_is](teacher), keywords


def mass(teacher, teacher_is="logits", dim=-1, **_):
    """The largest sum of a row's probabilities."""
    if teacher_is == "logits" or not teacher.numel():
        return 1.0
    p = teacher.double()
    p = p.exp() if teacher_is == "log_probabilities" else p
    return p.nan_to_num().sum(dim).max().item()


def _arguments(student, teacher, keywords):
    """The tensors of a call, and how the oracle takes them.

    These are the student, the teachers, and the temperatures that are tensors.
    """
    if "teacher_is" in keywords:
        keywords = {**keywords, "teacher_temperature": 1.0}
    teachers = teacher if isinstance(teacher, list) else [teacher]
    names = ("temperature", "teacher_temperature")
    names = [name for name in names if isinstance(keywords.get(name), torch.Tensor)]
    others = {name: value for name, value in keywords.items() if name not in names}
    count = len(teachers)

    def taken(tensors):
        of_teachers, heat = list(tensors[:count]), tensors[count:]
        of_teachers = of_teachers if isinstance(teacher, list) else of_teachers[0]
        return of_teachers, {**others, **dict(zip(names, heat, strict=True))}

    return (student, *teachers, *(keywords[name] for name in names)), taken


def check_soft_target(student, teacher, backend, grad_output=None, teachers=True, **keywords):
    """`teacher` may be a list, and temperatures tensors, whose gradients are checked as well.

    `teacher_is` tells that it is no logits.
    """
    tensors, taken = _arguments(student, teacher, keywords)

    def loss(s, *others):
        t, keywords = taken(others)
        t, keywords = given(t, **keywords)
        return fastkd.soft_target_loss(s, t, backend=backend, **keywords)

    def expected(s, *others, grad_output, magnitudes=False):
        t, keywords = taken(others)
        return oracle_rows.soft_target(s, t, grad_output, magnitudes=magnitudes, **keywords)

    check(
        loss,
        expected,
        tensors,
        grad_output=grad_output,
        size=_size(student.shape, **keywords) * max(mass(teacher, **keywords), 1),
        teachers=teachers,
        terms=lambda *arrays, grad_output: expected(
            *arrays, grad_output=np.abs(grad_output), magnitudes=True
        )[1],
    )


def check_distillation(
    student, teacher, labels, backend, grad_output=None, teachers=True, **keywords
):
    """As `check_soft_target`."""
    soft, hard = keywords.get("soft_weight", 0.9), keywords.get("hard_weight", 0.1)
    size = float(torch.as_tensor(keywords.get("temperature", 4.0)).max()) ** 2
    size = abs(soft) * size * max(mass(teacher, **keywords), 1) + abs(hard)
    if "row_weight" in keywords:
        size *= keywords["row_weight"].abs().max().item()
    if keywords.get("reduction") == "sum":
        size *= max((labels != keywords.get("ignore_index", -100)).sum().item(), 1)
    tensors, taken = _arguments(student, teacher, keywords)

    def loss(s, *others):
        t, keywords = taken(others)
        t, keywords = given(t, **keywords)
        return fastkd.distillation_loss(s, t, labels, backend=backend, **keywords)

    def expected(s, *others, grad_output, **weights):
        t, keywords = taken(others)
        parts, gradients = oracle_rows.distillation(
            s, t, array(labels), grad_output, **{**keywords, **weights}
        )
        return parts[0], gradients

    def terms(*arrays, grad_output):
        weights = {"soft_weight": abs(soft), "hard_weight": abs(hard), "magnitudes": True}
        return expected(*arrays, grad_output=np.abs(grad_output), **weights)[1]

    check(
        loss,
        expected,
        tensors,
        grad_output=grad_output,
        size=size,
        teachers=teachers,
        terms=terms,
    )


def check_parts(student, teacher, labels, backend, temperature, **keywords):
    """The parts of the distillation loss, without a gradient and with one."""
    keywords["temperature"] = temperature
    expected, _ = oracle_rows.distillation(*map(array, (student, teacher, labels)), **keywords)
    for requires_grad in (False, True):
        parts = fastkd.distillation_loss(
            leaf(student, requires_grad), teacher, labels, return_parts=True, backend=backend,
            **keywords,
        )  # fmt: skip
        for part, value in zip(parts, expected, strict=True):
            assert_loss(part, value, (student, teacher), size=temperature**2)


def features(*shape, dtype=torch.float32, channel_dim=1):
    """Of either sign, as before a ReLU, and stronger at some positions than at others."""
    strength = 0.1 + torch.rand(shape, dtype=float64)
    if len(shape) > 1:
        strength = strength.narrow(channel_dim, 0, min(1, shape[channel_dim]))
    return (torch.randn(shape, dtype=float64) * strength).to(dtype)


def distinct(draw, loss, size):
    """Two sides, drawn again while they nearly agree: all that is left of them then is rounding.

    Their loss is at least a tenth of `size`.
    """
    while True:
        sides = draw()
        if loss(*sides, backend="reference") >= 0.1 * size(*sides):
            return sides


def check_map(x, backend, **keywords):
    positions = math.prod(x.shape[1:]) // x.shape[keywords.get("channel_dim", 1)]
    check(
        functools.partial(fastkd.attention_map, backend=backend, **keywords),
        functools.partial(oracle.attention_map, **keywords),
        (x,),
        grad_output=torch.randn(x.shape[0], positions),
    )


def check_transfer(students, teachers, backend, grad_output=None, with_teachers=True, **keywords):
    """Tensors or lists of them, as the loss takes them."""
    is_sequence = isinstance(students, list)
    students, teachers = (x if is_sequence else [x] for x in (students, teachers))
    count = len(students)

    def loss(*tensors):
        sides = list(tensors[:count]), list(tensors[count:])
        if not is_sequence:
            sides = sides[0][0], sides[1][0]
        return fastkd.attention_transfer_loss(*sides, backend=backend, **keywords)

    def expected(*arrays, grad_output):
        value, gradients = oracle.attention_transfer(
            arrays[:count], arrays[count:], grad_output=grad_output, **keywords
        )
        per_sample = not is_sequence and keywords.get("reduction") == "none"
        return value[0] if per_sample else value, gradients

    check(
        loss, expected, [*students, *teachers],
        students=count, grad_output=grad_output, teachers=with_teachers,
    )  # fmt: skip


def check_hint(students, teachers, backend, weight=None, bias=None, grad_output=None, **keywords):
    """Tensors or lists of them, as the loss takes them."""
    is_sequence = isinstance(students, list)
    students, teachers = (x if is_sequence else [x] for x in (students, teachers))
    count = len(students)
    regressor = [x for x in (weight, bias) if x is not None]

    def split(values):
        extra = [*values[2 * count :], None, None]
        return list(values[:count]), list(values[count : 2 * count]), extra[0], extra[1]

    def loss(*tensors):
        *sides, w, b = split(tensors)
        if not is_sequence:
            sides = [side[0] for side in sides]
        return fastkd.hint_loss(
            *sides, regressor_weight=w, regressor_bias=b, backend=backend, **keywords
        )

    def expected(*arrays, grad_output):
        value, gradients = oracle.hint(*split(arrays), grad_output, **keywords)
        per_sample = not is_sequence and keywords.get("reduction") == "none"
        return value[0] if per_sample else value, gradients

    check(
        loss, expected, [*students, *teachers, *regressor], students=count, grad_output=grad_output
    )


def points(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def check_relation(name, student, teacher, backend, grad_output=None, **keywords):
    check(
        functools.partial(getattr(fastkd, name), backend=backend, **keywords),
        functools.partial(getattr(oracle, name.removesuffix("_loss")), **keywords),
        (student, teacher),
        grad_output=grad_output,
    )


def check_similarity(student, teacher, backend, grad_output=None):
    check(
        functools.partial(fastkd.similarity_preserving_loss, backend=backend),
        oracle.similarity,
        (student, teacher),
        grad_output=grad_output,
    )


def in_pairs(flat):
    return list(zip(flat[::2], flat[1::2], strict=True))


def check_flow(student, teacher, backend, grad_output=None):
    """Lists of pairs."""
    flat = [x for side in (student, teacher) for pair in side for x in pair]
    count = len(flat) // 2

    def loss(*x):
        return fastkd.fsp_loss(in_pairs(x[:count]), in_pairs(x[count:]), backend=backend)

    def expected(*x, grad_output):
        return oracle.fsp(in_pairs(x[:count]), in_pairs(x[count:]), grad_output)

    check(loss, expected, flat, students=count, grad_output=grad_output)


def check_metrics(student, teacher, backend, **keywords):
    found = fastkd.distillation_metrics(student, teacher, backend=backend, **keywords)
    on_host = {k: array(v) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    expected = oracle_metrics.distillation_metrics(array(student), array(teacher), **on_host)
    assert found._fields == tuple(expected)
    for name, value in found._asdict().items():
        assert not value.requires_grad
        if "argmax" in name:
            assert value.dtype == torch.int64
            np.testing.assert_array_equal(array(value), expected[name], err_msg=name)
        else:
            assert_loss(value, expected[name], (student, teacher), size=1)

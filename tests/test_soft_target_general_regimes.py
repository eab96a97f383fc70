"""Divergences and temperatures where the general form of CUDA changes: sizes and strides."""

import math

import layouts
import pytest
import torch
from agreement_logits import check_distillation, check_soft_target, edge_labels
from divergences import FEW, sides
from temperatures import of_kind

import fastkd

pytestmark = pytest.mark.gpu_sizes

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SIDES = [(F32, F32), (BF16, BF16), (F32, BF16), (F16, F32), (F64, F32)]

# Divergences at one number for a temperature, and temperatures of every kind.
CALLS = [
    *FEW,
    {"kind": "numbers"},
    {"kind": "rows and rows"},
    *({"kind": kind, **FEW[i]} for kind, i in [("numbers", 0), ("rows", 2), ("rows and rows", 0)]),
]
every_call = pytest.mark.parametrize(
    "call", CALLS, ids=lambda call: "-".join(map(str, call.values()))
)
every_pair = pytest.mark.parametrize("dtypes", SIDES)


def keywords_of(call, shape, dtypes, dim=-1):
    keywords = {**call}
    kind = keywords.pop("kind", None)
    dtype = F64 if F64 in dtypes else F32
    return keywords | (of_kind(kind, shape, dtype, dim) if kind else {"temperature": 2.0})


def draw(call, rows, classes, dtypes):
    """The tensors, student first, and keywords."""
    keywords = keywords_of(call, (rows, classes), dtypes)
    heat = {k: v for k, v in keywords.items() if k.endswith("temperature")}
    return sides(rows, classes, *dtypes, **heat), keywords


@every_pair
@every_call
def test_class_counts(backend, call, dtypes):
    """A thread's vector has 8 classes, a warp's 256 and a block's 2048."""
    for classes in (2, 8, 9, 255, 257, 2047, 2049, 5003):
        (student, teacher), keywords = draw(call, 3, classes, dtypes)
        check_soft_target(student, teacher, backend, **keywords)
        labels = edge_labels(3, classes)
        labels[1] = -100
        keywords["label_smoothing"] = 0.1
        check_distillation(student, teacher, labels, backend, 3.0, **keywords)


@every_call
def test_more_rows_than_blocks(backend, call):
    for rows, classes in ((300, 5), (70, 300)):
        (student, teacher), keywords = draw(call, rows, classes, SIDES[0])
        check_soft_target(student, teacher, backend, 3.0, **keywords)
        mask = torch.rand(rows) < 0.7
        check_soft_target(student, teacher, backend, mask=mask, **keywords)
        upstream = torch.randn(rows)
        check_soft_target(student, teacher, backend, upstream, reduction="none", **keywords)


@every_call
def test_more_labels_than_each_block_counts(backend, call):
    (student, teacher), keywords = draw(call, 8200, 3, SIDES[0])
    labels = torch.randint(3, (8200,))
    labels[::7] = -100
    check_distillation(student, teacher, labels, backend, 3.0, **keywords)


@every_pair
@every_call
def test_rows_that_begin_at_each_alignment(backend, call, dtypes):
    classes = 250
    (student, teacher), keywords = draw(call, 3, classes, dtypes)
    labels = edge_labels(3, classes)
    # By how far apart the rows are: all at one alignment, or each at another.
    for starts, gap in [((1, 1), 24), ((3, 0), 24), ((0, 5), 9)]:
        width = classes + gap + -classes % 16
        s, t = (
            layouts.beginning_at(x, start, width)
            for x, start in zip((student, teacher), starts, strict=True)
        )
        check_distillation(s, t, labels, backend, **keywords)


@pytest.mark.parametrize("layout", [layouts.stepped, layouts.reversed_dims])
@pytest.mark.parametrize("classes", [40, 3001])
@every_call
def test_classes_that_are_apart(backend, call, classes, layout):
    (student, teacher), keywords = draw(call, 3, classes, SIDES[2])
    check_soft_target(student, layout(teacher), backend, **keywords)
    check_soft_target(layout(student), teacher, backend, 3.0, **keywords)


@every_pair
@pytest.mark.parametrize("shape", [(2, 19, 65), (3, 5, 6, 7), (1, 70, 33), (1, 4100, 3)])
@every_call
def test_columns(backend, call, shape, dtypes):
    """Where rows are contiguous a thread has one, unless its classes are too many."""
    rows = math.prod(shape) // shape[1]
    keywords = keywords_of(call, shape, dtypes, dim=1)
    heat = {k: v for k, v in keywords.items() if k.endswith("temperature")}
    heat = {k: v.reshape(-1) if torch.is_tensor(v) and v.ndim else v for k, v in heat.items()}
    student, teacher = (
        x.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
        for x in sides(rows, shape[1], *dtypes, **heat)
    )
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels[0, 1] = -100
    keywords["dim"] = 1
    check_soft_target(student, teacher, backend, reduction="none", **keywords)
    check_distillation(student, teacher, labels, backend, label_smoothing=0.1, **keywords)
    teacher = layouts.channels_last(teacher)
    check_distillation(student, teacher, labels, backend, 3.0, **keywords)


@pytest.mark.parametrize("dtypes", [(F32,) * 4, (F16, BF16, F32, F16), (F64, F32, F64)])
@pytest.mark.parametrize("form", [(5, 40), (3, 3001), (40, 33)])
@every_call
def test_several_teachers(backend, call, form, dtypes):
    (student, *teachers), keywords = draw(call, *form, dtypes)
    check_soft_target(student, teachers, backend, **keywords)
    columns = [x.t().contiguous() for x in (student, *teachers)]
    check_soft_target(columns[0], columns[1:], backend, 3.0, dim=0, **keywords)


@pytest.mark.parametrize("form", [(3, 3001), (40, 33)])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("call", [{}, {"kind": "rows and rows"}, {"kind": "numbers"}], ids=str)
def test_reverse_kl_where_the_mean_underflows(backend, call, dtype, form):
    """In classes of one thread and of several, some of which one teacher excludes."""
    (student, *teachers), keywords = draw(call, *form, (dtype,) * 3)
    for teacher, excluded in zip(teachers, (-3e3, -math.inf), strict=True):
        teacher[0, 4:12] -= 2e3
        teacher[1, ::3] = -2e3 + 5 * torch.randn(form[1])[::3].to(dtype)
        teacher[2, -1] = excluded
    keywords["divergence"] = "reverse_kl"
    check_soft_target(student, teachers, backend, **keywords, teachers=False)
    columns = [x.t().contiguous() for x in (student, *teachers)]
    check_soft_target(columns[0], columns[1:], backend, dim=0, **keywords, teachers=False)


@pytest.mark.parametrize("dtypes", SIDES[:3])
@every_call
def test_a_gradient_in_the_logits_place(backend, call, dtypes):
    for classes in (300, 3001):
        (student, teacher), keywords = draw(call, 7, classes, dtypes)
        labels = edge_labels(7, classes)
        labels[2] = -100
        found = []
        for inplace in (False, True):
            leaf = student.clone().requires_grad_()
            loss = fastkd.distillation_loss(
                leaf * 1, teacher, labels, inplace=inplace, backend=backend, **keywords
            )
            found.append((loss, *torch.autograd.grad(loss, leaf)))
        assert all(map(torch.equal, *found))


@every_call
def test_same_bits_again(kernel_backend, call):
    """In another schedule where one can be chosen; and a grad_output does not change which."""
    (student, teacher), keywords = draw(call, 13, 3000, SIDES[0])
    labels = edge_labels(13, 3000)

    def run():
        leaves = [x.detach().requires_grad_() for x in (student, teacher)]
        loss = fastkd.distillation_loss(*leaves, labels, backend=kernel_backend, **keywords)
        return loss, *torch.autograd.grad(3 * loss, leaves)

    first, second = run(), run()
    assert all(map(torch.equal, first, second))

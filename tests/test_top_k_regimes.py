"""Teachers that kept k classes, where GPU kernels change their form: sizes, strides, many slots."""

import math

import layouts
import pytest
import torch
from agreement_logits import edge_labels
from divergences import name_of
from top_k import CALLS, check_both, check_top_k, draw, kept, split
from triton_calls import SUM

import fastkd
from fastkd.operators import kernels

pytestmark = pytest.mark.gpu_sizes

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

every_call = pytest.mark.parametrize("call", CALLS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])


@every_dtype
@every_call
def test_class_counts(backend, call, dtype):
    """A thread's vector has 8 classes, a warp's 256 and a block's 2048; a row held whole 4096."""
    for classes in (7, 8, 9, 255, 257, 2047, 2049, 4096, 5003):
        tensors, keywords = draw(call, 3, classes, 6, dtype)
        labels = edge_labels(3, classes)
        labels[1] = -100
        check_both(tensors, backend, labels, **keywords)


@every_dtype
@every_call
def test_slots_at_the_ends_of_vectors(backend, call, dtype):
    """The first and last classes of a vector, of a warp's and of a block's, and of the row."""
    classes, ends = 4099, [0, 7, 8, 255, 256, 2047, 2048, 4095, 4096, 4098]
    tensors, keywords = draw(call, 3, classes, len(ends), dtype)
    tensors[2][:] = torch.tensor(ends)
    check_both(tensors, backend, torch.tensor([4098, 8, 2047]), **keywords)


@pytest.mark.parametrize(
    "form", [(5, 3), (40, 30), (300, 300), (1100, 70), (5003, 1200), (5003, 40)]
)
@every_call
def test_numbers_of_slots(backend, call, form):
    """Few are looked at in turn, many by each class for itself; a program holds 1,024 at a time."""
    classes, k = form
    if k == classes and call["tail"] == "bucket":
        k -= 1
    tensors, keywords = draw(call, 3, classes, k)
    check_both(tensors, backend, edge_labels(3, classes), **keywords)


@pytest.mark.parametrize("form", [(700, 9), (700, 90), (4099, 9), (4099, 1100)])
@every_call
def test_two_slots_of_one_class_and_padding(backend, call, form):
    classes, k = form
    (student, values, indices, lse), keywords = draw(call, 4, classes, k)
    half = k // 2
    values[:, half : 2 * half] = values[:, :half] - 1
    indices[:, half : 2 * half] = indices[:, :half]
    indices[0, :5] = indices[0, 0]
    values[1, ::2], indices[2, 1::3], indices[3, : k - 1] = -math.inf, -1, -1
    tensors = student, values, indices, lse
    check_both(tensors, backend, indices[:, -1].long().clamp(min=0), **keywords)


@every_call
def test_more_rows_than_blocks(backend, call):
    for rows, classes in ((300, 5), (70, 300)):
        tensors, keywords = draw(call, rows, classes, 3)
        check_top_k(*tensors, backend, 3.0, **keywords)
        check_top_k(*tensors, backend, mask=torch.rand(rows) < 0.7, **keywords)
        upstream = torch.randn(rows)
        check_top_k(*tensors, backend, upstream, reduction="none", **keywords)


def test_more_labels_than_each_block_counts(backend):
    tensors, keywords = draw(CALLS[2], 8200, 4, 2)
    labels = torch.randint(4, (8200,))
    labels[::7] = -100
    check_top_k(*tensors, backend, 3.0, labels, **keywords)


@every_dtype
@every_call
def test_rows_that_begin_at_each_alignment(backend, call, dtype):
    classes = 250
    (student, *teacher), keywords = draw(call, 3, classes, 9, dtype)
    labels = edge_labels(3, classes)
    for start, gap in ((1, 24), (3, 24), (5, 9), (0, 9)):
        moved = layouts.beginning_at(student, start, classes + gap + -classes % 16)
        check_both((moved, *teacher), backend, labels, **keywords)


@pytest.mark.parametrize("layout", [layouts.stepped, layouts.reversed_dims])
@pytest.mark.parametrize("classes", [40, 3001])
@every_call
def test_classes_that_are_apart(backend, call, classes, layout):
    (student, *teacher), keywords = draw(call, 3, classes, 9, BF16)
    check_both((layout(student), *teacher), backend, edge_labels(3, classes), **keywords)


@every_dtype
@pytest.mark.parametrize("shape", [(2, 19, 65), (3, 5, 6, 7), (1, 70, 33), (1, 4100, 3)])
@every_call
def test_columns(backend, call, shape, dtype):
    """Where rows are contiguous a thread has one."""
    of_rows = (shape[0], *shape[2:])
    rows, classes = math.prod(of_rows), shape[1]
    (student, values, indices, lse), keywords = draw(call, rows, classes, 4, dtype)
    keywords = {
        name: x.reshape(of_rows) if torch.is_tensor(x) and x.ndim else x
        for name, x in keywords.items()
    } | {"dim": 1}
    student = student.reshape(*of_rows, classes).movedim(-1, 1)
    teacher = (
        values.reshape(*of_rows, -1),
        indices.reshape(*of_rows, -1),
        None if lse is None else lse.reshape(of_rows),
    )
    labels = torch.randint(classes, of_rows)
    labels[0, 1] = -100
    for images in (student.contiguous(), layouts.cropped(student.contiguous())):
        check_both((images, *teacher), backend, labels, **keywords)


@every_dtype
@every_call
def test_a_gradient_in_the_logits_place(backend, call, dtype):
    for classes, k in ((300, 5), (300, 90), (5003, 30)):
        (student, *teacher), keywords = draw(call, 7, classes, k, dtype)
        labels = edge_labels(7, classes)
        labels[2] = -100
        of_teacher, others = split(keywords)
        found = []
        for inplace in (False, True):
            leaf = student.clone().requires_grad_()
            side = kept(*teacher, **of_teacher)
            loss = fastkd.distillation_loss(
                leaf * 1, side, labels, inplace=inplace, backend=backend, **others
            )
            found.append((loss, *torch.autograd.grad(loss, leaf)))
        assert all(map(torch.equal, *found))


@every_call
def test_same_bits_again(kernel_backend, call):
    """In another schedule where one can be chosen; and a grad_output does not change which."""
    (student, values, indices, lse), keywords = draw(call, 13, 3000, 40)
    labels = edge_labels(13, 3000)
    of_teacher, others = split(keywords)

    def run():
        leaves = [x.detach().requires_grad_() for x in (student, values)]
        side = kept(leaves[1], indices, lse, **of_teacher)
        loss = fastkd.distillation_loss(leaves[0], side, labels, backend=kernel_backend, **others)
        return loss, *torch.autograd.grad(3 * loss, leaves)

    first, second = run(), run()
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("listed_only", [False, True])
@pytest.mark.parametrize("classes", [40, 5000])
def test_an_index_that_is_no_class(kernel_backend, classes, listed_only):
    """No check of Python's comes before the kernel where that would wait for a GPU."""
    student, log_p = torch.randn(3, classes), torch.randn(3, 4).log_softmax(-1)
    indices = torch.tensor([[-1, 2, 3, 4], [0, 1, 2, classes], [5, 6, 7, 2**31 - 1]]).int()
    loss, gradient = torch.full((3,), math.nan), torch.full_like(student, math.nan)
    p = SUM._replace(
        temperature=1.0,
        teacher_temperature=1.0,
        soft_weight=1.0,
        reduction="none",
        backend=kernel_backend,
        teacher_is="top_k",
    )
    log_p[0, 0] = -math.inf
    arguments = student, indices, log_p, None, None, loss, None, None, gradient, listed_only, p
    kernels(kernel_backend, "top_k").top_k_forward(*arguments)
    assert loss.isnan().tolist() == [False, True, True]
    assert gradient.isnan().all(1).tolist() == [False, True, True]
    assert not gradient[0].isnan().any()

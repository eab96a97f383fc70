"""Teachers that kept k classes, and shards of these, where GPU kernels change their form.

A shard is a view of whole rows, so it begins at any alignment.
"""

import math

import layouts
import pytest
import torch
from agreement_logits import edge_labels
from divergences import name_of
from top_k import CALLS, check_both, check_top_k, draw
from triton_calls import SUM

from fastkd.operators import kernels

pytestmark = pytest.mark.gpu_sizes

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

every_call = pytest.mark.parametrize("call", CALLS, ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])


@every_dtype
@every_call
def test_shards(backend, split, call, dtype):
    """They end where a vector does, a warp's or a block's, or beside it; slots lie there, too."""
    for cuts in ([7, 1, 9], [256, 255, 0, 10], [2049, 2047, 4], [1, 4096, 903]):
        split(len(cuts), cuts)
        classes, ends = sum(cuts), torch.tensor(cuts).cumsum(0)
        tensors, keywords = draw(call, 3, classes, 8, dtype)
        tensors[2][0] = torch.cat([torch.tensor([0]), ends[:-1], ends - 1, ends])[:8].clamp(
            max=classes - 1
        )
        labels = edge_labels(3, classes)
        labels[1] = -100
        check_both(tensors, backend, labels, **keywords)


@pytest.mark.parametrize("form", [(1100, 700), (5003, 1200), (5003, 40)])
@every_call
def test_slots_of_shards(backend, split, call, form):
    """Many, two of one class, padding, and rows whose slots all lie in one shard."""
    classes, k = form
    split(3, [400, 300, classes - 700])
    (student, values, indices, lse), keywords = draw(call, 4, classes, k)
    half = k // 2
    values[0, half : 2 * half] = values[0, :half] - 1
    indices[0, half : 2 * half] = indices[0, :half]
    values[1, ::2], indices[1, 1::4] = -math.inf, -1
    indices[2] = torch.randint(400, 700, (k,))
    tensors = student, values, indices, lse
    check_both(tensors, backend, indices[:, -1].long().clamp(min=0), **keywords)


@every_call
def test_shards_of_more_rows_than_blocks(backend, split, call):
    split(2, [2, 3])
    tensors, keywords = draw(call, 300, 5, 3)
    check_top_k(*tensors, backend, mask=torch.rand(300) < 0.7, **keywords)
    check_top_k(*tensors, backend, torch.randn(300), reduction="none", **keywords)


@pytest.mark.parametrize("layout", [layouts.stepped, layouts.reversed_dims])
@every_call
def test_shards_whose_classes_are_apart(backend, split, call, layout):
    split(2, [1200, 1801])
    (student, *teacher), keywords = draw(call, 3, 3001, 9, BF16)
    check_both((layout(student), *teacher), backend, edge_labels(3, 3001), **keywords)


@every_dtype
@every_call
def test_columns_of_shards(backend, split, call, dtype):
    split(3, [8, 0, 41])
    (student, values, indices, lse), keywords = draw(call, 130, 49, 6, dtype)
    images = student.view(2, 65, 49).movedim(-1, 1).contiguous()
    labels = torch.randint(49, (2, 65))
    labels[0, 1] = -100
    keywords = {
        n: x.view(2, 65) if torch.is_tensor(x) and x.ndim else x for n, x in keywords.items()
    }
    teacher = (
        values.view(2, 65, 6),
        indices.view(2, 65, 6),
        None if lse is None else lse.view(2, 65),
    )
    check_both((images, *teacher), backend, labels, dim=1, **keywords)


def shard(backend, rows, classes, k, dtype=F32, *, listed_only=False):
    """`run(student, loss, gradient)` calls top_k_forward for the second of three shards.

    What whole rows have is drawn, and so are the labels: one is elsewhere, and one ignored. The
    slots' classes come with it.
    """
    precise = F64 if dtype == F64 else F32
    indices = torch.randint(3 * classes, (rows, k)).sort().values.int()
    labels = torch.randint(classes, (rows,))
    labels[0], labels[1] = -2, -1
    p = SUM._replace(
        temperature=2.0,
        hard_weight=0.5,
        label_smoothing=0.1,
        ignore_index=-1,
        reduction="none",
        backend=backend,
        teacher_is="top_k",
        all_classes=3 * classes,
    )
    log_p = torch.randn(rows, k, dtype=precise).log_softmax(-1)
    whole = {
        "first": classes,
        "sums": torch.rand(rows, 4, dtype=F64) + 1,
        "logits": torch.randn(rows, k + 1, dtype=precise),
    }

    def run(student, loss=None, gradient=None):
        # As ranks exchange them.
        whole["logits"][:, :k].masked_fill_(indices >= p.all_classes, math.nan)
        inputs, outputs = (student, indices, log_p, None, labels), (loss, None, None, gradient)
        kernels(backend, "top_k").top_k_forward(*inputs, *outputs, listed_only, p, **whole)

    return run, indices


@pytest.mark.parametrize("listed_only", [False, True])
@every_dtype
def test_a_shards_gradient_in_the_logits_place(kernel_backend, dtype, listed_only):
    for classes, k in ((300, 5), (300, 90), (5003, 30)):
        run, _ = shard(kernel_backend, 7, classes, k, dtype, listed_only=listed_only)
        student = torch.randn(7, classes).to(dtype)
        gradient = torch.full_like(student, math.nan)
        run(student, gradient=gradient)
        run(student, gradient=student)
        assert torch.equal(student, gradient)


def test_the_losses_of_a_shard_read_no_logits(kernel_backend):
    """And an index is a class of all shards, or makes its row NaN."""
    run, indices = shard(kernel_backend, 5, 40, 4)
    indices[2, 3], indices[3, 3], indices[4, :2] = 120, 119, -1
    student, loss = torch.full((5, 40), math.nan), torch.full((5,), math.nan)
    run(student, loss)
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert loss[1] == 0
    gradient = torch.full_like(student, math.nan)
    run(torch.randn(5, 40), gradient=gradient)
    assert gradient.isnan().any(1).tolist() == [False, False, True, False, False]
    assert gradient[2].isnan().all()

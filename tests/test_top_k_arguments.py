"""What is checked of a teacher that kept k classes, what is written in place, and what is kept."""

import gc

import pytest
import torch
from agreement import DTYPES
from conftest import DEVICE
from divergences import DIVERGENCES, name_of
from top_k import FOR_ALL, PAIRS, TAILS, TRUE, kept, sides

import fastkd

FORMS = {"soft_target_loss": (), "distillation_loss": (torch.tensor([1, 2, -100, 0]),)}
every_loss = pytest.mark.parametrize("name", FORMS)
every_pair = pytest.mark.parametrize("keywords", PAIRS, ids=name_of)


@pytest.fixture
def call():
    def run(side, student=None, name="soft_target_loss", **keywords):
        student = torch.randn(4, 10) if student is None else student
        return getattr(fastkd, name)(student, side, *FORMS[name], **keywords)

    return run


@every_loss
def test_wrong_tensors(call, name):
    def fails(kind, message, side, **keywords):
        with pytest.raises(kind, match=message):
            call(side, name=name, **keywords)

    values, indices = torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.int64)
    meta = {"device": "meta"}
    fails(TypeError, "values must be a tensor, got list", kept([[1.0]], indices))
    fails(TypeError, "values must be float32, .*, got torch.int64", kept(indices, indices))
    fails(TypeError, "indices must be a tensor, got list", kept(values, [[1]]))
    fails(TypeError, "indices must be integers, .*, got torch.float32", kept(values, values))
    fails(TypeError, "indices must be integers, .*, got torch.bool", kept(values, indices > 0))
    fails(
        ValueError,
        r"shape of the rows, \(4,\), .* \(5, 3\)",
        kept(values[:1].expand(5, 3), indices[:1].expand(5, 3)),
    )
    fails(ValueError, "shape of the rows", kept(values[0], indices[0]))
    fails(ValueError, "kept classes as the last", kept(values[:, :0], indices[:, :0]))
    message = r"values and indices must have the same shape, got \(4, 3\) and \(4, 2\)"
    fails(ValueError, message, kept(values, indices[:, :2]))
    fails(ValueError, "and values must be on the same", kept(values.to(**meta), indices))
    fails(ValueError, "and indices must be on the same", kept(values, indices.to(**meta)))
    lse = torch.zeros(4)
    fails(ValueError, r"lse must have .* \(4,\), got \(4, 1\)",
          kept(values, indices, lse[:, None], tail="zero"))  # fmt: skip
    fails(TypeError, "lse must be float32", kept(values, indices, lse.long(), tail="zero"))
    fails(ValueError, "and lse must be on", kept(values, indices, lse.to(**meta), tail="zero"))
    fails(ValueError, "tail must be one of 'renormalize'.*, got 'rest'",
          kept(values, indices, tail="rest"))  # fmt: skip
    fails(ValueError, "values_are must be one of 'logits', 'log_probs', got 'probs'",
          kept(values, indices, values_are="probs"))  # fmt: skip
    fails(ValueError, "teacher_weights needs", kept(values, indices), teacher_weights=[1.0])
    for many in ([kept(values, indices)], [torch.randn(4, 10), kept(values, indices)]):
        fails(TypeError, r"teacher_logits\[.\] must be a .*, got TopK", many)


@pytest.mark.parametrize("tail", TAILS)
@every_loss
def test_what_goes_with_a_tail(call, name, tail):
    student, values, indices, _ = sides(4, 10, 3, (torch.float32,) * 2)
    lse = torch.full((4,), 10.0)
    if tail in TRUE:
        with pytest.raises(ValueError, match=f"tail='{tail}' needs true .* pass lse"):
            call(kept(values, indices, tail=tail), student, name)
        call(kept(values, indices, lse, tail=tail), student, name)
    else:
        with pytest.raises(ValueError, match=f"lse belongs to .*tail='{tail}'"):
            call(kept(values, indices, lse, tail=tail), student, name)
    probs = {"values_are": "log_probs", "tail": tail}
    with pytest.raises(ValueError, match="lse belongs to values_are='logits'"):
        call(kept(values, indices, lse, **probs), student, name)
    side = kept(values - 3, indices, **probs)
    for heat in (2.0, torch.tensor(2.0)):
        with pytest.raises(ValueError, match="teacher_temperature softens logits"):
            call(side, student, name, teacher_temperature=heat)
    for keywords in DIVERGENCES:
        is_forward = keywords.get("beta") == 0 and keywords["divergence"] in ("jsd", "skew_kl")
        if tail in FOR_ALL or is_forward:
            call(side, student, name, **keywords)
        else:
            with pytest.raises(ValueError, match="needs tail 'bucket' or 'renormalize_both'"):
                call(side, student, name, **keywords)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]
)
def test_indices_of_any_integers(call, backend, dtype):
    student, values, indices, _ = sides(4, 10, 3, (torch.float32,) * 2)
    expected = call(kept(values, indices), student, backend=backend)
    assert torch.equal(call(kept(values, indices.to(dtype)), student, backend=backend), expected)


def test_metrics_take_logits_alone():
    side = kept(torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="teacher_logits must be a tensor, got TopK"):
        fastkd.distillation_metrics(torch.randn(4, 10), side)


def test_explain(call, backend):
    student, values, indices, _ = sides(4, 10, 3, (torch.float32,) * 2)
    side = kept(values, indices)
    answer = fastkd.explain(fastkd.soft_target_loss, student, side, backend=backend)
    assert answer.chosen == backend
    with pytest.raises(ValueError, match="needs true probabilities"):
        fastkd.explain(fastkd.soft_target_loss, student, kept(values, indices, tail="zero"))


@pytest.mark.parametrize("dtype", DTYPES)
@every_pair
@every_loss
def test_inplace(call, backend, name, keywords, dtype):
    """The same bits, over the logits."""
    student, values, indices, lse = sides(4, 300, 5, (dtype, dtype), **keywords)
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"} | {"backend": backend}
    side = kept(values, indices % 290, lse, tail=tail)
    weights = {"row_weight": torch.rand(4), "normalizer": torch.tensor(3.0), "num_classes": 290}
    for more in ({}, weights):
        found = []
        for inplace in (True, False):
            leaf = student.clone().requires_grad_()
            logits = leaf * 1
            loss = call(side, logits, name, inplace=inplace, **more, **others)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
            assert (logits._version > 0) == inplace
        for x, y in zip(*found, strict=True):
            assert torch.equal(x, y)


def test_inplace_where_the_teacher_learns(call, backend):
    student, values, indices, _ = sides(4, 10, 3, (torch.float32,) * 2)
    side = kept(values.requires_grad_(), indices)
    logits = student.requires_grad_() * 1
    with pytest.raises(ValueError, match="inplace=True does not take a teacher, a temp"):
        call(side, logits, inplace=True, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@every_pair
@every_loss
def test_autocast(call, backend, name, keywords, dtype):
    student, values, indices, lse = sides(4, 30, 5, (dtype, dtype), **keywords)
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"} | {"backend": backend}

    def found():
        leaves = [x.detach().requires_grad_() for x in (student, values)]
        loss = call(kept(leaves[1], indices, lse, tail=tail), leaves[0], name, **others)
        return loss, *torch.autograd.grad(loss, leaves)

    expected = found()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for x, y in zip(found(), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_pair
def test_what_lives_until_backward(kernel_backend, keywords, dtype):
    """The student's gradient, its logits, and nothing else of their size."""
    student, values, indices, lse = sides(64, 2000, 5, (dtype, dtype), **keywords)
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"}
    student.requires_grad_()
    gc.collect()
    loss = fastkd.soft_target_loss(
        student, kept(values, indices, lse, tail=tail), backend=kernel_backend, **others
    )
    saved = [x for x in loss.grad_fn.saved_tensors if x is not None]
    large = [x for x in saved if x.numel() > 64 * 6 and x is not student]
    assert [tuple(x.shape) for x in large if x.data_ptr() != student.data_ptr()] == [(64, 2000)]


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the memory of a CPU's operators")
@every_pair
def test_memory_beside_the_gradient(keywords):
    """A step allocates the gradient, and otherwise numbers of the rows and of the slots."""
    student, values, indices, lse = sides(64, 4000, 5, (torch.float32,) * 2, **keywords)
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"}
    side = kept(values, indices, lse, tail=tail)
    student.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        fastkd.soft_target_loss(student, side, backend="native", **others).backward()
    sizes = [e.self_cpu_memory_usage for e in profile.events()]
    sizes = [size for size in sizes if size > 40_000]  # what a GPU's blocks add up is less
    assert sizes == [student.numel() * 4]

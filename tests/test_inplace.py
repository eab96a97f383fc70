"""Gradients that take the place of the student's logits."""

import divergences
import pytest
import temperatures
import torch
from agreement import DTYPES
from agreement_logits import logits, some_labels
from calls import Recorder
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint

import fastkd

T = {"temperature": 2.0}


def value_and_gradient(loss, logits, grad_output=1.0, **keywords):
    """Of a model whose last layer is a product with 1: what comes back is what reaches it."""
    leaf = logits.detach().clone().requires_grad_()
    value = loss(leaf * 1, **keywords)
    return value.detach(), *torch.autograd.grad(
        value, leaf, torch.as_tensor(grad_output, dtype=value.dtype)
    )


def assert_same(loss, logits):
    """Bit for bit those of the same loss elsewhere: they come from the same kernel."""
    found = value_and_gradient(loss, logits, inplace=True)
    for actual, expected in zip(found, value_and_gradient(loss, logits), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def soft_target(teacher, backend, **others):
    return lambda student, **keywords: fastkd.soft_target_loss(
        student, teacher, backend=backend, **others, **keywords
    )


@pytest.mark.parametrize("classes", [1, 10, 40, 300, 1100, 5000, 40000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets(backend, dtype, classes):
    student, teacher = logits(5, classes, dtype=dtype), logits(5, classes, dtype=dtype)
    assert_same(soft_target(teacher, backend, **T), student)


@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_other_keywords(backend, reduction):
    mask = torch.arange(9) % 3 > 0
    others = {"mask": mask, "num_classes": 37, "reduction": reduction, **T}
    assert_same(soft_target(logits(9, 40), backend, **others), logits(9, 48))


@pytest.mark.parametrize("classes", [40, 1100, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_normalizers(backend, dtype, classes):
    student, teacher = logits(9, classes, dtype=dtype), logits(9, classes, dtype=dtype)
    weights = {"row_weight": torch.randn(9).to(DEVICE)}
    normalizer = {"normalizer": torch.tensor(7.0, device=DEVICE)}
    for others in (weights, normalizer, weights | normalizer):
        assert_same(soft_target(teacher, backend, **others), student)


@pytest.mark.parametrize("shape, dim", [((3, 6, 50), -1), ((2, 19, 8, 8), 1), ((30, 7), 0)])
def test_shapes_and_dims(backend, shape, dim):
    student, teacher = logits(*shape), logits(*shape)
    assert_same(soft_target(teacher, backend, dim=dim), student)
    if len(shape) == 4:
        channels_last = student.contiguous(memory_format=torch.channels_last)
        assert_same(soft_target(teacher, backend, dim=dim), channels_last)


@pytest.mark.parametrize("classes", [40, 1100, 20000])
def test_several_teachers(backend, classes):
    student, *teachers = (logits(5, classes) for _ in range(4))
    assert_same(soft_target(teachers, backend, **T), student)


@pytest.mark.parametrize("keywords", divergences.FEW, ids=divergences.name_of)
@pytest.mark.parametrize("classes", [40, 3000])
def test_other_divergences(backend, keywords, classes):
    student, teacher = logits(5, classes), logits(5, classes)
    assert_same(soft_target(teacher, backend, **keywords), student)


@pytest.mark.parametrize("kind", temperatures.KINDS)
@pytest.mark.parametrize("classes", [40, 3000])
def test_temperatures(backend, kind, classes):
    student, teacher = logits(5, classes), logits(5, classes)
    assert_same(soft_target(teacher, backend, **temperatures.of_kind(kind, (5, classes))), student)


@pytest.mark.parametrize("classes", [40, 1100, 40000])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_with_labels(backend, classes, label_smoothing):
    student, teacher = logits(9, classes), logits(9, classes)
    labels = some_labels(9, classes=classes)

    def loss(student, **keywords):
        return fastkd.distillation_loss(
            student, teacher, labels, label_smoothing=label_smoothing, backend=backend, **keywords
        )

    assert_same(loss, student)
    expected = loss(student, return_parts=True)
    found = loss(student.clone().requires_grad_() * 1, return_parts=True, inplace=True)
    for part, other in zip(found, expected, strict=True):
        torch.testing.assert_close(part.detach(), other, rtol=0, atol=0)
    assert [part.requires_grad for part in found] == [True, False, False]


@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize(("shape", "dim"), [((9, 300), 1), ((9, 9000), 1), ((3, 19, 30), 1)])
def test_labels_whose_logits_are_read_late(backend, shape, dim, teachers):
    student, *others = (logits(*shape) for _ in range(teachers + 1))
    labels = torch.randint(shape[dim], shape[:dim] + shape[dim + 1 :])

    def loss(student, **keywords):
        return fastkd.distillation_loss(
            student, others, labels, dim=dim, backend=backend, **keywords
        )

    assert_same(loss, student)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_grad_output(backend, dtype):
    """In half precision the gradient has been rounded before it is multiplied."""
    student, teacher = logits(9, 40, dtype=dtype), logits(9, 40, dtype=dtype)
    loss = soft_target(teacher, backend, **T)
    _, expected = value_and_gradient(loss, student, 3.0)
    _, gradient = value_and_gradient(loss, student, 3.0, inplace=True)
    eps = torch.finfo(dtype).eps
    atol = eps * expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=2 * eps, atol=atol)


def test_a_retained_graph(backend):
    leaf, teacher = logits(9, 40).requires_grad_(), logits(9, 40)
    loss = fastkd.soft_target_loss(leaf * 1, teacher, inplace=True, backend=backend)
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (thrice,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(once, again)
    torch.testing.assert_close(thrice, 3 * once)


def test_the_gradient_lies_where_the_logits_were(backend):
    leaf = logits(9, 40).requires_grad_()
    student = leaf * 1
    place, places = student.data_ptr(), []
    student.grad_fn.register_prehook(lambda gradients: places.append(gradients[0].data_ptr()))
    loss = fastkd.soft_target_loss(student, logits(9, 40), inplace=True, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(student.detach(), gradient)
    loss.backward()
    assert places[-1] == place


def test_no_memory_of_the_logits_size(kernel_backend):
    """Forward makes nothing but the loss and what a row needs."""
    teacher = logits(9, 4000)
    student = logits(9, 4000).requires_grad_() * 1
    with Recorder() as recorder:
        fastkd.soft_target_loss(student, teacher, inplace=True, backend=kernel_backend)
    ours = [function for function, _ in recorder.calls]
    assert ours == [torch.ops.fastkd.soft_target_forward_.default]


def test_a_later_use_raises(backend):
    teacher = logits(9, 40)
    for use in (lambda x: x.sum(), lambda x: fastkd.soft_target_loss(x, teacher, backend=backend)):
        student = logits(9, 40).requires_grad_() * 1
        loss = fastkd.soft_target_loss(student, teacher, inplace=True, backend=backend)
        with pytest.raises(RuntimeError, match="used after a loss on them with inplace=True"):
            (loss + use(student)).backward()


def test_an_earlier_use(backend):
    """One that keeps the logits for its backward raises; another one's gradient is added."""
    teacher = logits(9, 40)
    leaf = logits(9, 40).requires_grad_()
    student = leaf * 1
    total = student.sum()
    loss = fastkd.soft_target_loss(student, teacher, inplace=True, backend=backend)
    (both,) = torch.autograd.grad(loss + total, leaf)
    plain = fastkd.soft_target_loss(leaf, teacher, backend=backend)
    torch.testing.assert_close(both, torch.autograd.grad(plain, leaf)[0] + 1)
    student = leaf * 1
    total = student.square().sum()
    loss = fastkd.soft_target_loss(student, teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + total).backward()
    student = leaf.exp()
    loss = fastkd.soft_target_loss(student, teacher, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_raise(backend):
    leaf = logits(9, 40).requires_grad_()
    loss = fastkd.soft_target_loss(leaf * 1, logits(9, 40), inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_nothing_is_overwritten_without_a_gradient(backend):
    student, teacher = logits(9, 40), logits(9, 40)
    before = student.clone()
    loss = fastkd.soft_target_loss(student, teacher, inplace=True, backend=backend)
    assert torch.equal(student, before)
    with torch.no_grad():
        assert loss == fastkd.soft_target_loss(
            student.requires_grad_(), teacher, inplace=True, backend=backend
        )
    assert torch.equal(student, before)


def test_a_wrong_label_leaves_the_logits(backend):
    student = logits(9, 40).requires_grad_() * 1
    before, labels = student.detach().clone(), torch.full((9,), 40)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="labels must lie"):
            fastkd.distillation_loss(student, before, labels, inplace=True, backend=backend)
        assert torch.equal(student, before)


def test_within_a_checkpoint(backend):
    teacher = logits(9, 40)

    def step(leaf):
        return fastkd.soft_target_loss(leaf * 1, teacher, inplace=True, backend=backend)

    leaf = logits(9, 40).requires_grad_()
    (expected,) = torch.autograd.grad(step(leaf), leaf)
    (found,) = torch.autograd.grad(checkpoint(step, leaf, use_reentrant=False), leaf)
    assert torch.equal(found, expected)


def test_modules(backend):
    student, teacher, labels = logits(9, 40), logits(9, 40), some_labels(9, classes=40)
    for module, others in [
        (fastkd.nn.SoftTargetLoss, (teacher,)),
        (fastkd.nn.DistillationLoss, (teacher, labels)),
    ]:
        one = module(backend=backend)
        expected = value_and_gradient(lambda s, one=one, o=others: one(s, *o), student)
        one.inplace = True
        found = value_and_gradient(lambda s, one=one, o=others: one(s, *o), student)
        for actual, other in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, other, rtol=0, atol=0)


def test_compiled_as_one_graph(backend):
    """There the compiler decides what shares memory."""
    student, teacher = logits(12, 40), logits(12, 40)

    def step(leaf):
        student = leaf * 1
        return fastkd.soft_target_loss(student, teacher, inplace=True, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, step):
        leaf = student.clone().requires_grad_()
        loss = function(leaf)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_opcheck(kernel_backend):
    student, teacher = logits(9, 40), logits(9, 40)
    with Recorder() as recorder:
        for keywords in ({}, {"num_classes": 37}):
            fastkd.soft_target_loss(
                student.clone().requires_grad_() * 1, teacher, inplace=True,
                backend=kernel_backend, **keywords,
            )  # fmt: skip
    assert len(recorder.calls) == 2
    recorder.opcheck()


def learns(student):
    return {"teacher_logits": student.detach().clone().requires_grad_()}


@pytest.mark.parametrize(
    ("make", "keywords", "message"),
    [
        (lambda x: x, {}, "a leaf of the graph"),
        (lambda x: (x * 1)[:, 1:], {}, "a view, because another tensor would change"),
        (lambda x: (x * 1).view(4, 30), {}, "a view, because another tensor would change"),
        (lambda x: x * 1, {"reduction": "none"}, "a loss that is one number"),
        (
            lambda x: x * 1,
            {"row_weight": torch.ones(3).requires_grad_()},
            "row_weight that requires",
        ),
        (lambda x: x * 1, learns, "that requires a gradient, which needs"),
        (
            lambda x: x * 1,
            {"temperature": torch.tensor(2.0, requires_grad=True)},
            "that requires a gradient, which needs",
        ),
        (lambda x: x * 1, lambda s: {"teacher_logits": s.detach()}, "shares its memory"),
        (lambda x: x * 1, {"inplace": 1}, "inplace must be True or False"),
    ],
)
def test_what_it_does_not_take(make, keywords, message):
    student = make(logits(3, 40).requires_grad_())
    before = student.detach().clone()
    keywords = keywords(student) if callable(keywords) else keywords
    keywords = {"inplace": True, "teacher_logits": logits(*student.shape), **keywords}
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.soft_target_loss(student, **keywords)
    labels = torch.zeros(len(student), dtype=torch.int64)
    with pytest.raises((ValueError, TypeError), match=message):
        fastkd.distillation_loss(student, labels=labels, **keywords)
    assert torch.equal(student, before)


def test_transforms_raise():
    teacher = logits(3, 40)

    def loss(x):
        return fastkd.soft_target_loss(x * 1, teacher, inplace=True, backend="reference")

    with pytest.raises(ValueError, match="tensors that only the reference serves"):
        torch.func.grad(loss)(logits(3, 40))

"""Calls with a teacher that kept k classes: errors, compiled code, transforms, modules."""

import pytest
import torch
from agreement import DTYPES
from calls import Recorder
from divergences import name_of
from top_k import kept, sides
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

import fastkd

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Each tail, and one divergence of each kind.
CALLS = [
    {"tail": "renormalize"},
    {"tail": "zero"},
    {"tail": "bucket", "divergence": "skew_kl", "beta": 0.3},
    {"tail": "renormalize_both", "divergence": "reverse_kl"},
]
every_call = pytest.mark.parametrize("keywords", CALLS, ids=name_of)
FORMS = {"soft_target_loss": (), "distillation_loss": (torch.tensor([1, 2, -100, 0]),)}
every_loss = pytest.mark.parametrize("name", FORMS)


def gradients(loss, *tensors, upstream=3.0):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return value, *torch.autograd.grad(value, leaves, torch.full_like(value, upstream))


def loss_of(name, backend, tail, dtype=torch.float32, **keywords):
    """A loss of the tensors that may learn, and these: the student, the values, and lse if any."""
    student, values, indices, lse = sides(
        4, 10, 3, (dtype, dtype), tail=tail, temperature=2.0, **keywords
    )
    indices[1, 2] = -1
    keywords = {**keywords, "temperature": 2.0, "backend": backend}

    def loss(student, *teacher):
        side = kept(teacher[0], indices, *teacher[1:], tail=tail)
        return getattr(fastkd, name)(student, side, *FORMS[name], **keywords)

    return loss, (student, values, *(() if lse is None else (lse,)))


def test_the_class_holds_what_it_is_given():
    values, indices, lse = torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4)
    side = fastkd.TopK(values, indices)
    assert (side.values_are, side.tail, side.lse) == ("logits", "renormalize", None)
    with pytest.raises(AttributeError):
        side.tail = "zero"
    with pytest.raises(TypeError, match="positional arguments"):
        fastkd.TopK(values, indices, "logits")
    side = fastkd.TopK(values, indices, tail="bucket", lse=lse)
    moved = pytree.tree_map(lambda x: x.double(), [side])[0]
    assert type(moved) is fastkd.TopK
    assert {x.dtype for x in (moved.values, moved.indices, moved.lse)} == {torch.float64}
    assert (moved.values_are, moved.tail) == ("logits", "bucket")


@pytest.mark.parametrize("kwargs", [{}, {"reduction": "none"}], ids=str)
@every_call
@every_loss
def test_derivatives(backend, name, keywords, kwargs):
    loss, tensors = loss_of(name, backend, dtype=torch.float64, **keywords, **kwargs)
    inputs = [x.requires_grad_() for x in tensors]
    assert gradcheck(loss, inputs)
    if backend == "reference":
        assert gradgradcheck(loss, inputs)


@every_call
@every_loss
def test_compiled(backend, name, keywords):
    """Made in compiled code, or handed to it; with everything learning or the student alone."""
    loss, tensors = loss_of(name, backend, **keywords)
    expected = gradients(loss, *tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, *tensors), expected)
    alone = gradients(lambda s: compiled(s, *tensors[1:]), tensors[0])
    torch.testing.assert_close(alone, expected[:2])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def of_side(student, side):
        return fastkd.soft_target_loss(student, side, backend=backend)

    student, values, indices, lse = sides(4, 10, 3, (torch.float32,) * 2, tail=keywords["tail"])
    side = kept(values, indices, lse, tail=keywords["tail"])
    expected = fastkd.soft_target_loss(student, side, backend=backend)
    torch.testing.assert_close(of_side(student, side), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_call
def test_compiled_by_inductor(backend, keywords, dtype):
    loss, tensors = loss_of("distillation_loss", backend, dtype=dtype, **keywords)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, *tensors), gradients(loss, *tensors))


def test_one_graph(backend):
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def loss(student, side):
        return fastkd.soft_target_loss(student, side, backend=backend)

    for _ in range(3):
        student, values, indices, _ = sides(4, 10, 3, (torch.float32,) * 2)
        side = kept(values, indices.long())
        expected = fastkd.soft_target_loss(student, side, backend=backend)
        torch.testing.assert_close(loss(student, side), expected)
    assert counter.frame_count == 1


def test_exported(backend):
    class Model(torch.nn.Module):
        def forward(self, student, side):
            return fastkd.soft_target_loss(student, side, backend=backend)

    student, values, indices, lse = sides(4, 10, 3, (torch.float32,) * 2, tail="bucket")
    inputs = student, kept(values, indices, lse, tail="bucket")
    program = torch.export.export(Model(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Model()(*inputs))


@every_call
@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(kernel_backend, name, keywords, dtype):
    loss, tensors = loss_of(name, kernel_backend, dtype=dtype, **keywords)
    with Recorder() as recorder:
        gradients(loss, *tensors)
        gradients(lambda student: loss(student, *tensors[1:]), tensors[0])
    assert len(recorder.calls) >= 2
    recorder.opcheck()


@pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")
@every_call
@every_loss
def test_transforms(name, keywords):
    loss, tensors = loss_of(name, None, **keywords)
    expected = gradients(loss, *tensors)[1:]
    argnums = tuple(range(len(tensors)))
    found = torch.func.grad(lambda *x: 3 * loss(*x), argnums=argnums)(*tensors)
    torch.testing.assert_close(found, expected)
    student, *teacher = tensors
    found = torch.func.vmap(lambda s: loss(s, *teacher))(torch.stack([student, 2 * student]))
    torch.testing.assert_close(found, torch.stack([loss(*tensors), loss(2 * student, *teacher)]))
    _, tangent = torch.func.jvp(loss, tensors, tuple(map(torch.ones_like, tensors)))
    torch.testing.assert_close(3 * tangent, sum(g.sum() for g in expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@every_call
@every_loss
def test_two_backwards_and_two_runs_are_the_same(backend, name, keywords, dtype):
    loss, tensors = loss_of(name, backend, dtype=dtype, **keywords)
    for count in {1, len(tensors)}:
        leaves = [x.clone().requires_grad_(i < count) for i, x in enumerate(tensors)]
        value = loss(*leaves)
        first = torch.autograd.grad(value, leaves[:count], retain_graph=True)
        second = torch.autograd.grad(value, leaves[:count])
        other = torch.autograd.grad(loss(*leaves), leaves[:count])
        for x, y, z in zip(first, second, other, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)


@every_call
def test_modules(backend, keywords):
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"} | {"backend": backend}
    student, values, indices, lse = sides(4, 10, 3, (torch.float32,) * 2, tail=tail)
    side, labels = kept(values, indices, lse, tail=tail), FORMS["distillation_loss"]
    found = fastkd.nn.SoftTargetLoss(**others)(student, side)
    torch.testing.assert_close(found, fastkd.soft_target_loss(student, side, **others))
    found = fastkd.nn.DistillationLoss(**others)(student, side, *labels)
    torch.testing.assert_close(found, fastkd.distillation_loss(student, side, *labels, **others))


@every_call
def test_parts(backend, keywords):
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"} | {"backend": backend}
    student, values, indices, lse = sides(4, 10, 3, (torch.float32,) * 2, tail=tail)
    student.requires_grad_()
    side, labels = kept(values, indices, lse, tail=tail), torch.tensor([1, 2, 3, 0])
    for weights in ({}, {"hard_weight": 0.0}, {"soft_weight": 0.0}):
        of_call = {**others, **weights, "temperature": 2.0}
        loss, hard, soft = fastkd.distillation_loss(
            student, side, labels, return_parts=True, **of_call
        )
        torch.testing.assert_close(hard, torch.nn.functional.cross_entropy(student, labels))
        expected = fastkd.soft_target_loss(student, side, temperature=2.0, **others)
        torch.testing.assert_close(soft, expected)
        assert not hard.requires_grad
        assert not soft.requires_grad
        torch.testing.assert_close(
            loss, weights.get("hard_weight", 0.1) * hard + weights.get("soft_weight", 0.9) * soft
        )


@every_call
def test_inputs_are_not_changed(backend, keywords):
    loss, tensors = loss_of("soft_target_loss", backend, **keywords)
    copies = [x.clone() for x in tensors]
    gradients(loss, *tensors)
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)


def test_empty_batch(backend):
    student = torch.randn(0, 5, requires_grad=True)
    values = torch.randn(0, 3, requires_grad=True)
    side = kept(values, torch.zeros(0, 3, dtype=torch.int64))
    loss = fastkd.soft_target_loss(student, side, backend=backend)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 5)
    assert values.grad.shape == (0, 3)


@every_call
def test_a_temperature_alone_learns(backend, keywords):
    """The values' gradient is not in this one, and the lse has no part in it."""
    heat = torch.full((4,), 2.0, requires_grad=True)
    tail = keywords["tail"]
    others = {n: x for n, x in keywords.items() if n != "tail"}
    student, values, indices, lse = sides(4, 10, 3, (torch.float32,) * 2, tail=tail)
    side = kept(values, indices, lse, tail=tail)

    def gradient(backend):
        loss = fastkd.soft_target_loss(student, side, temperature=heat, backend=backend, **others)
        return torch.autograd.grad(loss, heat)

    torch.testing.assert_close(gradient(backend), gradient("reference"))

"""Calls with a teacher of probabilities: errors, compiled code, transforms, modules."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import GIVEN, logits
from calls import Recorder
from probabilities import KINDS, sides
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

import fastkd

pytestmark = pytest.mark.usefixtures("fresh_compiler")

every_kind = pytest.mark.parametrize("teacher_is", KINDS)
# One divergence whose gradient kernels have from sums, and others.
CALLS = [{}, {"divergence": "reverse_kl"}, {"divergence": "skew_kl", "beta": 0.3}]
every_call = pytest.mark.parametrize("keywords", CALLS, ids=str)
FORMS = {"soft_target_loss": (), "distillation_loss": (torch.tensor([1, 2, -100, 0]),)}
every_loss = pytest.mark.parametrize("name", FORMS)


def gradients(loss, *tensors, upstream=3.0):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return value, *torch.autograd.grad(value, leaves, torch.full_like(value, upstream))


def loss_of(name, teacher_is, backend, **keywords):
    """A loss of two tensors, and these."""

    def loss(student, stated):
        side = GIVEN[teacher_is](stated)
        return getattr(fastkd, name)(
            student, side, *FORMS[name], temperature=2.0, backend=backend, **keywords
        )

    return loss, sides(teacher_is, 4, 10, torch.float32, torch.float32, temperature=2.0)


@every_kind
def test_a_side_holds_its_tensor(teacher_is):
    tensor = torch.rand(4, 10)
    side = GIVEN[teacher_is](tensor)
    assert getattr(side, teacher_is) is tensor
    with pytest.raises(AttributeError):
        setattr(side, teacher_is, tensor)
    moved = pytree.tree_map(lambda x: x.double(), [side])[0]
    assert type(moved) is GIVEN[teacher_is]
    assert getattr(moved, teacher_is).dtype == torch.float64


@every_kind
@every_loss
def test_errors(name, teacher_is):
    make, student = GIVEN[teacher_is], torch.randn(4, 10)
    word = make.__name__

    def call(*sides, **keywords):
        return getattr(fastkd, name)(*sides, *FORMS[name], **keywords)

    good = make(torch.rand(4, 10))
    for heat in (2.0, torch.tensor(2.0)):
        with pytest.raises(ValueError, match=f"teacher_temperature softens .* {word} are used as"):
            call(student, good, teacher_temperature=heat)
    for many in ([good], [student, good], (x for x in [good])):
        with pytest.raises(TypeError, match=rf"teacher_logits\[.\] must be a .*, got {word}: of"):
            call(student, many)
    with pytest.raises(ValueError, match="teacher_weights needs a sequence"):
        call(student, good, teacher_weights=[1.0])
    with pytest.raises(TypeError, match=f"{word} must hold a tensor, got list"):
        call(student, make([[0.1] * 10] * 4))
    with pytest.raises(TypeError, match=r"must be float32, .* got torch.int64"):
        call(student, make(torch.ones(4, 10, dtype=torch.int64)))
    with pytest.raises(ValueError, match="must have the same shape"):
        call(student, make(torch.rand(4, 11)))
    with pytest.raises(ValueError, match="must be on the same device"):
        call(student, make(torch.rand(4, 10, device="meta")))
    with pytest.raises(TypeError, match=f"student_logits must be a tensor, got {word}"):
        call(good, student)


@every_kind
def test_metrics_take_logits_alone(teacher_is):
    side = GIVEN[teacher_is](torch.rand(4, 10))
    with pytest.raises(
        TypeError, match=f"teacher_logits must be a tensor, .*{type(side).__name__}"
    ):
        fastkd.distillation_metrics(torch.randn(4, 10), side)


@every_kind
def test_explain(backend, teacher_is):
    _, (student, stated) = loss_of("soft_target_loss", teacher_is, backend)
    side = GIVEN[teacher_is](stated)
    assert fastkd.explain(fastkd.soft_target_loss, student, side, backend=backend).chosen == backend


@pytest.mark.parametrize("kwargs", [{}, {"reduction": "none"}], ids=str)
@every_call
@every_kind
@every_loss
def test_derivatives(backend, name, teacher_is, keywords, kwargs):
    loss, tensors = loss_of(name, teacher_is, backend, **keywords, **kwargs)
    # No probability so small that differences are larger.
    stated = (0.5 + torch.rand(4, 10, dtype=torch.float64)) / 10
    stated = stated.log() if teacher_is == "log_probabilities" else stated
    inputs = [x.requires_grad_() for x in (tensors[0].double(), stated)]
    assert gradcheck(loss, inputs)
    if backend == "reference":
        assert gradgradcheck(loss, inputs)


@every_call
@every_kind
@every_loss
def test_compiled(backend, name, teacher_is, keywords):
    """Made in compiled code, or handed to it."""
    loss, tensors = loss_of(name, teacher_is, backend, **keywords)
    expected = gradients(loss, *tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, *tensors), expected)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def of_side(student, side):
        return getattr(fastkd, name)(
            student, side, *FORMS[name], temperature=2.0, backend=backend, **keywords
        )

    found = gradients(lambda s, t: of_side(s, GIVEN[teacher_is](t)), *tensors)
    torch.testing.assert_close(found, expected)


def test_one_graph_for_each_side(backend):
    counter = CompileCounter()
    student = torch.randn(4, 10)

    @torch.compile(fullgraph=True, backend=counter)
    def loss(student, side):
        return fastkd.soft_target_loss(student, side, backend=backend)

    for _ in range(2):
        p = torch.randn(4, 10).softmax(-1)
        for side in (fastkd.Probabilities(p), fastkd.LogProbabilities(p.log())):
            expected = fastkd.soft_target_loss(student, side, backend=backend)
            torch.testing.assert_close(loss(student, side), expected)
    assert counter.frame_count == 2


@every_kind
def test_exported(backend, teacher_is):
    class Model(torch.nn.Module):
        def forward(self, student, side):
            return fastkd.soft_target_loss(student, side, backend=backend)

    _, (student, stated) = loss_of("soft_target_loss", teacher_is, backend)
    sides = student, GIVEN[teacher_is](stated)
    program = torch.export.export(Model(), sides)
    torch.testing.assert_close(program.module()(*sides), Model()(*sides))


@every_call
@every_kind
@every_loss
def test_operators_pass_opcheck(kernel_backend, name, teacher_is, keywords):
    loss, tensors = loss_of(name, teacher_is, kernel_backend, **keywords)
    with Recorder() as recorder:
        gradients(loss, *tensors)
    assert len(recorder.calls) >= 2
    recorder.opcheck()


@pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")
@every_call
@every_kind
@every_loss
def test_transforms(name, teacher_is, keywords):
    loss, tensors = loss_of(name, teacher_is, None, **keywords)
    expected = gradients(loss, *tensors)[1:]
    found = torch.func.grad(lambda *x: 3 * loss(*x), argnums=(0, 1))(*tensors)
    torch.testing.assert_close(found, expected)
    student, stated = tensors
    found = torch.func.vmap(lambda s: loss(s, stated))(torch.stack([student, 2 * student]))
    torch.testing.assert_close(found, torch.stack([loss(*tensors), loss(2 * student, stated)]))
    _, tangent = torch.func.jvp(loss, tensors, tuple(map(torch.ones_like, tensors)))
    torch.testing.assert_close(3 * tangent, sum(g.sum() for g in expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@every_call
@every_kind
@every_loss
def test_two_backwards_and_two_runs_are_the_same(backend, name, teacher_is, keywords, dtype):
    loss, tensors = loss_of(name, teacher_is, backend, **keywords)
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    other = torch.autograd.grad(loss(*leaves), leaves)
    for x, y, z in zip(first, second, other, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@every_kind
def test_modules(backend, teacher_is):
    _, (student, stated) = loss_of("soft_target_loss", teacher_is, backend)
    side, labels = GIVEN[teacher_is](stated), FORMS["distillation_loss"]
    keywords = {"temperature": 2.0, "divergence": "jsd", "backend": backend}
    found = fastkd.nn.SoftTargetLoss(**keywords)(student, side)
    torch.testing.assert_close(found, fastkd.soft_target_loss(student, side, **keywords))
    found = fastkd.nn.DistillationLoss(**keywords)(student, side, *labels)
    torch.testing.assert_close(found, fastkd.distillation_loss(student, side, *labels, **keywords))
    with pytest.raises(ValueError, match="teacher_temperature softens logits"):
        fastkd.nn.SoftTargetLoss(teacher_temperature=2.0)(student, side)


@every_kind
def test_inputs_are_not_changed(backend, teacher_is):
    loss, tensors = loss_of("soft_target_loss", teacher_is, backend)
    copies = [x.clone() for x in tensors]
    gradients(loss, *tensors)
    for x, copy in zip(tensors, copies, strict=True):
        assert torch.equal(x, copy)


@every_kind
def test_empty_batch(backend, teacher_is):
    student, stated = (torch.randn(0, 5, requires_grad=True) for _ in range(2))
    loss = fastkd.soft_target_loss(student, GIVEN[teacher_is](stated), backend=backend)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == stated.grad.shape == (0, 5)


@every_kind
def test_a_temperature_alone_learns(backend, teacher_is):
    """The teacher's numbers have no temperature, and its gradient is not in this one."""
    student, stated = loss_of("soft_target_loss", teacher_is, backend)[1]
    stated[0, 3] = 0.0 if teacher_is == "probabilities" else -math.inf
    heat = torch.full((4,), 2.0, requires_grad=True)

    def gradient(backend):
        side = GIVEN[teacher_is](stated)
        loss = fastkd.soft_target_loss(student, side, temperature=heat, backend=backend)
        return torch.autograd.grad(loss, heat)

    torch.testing.assert_close(gradient(backend), gradient("reference"))


def test_the_gradient_at_0_is_0(backend):
    """Where it would be infinite, as a derivative from one side."""
    p = torch.tensor([[0.0, 0.5, 0.5]], requires_grad=True)
    for divergence in ("forward_kl", "jsd", "tvd", "skew_kl", "skew_reverse_kl"):
        loss = fastkd.soft_target_loss(
            logits(1, 3), fastkd.Probabilities(p), divergence=divergence, backend=backend
        )
        (gradient,) = torch.autograd.grad(loss, p)
        assert gradient[0, 0] == 0
        assert gradient[0, 1:].all()

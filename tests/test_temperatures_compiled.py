"""Temperatures that learn, in compiled code, under transforms and as torch wants operators."""

import math

import pytest
import torch
from agreement_logits import logits
from calls import Recorder
from torch._dynamo.testing import CompileCounter

import fastkd

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Those whose gradients a kernel gives, and those whose gradients torch's own operations do.
CALLS = [{}, {"divergence": "reverse_kl"}, {"divergence": "jsd"}, {"teacher_weights": [1, 2]}]
every_call = pytest.mark.parametrize("keywords", CALLS, ids=str)


def gradients(loss, *tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return value, *torch.autograd.grad(value, leaves, torch.full_like(value, 3.0))


def loss_of(backend, keywords):
    """A loss of a student, a temperature and one of the teacher."""
    teachers = [logits(4, 10) for _ in range(2)]

    def loss(student, heat, own):
        return fastkd.soft_target_loss(
            student, teachers if "teacher_weights" in keywords else teachers[0],
            temperature=heat, teacher_temperature=own, backend=backend, **keywords,
        )  # fmt: skip

    return loss, (logits(4, 10), torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0, 0.5]))


@every_call
def test_compiled(backend, keywords):
    loss, tensors = loss_of(backend, keywords)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, *tensors), gradients(loss, *tensors))


def test_one_graph_for_all_values(backend):
    loss, (student, _, own) = loss_of(backend, {})
    counter = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for heat in (1.0, 2.0, 5.0):
        tensors = student, torch.tensor(heat), own
        torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    assert counter.frame_count == 1


@every_call
def test_operators_pass_opcheck(kernel_backend, keywords):
    loss, tensors = loss_of(kernel_backend, keywords)
    with Recorder() as recorder:
        gradients(loss, *tensors)
    assert len(recorder.calls) >= 2
    recorder.opcheck()


@pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")
@every_call
def test_transforms(keywords):
    loss, tensors = loss_of(None, keywords)
    expected = gradients(loss, *tensors)[1:]
    found = torch.func.grad(lambda *x: 3 * loss(*x), argnums=(0, 1, 2))(*tensors)
    torch.testing.assert_close(found, expected)
    student, heat, own = tensors
    found = torch.func.vmap(lambda heat: loss(student, heat, own))(torch.stack([heat, 2 * heat]))
    torch.testing.assert_close(found, torch.stack([loss(*tensors), loss(student, 2 * heat, own)]))


@pytest.mark.parametrize("scale_t2", [True, False])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@every_call
def test_values_out_of_range_in_compiled_code(backend, keywords, value, scale_t2):
    """NaN rows with NaN gradients, and no others: nothing can raise there."""
    keywords = {**keywords, "scale_t2": scale_t2, "reduction": "none"}
    loss, (student, _, own) = loss_of(backend, keywords)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    bad = torch.tensor([1.0, value, 2.0, 3.0])
    for temperatures in ((bad, own), (own, bad)):
        value, to_student, *_ = gradients(compiled, student, *temperatures)
        assert value.isnan().tolist() == [False, True, False, False]
        assert to_student.isnan().all(-1).tolist() == to_student.isnan().any(-1).tolist()
        assert to_student.isnan().any(-1).tolist() == value.isnan().tolist()


@every_call
def test_two_backwards_and_two_runs_are_the_same(backend, keywords):
    loss, tensors = loss_of(backend, keywords)
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    second = torch.autograd.grad(value, leaves)
    other = torch.autograd.grad(loss(*leaves), leaves)
    for x, y, z in zip(first, second, other, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


def test_second_derivatives_through_a_kernel_raise(kernel_backend):
    loss, tensors = loss_of(kernel_backend, {})
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match='pass backend="reference"'):
        torch.autograd.grad(found[1], leaves[1])

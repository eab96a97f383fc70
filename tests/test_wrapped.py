"""Tensors whose memory does not hold their values: transforms, subclasses, lazy negations."""

import functools

import pytest
import torch
from calls import LOSSES, sample
from torch.utils._pytree import tree_map, tree_map_only

import fastkd

pytestmark = pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")


class Wrapped(torch.Tensor):
    """A tensor without memory of its own: every operator goes to the one inside."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = functools.partial(tree_map_only, cls, lambda x: x.inner)
        result = function(*unwrap(args), **unwrap(kwargs or {}))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, result)


def plain(x):
    return x.inner if isinstance(x, Wrapped) else x


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_tensor_subclasses(backend, name, position):
    call = sample(name)
    if position >= len(call.tensors):
        return
    expected = call(backend=backend)
    tensors = list(call.tensors)
    tensors[position] = Wrapped(tensors[position])
    actual = call(*tensors, backend=backend)
    torch.testing.assert_close(plain(actual), expected)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_tensor_subclasses(backend, name, position):
    call = sample(name)
    if position >= len(call.tensors):
        return
    leaves, others = call.leaves(), call.leaves()
    call(*leaves, backend=backend).sum().backward()
    others[position] = Wrapped(others[position].detach()).requires_grad_()
    call(*others, backend=backend).sum().backward()
    for x, y in zip(leaves, others, strict=True):
        torch.testing.assert_close(plain(y.grad), x.grad)


def test_labels_in_a_subclass(backend):
    call = sample("distillation_loss")
    actual = call(labels=Wrapped(call.keywords["labels"]), backend=backend)
    torch.testing.assert_close(plain(actual), call(backend=backend))


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_lazy_negation(name, position):
    """The imaginary part of a conjugate is a float32 view of the negated numbers."""
    call = sample(name)
    if position >= len(call.tensors):
        return
    tensors = list(call.tensors)
    x = tensors[position]
    tensors[position] = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert tensors[position].is_neg()
    torch.testing.assert_close(call(*tensors), call())


def scalar(call, student, **keywords):
    return call(student, *call.tensors[1:], **keywords).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_functional_transforms(name):
    call = sample(name)
    student = call.tensors[0]
    (expected,) = torch.autograd.grad(scalar(call, leaf := call.leaves()[0]), leaf)
    gradient = torch.func.grad(lambda x: scalar(call, x))
    torch.testing.assert_close(gradient(student), expected)
    _, hessian_vector = torch.func.jvp(gradient, (student,), (torch.ones_like(student),))
    assert hessian_vector.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_vmap(name):
    calls = [sample(name) for _ in range(3)]
    stacked = [torch.stack(x) for x in zip(*(c.tensors for c in calls), strict=True)]
    actual = torch.func.vmap(lambda *x: calls[0](*x))(*stacked)
    torch.testing.assert_close(actual, torch.stack([c() for c in calls]))


def test_vmap_over_labels():
    call = sample("distillation_loss")
    labels = torch.stack([call.keywords["labels"], call.keywords["labels"].flip(0)])
    actual = torch.func.vmap(lambda one: call(labels=one))(labels)
    torch.testing.assert_close(actual, torch.stack([call(labels=one) for one in labels]))


def test_gradient_of_the_regressor_alone():
    call, weight = sample("hint_loss"), torch.randn(3, 3)

    def loss(w):
        return call(regressor_weight=w)

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode(name):
    """It works on the reference, and says so where a kernel cannot do it."""
    call = sample(name)
    dual = torch.autograd.forward_ad
    with dual.dual_level():
        student = dual.make_dual(call.tensors[0], torch.ones_like(call.tensors[0]))
        loss = scalar(call, student, backend="reference")
        assert dual.unpack_dual(loss).tangent.isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_a_transform_falls_back_aloud(kernel_backend, name):
    call = sample(name)
    with pytest.warns(fastkd.FallbackWarning, match=r"torch\.func"):
        torch.func.grad(lambda x: scalar(call, x))(call.tensors[0])


@pytest.mark.parametrize("name", LOSSES)
def test_a_transform_of_a_kernel_asked_for_raises(kernel_backend, name):
    call = sample(name)
    with pytest.raises(fastkd.BackendUnavailableError, match=r"torch\.func"):
        torch.func.grad(lambda x: scalar(call, x, backend=kernel_backend))(call.tensors[0])

"""Tensors whose memory does not hold their values: transforms, subclasses, lazy negations."""

import functools

import pytest
import torch
from calls import LOSSES, sample, variants
from wrapped import Wrapped, plain

import fastkd
from fastkd import autograd, tensors

pytestmark = pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")


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


def negated(x):
    """The imaginary part of a conjugate is a float32 view of the negated numbers."""
    lazily = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazily.is_neg()
    return lazily


def zero(x):
    """Zeros without memory: their address is a null pointer."""
    return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)


# Each with what it stands for.
ODD = {"negated": (negated, lambda x: x), "zero": (zero, torch.zeros_like)}


def with_(tensors, position, x):
    return [*tensors[:position], x, *tensors[position + 1 :]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", LOSSES)
def test_tensors_whose_memory_is_something_else(backend, name, odd, dtype):
    make, meant = ODD[odd]
    for call in variants(name, dtype):
        for position, x in enumerate(call.tensors):
            actual = call(*with_(call.tensors, position, make(x)), backend=backend)
            expected = call(*with_(call.tensors, position, meant(x)), backend=backend)
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_beside_such_tensors(backend, name, odd):
    """Of the tensors that are ordinary, and of the odd one itself."""
    make, meant = ODD[odd]
    for call in variants(name):
        for position, x in enumerate(call.tensors):
            found = []
            for one in (make(x), meant(x)):
                leaves = with_(call.leaves(), position, one.detach().requires_grad_())
                loss = call(*leaves, backend=backend)
                found.append(torch.autograd.grad(loss, leaves, torch.full_like(loss, 3.0)))
            torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", LOSSES)
def test_a_grad_output_whose_memory_is_something_else(backend, name, odd, dtype):
    make, meant = ODD[odd]
    for call in variants(name, dtype):
        for count in {call.students, len(call.tensors)}:
            leaves = [
                x.clone().requires_grad_(index < count) for index, x in enumerate(call.tensors)
            ]
            loss = call(*leaves, backend=backend)
            # 1 is what hands forward's gradient on.
            for value in (torch.ones_like(loss), torch.randn_like(loss)):
                loss = call(*leaves, backend=backend)
                find = functools.partial(torch.autograd.grad, loss, leaves[:count])
                kept = find(make(value), retain_graph=True)
                expected = find(meant(value), retain_graph=True)
                torch.testing.assert_close(kept, expected)
                torch.testing.assert_close(find(make(value)), expected)


def test_the_sign_of_a_gradient_that_torch_negates_lazily(backend):
    student, teacher = sample("soft_target_loss").tensors
    found = []
    for sign in (lambda loss: loss, lambda loss: (torch.complex(0 * loss, loss).conj() * 1j).real):
        leaf = student[:1].clone().requires_grad_()
        loss = fastkd.soft_target_loss(leaf, teacher[:1], reduction="none", backend=backend)
        sign(loss).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


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


def directional(call, position, tangent, **keywords):
    """The derivative of the summed loss along a tangent, by a gradient and by forward mode."""
    leaves = call.leaves()
    gradients = torch.autograd.grad(call(*leaves, **keywords).sum(), leaves)
    dual = torch.autograd.forward_ad
    with dual.dual_level():
        tensors = with_(call.tensors, position, dual.make_dual(call.tensors[position], tangent))
        loss = call(*tensors, **keywords).sum()
        return (gradients[position] * tangent).sum(), dual.unpack_dual(loss).tangent


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode(name):
    """No backend is asked for: a kernel, which has no tangents, steps back."""
    for call in variants(name, torch.float64):
        for position, x in enumerate(call.tensors):
            for keywords in ({}, {"backend": "reference"}):
                torch.testing.assert_close(
                    *directional(call, position, torch.randn_like(x), **keywords)
                )


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_over_a_kernel_asked_for_raises(kernel_backend, name):
    call = sample(name)
    for position, x in enumerate(call.tensors):
        with pytest.raises(fastkd.BackendUnavailableError, match="forward mode"):
            directional(call, position, torch.ones_like(x), backend=kernel_backend)


@pytest.mark.parametrize("name", LOSSES)
def test_a_level_of_forward_mode_without_tangents_is_no_obstacle(kernel_backend, name):
    call = sample(name)
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(call(backend=kernel_backend), call(backend=kernel_backend))


@pytest.mark.parametrize("name", LOSSES)
def test_a_tangent_that_only_backward_sees(kernel_backend, name):
    """Forward mode over reverse mode: the tangent is that of a factor of the loss."""
    dual = torch.autograd.forward_ad
    for call in variants(name):
        with dual.dual_level():
            leaves = call.leaves()
            loss = call(*leaves, backend=kernel_backend)
            factor = dual.make_dual(torch.ones_like(loss), torch.ones_like(loss))
            with pytest.raises(RuntimeError, match=r'forward mode.*backend="reference"'):
                torch.autograd.grad(loss, leaves, factor)


@pytest.mark.parametrize("name", LOSSES)
def test_batches_of_gradients(backend, name):
    """Vectorised jacobians and is_grads_batched: the reference takes them, a kernel names it."""
    for call in variants(name):
        leaves = call.leaves()
        loss = call(*leaves, backend=backend)
        batch = torch.randn(3, *loss.shape)

        def by_vmap(loss=loss, leaves=leaves):
            def one(cotangent):
                return torch.autograd.grad(loss, leaves, cotangent, retain_graph=True)

            return torch.func.vmap(one)

        def find(*args, loss=loss, leaves=leaves, **keywords):
            return torch.autograd.grad(loss, leaves, *args, retain_graph=True, **keywords)

        batched = functools.partial(find, is_grads_batched=True)
        if backend != "reference":
            for vectorised in (batched, by_vmap()):
                with pytest.raises(RuntimeError, match=r'one grad_output.*backend="reference"'):
                    vectorised(batch)
            continue
        expected = [torch.stack(x) for x in zip(*map(find, batch), strict=True)]
        torch.testing.assert_close(list(batched(batch)), expected)
        torch.testing.assert_close(list(by_vmap()(batch)), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_vectorised_jacobian(name):
    call = sample(name)
    one_by_one, at_once = (
        torch.autograd.functional.jacobian(
            lambda *x: call(*x, backend="reference"), call.tensors, vectorize=vectorize
        )
        for vectorize in (False, True)
    )
    torch.testing.assert_close(at_once, one_by_one)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_jit_trace(name):
    """A trace holds torch's own operations, so it computes: for other values, with gradients."""
    for first, second in zip(variants(name), variants(name), strict=True):

        def loss(*tensors, call=first):
            return call(*tensors)

        traced = torch.jit.trace(loss, first.tensors, check_trace=False)
        for call in (first, second):
            call = call._replace(keywords=first.keywords)
            torch.testing.assert_close(traced(*call.tensors), call())
            mine, theirs = call.leaves(), call.leaves()
            traced(*mine).sum().backward()
            call(*theirs).sum().backward()
            torch.testing.assert_close([x.grad for x in mine], [x.grad for x in theirs])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LOSSES)
def test_jit_trace_of_a_kernel_asked_for_raises(kernel_backend, name):
    call = sample(name)
    with pytest.raises(fastkd.BackendUnavailableError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda *x: call(*x, backend=kernel_backend), call.tensors)


@pytest.mark.parametrize("name", LOSSES)
def test_a_torch_without_the_private_names(kernel_backend, name, monkeypatch):
    """All calls go through the dispatcher then."""

    def find(call):
        leaves = call.leaves()
        loss = call(*leaves, backend=kernel_backend)
        return loss, torch.autograd.grad(loss, leaves, torch.ones_like(loss))

    for call in variants(name):
        expected = find(call)
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "_is_zero", lambda _: True)
            patch.setattr(autograd, "dispatch_modes", lambda: 1)
            torch.testing.assert_close(find(call), expected)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


TRANSFORMS = {
    "grad": torch.func.grad,
    "hessian": torch.func.hessian,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(())),
    "jacrev": torch.func.jacrev,
    "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
}


@pytest.mark.thorough
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_transforms_inside_a_compiled_function(name, transform):
    call = sample(name, torch.float64)
    transformed = TRANSFORMS[transform](lambda x: scalar(call, x))
    actual = compiled(transformed)(call.tensors[0])
    torch.testing.assert_close(actual, transformed(call.tensors[0]))
    leaves = [x for x in torch.utils._pytree.tree_leaves(actual)]
    assert all(x.abs().sum() > 0 for x in leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_a_compiled_function_inside_a_transform(name):
    call = sample(name, torch.float64)
    expected = torch.func.grad(lambda x: scalar(call, x))(call.tensors[0])
    torch._dynamo.reset()
    inner = torch.compile(lambda x: scalar(call, x), backend="aot_eager")
    torch.testing.assert_close(torch.func.grad(inner)(call.tensors[0]), expected)


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

"""Losses of fastkd.compat against the libraries' formulas, or the libraries themselves."""

import torch
from conventions import assert_same, draw

import fastkd


def assert_stands_for(backend, call, formula, *tensors, students=1):
    """`call` has the results of `formula` and their gradients, in float64 and in float32.

    The formula is in float64 always. Results are one tensor, or a list of them.
    """
    with fastkd.use_backend(backend):
        ours, theirs = (function(*tensors) for function in (call, formula))
    assert type(ours) is type(theirs)
    assert_same_layout(ours, theirs)
    assert_same(backend, one(call), one(formula), *tensors, students=students)

    rounded = [x.float() if x.is_floating_point() else x for x in tensors]
    wide = [x.double() if x.is_floating_point() else x for x in rounded]
    loss, *gradients = differentiate(backend, one(call), rounded, students)
    expected, *expected_gradients = differentiate(backend, one(formula), wide, students)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-7)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        largest = other.abs().max().item()
        torch.testing.assert_close(gradient.double(), other, rtol=1e-5, atol=2e-6 * largest)


def assert_same_layout(ours, theirs):
    if isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_same_layout(one, other)
    else:
        assert ours.shape == theirs.shape


def one(function):
    """One number that has all of the function's results in it."""

    def total(*tensors):
        results = function(*tensors)
        results = results if isinstance(results, list) else [results]
        return sum((i + 1) * x.sum() for i, x in enumerate(results))

    return total


def differentiate(backend, function, tensors, students):
    leaves = [x.detach().clone().requires_grad_(i < students) for i, x in enumerate(tensors)]
    with fastkd.use_backend(backend):
        loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves[:students])


def is_without_gradient(call, student, teacher):
    """The teacher receives no gradient, though it requires one."""
    student, teacher = (x.detach().clone().requires_grad_() for x in (student, teacher))
    return torch.autograd.grad(call(student, teacher), teacher, allow_unused=True)[0] is None


def draw_logits(*shapes):
    """Far enough apart that the terms of a KL divergence in float32 do not cancel."""
    return [4 * x for x in draw(*shapes)]

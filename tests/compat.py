"""Losses of fastkd.compat against the libraries' formulas, or the libraries themselves."""

import torch
from conventions import assert_same, draw

import fastkd


def assert_stands_for(backend, call, formula, *tensors, students=1, tolerance=2e-6, in_half=False):
    """`call` has the results of `formula` and their gradients, in float64 and in float32.

    Results are one tensor, or a list of them. With `in_half` the inputs are bfloat16 too, and
    autocast is on.
    """
    if in_half:
        assert_keeps_precision(backend, one(call), one(formula), *tensors, students=students)
    with fastkd.use_backend(backend):
        ours, theirs = (function(*tensors) for function in (call, formula))
    assert type(ours) is type(theirs)
    assert_same_layout(ours, theirs)
    assert_same(backend, one(call), one(formula), *tensors, students=students)

    rounded, wide = rounded_to(torch.float32, tensors)
    found = differentiate(backend, one(call), rounded, students)
    expected = differentiate(backend, one(formula), wide, students)
    library = differentiate(backend, one(formula), rounded, students)
    assert found[0].dtype == torch.float32
    for result, exact, theirs in zip(found, expected, library, strict=True):
        assert_close(result, exact, theirs, tolerance)


def rounded_to(dtype, tensors):
    """The tensors in a dtype, and the same numbers in float64."""
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    return rounded, [x.double() if x.is_floating_point() else x for x in rounded]


def assert_keeps_precision(backend, call, formula, *tensors, students):
    """Half precision is only stored: bfloat16 inputs are widened, and autocast changes nothing."""

    def under_autocast(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return call(*tensors)

    for function, dtype, tolerance in (
        (call, torch.bfloat16, 2e-2),
        (under_autocast, torch.float32, 1e-5),
    ):
        rounded, wide = rounded_to(dtype, tensors)
        loss, *gradients = differentiate(backend, function, rounded, students)
        exact, *expected = differentiate(backend, formula, wide, students)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
        for gradient, other in zip(gradients, expected, strict=True):
            assert (gradient.double() - other).abs().max() <= tolerance * other.abs().max()


def assert_close(found, exact, theirs, tolerance):
    """To so much of the largest, beyond three times what the library itself is off in float32."""
    error, of_library = ((x.double() - exact).abs().max() for x in (found, theirs))
    assert error <= tolerance * exact.abs().max() + 3 * of_library


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

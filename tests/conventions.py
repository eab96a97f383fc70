"""Other libraries' formulas and the calls that replace them, compared in float64."""

import torch

import fastkd


def row(table, convention):
    """Marks the test of one row of the tables in docs/numerics.md, by its first cell."""

    def mark(test):
        test.convention = (table, convention)
        return test

    return mark


def assert_same(backend, call, formula, *tensors, students=1, value=True):
    """`call(*tensors)` has the value of `formula(*tensors)`, and its gradients to the students.

    Without `value` the gradients alone are compared.
    """
    results = []
    for function in (call, formula):
        leaves = [x.detach().clone().requires_grad_(i < students) for i, x in enumerate(tensors)]
        with fastkd.use_backend(backend):
            loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves[:students])))
    (actual, *gradients), (expected, *expected_gradients) = results
    if value:
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def draw(*shapes):
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]

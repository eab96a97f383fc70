"""What it means that a loss agrees with the oracle, in value and gradients."""

import functools

import numpy as np
import torch
from torch import float32, float64

DTYPES = [float32, float64, torch.float16, torch.bfloat16]

# Of the loss, or of the loss's natural size where that is larger; of the gradient's norm.
LOSS_TOLERANCE = {float32: 2e-6, float64: 1e-12}

GRADIENT_TOLERANCE = {float32: 3e-6, float64: 1e-12}

# Half precision: the error of rounding the exact gradient, and no more than 5% of error besides.
HALF_TOLERANCE = 1.05

# Of the norm of the terms of a gradient, added up where they are subtracted: what is left of terms
# that cancel. It counts where it is larger than the tolerance above; half precision adds the two.
CANCELLED_TOLERANCE = {float32: 5e-7, float64: 5e-15}


def array(x):
    """Exact, whatever the dtype and the device."""
    x = x.detach().cpu()
    return x.double().numpy() if x.is_floating_point() else x.numpy()


def leaf(x, requires_grad=True):
    """A leaf that shares values and strides with `x`."""
    return x.detach().requires_grad_(requires_grad)


def check(
    loss, expected, tensors, *, students=1, grad_output=None, size=0.0, teachers=True, terms=None
):
    """`loss(*tensors)` and its gradients are those of `expected(*arrays, grad_output=...)`.

    The first `students` tensors require grad alone (kernels compute that gradient in forward), and
    then together with all others unless `teachers` is False. `size` is what the loss may be
    rounded against where it is smaller. `terms(*arrays, grad_output=...)` is what gradients may be
    rounded against.
    """
    upstream = 1.0 if grad_output is None else array(torch.as_tensor(grad_output, dtype=float64))
    arrays = [*map(array, tensors)]
    value, expected_gradients = expected(*arrays, grad_output=upstream)
    of_terms = terms and functools.cache(lambda: terms(*arrays, grad_output=upstream))
    for wanted in {students, len(tensors) if teachers else students}:
        leaves = [leaf(x, index < wanted) for index, x in enumerate(tensors)]
        actual = loss(*leaves)
        assert_loss(actual, value, tensors, size)
        if grad_output is None:
            cotangent = torch.ones_like(actual)
        else:
            cotangent = torch.as_tensor(grad_output, dtype=actual.dtype).expand_as(actual)
        gradients = torch.autograd.grad(actual, leaves[:wanted], cotangent)
        compute = float64 if any(x.dtype == float64 for x in tensors) else float32
        for index, gradient in enumerate(gradients):
            assert gradient.dtype == tensors[index].dtype
            cancelled = CANCELLED_TOLERANCE[compute], of_terms and (lambda i=index: of_terms()[i])
            assert_gradient(gradient, expected_gradients[index], *cancelled)


def assert_loss(actual, expected, tensors, size=0.0):
    expected = np.asarray(expected)
    # What the dtype does not hold is infinite.
    limit = torch.finfo(actual.dtype).max
    expected = np.where(np.abs(expected) > limit, np.copysign(np.inf, expected), expected)
    is_double = any(x.dtype == float64 for x in tensors)
    assert actual.dtype == (float64 if is_double else float32)
    assert tuple(actual.shape) == expected.shape
    bound = LOSS_TOLERANCE[actual.dtype] * np.maximum(np.abs(expected), size)
    actual = array(actual)
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        wrong = ~(same | (np.isfinite(expected) & (np.abs(actual - expected) <= bound)))
    assert not wrong.any(), (actual[wrong], expected[wrong], (actual - expected)[wrong])


def assert_gradient(actual, expected, cancelled=0.0, terms=None):
    """Infinite and NaN elements are where they should be; the others are close in norm.

    Where they are not, `cancelled` times the norm of `terms()` is allowed.
    """
    assert tuple(actual.shape) == expected.shape
    dtype, actual = actual.dtype, array(actual)
    rounded = array(torch.from_numpy(np.array(expected)).to(dtype))
    is_finite = np.isfinite(rounded)
    np.testing.assert_array_equal(actual[~is_finite], rounded[~is_finite])

    def norm(x):
        """Of what is finite; squares of finite numbers may not be."""
        x = x[is_finite]
        largest = np.abs(x).max(initial=0)
        return largest * np.linalg.norm(x / largest) if largest else 0.0

    if dtype in GRADIENT_TOLERANCE:
        bound = GRADIENT_TOLERANCE[dtype] * norm(expected)
    else:
        bound = HALF_TOLERANCE * norm(rounded - expected)
    error = norm(actual - expected)
    if error > bound and terms is not None:
        rest = cancelled * norm(terms())
        bound = max(bound, rest) if dtype in GRADIENT_TOLERANCE else bound + rest
    assert error <= bound, (
        f"error {error:.3g} > {bound:.3g}, ratio {error / max(bound, 1e-300):.3g}"
    )

"""Every loss under autocast, around forward, backward or both, is the loss without it, bit by bit.

What autocast would leave of a float32 gradient is 2e-3 off, and of a regressor's sometimes more.
"""

import contextlib

import pytest
import torch
from calls import LOSSES, Call, variants
from conftest import DEVICE

import fastkd

pytestmark = pytest.mark.usefixtures("fresh_compiler")

REGIONS = {"forward": (True, False), "both": (True, True), "backward": (False, True)}
AUTOCASTS = [torch.bfloat16, torch.float16]
# The losses in which torch's own products take part, all of them or in the reference alone.
PRODUCTS = ["fsp_loss", "similarity_preserving_loss", "hint_loss with a regressor"]


def hints(dtype):
    """Hints with a regressor, which is in float32: on planes, on channels, on vectors."""

    def loss(student, teacher, weight, bias=None, **keywords):
        regressor = {"regressor_weight": weight, "regressor_bias": bias}
        return fastkd.hint_loss(student, teacher, **regressor, **keywords)

    calls = []
    for spatial, layout, with_bias in [
        ((5, 3), torch.contiguous_format, True),
        ((5, 3), torch.contiguous_format, False),
        ((5, 3), torch.channels_last, True),
        ((5, 3), torch.channels_last, False),
        ((), torch.contiguous_format, True),
    ]:
        sides = [torch.randn(4, c, *spatial).to(dtype, memory_format=layout) for c in (16, 12)]
        regressor = [torch.randn(12, 16), torch.randn(12)][: 1 + with_bias]
        calls.append(Call(loss, (*sides, *regressor), {}))
    return calls


def calls_of(name, dtype):
    return hints(dtype) if name == PRODUCTS[2] else variants(name, dtype)


def value_and_gradients(function, tensors, region=(False, False), dtype=None):
    def autocast(is_on):
        return torch.autocast(DEVICE, dtype=dtype) if is_on else contextlib.nullcontext()

    leaves = [x.clone().requires_grad_() for x in tensors]
    with autocast(region[0]):
        loss = function(*leaves)
    with autocast(region[1]):
        loss.backward(torch.full_like(loss, 1.7))
    return [loss.detach(), *(x.grad for x in leaves)]


def assert_equal(actual, expected, tolerance=0.0):
    """Relative in the L2 norm; half precision may round otherwise where the last bits differ."""
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        limit = 1e-3 if tolerance and e.dtype.itemsize == 2 else tolerance
        assert (a - e).double().norm() <= limit * e.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", [*LOSSES, PRODUCTS[2]])
def test_eager(backend, name, region, dtype):
    for call in calls_of(name, dtype):
        call.keywords["backend"] = backend
        expected = value_and_gradients(call, call.tensors)
        for autocast in AUTOCASTS:
            actual = value_and_gradients(call, call.tensors, REGIONS[region], autocast)
            assert_equal(actual, expected)


def compare_compiled(call, region, compiler, dtype, tolerance):
    compiled = torch.compile(call.__call__, fullgraph=True, backend=compiler)
    expected = value_and_gradients(call, call.tensors)
    assert_equal(
        value_and_gradients(compiled, call.tensors, REGIONS[region], dtype), expected, tolerance
    )
    torch._dynamo.reset()


@pytest.mark.thorough
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_compiled(backend, name, region):
    call = calls_of(name, torch.float32)[0]
    call.keywords["backend"] = backend
    compare_compiled(call, region, "aot_eager", torch.bfloat16, 3e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_compiled_products(backend, name, region, dtype):
    for call in calls_of(name, dtype):
        call.keywords["backend"] = backend
        for autocast in AUTOCASTS if dtype == torch.float32 else AUTOCASTS[:1]:
            compare_compiled(call, region, "aot_eager", autocast, 3e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_inductor(backend, name, region):
    call = calls_of(name, torch.float32)[0]
    call.keywords["backend"] = backend
    compare_compiled(call, region, "inductor", torch.bfloat16, 3e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_functional_gradients(name):
    """They are computed where the transform is called, whatever autocast there is.

    Before torch 2.13 compiled ones are as precise as autocast says.
    """
    call = calls_of(name, torch.float32)[0]
    call.keywords["backend"] = "reference"
    argnums = tuple(range(len(call.tensors)))
    gradient = torch.func.grad(call.__call__, argnums)
    expected = gradient(*call.tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_equal(gradient(*call.tensors), expected)
        compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
        limit = 3e-6 if torch.__version__ >= "2.13" else torch.finfo(torch.bfloat16).eps
        assert_equal(compiled(*call.tensors), expected, limit)


@pytest.mark.parametrize("name", PRODUCTS)
def test_second_derivatives(name):
    call = calls_of(name, torch.float64)[0]
    call = call._replace(tensors=tuple(x.float() for x in call.tensors))
    call.keywords["backend"] = "reference"

    def derivatives():
        leaves = call.leaves()
        first = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    expected = derivatives()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert_equal(derivatives(), expected)

"""The product in full precision differs from torch's in nothing but autocast."""

import itertools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jvp, vmap

from fastkd.product import product

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def plain(a, b, bias=None):
    return a @ b if bias is None else a @ b + bias


def operands(batch=(), with_bias=True):
    """A matrix, another, and a bias that is expanded."""
    shapes = [(*batch, 3, 4), (*batch, 4, 5), (1,) * len(batch) + (1, 5)]
    return [torch.randn(s, dtype=torch.float64) for s in shapes[: 2 + with_bias]]


@pytest.fixture(params=[(), (2,)], ids=["matrices", "batches"])
def batch(request):
    return request.param


def check_derivatives(leaves):
    assert torch.autograd.gradcheck(
        product, leaves, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        product, leaves, check_fwd_over_rev=True, check_rev_over_rev=True
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_derivatives(batch, with_bias):
    leaves = [x.requires_grad_() for x in operands(batch, with_bias)]
    check_derivatives(leaves)


def test_a_transposed_matrix(batch):
    """Has a gradient in its own layout."""
    a, b, bias = operands(batch)
    b = b.mT.contiguous().mT
    leaves = [x.requires_grad_() for x in (a, b, bias)]
    assert torch.autograd.grad(product(*leaves).sum(), b)[0].stride() == b.stride()
    check_derivatives(leaves)


@pytest.mark.parametrize(
    "wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)]
)
def test_some_derivatives(batch, wanted):
    leaves = [x.requires_grad_(want) for x, want in zip(operands(batch), wanted, strict=True)]
    assert torch.autograd.gradcheck(product, leaves, check_forward_ad=True)


def cubed(function):
    return lambda *x: function(*x).pow(3).sum()


def both(x):
    return torch.stack([x, -2 * x])


TRANSFORMS = {
    "grad": lambda f: grad(cubed(f), argnums=(0, 1, 2)),
    "grad of grad": lambda f: grad(cubed(grad(cubed(f))), argnums=(0, 1, 2)),
    "vmap": lambda f: lambda a, b, c: vmap(f, in_dims=(0, None, None))(both(a), b, c),
    "jvp": lambda f: lambda *x: jvp(f, x, x),
    "hessian": lambda f: hessian(cubed(f)),
    "jacfwd": lambda f: jacfwd(f, argnums=1),
    "vmap of grad": lambda f: lambda a, b, c: vmap(grad(cubed(f)), (None, 0, None))(a, both(b), c),
    "grad of vmap": lambda f: (
        lambda a, b, c: grad(lambda x: cubed(vmap(lambda y: f(y, b, c)))(both(x)))(a)
    ),
    "jvp of grad": lambda f: (
        lambda a, b, c: jvp(grad(lambda x: cubed(f)(x, b, c)), (a,), (a.cos(),))
    ),
    "grad of jvp": lambda f: grad(lambda a, b, c: cubed(lambda *x: jvp(f, x, x)[1])(a, b, c)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(batch, name, compiled):
    tensors = operands(batch)
    transformed = TRANSFORMS[name](lambda *x: product(*x))
    if compiled:
        transformed = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(transformed(*tensors), TRANSFORMS[name](plain)(*tensors))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_backward_through_vmap(in_dims, wanted):
    tensors = [x.requires_grad_(want) for x, want in zip(operands((), False), wanted, strict=True)]
    leaves = [x for x in tensors if x.requires_grad]

    def gradients(function):
        stacked = [x if d is None else both(x) for x, d in zip(tensors, in_dims, strict=True)]
        return torch.autograd.grad(cubed(vmap(function, in_dims=in_dims))(*stacked), leaves)

    torch.testing.assert_close(gradients(product), gradients(plain))


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_what_backward_needs_is_kept(wanted):
    """The operand whose gradient is wanted may be changed before backward."""
    tensors = operands(with_bias=False)
    leaf = tensors[wanted].requires_grad_()
    tensors[wanted] = leaf.clone()
    result = product(*tensors)
    tensors[wanted].zero_()
    (actual,) = torch.autograd.grad(result.sum(), leaf)
    (expected,) = torch.autograd.grad(
        plain(*(leaf if i == wanted else x for i, x in enumerate(tensors))).sum(), leaf
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_operator(batch, dtype, with_bias):
    a, b, *bias = (x.to(dtype) for x in operands(batch, with_bias))
    operator = torch.ops.fastkd.product.default
    torch.library.opcheck(operator, (a, b, *(bias or [None])))
    torch.testing.assert_close(operator(a, b, *(bias or [None])), plain(a, b, *bias))
    # Features in another layout are read through their strides.
    torch.library.opcheck(operator, (a, b.mT.contiguous().mT, None))

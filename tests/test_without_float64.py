"""Devices without float64: the reference computes in float32 there, and in nothing wider."""

import functools

import agreement
import agreement_features
import oracle
import pytest
import torch
from calls import LOSSES, sample, variants
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import precision

RELATIONS = {
    "rkd_distance_loss": oracle.rkd_distance,
    "rkd_angle_loss": oracle.rkd_angle,
    "similarity_preserving_loss": oracle.similarity,
}


class NoFloat64(TorchDispatchMode):
    """Raises what a device without float64 raises, for every tensor that would have it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in torch.utils._pytree.tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                raise TypeError(f"{function}: this device does not support float64")
        return results


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(precision, "_has_float64", lambda _: False)


EXTRA = [
    ("attention_transfer_loss", [(2, 3, 5, 5), (2, 3, 3, 4)], {"resize": "adaptive_avg_pool"}),
    ("attention_transfer_loss", [(2, 3, 4), (2, 4, 4)], {"order": 1.5, "p": 2.7}),
    ("attention_transfer_loss", [(2, 3, 4), (2, 4, 4)], {"order": float("inf")}),
    ("hint_loss", [(2, 3), (2, 3)], {"reduction": "mean"}),
]


def calls(dtype):
    yield from (call for name in LOSSES for call in variants(name, dtype))
    for name, shapes, keywords in EXTRA:
        tensors = tuple(torch.randn(shape).to(dtype) for shape in shapes)
        yield sample(name)._replace(tensors=tensors, keywords=keywords)
    regressor = {"regressor_weight": torch.randn(4, 3), "regressor_bias": torch.randn(4)}
    tensors = torch.randn(2, 3, 5, 5).to(dtype), torch.randn(2, 4, 5, 5).to(dtype)
    yield sample("hint_loss")._replace(tensors=tensors, keywords=regressor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_loss_needs_it(without_float64, dtype):
    for call in calls(dtype):
        leaves = call.leaves()
        with NoFloat64():
            loss = call(*leaves, backend="reference")
            loss.sum().mul(3).backward()
        assert all(x.grad.isfinite().all() for x in leaves)


def test_no_second_derivative_needs_it(without_float64):
    for call in calls(torch.float32):
        leaves = call.leaves()
        with NoFloat64():
            loss = call(*leaves, backend="reference").sum()
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("name", LOSSES)
def test_no_graph_needs_it(without_float64, name):
    dtypes = set()

    def look(graph, _):
        values = [node.meta.get("val") for node in graph.graph.nodes]
        dtypes.update(v.dtype for v in values if isinstance(v, torch.Tensor))
        return graph.forward

    torch._dynamo.reset()
    call = sample(name)
    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    compiled = torch.compile(call.__call__, fullgraph=True, backend=backend)
    loss = compiled(*call.leaves(), backend="reference")
    loss.sum().backward()
    assert torch.float32 in dtypes
    assert torch.float64 not in dtypes
    torch.testing.assert_close(loss, call(backend="reference"))
    torch._dynamo.reset()


def size(student, teacher):
    """A loss below a tenth of it is a small difference of relations, rounded against their size."""
    return 1 / max(len(student), 50)


@pytest.mark.parametrize("shapes", [((5, 6), (5, 4)), ((33, 20), (33, 7)), ((96, 128), (96, 512))])
@pytest.mark.parametrize("name", RELATIONS)
def test_numbers(without_float64, name, shapes):
    """As close as the losses that always compute in float32."""
    loss = functools.partial(getattr(fastkd, name), backend="reference")
    sides = agreement_features.distinct(lambda: [*map(torch.randn, shapes)], loss, size)
    agreement.check(loss, RELATIONS[name], sides)


@pytest.mark.parametrize("name", RELATIONS)
def test_near_points(without_float64, name):
    """Distances come from differences, which float32 has exactly where points are near."""
    sides = [torch.randn(24, width) for width in (40, 60)]
    for side in sides:
        side[12:] = side[:12] + 1e-3 * torch.randn_like(side[:12])
    loss = functools.partial(getattr(fastkd, name), backend="reference")
    agreement.check(loss, RELATIONS[name], sides)


@pytest.mark.parametrize("name", RELATIONS)
def test_autocast_does_not_narrow_it(without_float64, name):
    sides = [torch.randn(12, 20), torch.randn(12, 30)]
    loss = functools.partial(getattr(fastkd, name), *sides, backend="reference")
    with torch.autocast(sides[0].device.type, dtype=torch.bfloat16):
        actual = loss()
    assert torch.equal(actual, loss())


@pytest.fixture
def fresh_probe():
    precision._computes_float64.cache_clear()
    yield
    precision._computes_float64.cache_clear()


@pytest.mark.parametrize("error", [None, TypeError, RuntimeError, AssertionError])
def test_a_device_is_tried_once(fresh_probe, monkeypatch, error):
    tried = []

    def ones(*_, device, **__):
        tried.append(device)
        if error is not None:
            raise error("no float64 here")
        return torch.zeros(1)

    monkeypatch.setattr(precision.torch, "ones", ones)
    expected = torch.float64 if error is None else torch.float32
    for _ in range(3):
        assert precision.widest_dtype(torch.device("mps:0")) == expected
        assert precision.widest_dtype(torch.device("cpu")) == torch.float64
    assert tried == ["mps"]


def test_the_trial_is_real_under_a_mode(fresh_probe):
    """A fake tensor would have any dtype."""
    with FakeTensorMode(), NoFloat64():
        found = precision._computes_float64("cpu"), precision._computes_float64("mps")
    assert found == (True, False)

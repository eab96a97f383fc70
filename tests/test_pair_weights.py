"""Weights of pairs, and losses of several pairs, against the oracle."""

import agreement
import numpy as np
import oracle
import pytest
import torch
from agreement import DTYPES
from agreement_features import check_hint, check_transfer, features

import fastkd

WEIGHTS = [0.5, 3, -1.25]
SHAPES = [(5, 6, 7), (2, 4, 3), (8, 3, 3)]  # channels, height, width
LOSSES = ["attention_transfer_loss", "hint_loss", "similarity_preserving_loss", "fsp_loss"]


def draw(count=3, dtype=torch.float32, wider=0):
    """As many feature maps of one batch; the teacher's may have more channels."""
    return [
        features(4, channels + wider, height, width, dtype=dtype)
        for channels, height, width in SHAPES[:count]
    ]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("distance", ["norm", "mse"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_transfer_loss(backend, dtype, distance, reduction):
    students, teachers = draw(dtype=dtype), draw(wider=2)
    keywords = {"distance": distance, "reduction": reduction, "beta": 10.0}
    for upstream in (None, torch.randn(3, 4) if reduction == "none" else 3.7):
        check_transfer(students, teachers, backend, upstream, pair_weights=WEIGHTS, **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hint_loss(backend, dtype, reduction):
    students, teachers = draw(dtype=dtype), draw()
    keywords = {"reduction": reduction, "pair_weights": np.array(WEIGHTS)}
    for upstream in (None, torch.randn(3, 4) if reduction == "none" else 3.7):
        check_hint(students, teachers, backend, grad_output=upstream, **keywords)
    weight, bias = features(6, 5), features(6)
    wide = [features(4, 6, 3, 2) for _ in WEIGHTS]
    narrow = [features(4, 5, 3, 2, dtype=dtype) for _ in WEIGHTS]
    check_hint(narrow, wide, backend, weight, bias, **keywords)


def of_pairs(loss, count, **keywords):
    """A loss whose tensors come one by one."""
    return lambda *x: loss(list(x[:count]), list(x[count:]), **keywords)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_similarity_preserving_loss(backend, dtype, weights):
    students, teachers = draw(dtype=dtype), [features(n, 4) for n in (4, 4, 4)]
    agreement.check(
        of_pairs(fastkd.similarity_preserving_loss, 3, pair_weights=weights, backend=backend),
        lambda *x, grad_output: oracle.similarities(
            x[:3], x[3:], grad_output, pair_weights=weights
        ),
        (*students, *teachers),
        students=3,
        grad_output=3.7,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_fsp_loss(backend, dtype):
    def pairs(side):
        return list(zip(side[::2], side[1::2], strict=True))

    flat = [features(3, c, s, s, dtype=dtype) for _ in range(2) for c, s in ((4, 6), (3, 3)) * 3]
    agreement.check(
        lambda *x: fastkd.fsp_loss(
            pairs(x[:6]), pairs(x[6:]), pair_weights=WEIGHTS, backend=backend
        ),
        lambda *x, grad_output: oracle.fsp(
            pairs(x[:6]), pairs(x[6:]), grad_output, pair_weights=WEIGHTS
        ),
        flat,
        students=6,
        grad_output=3.7,
    )


def sides_of(name):
    students, teachers = draw(), draw()
    if name == "fsp_loss":
        return [(x, x) for x in students], [(x, x) for x in teachers]
    return students, teachers


@pytest.mark.parametrize("name", LOSSES)
def test_a_pair_in_float64_has_all_computed_in_it(backend, name):
    """As without weights: the dtype of the loss is that of the call, not of one pair."""
    loss = getattr(fastkd, name)
    students, teachers = sides_of(name)
    doubled = tuple(x.double() for x in teachers[1]) if name == "fsp_loss" else teachers[1].double()
    teachers = [teachers[0], doubled, teachers[2]]
    weighted = loss(students, teachers, pair_weights=[1, 1, 1], backend=backend)
    torch.testing.assert_close(
        weighted, loss(students, teachers, backend=backend), rtol=1e-13, atol=0
    )
    assert weighted.dtype == torch.float64


@pytest.mark.parametrize("name", LOSSES)
def test_one_pair_of_tensors(backend, name):
    loss = getattr(fastkd, name)
    student, teacher = (side[0] for side in sides_of(name))
    torch.testing.assert_close(
        loss(student, teacher, pair_weights=[2.5], backend=backend),
        2.5 * loss(student, teacher, backend=backend),
    )


@pytest.mark.parametrize("weights", [None, [2.0], [2.0, 3.0]])
@pytest.mark.parametrize("name", ["attention_transfer_loss", "hint_loss"])
def test_none_has_one_loss_for_each_sample(backend, name, weights):
    """`(B,)` for tensors, `(pairs, B)` for sequences, also of one pair."""
    loss = getattr(fastkd, name)
    keywords = {"reduction": "none", "backend": backend, "pair_weights": weights}
    students, teachers = draw(2), draw(2)
    if weights is None or len(weights) == 1:
        assert loss(students[0], teachers[0], **keywords).shape == (4,)
        assert loss(students[:1], teachers[:1], **keywords).shape == (1, 4)
    if weights is None or len(weights) == 2:
        assert loss(students, teachers, **keywords).shape == (2, 4)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_weights(name):
    loss, sides = getattr(fastkd, name), sides_of(name)
    for weights in (1.0, "123", {1: 2}, torch.ones(3), True):
        with pytest.raises(TypeError, match="pair_weights must be a sequence of numbers"):
            loss(*sides, pair_weights=weights)
    for weights in ([], [1, 2], [1, 2, 3, 4]):
        message = f"one number for each pair, 3 here, got {len(weights)}"
        with pytest.raises(ValueError, match=message):
            loss(*sides, pair_weights=weights)
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=r"pair_weights\[1\] must be a finite number"):
            loss(*sides, pair_weights=[1, value, 1])
    for value in ("1", None, True, torch.tensor(1.0), 1j):
        with pytest.raises(TypeError, match=r"pair_weights\[2\] must be a number"):
            loss(*sides, pair_weights=[1, 1, value])


@pytest.mark.parametrize("name", ["attention_transfer_loss", "hint_loss", "fsp_loss"])
def test_without_weights_one_call_serves_all_pairs(kernel_backend, name, monkeypatch):
    from fastkd.losses import attention, fsp, hint

    module = {"attention_transfer_loss": attention, "hint_loss": hint, "fsp_loss": fsp}[name]
    function = "attention_transfer" if module is attention else "hint"
    calls, run = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: calls.append(args) or run(*args))
    sides = sides_of(name)
    getattr(fastkd, name)(*sides, backend=kernel_backend)
    assert len(calls) == 1
    getattr(fastkd, name)(*sides, pair_weights=WEIGHTS, backend=kernel_backend)
    assert len(calls) == 4

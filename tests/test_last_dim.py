"""Logits of images without `dim=1`: a warning, or an error that suggests it."""

import inspect
import warnings

import pytest
import torch
from agreement_logits import logits

import fastkd
from fastkd.losses import logits as checks

PIXELS = (2, 4, 3, 5)
LABELS = torch.zeros(2, 4, 3, dtype=torch.int64)
CUBE = (2, 3, 3, 3)
CUBE_LABELS = torch.zeros(2, 3, 3, dtype=torch.int64)


@pytest.fixture(autouse=True)
def fresh_warning():
    checks._warn_once_of_last_dim.cache_clear()
    torch._dynamo.reset()
    yield
    checks._warn_once_of_last_dim.cache_clear()
    torch._dynamo.reset()


def warned(function, *args, **keywords):
    """The warnings about dimensions, and where they point to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **keywords)
    return [w for w in caught if "pass dim=1" in str(w.message)]


def test_soft_target_warns_once_and_where_it_was_called(backend):
    x = logits(*PIXELS)
    (warning,) = warned(lambda: fastkd.soft_target_loss(x, x, backend=backend))
    assert (warning.category, warning.filename) == (UserWarning, __file__)
    assert "dim=1 for (N, C, H, W)" in str(warning.message)
    assert "dim=3" in str(warning.message)
    for keywords in ({}, {"dim": -1}, {"reduction": "none"}):
        assert not warned(fastkd.soft_target_loss, x, x, backend=backend, **keywords)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -2, -3, -4])
def test_soft_target_with_another_dim_is_silent(backend, dim):
    x = logits(*PIXELS)
    assert not warned(fastkd.soft_target_loss, x, x, dim=dim, backend=backend)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)])
def test_soft_target_of_few_dimensions_is_silent(backend, shape):
    x = logits(*shape)
    assert not warned(fastkd.soft_target_loss, x, x, backend=backend)


def test_soft_target_of_five_dimensions_warns(backend):
    x = logits(2, 4, 3, 2, 2)
    assert warned(fastkd.soft_target_loss, x, [x, x], backend=backend)


def test_distillation_warns_where_labels_leave_it_open(backend):
    x, cube = logits(*PIXELS), logits(*CUBE)
    assert not warned(fastkd.distillation_loss, x, x, LABELS, backend=backend)
    for dim in (1, 3):
        keywords = {"dim": dim, "backend": backend}
        assert not warned(fastkd.distillation_loss, cube, cube, CUBE_LABELS, **keywords)
    assert warned(fastkd.distillation_loss, cube, cube, CUBE_LABELS, backend=backend)


def test_an_error_comes_without_the_warning():
    x = logits(*PIXELS)
    for labels in (LABELS.mT, torch.zeros(2, 3, 5, dtype=torch.int64)):
        with pytest.raises(ValueError) as caught, warnings.catch_warnings():
            warnings.simplefilter("error")
            fastkd.distillation_loss(x, x, labels)
        assert ("dim=1" in str(caught.value)) == (labels.shape == (2, 3, 5))


def test_soft_target_modules_warn(backend):
    x = logits(*PIXELS)
    assert warned(fastkd.nn.SoftTargetLoss(backend=backend), x, x)


def test_soft_target_explained(backend):
    x = logits(*PIXELS)
    found = []
    assert warned(
        lambda: found.append(fastkd.explain(fastkd.soft_target_loss, x, x, backend=backend))
    )
    assert found[0].chosen == backend


def test_soft_target_in_compiled_code(backend):
    x = logits(*PIXELS)
    function = torch.compile(fastkd.soft_target_loss, fullgraph=True, backend="aot_eager")
    assert len(warned(function, x, x, backend=backend)) == 1
    torch.testing.assert_close(
        function(x, 2 * x, backend=backend), fastkd.soft_target_loss(x, 2 * x, dim=3)
    )


def test_the_default_is_the_last_dimension():
    for function in (fastkd.soft_target_loss, fastkd.distillation_loss):
        assert inspect.signature(function).parameters["dim"].default == -1

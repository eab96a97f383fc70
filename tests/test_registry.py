"""A loss is complete: it has a reference, operators, checks of both, a module and workloads."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch
from calls import LOSSES, METRICS, MODULES, operators_of, public_losses
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import operators


def home(name):
    """The file name that a loss has in every folder."""
    return getattr(fastkd, name).__module__.rpartition(".")[2]


def test_every_public_loss_has_a_sample():
    assert sorted(LOSSES) == public_losses()


@pytest.mark.parametrize("name", [*public_losses(), METRICS])
def test_reference(name):
    assert callable(getattr(importlib.import_module(f"fastkd.reference.{home(name)}"), name))


@pytest.mark.parametrize("name", [*public_losses(), METRICS])
def test_docstring_names_every_argument_and_its_source(name):
    function = getattr(fastkd, name)
    arguments = [name for name in function.__annotations__ if name != "return"]
    assert [name for name in arguments if f"    {name}:" not in inspect.getdoc(function)] == []
    assert "Source:" in function.__doc__


@pytest.mark.parametrize("name", public_losses())
def test_operators_have_fakes(kernel_backend, name):
    calls = operators_of(name, kernel_backend)
    assert calls, "no operator ran"
    with FakeTensorMode() as mode:
        for function, args in calls:
            assert function in operators.OPERATORS.values()
            fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            results = torch.utils._pytree.tree_leaves(function(*fakes))
            real = torch.utils._pytree.tree_leaves(run(function, args))
            for fake, value in zip(results, real, strict=True):
                if isinstance(value, torch.Tensor):
                    assert (fake.shape, fake.dtype) == (value.shape, value.dtype)
                    assert fake.stride() == value.stride()


def run(function, args):
    with torch._C._DisableTorchDispatch():
        return function(*args)


TRAINABLE = [name for name in public_losses() if name != "attention_map"]


@pytest.mark.parametrize("name", TRAINABLE)
def test_module(name):
    assert getattr(fastkd, name) in [*MODULES.values(), fastkd.hint_loss]


@pytest.mark.parametrize("name", TRAINABLE)
def test_workloads(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    workloads = importlib.import_module("benchmarks.workloads")
    assert name in {workload.loss for workload in workloads.WORKLOADS}

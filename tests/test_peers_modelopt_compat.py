"""`fastkd.compat.modelopt` against Model-Optimizer's classes, where it is installed.

Its package imports more than its losses need, and those for Megatron import Megatron: each class is
read from its file and made by itself. `TopLogitsKLLoss` is not in release 0.47.
"""

import abc
import ast
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conventions import assert_same, draw
from signatures import parameters

import fastkd
from fastkd.compat import modelopt

# Found and not imported.
SPEC = find_spec("modelopt")
if not SPEC:
    pytest.skip("could not find 'modelopt'", allow_module_level=True)
FOLDER = Path(next(iter(SPEC.submodule_search_locations))) / "torch" / "distill"
S, B, V, K, T = 5, 2, 13, 4, 2.0
CONFIG = SimpleNamespace(tensor_model_parallel_size=1)
REDUCTIONS = ["mean", "batchmean", "sum", "none"]
either_way = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def classes(file, *names):
    """Those of a file that are named here, made without what the file imports."""
    tree = ast.parse((FOLDER / file).read_text())
    body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in names]
    space = {
        "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "Tensor": torch.Tensor,
        "Loss": torch.nn.modules.loss._Loss, "_Loss": torch.nn.modules.loss._Loss,
        "ABCMeta": abc.ABCMeta,
    }  # fmt: skip
    exec(compile(ast.Module(body, []), file, "exec"), space)
    return {name: space[name] for name in names if name in space}


ORIGINALS = {
    **classes("losses.py", "LogitsDistillationLoss", "MFTLoss"),
    **classes("plugins/megatron.py", "BaseLoss", "LogitsKLLoss", "TopLogitsKLLoss"),
}
# The name of another loss where there is TopLogitsKLLoss.
if "TopLogitsKLLoss" not in ORIGINALS:
    ORIGINALS |= classes("plugins/megatron.py", "BaseLoss", "LogitsKLLoss", "TopKLogitsKLLoss")
HAS = ORIGINALS.keys() - {"BaseLoss"}


def of_either(name, *arguments, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        own = getattr(modelopt, name)(*arguments, **keywords)
    return own, ORIGINALS[name](*arguments, **keywords)


def squared(criterion, *arguments):
    """A number whose gradient tells losses apart, of what may be one of a tuple."""

    def number(s, t):
        found = criterion(s, t, *arguments)
        return (found[0] if isinstance(found, tuple) else found).square().sum()

    return number


@pytest.mark.parametrize("name", sorted(HAS))
def test_signatures(name):
    found, expected = (parameters(of) for of in (getattr(modelopt, name), ORIGINALS[name]))
    found.pop("group", None)
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("shape", [(B, S, V), (S, V)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_distillation(backend, reduction, shape):
    criteria = of_either("LogitsDistillationLoss", T, reduction)
    assert_same(backend, *map(squared, criteria), *draw(shape, shape))
    sides = draw(shape, shape)
    assert criteria[0](*sides).shape == criteria[1](*sides).shape


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_minifinetuning(backend, reduction, threshold):
    """Its labels are the teacher's likeliest class in some rows."""
    s, t = draw((B, S, V), (B, S, V))
    labels = torch.randint(V, (B * S,))
    labels[::2] = t.reshape(-1, V).argmax(-1)[::2]
    criteria = of_either("MFTLoss", T, threshold, reduction)
    assert_same(backend, *(squared(criterion, labels) for criterion in criteria), s, t)


@pytest.mark.parametrize("name", sorted(HAS - {"LogitsDistillationLoss", "MFTLoss"}))
@either_way
def test_megatron(backend, reverse, name):
    """In float32, which it computes in whatever comes in."""
    of_top = {} if name == "LogitsKLLoss" else {"top_k": K}
    sides = [2 * x.float() for x in draw((S, B, V), (S, B, V))]
    results = []
    for criterion in of_either(name, CONFIG, T, reverse, **of_top):
        student = sides[0].clone().requires_grad_()
        with fastkd.use_backend(backend):
            loss, *flags = criterion((student, None), (sides[1].requires_grad_(), None))
        results.append((loss, flags, *torch.autograd.grad(loss.square().sum(), student)))
    (loss, flags, gradient), (expected, expected_flags, other) = results
    assert flags == expected_flags and loss.is_contiguous()
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(gradient, other, rtol=2e-5, atol=2e-6)

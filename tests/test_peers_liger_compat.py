"""`fastkd.compat.liger` against Liger-Kernel itself, where it is installed."""

import ast
import itertools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd.compat import liger

# Found and not imported: its kernels run in a process of their own.
SPEC = find_spec("liger_kernel")
if not SPEC:
    pytest.skip("could not find 'liger_kernel'", allow_module_level=True)
B, V, H, T = 6, 37, 8, 2.0
LABELS = torch.tensor([3, -100, 0, 29, -100, 7])
BETAS = (0.0, 0.3, 1.0)
generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


LOG_Q, LOG_P = (3 * draw(B, V) for _ in range(2))
LOG_Q, LOG_P = LOG_Q.log_softmax(-1), LOG_P.log_softmax(-1)
HEADS = draw(B, H), draw(V, H), draw(B, H + 1), draw(V, H + 1)
BIASES = draw(V), draw(V)
FEWER = HEADS[0], HEADS[1][:30], *HEADS[2:]

# Name, the module's keywords, what it is called with, and which of these get gradients.
CALLS = [
    *[
        ("LigerJSD", {"beta": beta}, (LOG_Q, LOG_P, labels), (0,))
        for beta, labels in itertools.product(BETAS, (None, LABELS))
    ],
    *[
        ("LigerKLDIVLoss", {"reduction": reduction, "log_target": logs}, (LOG_Q, target), (0,))
        for reduction in ("batchmean", "sum", "mean", "none")
        for logs, target in [(False, LOG_P.exp()), (True, LOG_P)]
    ],
    *[
        ("LigerTVDLoss", {"reduction": reduction}, (LOG_Q.exp(), LOG_P.exp(), LABELS), (0,))
        for reduction in ("batchmean", "sum", "mean", "none")
    ],
    *[
        ("LigerFusedLinearJSD", {"jsd_beta": beta, "temperature": T}, (*HEADS, labels), (0, 1))
        for beta, labels in itertools.product(BETAS, (None, LABELS))
    ],
    *[
        (
            "LigerFusedLinearKLDivLoss",
            {"reduction": reduction, "temperature": T},
            (*HEADS[:2], LOG_P.exp(), labels),
            (0, 1),
        )
        for reduction in ("batchmean", "sum", "mean")
        for labels in (None, LABELS)
    ],
    *[
        (
            "LigerFusedLinearJSDLoss",
            {"beta": beta, "temperature": T, "weight_hard_loss": 0.3, "compiled": False}
            | {"chunk_size": 3, "return_soft_hard_loss": True},
            tensors,
            learning,
        )
        for beta in BETAS
        for tensors, learning in [
            ((*HEADS, LABELS), (0, 1)),
            ((*HEADS, LABELS, *BIASES), (0, 1, 5)),
            ((*FEWER, LABELS), (0, 1)),
        ]
    ],
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("liger")
    torch.save(CALLS, folder / "calls")
    program = Path(__file__).with_name("liger_modules_on_cpu.py")
    done = subprocess.run(
        [sys.executable, program, folder / "calls", folder / "results"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results")


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda i: f"{i}-{CALLS[i][0]}")
def test_values_and_gradients(backend, number, originals):
    name, keywords, tensors, learning = CALLS[number]
    expected, expected_gradients = originals[number]
    tensors = [x.clone() if isinstance(x, torch.Tensor) else x for x in tensors]
    leaves = [tensors[i].requires_grad_() for i in learning]
    with fastkd.use_backend(backend):
        found = getattr(liger, name)(**keywords)(*tensors)
    found = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(found[0], leaves, torch.full_like(found[0], 1.5))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)


def arguments(function):
    """Names and written defaults, of a function's syntax."""
    given = function.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    named = [
        (a.arg, d and ast.unparse(d)) for a, d in zip(given.args, defaults, strict=True)
    ]  # fmt: skip
    return [*named, given.vararg and given.vararg.arg, given.kwarg and given.kwarg.arg]


def methods(files):
    """Of each class, in these files, by name."""
    trees = [node for file in files for node in ast.parse(file.read_text()).body]
    return {
        node.name: {m.name: arguments(m) for m in node.body if isinstance(m, ast.FunctionDef)}
        for node in trees
        if isinstance(node, ast.ClassDef)
    }


@pytest.mark.parametrize("name", liger.__all__)
def test_signatures(name):
    """Read and not imported, as above."""
    theirs, own = Path(SPEC.origin).parent, Path(liger.__file__).parent
    expected = methods([*theirs.glob("transformers/*.py"), theirs / "chunked_loss/jsd_loss.py"])
    found = methods(own.glob("*.py"))
    for method in ("__init__", "forward"):
        assert found[name][method] == expected[name][method]

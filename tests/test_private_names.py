"""Private names of torch: where one is missing results are the same, as private_names.py finds."""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS

import fastkd
from fastkd import dispatch, precision
from fastkd.kernels import compiled

pytestmark = [
    pytest.mark.skipif("native" not in BACKENDS, reason="the best backend is under test"),
    pytest.mark.thorough,
]

NAMES = [
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_tracing_state",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "torch._C._DisableTorchDispatch",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.autograd.forward_ad._current_level",
]
# Compiled code asks for these.
OF_COMPILED_CODE = [
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch",
    "torch.autograd.forward_ad._current_level",
    "torch.fx.experimental.symbolic_shapes.has_static_value",
]
# With these two away nothing tells of a transform.
TRANSFORMS = [
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.peek_interpreter_stack",
]


def results(folder, uses, *missing):
    out = folder / "results.pt"
    script = Path(__file__).with_name("private_names.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out), uses, *missing],
        env={**os.environ, "PYTHONPATH": str(Path(fastkd.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """With every name in its place."""
    folder = tmp_path_factory.mktemp("expected")
    found = {uses: results(folder, uses) for uses in ("eager", "compiled")}
    raised = {use for uses in found.values() for (use, _), x in uses.items() if isinstance(x, str)}
    assert raised == {"batches of gradients"}
    return found


def compare(found, expected):
    """The uses that raise, and did not."""
    assert found.keys() == expected.keys()
    raised = {}
    for (use, name), value in found.items():
        known = expected[use, name]
        if not isinstance(value, str):
            torch.testing.assert_close(value, known, msg=lambda m, at=(use, name): f"{at}: {m}")
        elif not isinstance(known, str):
            raised.setdefault(use, set()).add(value)
    return raised


@pytest.mark.parametrize("name", NAMES)
def test_without_one(expected, tmp_path, name):
    assert compare(results(tmp_path, "eager", name), expected["eager"]) == {}


@pytest.mark.parametrize("name", OF_COMPILED_CODE)
def test_compiled_without_one(expected, tmp_path, name):
    assert compare(results(tmp_path, "compiled", name), expected["compiled"]) == {}


def test_a_transform_that_nothing_tells_of_raises(expected, tmp_path):
    """Torch refuses the kernel, in words of its own; there is no silent number."""
    raised = compare(results(tmp_path, "eager", *TRANSFORMS), expected["eager"])
    assert raised.keys() == {"grad", "hessian", "vmap"}


def test_the_stream_by_its_public_name(monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=index + 40)
    )
    spec = importlib.util.find_spec(compiled.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh._raw_stream(2) == 42


@pytest.mark.parametrize(
    "function",
    [dispatch._resolve_compiled, precision._has_float64],
    ids=lambda function: function.__name__,
)
def test_the_mark_of_constants_is_torch_s(function):
    """It cannot fall back: where torch renames it, this fails."""
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(function).items()

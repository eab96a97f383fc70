"""Which backend serves a call, who is told, and what is refused."""

import threading
import warnings

import pytest
import torch
from calls import LOSSES, sample

import fastkd
import fastkd.losses.attention as module
from fastkd import dispatch
from fastkd.kernels import native


@pytest.fixture
def served(monkeypatch):
    """The backends that calls of attention_map were given, in order."""
    record = []
    select = module.select

    def recording(*args):
        record.append(select(*args))
        return record[-1]

    monkeypatch.setattr(module, "select", recording)
    return record


@pytest.fixture
def without_native(monkeypatch):
    refusal = dispatch.Refusal("the kernels are on holiday", "Wait.")
    monkeypatch.setattr(native, "refuse", lambda facts: refusal)


def call(**keywords):
    return sample("attention_map")(**keywords)


def test_the_best_is_first(served, kernel_backend):
    call()
    assert served == [kernel_backend]


def test_argument_beats_context_beats_environment(served, kernel_backend, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    call()
    with fastkd.use_backend(kernel_backend):
        call()
        call(backend="reference")
        with fastkd.use_backend("reference"):
            call()
        call()
    call()
    assert served == [
        "reference", kernel_backend, "reference", "reference", kernel_backend, "reference",
    ]  # fmt: skip


def test_context_ends_with_an_exception(served, kernel_backend):
    with pytest.raises(KeyError), fastkd.use_backend("reference"):
        raise KeyError
    call()
    assert served == [kernel_backend]


def test_context_decorates(served):
    fastkd.use_backend("reference")(call)()
    assert served == ["reference"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("unknown", ["Native", "cuda", "reference ", ""])
def test_unknown_names(name, unknown):
    with pytest.raises(ValueError, match=rf"'native', 'triton', 'reference', got '{unknown}'"):
        sample(name)(backend=unknown)
    with pytest.raises(ValueError, match=f"'reference', got '{unknown}'"):
        fastkd.use_backend(unknown).__enter__()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [1, 0, True, ["native"], torch.float32])
def test_names_that_are_no_strings(name, value):
    with pytest.raises((ValueError, TypeError), match="backend must be"):
        sample(name)(backend=value)


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"FASTKD_BACKEND|backend must be one of .* got 'fastest'"):
        call()


def test_empty_environment_variable_is_no_choice(served, kernel_backend, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "")
    call()
    assert served == [kernel_backend]


@pytest.mark.parametrize("name", LOSSES)
def test_a_backend_asked_for_is_used_or_raises(name, without_native, monkeypatch):
    for backend in ("native", "triton"):
        reason = "on holiday. Wait" if backend == "native" else ""
        message = f"'{backend}' was asked for and cannot serve {name}: .*{reason}"
        with pytest.raises(fastkd.BackendUnavailableError, match=message):
            sample(name)(backend=backend)
        with (
            fastkd.use_backend(backend),
            pytest.raises(fastkd.BackendUnavailableError, match=message),
        ):
            sample(name)()
        monkeypatch.setenv("FASTKD_BACKEND", backend)
        with pytest.raises(fastkd.BackendUnavailableError, match=message):
            sample(name)()
        monkeypatch.delenv("FASTKD_BACKEND")


def test_refusal_is_no_value_error():
    assert issubclass(fastkd.BackendUnavailableError, RuntimeError)
    assert issubclass(fastkd.FallbackWarning, UserWarning)


def test_falling_back_warns_once_per_reason(without_native, monkeypatch):
    with pytest.warns(fastkd.FallbackWarning, match=r"native.*on holiday\. Wait\.") as caught:
        for dtype in (torch.float32, torch.float64, torch.float16):
            sample("attention_map", dtype)()
            sample("hint_loss", dtype)()
    assert len(caught) == 1
    # The warning points at the user's line, not into fastkd.
    assert caught[0].filename.endswith("calls.py")
    monkeypatch.setattr(native, "refuse", lambda facts: dispatch.Refusal("they are ill"))
    dispatch._resolve.cache_clear()
    with pytest.warns(fastkd.FallbackWarning, match="they are ill"):
        call()


def test_no_warning_without_a_step_down(kernel_backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in LOSSES:
            sample(name)()
            sample(name)(backend=kernel_backend)
            sample(name)(backend="reference")


def test_fallback_result_is_the_reference(without_native):
    one = sample("attention_map")
    with pytest.warns(fastkd.FallbackWarning):
        assert torch.equal(one(), one(backend="reference"))


def explained(name, **keywords):
    one = sample(name)
    return fastkd.explain(one.function, *one.tensors, **one.keywords, **keywords)


@pytest.mark.parametrize("name", LOSSES)
def test_explain(name, kernel_backend):
    explanation = explained(name)
    assert (explanation.loss, explanation.chosen) == (name, kernel_backend)
    assert list(explanation.reasons) == list(dispatch.ORDER)
    assert all(explanation.reasons.values())
    assert all(backend in str(explanation) for backend in dispatch.ORDER)
    assert explained(name, backend="reference").chosen == "reference"
    with fastkd.use_backend("reference"):
        assert explained(name).chosen == "reference"


@pytest.mark.parametrize("name", LOSSES)
def test_explain_where_nothing_serves(name, without_native):
    explanation = explained(name, backend="native")
    assert explanation.chosen is None
    assert "holiday" in explanation.reasons["native"]
    assert explained(name).chosen == "reference"


def test_explain_neither_warns_nor_runs_nor_remembers(without_native, served, monkeypatch):
    monkeypatch.setattr(
        "fastkd.reference.attention.attention_map", lambda *_, **__: pytest.fail("it ran")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained("attention_map")
    assert not served
    assert not dispatch._explaining.get()


def test_explain_checks_the_arguments():
    with pytest.raises(ValueError, match="kind"):
        explained("attention_map", kind="median")
    assert not dispatch._explaining.get()


def test_explain_leaves_other_threads_alone(monkeypatch):
    """A loss that another thread computes meanwhile is computed, not explained."""
    check = module.checks.floating
    elsewhere = []

    def check_slowly(*named):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: elsewhere.append(call()))
            thread.start()
            thread.join()
        return check(*named)

    monkeypatch.setattr(module.checks, "floating", check_slowly)
    assert explained("attention_map").loss == "attention_map"
    assert torch.is_tensor(elsewhere[0])


def test_explain_takes_modules(kernel_backend):
    explanation = fastkd.explain(
        fastkd.nn.HintLoss(3, 4), torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    )
    assert (explanation.loss, explanation.chosen) == ("hint_loss", kernel_backend)


@pytest.mark.parametrize("stranger", [abs, lambda x: x, torch.nn.Identity()])
def test_explain_of_a_stranger(stranger):
    with pytest.raises(TypeError, match="expects a loss of fastkd"):
        fastkd.explain(stranger, torch.ones(()))

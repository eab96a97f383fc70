"""Which backend serves a call, who is told, and what is refused."""

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from calls import LOSSES, sample
from conftest import BACKENDS

import fastkd
import fastkd.losses.attention as module
from fastkd import dispatch, facts
from fastkd.kernels import native

# Of the CPU: native first, then the reference.
pytestmark = pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test")


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
    refusal = facts.Refusal("the kernels are on holiday", "Wait.")
    monkeypatch.setattr(native, "refuse", lambda facts: refusal)


def call(**keywords):
    return sample("attention_map")(**keywords)


def test_the_best_is_first(served):
    call()
    assert served == ["native"]


def test_argument_beats_context_beats_environment(served, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    call()
    with fastkd.use_backend("native"):
        call()
        call(backend="reference")
        with fastkd.use_backend("reference"):
            call()
        call()
    call()
    assert served == [
        "reference", "native", "reference", "reference", "native", "reference",
    ]  # fmt: skip


def test_context_ends_with_an_exception(served):
    with pytest.raises(KeyError), fastkd.use_backend("reference"):
        raise KeyError
    call()
    assert served == ["native"]


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


def test_empty_environment_variable_is_no_choice(served, monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "")
    call()
    assert served == ["native"]


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
    monkeypatch.setattr(native, "refuse", lambda _: facts.Refusal("they are ill"))
    dispatch._resolve.cache_clear()
    with pytest.warns(fastkd.FallbackWarning, match="they are ill"):
        call()


def test_no_warning_without_a_step_down():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in LOSSES:
            sample(name)()
            sample(name)(backend="native")
            sample(name)(backend="reference")


def test_fallback_result_is_the_reference(without_native):
    one = sample("attention_map")
    with pytest.warns(fastkd.FallbackWarning):
        assert torch.equal(one(), one(backend="reference"))


def explained(name, **keywords):
    one = sample(name)
    return fastkd.explain(one.function, *one.tensors, **one.keywords, **keywords)


@pytest.mark.parametrize("name", LOSSES)
def test_explain(name):
    explanation = explained(name)
    assert (explanation.loss, explanation.chosen) == (name, "native")
    assert list(explanation.reasons) == list(facts.ORDER)
    assert all(explanation.reasons.values())
    assert all(backend in str(explanation) for backend in facts.ORDER)
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


def test_explain_takes_modules():
    explanation = fastkd.explain(
        fastkd.nn.HintLoss(3, 4), torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    )
    assert (explanation.loss, explanation.chosen) == ("hint_loss", "native")


@pytest.mark.parametrize("stranger", [abs, lambda x: x, torch.nn.Identity()])
def test_explain_of_a_stranger(stranger):
    with pytest.raises(TypeError, match="expects a loss of fastkd"):
        fastkd.explain(stranger, torch.ones(()))


def on_a_gpu(loss="hint_loss"):
    return facts.Facts(loss, "cuda:0", (torch.float32, torch.float32), None)


def module_for(archs, problem=""):
    return SimpleNamespace(cuda_archs=lambda: archs, cuda_problem=lambda device: problem)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (module_for([]), r"built without CUDA kernels.*FASTKD_BUILD=cuda"),
        (
            module_for(["90"], "no kernel image is available"),
            r"for sm_90, do not run on cuda:0, which is sm_86 \(no kernel image is available\)\. "
            r'Reinstall fastkd with FASTKD_CUDA_ARCHS="90;86"\.',
        ),
        (
            module_for(["80", "86"], "driver version is insufficient"),
            r"for sm_80, sm_86, do not run on cuda:0, which is sm_86 \(driver version is insuff.*"
            r"Update the driver",
        ),
        ("it does not load", r"it does not load\. Install"),
    ],
)
def test_a_gpu_that_the_compiled_module_does_not_serve(monkeypatch, module, reason):
    """Loaded is not usable: the next backend serves, and the reason is told once."""
    monkeypatch.setattr(native, "load", lambda: module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setitem(dispatch._REFUSE, "triton", lambda facts: None)
    with pytest.warns(fastkd.FallbackWarning, match=reason) as caught:
        for dtypes in ((torch.float32,) * 2, (torch.float16,) * 2):
            assert dispatch._resolve(*on_a_gpu()._replace(dtypes=dtypes), None) == "triton"
    assert len(caught) == 1
    with pytest.raises(fastkd.BackendUnavailableError, match=reason):
        dispatch._resolve(*on_a_gpu(), "native")


def test_a_gpu_too_old_for_the_cuda_kernels(monkeypatch):
    """No reinstallation helps, so that Triton serves without a warning."""
    monkeypatch.setattr(native, "load", lambda: module_for(["80"], "no kernel image is available"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setitem(dispatch._REFUSE, "triton", lambda facts: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._resolve(*on_a_gpu(), None) == "triton"
    refusal = dispatch._REFUSE["native"](on_a_gpu())
    assert "which is sm_75" in str(refusal) and "they need sm_80 or newer" in str(refusal)


def test_a_gpu_that_the_compiled_module_serves(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: module_for(["90"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch._resolve(*on_a_gpu(), None) == "native"
    refusal = dispatch._REFUSE["native"](on_a_gpu("a_loss_to_come"))
    assert "no CUDA kernels for a_loss_to_come" in str(refusal)


def test_a_gpu_of_another_maker(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: module_for(["90"]))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    refusal = dispatch._REFUSE["native"](on_a_gpu())
    assert refusal.expected and "AMD" in refusal.reason


def test_a_gpu_that_no_kernel_serves(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: module_for([]))
    monkeypatch.setitem(dispatch._REFUSE, "triton", lambda _: facts.Refusal("no Triton"))
    with pytest.warns(fastkd.FallbackWarning) as caught:
        assert dispatch._resolve(*on_a_gpu(), None) == "reference"
    assert len(caught) == 2


@pytest.mark.parametrize("device", ["meta:None", "mps:0"])
def test_devices_without_kernels(device):
    refusal = dispatch._REFUSE["native"](on_a_gpu()._replace(device=device))
    assert f"no kernels for {device.partition(':')[0]} tensors" in str(refusal)

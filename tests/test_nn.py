"""The modules are the functions: the same keywords, defaults, numbers and gradients."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from calls import MODULES, keyword_defaults, sample

import fastkd

KEYWORDS = {
    fastkd.nn.SoftTargetLoss: {"temperature": 3.0, "scale_t2": False, "reduction": "none"},
    fastkd.nn.DistillationLoss: {"temperature": 2.0, "label_smoothing": 0.2, "reduction": "sum"},
    fastkd.nn.AttentionTransferLoss: {"kind": "max_pow", "order": 3.0, "pair_weights": [7.0]},
    fastkd.nn.RKDDistanceLoss: {"delta": 0.2},
    fastkd.nn.RKDAngleLoss: {"delta": 0.2},
    fastkd.nn.SimilarityPreservingLoss: {"pair_weights": (1.0, 0.5)},
    fastkd.nn.FSPLoss: {"pair_weights": [0.5]},
}


def test_every_module_is_tested():
    modules = {
        value
        for value in vars(fastkd.nn).values()
        if inspect.isclass(value)
        and issubclass(value, torch.nn.Module)
        and not value.__name__.startswith("_")
    }
    assert modules == {*MODULES, fastkd.nn.HintLoss}


@pytest.mark.parametrize("module", MODULES)
def test_the_defaults_are_the_function_s(module):
    expected = keyword_defaults(MODULES[module])
    for name in ("mask", "row_weight", "normalizer"):  # which a call takes
        expected.pop(name, None)
    assert keyword_defaults(module) == expected


def test_the_defaults_of_hint_loss():
    expected = keyword_defaults(fastkd.hint_loss)
    actual = keyword_defaults(fastkd.nn.HintLoss)
    regressor = {"regressor_weight", "regressor_bias"}
    assert {k: v for k, v in expected.items() if k not in regressor} == {
        k: v for k, v in actual.items() if k != "bias"
    }


@pytest.mark.parametrize("with_keywords", [False, True])
@pytest.mark.parametrize("module", MODULES)
def test_the_numbers_are_the_function_s(backend, module, with_keywords):
    function = MODULES[module]
    call = sample(function.__name__)
    tensors = call.tensors
    if function is fastkd.fsp_loss:
        tensors = tensors[:2], tensors[2:]
    if function is fastkd.similarity_preserving_loss:
        tensors = [tensors[0]] * 2, [tensors[1]] * 2
    inputs = [*tensors, *([call.keywords["labels"]] if "labels" in call.keywords else [])]
    keywords = {"backend": backend, **(KEYWORDS[module] if with_keywords else {})}
    assert torch.equal(module(**keywords)(*inputs), function(*inputs, **keywords))


def test_a_module_learns_its_temperature(backend):
    """A parameter is the module's; a temperature of a call takes its place."""
    heat = torch.nn.Parameter(torch.tensor(4.0))
    module = fastkd.nn.SoftTargetLoss(temperature=heat, teacher_temperature=2.0, backend=backend)
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    assert [*module.state_dict()] == ["temperature"]
    keywords = {"temperature": heat, "teacher_temperature": 2.0, "backend": backend}
    loss = module(student, teacher)
    assert torch.equal(loss, fastkd.soft_target_loss(student, teacher, **keywords))
    loss.backward()
    assert heat.grad
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    given = module(student, teacher, temperature=rows, teacher_temperature=rows.detach())
    keywords |= {"temperature": rows, "teacher_temperature": rows.detach()}
    assert torch.equal(given, fastkd.soft_target_loss(student, teacher, **keywords))
    module.to(torch.float64)
    assert heat.dtype == torch.float64


def test_parts():
    call = sample("distillation_loss")
    parts = fastkd.nn.DistillationLoss(return_parts=True)(*call.tensors, call.keywords["labels"])
    assert parts._fields == ("loss", "hard", "soft")


@pytest.mark.parametrize("module", MODULES)
def test_repr_shows_the_keywords(module):
    for name, value in KEYWORDS[module].items():
        assert f"{name}={value!r}" in repr(module(**KEYWORDS[module]))
    assert not list(module().parameters())


def test_repr_of_hint_loss_shows_its_regressor():
    text = repr(fastkd.nn.HintLoss(3, 8, reduction="mean"))
    assert "reduction='mean'" in text
    assert "Conv2d(3, 8" in text


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spatial", [(), (6,), (4, 5)])
def test_hint_loss_is_the_function_with_its_regressor(backend, spatial, bias):
    module = fastkd.nn.HintLoss(3, 8, bias=bias, reduction="mean", backend=backend)
    student, teacher = torch.randn(2, 3, *spatial, requires_grad=True), torch.randn(2, 8, *spatial)
    loss = module(student, teacher)
    expected = fastkd.hint_loss(
        student, teacher, regressor_weight=module.regressor.weight,
        regressor_bias=module.regressor.bias, reduction="mean", backend=backend,
    )  # fmt: skip
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    assert len(list(module.parameters())) == 1 + bias


@pytest.mark.parametrize("channels", [(), (None, None)])
def test_hint_loss_without_a_regressor_is_the_function(backend, channels):
    module = fastkd.nn.HintLoss(*channels, reduction="mean", half=False, backend=backend)
    student, teacher = (torch.randn(2, 8, 4, 4) for _ in range(2))
    torch.testing.assert_close(module(student, teacher), F.mse_loss(student, teacher))
    assert module([student], [teacher]) == module(student, teacher)
    assert not list(module.parameters())
    assert not module.state_dict()
    module.regressor = torch.nn.Linear(4, 4)
    assert len(list(module.parameters())) == 2
    assert module(student, teacher) != F.mse_loss(student, teacher)


@pytest.mark.parametrize(("channels", "bias"), [((3,), True), ((None, 3), True), ((), False)])
def test_half_a_regressor_is_refused(channels, bias):
    with pytest.raises(ValueError, match="channels of both sides"):
        fastkd.nn.HintLoss(*channels, bias=bias)


def test_an_optimizer_trains_the_regressor(backend):
    module = fastkd.nn.HintLoss(3, 4, backend=backend)
    student = torch.randn(8, 3, 5, 5)
    teacher = torch.nn.functional.conv2d(student, torch.randn(4, 3, 1, 1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = module(student, teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_state_dict_round_trip():
    module, other = fastkd.nn.HintLoss(3, 8), fastkd.nn.HintLoss(3, 8)
    assert set(module.state_dict()) == {"regressor.weight", "regressor.bias"}
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    inputs = torch.randn(2, 3, 4, 4), torch.randn(2, 8, 4, 4)
    assert torch.equal(module(*inputs), other(*inputs))


@pytest.mark.parametrize(
    "module", [*MODULES, lambda: fastkd.nn.HintLoss(3, 8), lambda: fastkd.nn.HintLoss()]
)
def test_modules_copy_and_pickle(module):
    one = module()
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert repr(other) == repr(one)


def test_a_module_in_half_precision(backend):
    module = fastkd.nn.HintLoss(3, 8, backend=backend).to(torch.bfloat16)
    student, teacher = (torch.randn(2, c, 4, 4, dtype=torch.bfloat16) for c in (3, 8))
    module(student, teacher).backward()
    assert module.regressor.weight.grad.dtype == torch.bfloat16

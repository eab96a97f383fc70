"""The attributes of a module are the keywords of its loss: what is set, the next call takes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from calls import MODULES, keyword_defaults, sample

import fastkd
from fastkd import nn

LOSSES = {**MODULES, nn.HintLoss: fastkd.hint_loss}
# For each keyword another value than the default, and one that the function refuses.
VALUES = {
    (nn.SoftTargetLoss, "temperature"): (4, 0),
    (nn.SoftTargetLoss, "teacher_temperature"): (3.0, -1),
    (nn.SoftTargetLoss, "scale_t2"): (False, "yes"),
    (nn.SoftTargetLoss, "reduction"): ("none", "average"),
    (nn.SoftTargetLoss, "dim"): (0, 2),
    (nn.SoftTargetLoss, "num_classes"): (3, 5),
    (nn.SoftTargetLoss, "divergence"): ("reverse_kl", "kl"),
    (nn.SoftTargetLoss, "beta"): (0.9, 1.5),
    (nn.SoftTargetLoss, "inplace"): (True, "yes"),
    (nn.SoftTargetLoss, "teacher_weights"): ([1, 3], [1]),
    (nn.DistillationLoss, "temperature"): (2.5, "4"),
    (nn.DistillationLoss, "teacher_temperature"): (2, "4"),
    (nn.DistillationLoss, "soft_weight"): (0.25, None),
    (nn.DistillationLoss, "hard_weight"): (3.0, float("nan")),
    (nn.DistillationLoss, "ignore_index"): (3, 1.5),
    (nn.DistillationLoss, "label_smoothing"): (0.25, 2),
    (nn.DistillationLoss, "reduction"): ("none", "mean"),
    (nn.DistillationLoss, "dim"): (0, -3),
    (nn.DistillationLoss, "num_classes"): (3, 0),
    (nn.DistillationLoss, "divergence"): ("tvd", None),
    (nn.DistillationLoss, "beta"): (0.1, "0.5"),
    (nn.DistillationLoss, "inplace"): (True, 1),
    (nn.DistillationLoss, "teacher_weights"): ((2.0, 1.0), "12"),
    (nn.DistillationLoss, "return_parts"): (True, 1),
    (nn.AttentionTransferLoss, "kind"): ("max_pow", "min"),
    (nn.AttentionTransferLoss, "p"): (3.0, 0.5),
    (nn.AttentionTransferLoss, "distance"): ("mse", "l2"),
    (nn.AttentionTransferLoss, "order"): (1.5, 0),
    (nn.AttentionTransferLoss, "beta"): (1000, "1000"),
    (nn.AttentionTransferLoss, "pair_weights"): ([3.0], [1, 2]),
    (nn.AttentionTransferLoss, "resize"): ("adaptive_avg_pool", "bilinear"),
    (nn.AttentionTransferLoss, "reduction"): ("sum", "batchmean"),
    (nn.AttentionTransferLoss, "eps"): (1e3, 0),
    (nn.AttentionTransferLoss, "channel_dim"): (-1, 0),
    (nn.HintLoss, "pair_weights"): ((0.5,), 0.5),
    (nn.HintLoss, "reduction"): ("mean", None),
    (nn.HintLoss, "half"): (False, 1),
    (nn.RKDDistanceLoss, "delta"): (0.01, -1),
    (nn.RKDAngleLoss, "delta"): (0.01, "1"),
    (nn.SimilarityPreservingLoss, "pair_weights"): ([2], ["2"]),
    (nn.FSPLoss, "pair_weights"): ([-1.5], [float("nan")]),
}
# A process group is not copied, pickled or compiled: test_ranks_calls.py has modules with one.
OF_GROUPS = {(module, "group") for module in (nn.SoftTargetLoss, nn.DistillationLoss)}
BACKENDS = {(module, "backend"): ("reference", "cuda") for module in LOSSES}
# What goes with a linear head alone: tests/test_linear_head_calls.py.
OF_HEADS = {(module, "chunk_size") for module in (nn.SoftTargetLoss, nn.DistillationLoss)}
CASES = [(*key, *values) for key, values in (VALUES | BACKENDS).items()]
EACH = pytest.mark.parametrize(("module", "name", "value", "wrong"), CASES)


def make(module, **keywords):
    return nn.HintLoss(3, 3, **keywords) if module is nn.HintLoss else module(**keywords)


def beside(module, name):
    """Other keywords, without which the loss does not take this one, or does not show it."""
    if name == "beta" and module in (nn.SoftTargetLoss, nn.DistillationLoss):
        return {"divergence": "jsd"}
    return {"temperature": 2.0} if name == "scale_t2" else {}


def inputs_of(module, name):
    """Sides that the loss takes, also with another value of this keyword."""
    if module in (nn.SoftTargetLoss, nn.DistillationLoss):
        student, *teachers = (torch.randn(4, 4) for _ in range(3))
        teachers = teachers if name == "teacher_weights" else teachers[0]
        labels = torch.tensor([0, 3, 2, 1]).clamp(max=2 if name == "num_classes" else 3)
        return (student, teachers, labels) if module is nn.DistillationLoss else (student, teachers)
    if module is nn.AttentionTransferLoss:
        smaller = 3 if name == "resize" else 5
        return torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, smaller)
    tensors = sample(LOSSES[module].__name__).tensors
    return (tensors[:2], tensors[2:]) if module is nn.FSPLoss else tensors


def call(module, one, inputs):
    """The function with the module's attributes as they are."""
    function = LOSSES[module]
    keywords = {name: getattr(one, name) for name in keyword_defaults(module) if name != "bias"}
    if module is nn.HintLoss:
        keywords |= {"half": bool(one.half), "regressor_weight": one.regressor.weight}
        keywords["regressor_bias"] = one.regressor.bias
    return function(*inputs, **keywords)


def assert_same(actual, expected):
    for one, other in zip(torch.atleast_1d(actual), torch.atleast_1d(expected), strict=True):
        torch.testing.assert_close(one, other)


def test_every_keyword_is_tested():
    named = {(module, name) for module in LOSSES for name in keyword_defaults(module)}
    expected = set(VALUES | BACKENDS) | OF_HEADS | OF_GROUPS
    assert named - {(nn.HintLoss, "bias")} == expected


@EACH
def test_an_attribute_is_what_was_passed(module, name, value, wrong):
    one = make(module, **{name: value})
    assert getattr(one, name) == value
    assert f"{name}={value!r}" in repr(one)
    assert getattr(make(module), name) == keyword_defaults(module)[name]


@EACH
def test_what_is_set_changes_the_next_call(module, name, value, wrong):
    one, inputs = make(module, **beside(module, name)), inputs_of(module, name)
    if name != "resize":
        before = one(*inputs)
    setattr(one, name, value)
    assert getattr(one, name) == value
    assert f"{name}={value!r}" in repr(one)
    after = one(*inputs)
    assert_same(after, call(module, one, inputs))
    if name in ("resize", "backend", "inplace"):
        return
    changed = type(before) is not type(after) or before.shape != after.shape
    assert changed or not torch.allclose(before, after)


@EACH
def test_nonsense_raises_at_the_next_call(module, name, value, wrong):
    one, inputs = make(module, **beside(module, name)), inputs_of(module, name)
    setattr(one, name, wrong)
    assert f"{name}={wrong!r}" in repr(one)
    with pytest.raises((TypeError, ValueError)) as caught:
        one(*inputs)
    assert name in str(caught.value)
    setattr(one, name, value)
    one(*inputs)


@EACH
def test_copies_keep_it(module, name, value, wrong):
    one, inputs = make(module, **beside(module, name)), inputs_of(module, name)
    setattr(one, name, value)
    copies = copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))
    for other in copies:
        assert repr(other) == repr(one)
        assert_same(other(*inputs), one(*inputs))
    default = keyword_defaults(module)[name]
    setattr(copies[1], name, default)
    assert getattr(one, name) == value


@pytest.mark.thorough
@EACH
def test_compiled_code_follows(module, name, value, wrong):
    torch._dynamo.reset()
    one, inputs = make(module, **beside(module, name)), inputs_of(module, name)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    default = getattr(one, name)
    for each in (value, default, value) if name == "resize" else (default, value, default):
        setattr(one, name, each)
        if name == "resize" and each is None:
            continue
        assert_same(compiled(*inputs), one(*inputs))
    torch._dynamo.reset()


@EACH
def test_export(module, name, value, wrong):
    """An exported program holds the attributes as they were."""
    one = make(module, **{**beside(module, name), name: value})
    inputs = inputs_of(module, name)
    expected = one(*inputs)
    program = torch.export.export(one, inputs)
    assert_same(program.module()(*inputs), expected)


@pytest.mark.parametrize("backend_name", ["reference", None])
def test_a_schedule_of_temperatures_in_compiled_code(backend_name):
    torch._dynamo.reset()
    one = nn.SoftTargetLoss(temperature=1.0, backend=backend_name)
    inputs = inputs_of(nn.SoftTargetLoss, "temperature")
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 8.0, 4.5, 2.25, 1.0, 3):
        one.temperature = temperature
        assert_same(compiled(*inputs), fastkd.soft_target_loss(*inputs, temperature=temperature))
    torch._dynamo.reset()


@pytest.mark.parametrize("module", LOSSES)
def test_a_misspelt_attribute_is_any_module_s(module):
    one = make(module)
    with pytest.raises(AttributeError, match="temprature"):
        one.temprature  # noqa: B018
    one.temprature = 3.0
    assert one.temprature == 3.0
    assert "temprature" not in repr(one)
    one(*inputs_of(module, ""))


@pytest.mark.parametrize("module", LOSSES)
def test_attributes_are_declared(module):
    assert keyword_defaults(module).keys() - {"bias"} <= {*module.__annotations__, "half"}


@pytest.mark.parametrize("module", LOSSES)
def test_no_keyword_hides_what_every_module_has(module):
    assert [name for name in keyword_defaults(module) if hasattr(torch.nn.Module, name)] == (
        ["half"] if module is nn.HintLoss else []
    )


@pytest.mark.parametrize("half", [True, False, np.bool_(True)])
def test_half_is_a_keyword_and_a_conversion(half):
    """Of all keywords it alone shares its name with a method of modules."""
    one = nn.HintLoss(3, 4, half=half)
    assert bool(one.half) is bool(half)
    if isinstance(half, bool):
        assert one.half() is one
        assert one.regressor.weight.dtype == torch.float16
    assert one.half == half
    parent = torch.nn.Sequential(nn.HintLoss(3, 4, half=half)).half()
    assert parent[0].regressor.weight.dtype == torch.float16

"""Bad input of every kind: what is raised, that it says enough, and that no kernel has run."""

import inspect
import math

import numpy as np
import pytest
import torch
from calls import LOSSES, sample
from conftest import DEVICE

import fastkd

X = torch.randn(2, 3, 4, 5)
ROWS = torch.randn(4, 10)
LABELS = torch.tensor([1, 9, -100, 0])
HERE = str(X.device)
META = torch.empty(2, 3, 4, 5, device="meta")


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    """All checks come before the choice of a backend: so they are the same for each of them."""
    for module in ("soft_target", "attention", "hint", "rkd", "similarity", "fsp"):
        monkeypatch.setattr(
            f"fastkd.losses.{module}.select", lambda *_: pytest.fail("the checks let it through")
        )


def bad_logits(loss, *labels):
    """Arguments, the error, and what its message must hold: the expected and the actual."""
    rows = "soft_target_loss" if not labels else "distillation_loss"
    assert loss == rows
    wide = torch.randn(4, 11)
    yield (ROWS, wide, *labels), {}, ValueError, ["same shape", "(4, 10)", "(4, 11)"]
    yield (ROWS, ROWS[:3], *labels), {}, ValueError, ["same shape", "(4, 10)", "(3, 10)"]
    yield (ROWS, ROWS[0], *labels), {}, ValueError, ["same shape", "(4, 10)", "(10,)"]
    yield (ROWS[0, 0], ROWS[0, 0], *labels), {}, ValueError, ["at least one dim", "()"]
    yield (ROWS[:, :0], ROWS[:, :0], *labels), {}, ValueError, ["at least one class", "(4, 0)"]
    for dim in (2, -3, 7):
        yield (ROWS, ROWS, *labels), {"dim": dim}, ValueError, ["dim", "[-2, 1]", str(dim)]
    for dim in (1.0, "1", None, True, np.True_, np.float64(1), torch.tensor(1), np.ones(1)):
        yield (ROWS, ROWS, *labels), {"dim": dim}, TypeError, ["dim", "int", type(dim).__name__]
    for value in (0, 0.0, -1, math.nan, math.inf, -math.inf, 10**400):
        yield (
            (ROWS, ROWS, *labels), {"temperature": value}, ValueError,
            ["temperature", "> 0", repr(value)[:20]],
        )  # fmt: skip
    for value in (
        *("4", None, True, 1j, [1.0]),
        *(np.ones(1), np.ones(2), np.True_, np.complex64(4)),
    ):
        kind = type(value).__name__
        yield (ROWS, ROWS, *labels), {"temperature": value}, TypeError, ["temperature", kind]


def logit_cases():
    for case in bad_logits("soft_target_loss"):
        yield "soft_target_loss", *case
    for value in ("Mean", "batch", "", None, 1, X, np.ones(2)):
        yield (
            "soft_target_loss", (ROWS, ROWS), {"reduction": value}, ValueError,
            ["reduction", "'none', 'sum', 'mean', 'batchmean'"],
        )  # fmt: skip
    for value in (1, 0.0, None, "yes", torch.tensor(True)):
        yield (
            "soft_target_loss", (ROWS, ROWS), {"scale_t2": value}, TypeError,
            ["scale_t2", "True or False", repr(value)],
        )  # fmt: skip


def distillation_cases():
    for case in bad_logits("distillation_loss", LABELS):
        yield "distillation_loss", *case

    def case(labels=LABELS, error=ValueError, words=(), **keywords):
        return "distillation_loss", (ROWS, ROWS, labels), keywords, error, ["", *words]

    for name in ("soft_weight", "hard_weight"):
        for value in (math.nan, math.inf):
            yield case(**{name: value}, words=[name, "finite", repr(value)])
        for value in ("1", None, False, torch.tensor(1.0)):
            yield case(**{name: value}, error=TypeError, words=[name, type(value).__name__])
    for value in (-0.1, 1.01, math.nan):
        yield case(label_smoothing=value, words=["label_smoothing", ">= 0 and <= 1", repr(value)])
    for value in (1.5, None, "x", True, np.True_, np.float32(1), torch.tensor(1)):
        kind = type(value).__name__
        yield case(ignore_index=value, error=TypeError, words=["ignore_index", "int", kind])
    for value in (2**63, -(2**63) - 1):
        yield case(ignore_index=value, words=["ignore_index", str(value)])
    yield case(return_parts=1, error=TypeError, words=["return_parts", "True or False", "1"])
    for dtype in (torch.float32, torch.bool, torch.bfloat16, torch.complex64):
        yield case(LABELS.to(dtype), TypeError, ["labels", "integers", "int64", str(dtype)])
    yield case([1, 9, -100, 0], TypeError, ["labels", "tensor", "list"])
    words = ["two meanings", "cross-entropy's is over rows", "rows × classes", '"batchmean"']
    yield case(reduction="mean", words=words)
    for value in ("Mean", None, 1):
        words = ["reduction", "'none', 'sum', 'batchmean'", repr(value)]
        yield case(reduction=value, words=words)
    yield case(LABELS[:3], words=["labels", "(4,)", "(3,)"])
    yield case(LABELS[:, None], words=["labels", "(4,)", "(4, 1)"])
    yield case(LABELS, dim=0, words=["labels", "(10,)", "(4,)"])
    yield case(LABELS.to("meta"), words=["same device", HERE, "meta"])


def bad_maps(*tensors):
    """What `attention_map` and `attention_transfer_loss` have in common."""
    for value in ("Sum", "max", "", None, 2, X):
        yield tensors, {"kind": value}, ValueError, ["kind", "'sum', 'sum_pow', 'max_pow'"]
    for value in (0.99, 0, -2, math.nan, math.inf):
        yield tensors, {"p": value}, ValueError, ["p must", ">= 1", repr(value)]
    for value in ("2", True, 2j, torch.tensor(2.0)):
        yield tensors, {"p": value}, TypeError, ["p must", type(value).__name__]
    for value in (2, 1.5, -1):
        words = ["p must", "1", 'kind="sum"', repr(value)]
        yield tensors, {"kind": "sum", "p": value}, ValueError, words
    for value in (0, -1e-12, math.nan, math.inf):
        yield tensors, {"eps": value}, ValueError, ["eps", "> 0", repr(value)]
    yield tensors, {"eps": None}, TypeError, ["eps", "NoneType"]
    for value in (0, -4):
        yield tensors, {"channel_dim": value}, ValueError, ["channel_dim", "batch", str(value)]
    for value in (4, -5):
        yield tensors, {"channel_dim": value}, ValueError, ["channel_dim", "[-4, 3]", str(value)]
    for value in (1.0, None, True):
        yield tensors, {"channel_dim": value}, TypeError, ["channel_dim", type(value).__name__]
    flat = [x[:, :, 0, 0] for x in tensors]
    yield flat, {}, ValueError, ["at least 3 dimensions", "(2, 3)"]
    for empty in (X[:, :0], X[:, :, :0]):
        changed = [empty, *tensors[1:]]
        yield changed, {}, ValueError, ["at least one channel", str(tuple(empty.shape))]


def map_cases():
    for case in bad_maps(X):
        yield "attention_map", *case
    for value in (1, None, "no"):
        words = ["normalize", "True or False", repr(value)]
        yield "attention_map", (X,), {"normalize": value}, TypeError, words
    for case in bad_maps(X, X):
        yield "attention_transfer_loss", *case


def transfer_cases():
    def case(student=X, teacher=X, error=ValueError, words=(), **keywords):
        return "attention_transfer_loss", (student, teacher), keywords, error, words

    for value in ("l2", None, 2):
        yield case(distance=value, words=["distance", "'norm', 'mse'", repr(value)])
    for value in (0.5, 0, -math.inf, math.nan):
        yield case(order=value, words=["order", ">= 1", repr(value)])
    for value in ("fro", True, torch.tensor(2.0)):
        yield case(order=value, error=TypeError, words=["order", type(value).__name__])
    for value in (1, math.inf):
        yield case(distance="mse", order=value, words=["order", "2", '"mse"', repr(value)])
    for value in (math.nan, math.inf):
        yield case(beta=value, words=["beta", "finite", repr(value)])
    yield case(beta=None, error=TypeError, words=["beta", "NoneType"])
    for value in ("bilinear", "", True, 1):
        yield case(resize=value, words=["resize", "'adaptive_avg_pool'", repr(value)])
    for value in ("batchmean", None):
        yield case(reduction=value, words=["reduction", "'none', 'sum', 'mean'", repr(value)])
    yield case(X, X[:1], words=["batch size 2", "(2, 3, 4, 5)", "(1, 3, 4, 5)"])
    yield case([X, X[:1]], [X, X[:1]], words=["student[1]", "batch size 2", "(1, 3, 4, 5)"])
    small = X[:, :, :2]
    yield case(X, small, words=["student and teacher", "(2, 3, 4, 5)", "(2, 3, 2, 5)", "resize"])
    yield case([X, X], [X, small], words=["student[1]", "teacher[1]", "(2, 3, 2, 5)"])
    yield case(X, X.flatten(2), words=["spatial", "(2, 3, 4, 5)", "(2, 3, 20)"])
    pool = {"resize": "adaptive_avg_pool"}
    tokens = X.flatten(2)
    yield case(tokens, tokens[..., 1:], **pool, words=["(B, C, H, W)", "(2, 3, 20)", "(2, 3, 19)"])
    yield case(X, small, channel_dim=-1, **pool, words=["channel_dim=1", "channel_dim=-1"])


def hint_cases():
    weight, bias = torch.randn(6, 3), torch.randn(6)
    wide = torch.randn(2, 6, 4, 5)

    def case(student=X, teacher=X, error=ValueError, words=(), w=None, b=None, **keywords):
        regressor = {"regressor_weight": w, "regressor_bias": b}
        return "hint_loss", (student, teacher), {**regressor, **keywords}, error, words

    for value in ("batch", None):
        words = ["reduction", "'none', 'sum', 'mean', 'batchmean'", repr(value)]
        yield case(reduction=value, words=words)
    for value in (0.5, None):
        yield case(half=value, error=TypeError, words=["half", "True or False", repr(value)])
    yield case(X, wide, words=["same shape", "(2, 3, 4, 5)", "(2, 6, 4, 5)"])
    yield case([X, X], [X, wide], words=["student[1]", "teacher[1]", "(2, 6, 4, 5)"])
    yield case(X[0, 0, 0], X[0, 0, 0], words=["(B, C, *spatial)", "(5,)"])
    ragged = [X, X[:1]]
    yield case(ragged, ragged, reduction="none", words=["same batch size", "[2, 1]"])
    yield case(b=bias, words=["regressor_bias needs a regressor_weight", "None"])
    for shape in [(3, 6), (6, 3, 1), (6, 3, 3, 3), (18,), (6, 4)]:
        words = ["regressor_weight", "(6, 3)", str(shape)]
        yield case(X, wide, w=torch.randn(shape), words=words)
    for shape in [(3,), (6, 1), ()]:
        words = ["regressor_bias", "(6,)", str(shape)]
        yield case(X, wide, w=weight, b=torch.randn(shape), words=words)
    yield case(X, wide, w=weight.long(), error=TypeError, words=["regressor_weight", "int64"])
    yield case(X, wide, w=weight, b=bias.long(), error=TypeError, words=["bias", "int64"])
    yield case(X, wide, w=[1.0], error=TypeError, words=["regressor_weight", "tensor", "list"])
    yield case(X, wide, w=weight.to("meta"), words=["same device", HERE, "meta"])
    yield case(X, wide, w=weight, b=bias.to("meta"), words=["same device", HERE, "meta"])
    for teacher in (wide[:1], wide[:, :, :3], wide[..., 0]):
        words = ["same batch and spatial", "(2, 3, 4, 5)", str(tuple(teacher.shape))]
        yield case(X, teacher, w=weight, words=words)


def feature_cases():
    """Tensors and sequences that no loss of features takes."""
    for name in ("attention_transfer_loss", "hint_loss", "similarity_preserving_loss"):
        yield name, ([X], [X, X]), {}, ValueError, ["same number", "1 and 2"]
        yield name, ([], []), {}, ValueError, ["at least one", "none"]
        yield name, (X, [X]), {}, TypeError, ["Tensor and list"]
        yield name, ((X,), X), {}, TypeError, ["tuple and Tensor"]
        yield name, ([X, None], [X, X]), {}, TypeError, ["student[1]", "tensor", "NoneType"]
        yield name, ([X, X], [X, X.int()]), {}, TypeError, ["teacher[1]", "int32"]
        yield name, (X, META), {}, ValueError, ["same device", HERE, "meta"]
        yield name, ([X, META], [X, META]), {}, ValueError, ["student[1]", HERE, "meta"]
        for value in ("maps", b"maps", {"a": X}, {X}, 3.0):
            kind = type(value).__name__
            yield name, (value, value), {}, TypeError, ["student", "tensor", kind]
            yield name, ([X], value), {}, TypeError, ["sequences of tensors", f"list and {kind}"]


def relation_cases():
    for name in ("rkd_distance_loss", "rkd_angle_loss"):
        for value in (0, -1.0, math.nan, math.inf):
            yield name, (ROWS, ROWS), {"delta": value}, ValueError, ["delta", "> 0", repr(value)]
        for value in ("1", None, True, torch.tensor(1.0)):
            kind = type(value).__name__
            yield name, (ROWS, ROWS), {"delta": value}, TypeError, ["delta", kind]
        for one, other in ((X, ROWS), (ROWS, ROWS[0]), (ROWS, ROWS[:3])):
            words = ["(N, D)", "same N", str(tuple(one.shape)), str(tuple(other.shape))]
            yield name, (one, other), {}, ValueError, words
        yield name, (X, X), {}, ValueError, [".flatten(1)"]
    for one, other in ((X, X[:1]), (ROWS[0], ROWS), (ROWS, ROWS[0, 0])):
        words = ["(B, *any)", "same B", str(tuple(one.shape)), str(tuple(other.shape))]
        yield "similarity_preserving_loss", (one, other), {}, ValueError, words
        words = ["student[1] and teacher[1]", *words]
        yield "similarity_preserving_loss", ([X, one], [X, other]), {}, ValueError, words


def fsp_cases():
    def case(student=(X, X), teacher=(X, X), error=ValueError, words=()):
        return "fsp_loss", (student, teacher), {}, error, words

    wide, flat = torch.randn(2, 6, 4, 5), X.flatten(2)
    yield case(X, error=TypeError, words=["student", "pair (first, second)", "Tensor"])
    for value in ("maps", b"maps", {"a": X, "b": X}, {X}, 3.0, None):
        kind = type(value).__name__
        yield case(teacher=value, error=TypeError, words=["teacher", "pair (first", kind])
    yield case(teacher=(), words=["teacher", "at least one pair", "none"])
    words = ["student", "pair (first, second)", "3", "list(zip(f, f[1:]))"]
    yield case((X, X, X), words=words)
    yield case([(X, X), (X,)], words=["student[1]", "pair (first, second)", "1"])
    yield case([(X, X)] * 2, [(X, X)], words=["same number of pairs", "2 and 1"])
    yield case((X, [X, X]), error=TypeError, words=["student[1]", "tensor", "list"])
    yield case([(X, X), (X, None)], error=TypeError, words=["student[1][1]", "NoneType"])
    yield case((X, flat), words=["student", "(B, C, H, W)", "(2, 3, 20)"])
    yield case(teacher=(X, X[:1]), words=["teacher", "same B", "(1, 3, 4, 5)"])
    for empty in (X[..., :0], X[:, :0]):
        words = ["student", "one channel and one position", str(tuple(empty.shape))]
        yield case((X, empty), words=words)
    yield case((X, wide), words=["student and teacher", "batch size and channels", "(2, 6, 4, 5)"])
    yield case([(X, X)] * 2, [(X, X), (X[:1], X[:1])], words=["teacher[1]", "(1, 3, 4, 5)"])
    yield case((META, META), words=["student", "same device", HERE, "meta"])
    yield case([(X, X), (META, META)], [(X, X)] * 2, words=["student[1]", HERE, "meta"])


CASES = [
    *relation_cases(),
    *fsp_cases(),
    *logit_cases(),
    *distillation_cases(),
    *map_cases(),
    *transfer_cases(),
    *hint_cases(),
    *feature_cases(),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}"[:60])
def test_bad_arguments(case):
    name, arguments, keywords, error, words = case
    with pytest.raises(error) as caught:
        getattr(fastkd, name)(*arguments, **keywords)
    assert type(caught.value) is error
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU asserts, and is of no use afterwards")
@pytest.mark.parametrize("label", [10, -1, -101, 2**40])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_labels_out_of_range(backend, monkeypatch, label, needs_grad):
    """Their values are the one thing that is looked at behind the choice of a backend."""
    monkeypatch.undo()
    student = ROWS.clone().requires_grad_(needs_grad)
    labels = LABELS.clone()
    labels[1] = label
    words = rf"labels must lie in \[0, 9\] or be ignore_index=-100, got {label}$"
    with pytest.raises(ValueError, match=words):
        fastkd.distillation_loss(student, ROWS, labels, backend=backend)
    # No longer ignored, so out of range.
    with pytest.raises(ValueError, match="ignore_index=3, got -100"):
        fastkd.distillation_loss(student, ROWS, LABELS, ignore_index=3, backend=backend)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: x.long(), "int64"),
        (lambda x: x.bool(), "bool"),
        (lambda x: x.to(torch.complex64), "complex64"),
        (lambda x: x.to(torch.float8_e5m2), "float8_e5m2"),
        (lambda x: x.cpu().numpy(), "ndarray"),
        (lambda x: x.tolist(), "list"),
        (lambda x: None, "NoneType"),
        (lambda x: 3.0, "float"),
        (lambda x: x.to_sparse(), "sparse"),
    ],
)
def test_what_is_no_floating_tensor(name, position, change, kind):
    call = sample(name)
    tensors = list(call.tensors)
    if position >= len(tensors):
        return
    tensors[position] = change(tensors[position])
    with pytest.raises(TypeError, match=kind):
        call(*tensors)


@pytest.mark.parametrize("name", LOSSES)
def test_devices_that_differ(name):
    call = sample(name)
    if len(call.tensors) == 1:
        return
    with pytest.raises(ValueError, match=rf"same device.* {HERE} and meta"):
        call(call.tensors[0], call.tensors[1].to("meta"), *call.tensors[2:])


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_keywords_and_positional_ones(name):
    call = sample(name)
    with pytest.raises(TypeError, match="tau"):
        call(tau=4.0)
    with pytest.raises(TypeError, match="positional"):
        getattr(fastkd, name)(*call.tensors, *call.keywords.values(), 1, 2, 3)


@pytest.mark.parametrize("name", LOSSES)
def test_too_much_by_position_names_the_keywords(name):
    function = getattr(fastkd, name)
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    count = len(parameters) - len(named)
    words = rf"{name}\(\) takes {count} positional .* {named[0]}=.*: {', '.join(named)}$"
    with pytest.raises(TypeError, match=words):
        function(*[X] * count, 4.0)


def test_a_temperature_by_position():
    with pytest.raises(TypeError, match=r"by name, as temperature=\.\.\."):
        fastkd.soft_target_loss(ROWS, ROWS, 4.0)
    with pytest.raises(TypeError, match=r"by name, as temperature=\.\.\."):
        fastkd.distillation_loss(ROWS, ROWS, LABELS, 4.0)


PIXELS = torch.randn(2, 5, 3, 4)


def test_labels_that_fit_dim_1_suggest_it():
    labels = torch.zeros(2, 3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"without dim 3, \(2, 5, 3\), got .*; dim=1 says"):
        fastkd.distillation_loss(PIXELS, PIXELS, labels)
    with pytest.raises(ValueError, match=r"without dim 3.*got \(2, 4, 3\)$"):
        fastkd.distillation_loss(PIXELS, PIXELS, labels.mT)

"""Numbers that a call takes: NumPy's, fractions, flags; and logits of a single class."""

import decimal
import fractions
import warnings

import numpy as np
import pytest
import torch
from agreement_features import features
from agreement_logits import logits

import fastkd
from fastkd.losses import logits as logit_checks

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CLASSES = 10
LABELS = [0, 9, 3, 5]
NUMBERS = [
    np.float32, np.float64, np.float16, np.int64, np.uint8, np.longdouble,
    fractions.Fraction, decimal.Decimal, int, float,
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
def test_real_numbers(backend, number):
    student, teacher = logits(4, CLASSES), logits(4, CLASSES)
    maps, labels = [features(3, 4, 5) for _ in range(2)], torch.tensor(LABELS)
    rows = [torch.randn(5, 3) for _ in range(2)]

    def calls(of):
        four, two, one = of(4), of(2), of(1)
        common = {"backend": backend}
        yield fastkd.soft_target_loss(student, teacher, temperature=four, **common)
        yield fastkd.distillation_loss(
            student, teacher, labels, temperature=four, soft_weight=two, hard_weight=four,
            label_smoothing=one, **common,
        )  # fmt: skip
        yield fastkd.attention_map(maps[0], p=four, eps=two, **common)
        yield fastkd.attention_transfer_loss(*maps, p=two, order=four, beta=two, eps=one, **common)
        yield fastkd.attention_transfer_loss(*maps, kind="sum", p=one, **common)
        yield fastkd.attention_transfer_loss(*maps, distance="mse", order=two, **common)
        yield fastkd.rkd_distance_loss(*rows, delta=two, **common)
        yield fastkd.rkd_angle_loss(*rows, delta=two, **common)

    for actual, expected in zip(calls(number), calls(float), strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.int8, np.array])
def test_integers(backend, integer):
    student, teacher = logits(2, 5, 3), logits(2, 5, 3)
    labels = torch.randint(0, 5, (2, 3))
    labels[0, 0] = -100
    for dim in (1, -2):
        assert torch.equal(
            fastkd.soft_target_loss(student, teacher, dim=integer(dim), backend=backend),
            fastkd.soft_target_loss(student, teacher, dim=dim, backend=backend),
        )
        ignored = {"ignore_index": integer(-100), "dim": integer(dim)}
        assert torch.equal(
            fastkd.distillation_loss(student, teacher, labels, backend=backend, **ignored),
            fastkd.distillation_loss(student, teacher, labels, dim=dim, backend=backend),
        )
        for function in (fastkd.attention_map, fastkd.attention_transfer_loss):
            sides = (student,) if function is fastkd.attention_map else (student, teacher)
            assert torch.equal(
                function(*sides, channel_dim=integer(dim), backend=backend),
                function(*sides, channel_dim=dim, backend=backend),
            )


@pytest.mark.parametrize("value", [True, False])
def test_flags(backend, value):
    student, teacher, labels = logits(4, 5), logits(4, 5), torch.zeros(4, dtype=torch.int64)
    flag = np.bool_(value)
    keywords = {"temperature": 3.0, "backend": backend}
    assert torch.equal(
        fastkd.soft_target_loss(student, teacher, scale_t2=flag, **keywords),
        fastkd.soft_target_loss(student, teacher, scale_t2=value, **keywords),
    )
    parts = fastkd.distillation_loss(student, teacher, labels, return_parts=flag, **keywords)
    assert isinstance(parts, tuple) is value
    assert torch.equal(
        fastkd.hint_loss(student, teacher, half=flag, backend=backend),
        fastkd.hint_loss(student, teacher, half=value, backend=backend),
    )
    maps = features(2, 3, 4)
    assert torch.equal(
        fastkd.attention_map(maps, normalize=flag, backend=backend),
        fastkd.attention_map(maps, normalize=value, backend=backend),
    )


@pytest.mark.parametrize("number", [int, float, fractions.Fraction])
def test_numbers_in_compiled_code(backend, number):
    """NumPy's become tensors there, whose values no graph may ask for."""
    sides = logits(4, CLASSES), logits(4, CLASSES)
    compiled = torch.compile(fastkd.soft_target_loss, fullgraph=True, backend="aot_eager")
    keywords = {"temperature": number(4), "backend": backend}
    torch.testing.assert_close(
        compiled(*sides, **keywords), fastkd.soft_target_loss(*sides, **keywords)
    )


def test_numpy_s_numbers_break_the_graph_and_no_more(backend):
    sides = logits(4, CLASSES), logits(4, CLASSES)
    keywords = {"temperature": np.float32(4), "dim": np.int64(1), "backend": backend}
    compiled = torch.compile(fastkd.soft_target_loss, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*sides, **keywords), fastkd.soft_target_loss(*sides, **keywords)
    )


@pytest.fixture
def fresh_warning():
    logit_checks._warn_once_of_one_class.cache_clear()
    yield
    logit_checks._warn_once_of_one_class.cache_clear()


@pytest.mark.parametrize("first", [0, 1])
def test_one_class_warns_once(fresh_warning, backend, first):
    one, labels = torch.randn(4, 1), torch.zeros(4, dtype=torch.int64)
    calls = [
        lambda: fastkd.soft_target_loss(one, one, backend=backend),
        lambda: fastkd.distillation_loss(one, [one, one], labels, backend=backend),
    ]
    with pytest.warns(UserWarning, match=r"torch.stack\(\[torch.zeros_like\(z\), z\], dim\)") as w:
        assert calls[first]().abs() < 1e-6
    # Triton's interpreter has warnings of its own.
    ours = [x for x in w if "single class" in str(x.message)]
    assert [(type(x.message), x.filename) for x in ours] == [(UserWarning, __file__)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*single class")
        for call in calls:
            assert call().abs() < 1e-6
        z = torch.randn(4)
        two = torch.stack([torch.zeros_like(z), z], 1)
        assert fastkd.soft_target_loss(two, two.flip(1), backend=backend) > 0


def test_one_class_in_compiled_code(fresh_warning, backend):
    one, labels = torch.randn(4, 1), torch.zeros(4, dtype=torch.int64)

    def losses(student):
        soft = fastkd.soft_target_loss(student, one, backend=backend)
        return soft + fastkd.distillation_loss(student, one, labels, backend=backend)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="single class"):
        assert compiled(one).abs() < 1e-6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*single class")
        assert losses(one).abs() < 1e-6
        torch._dynamo.reset()
        assert compiled(one).abs() < 1e-6


def test_a_warning_that_is_an_error_comes_again(fresh_warning):
    one = torch.randn(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="single class"):
                fastkd.soft_target_loss(one, one)

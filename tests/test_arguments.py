"""What a call takes: labels of any width, any iterable for a sequence, NumPy's numbers."""

import collections
import decimal
import fractions
import warnings

import numpy as np
import pytest
import torch
from agreement import features, logits
from conftest import DEVICE

import fastkd
from fastkd.losses import logits as logit_checks

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
CLASSES = 10
LABELS = [0, 9, 3, 5]


def distil(labels, backend, **keywords):
    torch.manual_seed(len(LABELS))
    student = logits(len(LABELS), CLASSES).requires_grad_()
    parts = fastkd.distillation_loss(
        student, logits(len(LABELS), CLASSES), labels, backend=backend, return_parts=True,
        **keywords,
    )  # fmt: skip
    return *parts, *torch.autograd.grad(parts.loss, student)


def assert_equal(actual, expected):
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
def test_labels_of_any_width(backend, dtype):
    labels = torch.tensor(LABELS)
    assert_equal(distil(labels.to(dtype), backend), distil(labels, backend))


@pytest.mark.parametrize("ignore_index", [-100, -1, 11, 127])
@pytest.mark.parametrize("dtype", SIGNED)
def test_an_ignored_label_of_signed_labels(backend, dtype, ignore_index):
    labels = torch.tensor([*LABELS[:3], ignore_index])
    keywords = {"ignore_index": ignore_index}
    assert_equal(distil(labels.to(dtype), backend, **keywords), distil(labels, backend, **keywords))


@pytest.mark.parametrize("ignore_index", [11, 255])
@pytest.mark.parametrize("dtype", UNSIGNED)
def test_an_ignored_label_of_unsigned_labels(backend, dtype, ignore_index):
    labels = torch.tensor([*LABELS[:3], ignore_index])
    keywords = {"ignore_index": ignore_index}
    assert_equal(distil(labels.to(dtype), backend, **keywords), distil(labels, backend, **keywords))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU cannot look at labels")
@pytest.mark.parametrize("ignore_index", [-1, -2, -100])
@pytest.mark.parametrize("dtype", UNSIGNED)
def test_no_unsigned_label_is_a_negative_one(backend, dtype, ignore_index):
    """Neither by its bits, nor after a conversion to int64."""
    label = torch.iinfo(dtype).max + 1 + ignore_index
    labels = torch.tensor([0, label, 3, 5], dtype=dtype)
    words = rf"labels must lie in \[0, 9\] or be ignore_index={ignore_index}, got {label}$"
    with pytest.raises(ValueError, match=words):
        distil(labels, backend, ignore_index=ignore_index)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU cannot look at labels")
@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
@pytest.mark.parametrize("label", [10, 127, -1])
def test_labels_out_of_range(backend, dtype, label):
    if label < 0 and dtype in UNSIGNED:
        return
    labels = torch.tensor(LABELS).to(dtype)
    labels[2] = label
    words = rf"labels must lie in \[0, 9\] or be ignore_index=-100, got {label}$"
    with pytest.raises(ValueError, match=words):
        distil(labels, backend)


@pytest.mark.parametrize("ignore_index", [-1, -2, -100])
def test_compiled_code_ignores_no_label_beyond_int64(kernel_backend, ignore_index):
    """It cannot raise before the kernel, which then sees a label that is no class."""
    labels = torch.tensor([0, 2**64 + ignore_index, 3, 5], dtype=torch.uint64)
    compiled = torch.compile(fastkd.distillation_loss, fullgraph=True, backend="aot_eager")
    sides = logits(4, CLASSES), logits(4, CLASSES)
    keywords = {"ignore_index": ignore_index, "backend": kernel_backend}
    if DEVICE == "cpu" and kernel_backend == "native":
        with pytest.raises(ValueError, match="labels must lie in"):
            compiled(*sides, labels, **keywords)
    else:
        assert compiled(*sides, labels, **keywords).isnan()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", SIGNED + UNSIGNED)
def test_labels_in_compiled_code(backend, dtype):
    labels = torch.tensor(LABELS).to(dtype)
    compiled = torch.compile(fastkd.distillation_loss, fullgraph=True, backend="aot_eager")
    sides = logits(4, CLASSES), logits(4, CLASSES)
    torch.testing.assert_close(
        compiled(*sides, labels, backend=backend),
        fastkd.distillation_loss(*sides, labels.long(), backend=backend),
    )


def test_int64_labels_are_not_copied():
    labels, rows = torch.tensor(LABELS), torch.randn(4, CLASSES)
    assert logit_checks.check_labels(rows, labels, -100, 1) is labels


class Sequence(collections.abc.Sequence):
    """As configuration libraries have them: a sequence that is no list."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Indexed:
    """What was iterable before there were iterators."""

    def __init__(self, values):
        self.values = list(values)

    def __getitem__(self, index):
        return self.values[index]


def dict_values(values):
    return dict(enumerate(values)).values()


ITERABLES = [
    list,
    tuple,
    dict_values,
    collections.deque,
    Sequence,
    Indexed,
    iter,
    lambda values: (value for value in values),
    lambda values: map(torch.Tensor.detach, values),
]


@pytest.mark.parametrize("iterable", [*ITERABLES, torch.nn.ParameterList])
def test_teachers(backend, iterable):
    student, teachers = logits(4, CLASSES), [logits(4, CLASSES) for _ in range(3)]
    labels = torch.tensor(LABELS)
    for weights in ([1, 2, 3], None):
        keywords = {"teacher_weights": weights, "backend": backend}
        for function, others in (
            (fastkd.soft_target_loss, ()),
            (fastkd.distillation_loss, (labels,)),
        ):
            assert torch.equal(
                function(student, iterable(teachers), *others, **keywords),
                function(student, teachers, *others, **keywords),
            )


@pytest.mark.parametrize(
    "weights",
    [
        *(kind([1.0, 3.0, 0.5]) for kind in (list, tuple, collections.deque, Sequence, Indexed)),
        {"a": 1, "b": 3, "c": 0.5}.values(),
        [np.float32(1), np.int64(3), fractions.Fraction(1, 2)],
        [decimal.Decimal(1), 3, decimal.Decimal("0.5")],
        *(np.array([1, 3, 0.5], dtype) for dtype in (np.float64, np.float32, np.float16)),
        np.array([2, 6, 1], np.int32),
    ],
    ids=lambda weights: type(weights).__name__,
)
def test_teacher_weights(backend, weights):
    student, teachers = logits(4, CLASSES), [logits(4, CLASSES) for _ in range(3)]
    losses = [
        loss(student, teachers)
        for loss in (
            fastkd.nn.SoftTargetLoss(teacher_weights=w, backend=backend)
            for w in (weights, [1, 3, 0.5])
        )
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("iterable", [*ITERABLES, torch.nn.ParameterList])
@pytest.mark.parametrize("name", ["attention_transfer_loss", "hint_loss"])
def test_pairs(backend, name, iterable):
    students, teachers = ([features(2, 3, 4), features(2, 5, 6)] for _ in range(2))
    function = getattr(fastkd, name)
    assert torch.equal(
        function(iterable(students), iterable(teachers), backend=backend),
        function(students, tuple(teachers), backend=backend),
    )
    one = function(iterable(students[:1]), teachers[:1], reduction="none", backend=backend)
    assert one.shape == (1, 2)


@pytest.mark.parametrize("iterable", [*ITERABLES, torch.nn.ParameterList])
def test_pairs_of_layers(backend, iterable):
    first, second, third, last = (features(2, c, 4, 4) for c in (3, 5, 3, 5))
    one = fastkd.fsp_loss((first, second), (third, last), backend=backend)
    two = fastkd.fsp_loss([(first, second)] * 2, [(third, last)] * 2, backend=backend)

    def call(*sides):
        return fastkd.fsp_loss(*sides, backend=backend)

    assert torch.equal(call(iterable([first, second]), iterable([third, last])), one)
    pairs = [iterable([first, second]) for _ in range(2)], [iterable([third, last])] * 2
    if iterable not in (iter, *ITERABLES[-2:]):
        assert torch.equal(call(*pairs), two)
    outer = list if iterable in (ITERABLES[-1], torch.nn.ParameterList) else iterable
    pairs = [[iterable(pair) for _ in range(2)] for pair in ((first, second), (third, last))]
    assert torch.equal(call(*map(outer, pairs)), two)


@pytest.mark.parametrize("iterable", ITERABLES)
def test_modules_take_them(iterable):
    students, teachers = ([features(2, 3, 4, 4), features(2, 3, 5, 5)] for _ in range(2))
    loss = fastkd.nn.HintLoss(3, 3)
    torch.testing.assert_close(
        loss(iterable(students), iterable(teachers)), loss(students, teachers)
    )
    loss.regressor.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(
        loss(iterable(students), iterable(teachers)), loss(students, teachers)
    )


def test_an_error_inside_of_an_iterable_is_its_own():
    def broken():
        yield torch.randn(4, CLASSES)
        raise TypeError("of the user's own")

    with pytest.raises(TypeError, match="of the user's own"):
        fastkd.soft_target_loss(torch.randn(4, CLASSES), broken())


@pytest.mark.thorough
@pytest.mark.parametrize("iterable", [list, tuple, collections.deque, Sequence, dict_values])
def test_sequences_in_compiled_code(backend, iterable):
    """Values of a dictionary only where it is looked into inside, which is dynamo's own limit."""
    sides = {"one": features(2, 3, 4, 4), "two": features(2, 5, 4, 4)}
    other = [features(2, 3, 4, 4), features(2, 5, 4, 4)]

    def losses(student, teacher):
        student, teacher = iterable(student.values()), iterable(teacher)
        return (
            fastkd.fsp_loss(student, teacher, backend=backend)
            + fastkd.hint_loss(student, teacher, backend=backend)
            + fastkd.attention_transfer_loss(student, teacher, backend=backend)
        )

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(sides, other), losses(sides, other))


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

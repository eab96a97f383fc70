"""Labels that a call takes: of any integer dtype, ignored ones, and none out of range."""

import pytest
import torch
from agreement_logits import logits
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

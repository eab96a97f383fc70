"""Losses on linear heads against the oracle: values, and the gradients of all their tensors."""

import pytest
import torch
from agreement import array
from agreement_logits import GIVEN
from conftest import DEVICE
from linear_heads import NUMBERS, check_loss, head, labels_and_mask, other

import fastkd
from fastkd.ops import linear_head_sides

ROWS, CLASSES = (3, 5), 37
DIVERGENCES = [
    {},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd", "beta": 0.3},
    {"divergence": "tvd"},
    {"divergence": "skew_kl", "beta": 0.1},
    {"divergence": "skew_reverse_kl", "beta": 0.1},
]
# A GPU rounds logits to float16; a CPU has no such product, and rounds gradients alone.
DTYPES = [("float64",) * 2, ("float32",) * 2]
if DEVICE == "cpu":
    DTYPES += [("float32", "float16"), ("float16",) * 2]
TEACHERS = ("head", "logits", "ensemble", *GIVEN)
every_divergence = pytest.mark.parametrize("keywords", DIVERGENCES, ids=str)
every_loss = pytest.mark.parametrize("name", ["soft_target_loss", "distillation_loss"])


def teacher_of(kind, rows=ROWS, classes=CLASSES, dtype=torch.float32):
    if kind == "head":
        return head(rows, classes, 6, dtype=dtype, bias=False, softcap=5.0)
    return other(kind, rows, classes, dtype=dtype)


def of_labels(name, rows=ROWS, classes=CLASSES):
    labels, mask = labels_and_mask(rows, classes)
    return {"labels": labels, "mask": mask} if name == "distillation_loss" else {"mask": mask}


@every_divergence
@pytest.mark.parametrize("kind", TEACHERS)
@every_loss
def test_teachers(backend, name, kind, keywords):
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of(kind)
    check_loss(
        name, student, teacher, backend, chunk_size=4, grad_output=1.7, temperature=2.0,
        **of_labels(name), **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@every_loss
def test_dtypes_and_reductions(backend, name, reduction, dtypes):
    first, second = (getattr(torch, dtype) for dtype in dtypes)
    student = head(ROWS, CLASSES, 8, dtype=first)
    teacher = head(ROWS, CLASSES, 24, dtype=second, scale=0.5)
    upstream = torch.rand(ROWS, dtype=torch.float64) if reduction == "none" else 2.3
    check_loss(
        name, student, teacher, backend, chunk_size=7, grad_output=upstream, reduction=reduction,
        temperature=3.0, **of_labels(name),
    )  # fmt: skip


@pytest.mark.parametrize("chunk_size", [1, 3, 14, 15, 16, None])
@pytest.mark.parametrize("masked", [False, True])
def test_chunk_sizes(backend, masked, chunk_size):
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of("head")
    mask = torch.rand(ROWS) < 0.5 if masked else None
    check_loss("soft_target_loss", student, teacher, backend, mask=mask, chunk_size=chunk_size)


@pytest.mark.parametrize("numbers", [{}, {"scale": -0.3}, {"softcap": 2.0}, NUMBERS], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_heads(backend, bias, numbers):
    student = head(ROWS, CLASSES, 8, bias=bias, **numbers)
    teacher = head(ROWS, CLASSES, 5, bias=not bias, **numbers)
    check_loss("soft_target_loss", student, teacher, backend, chunk_size=4, grad_output=-2.0)


@pytest.mark.parametrize("kind", ["logits", "ensemble"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
def test_a_student_of_logits(backend, kind, dtype, masked):
    """Its gradient comes chunk by chunk, too, where the teacher is a head."""
    mask = torch.rand(ROWS) < 0.5 if masked else None
    student, teacher = other("logits", ROWS, CLASSES, dtype=dtype), teacher_of("head", dtype=dtype)
    if kind == "ensemble":
        student, teacher = head(ROWS, CLASSES, 8, dtype=dtype), teacher_of(kind, dtype=dtype)
    keywords = {"mask": mask, "chunk_size": 4, "grad_output": 3.0}
    check_loss("soft_target_loss", student, teacher, backend, **keywords)


@every_loss
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_temperatures(backend, name, divergence):
    """Numbers, one for each side, and tensors that receive their gradients."""
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of("head")
    keywords = {**of_labels(name), "divergence": divergence, "chunk_size": 4}
    for heat in ((2.0, 0.5), (1 + torch.rand(ROWS), None), (1 + torch.rand(()), torch.tensor(2.0))):
        named = {"temperature": heat[0], "teacher_temperature": heat[1]}
        check_loss(name, student, teacher, backend, grad_output=1.3, **named, **keywords)


@every_loss
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_weights_of_rows(backend, name, reduction):
    """A row of weight 0 counts, and is not multiplied."""
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of("head")
    weight = torch.rand(ROWS).masked_fill(torch.rand(ROWS) < 0.3, 0)
    upstream = torch.rand(ROWS, dtype=torch.float64) if reduction == "none" else 0.7
    check_loss(
        name, student, teacher, backend, grad_output=upstream, row_weight=weight, chunk_size=4,
        reduction=reduction, **of_labels(name),
    )  # fmt: skip


@every_loss
def test_weights_of_rows_learn(backend, name):
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of("head")
    labels = of_labels(name)
    given = [labels.pop("labels")] if "labels" in labels else []

    def loss(weight, tensors):
        return getattr(fastkd, name)(
            student.of(tensors), teacher.of(teacher.tensors), *given, row_weight=weight,
            chunk_size=4, backend=backend, **labels,
        )  # fmt: skip

    weight = torch.rand(ROWS)
    leaves = [weight.requires_grad_(), *(x.requires_grad_() for x in student.tensors)]
    found = torch.autograd.grad(loss(weight, student.tensors), leaves)
    each = getattr(fastkd, name)(
        student.of(student.tensors), teacher.of(teacher.tensors), *given, reduction="none",
        chunk_size=4, backend=backend, **labels,
    )  # fmt: skip
    count = labels["mask"].sum()
    if given:
        count = (labels["mask"] & (given[0] != -100)).sum()
    torch.testing.assert_close(found[0], each.detach() / count)
    alone = torch.autograd.grad(loss(weight.detach(), student.tensors), student.tensors)
    torch.testing.assert_close(found[1:], alone)


@pytest.mark.parametrize("teacher_classes", [CLASSES, CLASSES + 6])
@every_loss
def test_padded_vocabularies(backend, name, teacher_classes):
    student = head(ROWS, CLASSES + 3, 8, **NUMBERS)
    teacher = head(ROWS, teacher_classes, 6)
    for side in (student, teacher):
        for x in side.tensors[1:]:
            x[CLASSES:] = torch.nan
    keywords = of_labels(name)
    leaves = [x.clone().requires_grad_() for x in student.tensors]
    given = [keywords.pop("labels")] if "labels" in keywords else []

    def loss(of_student, of_teacher, **others):
        return getattr(fastkd, name)(
            student.of(of_student), teacher.of(of_teacher), *given, backend=backend, chunk_size=4,
            **keywords, **others,
        )  # fmt: skip

    value = loss(leaves, teacher.tensors, num_classes=CLASSES)
    found = torch.autograd.grad(value, leaves)
    cut = [leaves[0], *(x[:CLASSES] for x in leaves[1:])]
    of_teacher = [teacher.tensors[0], *(x[:CLASSES] for x in teacher.tensors[1:])]
    expected = loss(cut, of_teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves))
    assert not any(x[CLASSES:].any() for x in found[1:])


def test_layouts(backend):
    """Hidden states whose rows lie apart, and weights that are transposed or cut from others."""
    student, teacher = head((5, 4), CLASSES, 8), head((5, 4), CLASSES, 6)
    logits = other("logits", (5, 4), CLASSES)
    student.tensors[0] = torch.randn(4, 16, 5)[:, ::2].permute(2, 0, 1)
    student.tensors[1] = torch.randn(8, CLASSES).T
    student.tensors[2] = torch.randn(2 * CLASSES)[::2]
    teacher.tensors[1] = torch.randn(CLASSES, 12)[:, ::2]
    logits.tensors[0] = 2 * torch.randn(4, CLASSES, 5).permute(2, 0, 1)
    for side in (teacher, logits):
        for mask in (None, torch.rand(5, 4) < 0.6):
            check_loss("soft_target_loss", student, side, backend, mask=mask, chunk_size=3)


def test_rows_of_one_and_none(backend):
    """A vector is one row; a batch may be empty, and all rows may be ignored."""
    check_loss("soft_target_loss", head((), 7, 4), head((), 7, 3), backend)
    labels = torch.full((4,), -100)
    for rows, given in (((0,), labels[:0]), ((2, 0), labels[:0].view(2, 0)), ((4,), labels)):
        student, teacher = head(rows, 7, 4), head(rows, 7, 3)
        student.tensors[0].fill_(torch.nan)
        leaves = [x.requires_grad_() for x in student.tensors]
        loss = fastkd.distillation_loss(
            student.of(leaves), teacher.of(teacher.tensors), given, backend=backend
        )
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


@every_loss
def test_rows_that_do_not_count_may_hold_anything(backend, name):
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of("head")
    keywords = of_labels(name)
    keywords["mask"][0, 0] = False
    counts = keywords["mask"]
    if "labels" in keywords:
        counts = counts & (keywords["labels"] != -100)
    for side in (student, teacher):
        side.tensors[0][~counts] = torch.tensor([torch.nan, torch.inf])[torch.randint(2, (1,))]
    check_loss(name, student, teacher, backend, chunk_size=4, grad_output=2.0, **keywords)
    assert array(student.tensors[0]).size


@pytest.mark.parametrize("kind", ["head", "logits"])
@every_loss
def test_all_rows_are_multiplied_in_a_capture(kernel_backend, name, kind, monkeypatch):
    """Those that do not count are cleared first, and may hold NaN as ever."""
    monkeypatch.setattr(linear_head_sides, "is_capturing", lambda device: True)
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of(kind)
    keywords = of_labels(name)
    student.tensors[0][~keywords["mask"]] = torch.nan
    heat = 1 + torch.rand(ROWS)
    for others in ({}, {"reduction": "none"}, {"temperature": heat}):
        check_loss(name, student, teacher, kernel_backend, chunk_size=4, **keywords, **others)


def test_parts(backend):
    student, teacher = head(ROWS, CLASSES, 8, **NUMBERS), teacher_of("head")
    labels, mask = labels_and_mask(ROWS, CLASSES)

    def parts(*sides, **keywords):
        return fastkd.distillation_loss(
            *sides, labels, mask=mask, return_parts=True, backend=backend, **keywords
        )

    sides = student.of(student.tensors), teacher.of(teacher.tensors)
    logits = [
        4.0 * (0.7 * (s.hidden @ s.weight.T + s.bias) / 4.0).tanh() if s is sides[0]
        else 5.0 * (s.hidden @ s.weight.T / 5.0).tanh()
        for s in sides
    ]  # fmt: skip
    for keywords in ({}, {"reduction": "none"}, {"normalizer": 3.0},
                     {"row_weight": torch.rand(ROWS)}):  # fmt: skip
        found = parts(*sides, chunk_size=4, **keywords)
        torch.testing.assert_close([*found], [*parts(*logits, **keywords)])
        assert [x.requires_grad for x in found] == [False] * 3

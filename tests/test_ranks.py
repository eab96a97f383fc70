"""Classes that are split over ranks, which are threads here: any backend, against the oracle."""

import math
import random

import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, edge_labels, logits, some_labels
from calls import Recorder
from divergences import DIVERGENCES, FEW, name_of
from probabilities import KINDS, sides
from split import LOSSES, Threads, cuts_of, whole
from temperatures import of_kind

import fastkd

every_divergence = pytest.mark.parametrize("keywords", [{}, *DIVERGENCES], ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)
SIZES = [1, 2, 3, 4]


@pytest.fixture(autouse=True)
def seeded():
    random.seed(torch.initial_seed())


@pytest.fixture
def split(monkeypatch):
    """`split(ranks, cuts)`: from then on the losses that are checked are those of ranks."""

    def split(size, cuts=None):
        for name in LOSSES:
            monkeypatch.setattr(fastkd, name, whole(name, Threads(size), cuts))

    return split


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@every_divergence
def test_divergences(backend, split, keywords, dtype, size):
    split(size)
    student, teacher = logits(9, 100, dtype=dtype), logits(9, 100, dtype=dtype)
    check_soft_target(student, teacher, backend, temperature=2.0, **keywords)
    upstream = torch.randn(9)
    check_soft_target(student, teacher, backend, upstream, reduction="none", **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32,) * 2])
@some_divergences
def test_rows_that_count(backend, split, keywords, dtypes, reduction):
    """Masked rows may hold NaN; weights learn."""
    split(3)
    student, teacher = (logits(9, 40, dtype=dtype) for dtype in dtypes)
    mask = torch.rand(9) < 0.6
    student[~mask], teacher[~mask] = math.nan, math.inf
    upstream = torch.randn(9) if reduction == "none" else 3.7
    keywords = {"mask": mask, "reduction": reduction, "temperature": 3.0, **keywords}
    check_soft_target(student, teacher, backend, upstream, **keywords)
    weight = torch.rand(9)
    weight[0] = 0
    check_soft_target(student, teacher, backend, upstream, row_weight=weight, **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_labels(backend, split, keywords, dtype, smoothing):
    """Also at the borders of shards."""
    cuts = [5, 0, 30, 5]
    split(4, cuts)
    student, teacher = logits(9, 40, dtype=dtype), logits(9, 40)
    labels = torch.tensor([0, 4, 5, -100, 34, 35, 39, 20, 6])
    keywords = {"label_smoothing": smoothing, **keywords}
    check_distillation(student, teacher, labels, backend, **keywords)
    keywords["temperature"], keywords["reduction"] = 1.0, "none"
    check_distillation(student, teacher, labels, backend, torch.randn(9), **keywords)


@pytest.mark.parametrize("kind", ["scalar", "rows", "rows and number"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@some_divergences
def test_temperatures_that_learn(backend, split, keywords, dtype, kind):
    split(3)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    keywords = {**of_kind(kind, (9, 40), precise), **keywords}
    student, teacher = logits(9, 40, dtype=dtype), logits(9, 40, dtype=dtype)
    check_soft_target(student, teacher, backend, **keywords)
    labels = some_labels(9, classes=40)
    check_distillation(student, teacher, labels, backend, label_smoothing=0.1, **keywords)


@pytest.mark.parametrize("classes", [1, 2, 17, 1025, 4200])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_class_counts_and_dims(backend, split, keywords, dtype, classes):
    split(3)
    student, teacher = logits(6, classes, dtype=dtype), logits(6, classes, dtype=dtype)
    check_soft_target(student, teacher, backend, **keywords)
    columns = student.t().contiguous(), teacher.t().contiguous()
    check_soft_target(*columns, backend, 3.0, dim=0, **keywords)
    images = [x.reshape(2, 3, classes).movedim(-1, 1) for x in (student, teacher)]
    labels = edge_labels(6, classes).view(2, 3)
    check_distillation(*images, labels, backend, dim=1, reduction="none", **keywords)


@pytest.mark.parametrize("stored", [(40, 40), (40, 48), (56, 41)])
@some_divergences
def test_padded_classes(backend, split, keywords, stored):
    """Which a shard may have some of, or nothing else."""
    for size in SIZES[1:]:
        split(size)
        student, teacher = logits(5, stored[0]), logits(5, stored[1])
        student[:, 33:], teacher[:, 33:] = math.nan, math.inf
        check_soft_target(student, teacher, backend, num_classes=33, **keywords)
        labels = torch.tensor([0, 32, 16, -100, 31])
        keywords = {**keywords, "label_smoothing": 0.1}
        check_distillation(student, teacher, labels, backend, num_classes=33, **keywords)
        keywords.pop("label_smoothing")


@pytest.mark.parametrize("dtype", DTYPES)
@every_divergence
def test_excluded_classes(backend, split, keywords, dtype):
    """Some, and all that a rank has, of one side and of both."""
    split(3, [10, 20, 10])
    student, teacher = logits(6, 40, dtype=dtype), logits(6, 40, dtype=dtype)
    student[0, ::3] = teacher[0, ::3] = -math.inf
    teacher[1, :10] = -math.inf
    student[2, :10] = -math.inf  # infinite for a KL divergence of one direction
    student[3, 10:30] = teacher[3, 10:30] = -math.inf
    student[4, :30] = teacher[4, :30] = -math.inf
    keywords = {**keywords, "reduction": "none"}
    check_soft_target(student, teacher, backend, torch.randn(6), teachers=False, **keywords)


@every_divergence
def test_peaked_rows(backend, split, keywords):
    """One class has nearly all of the mass, on one rank or on both."""
    split(2)
    for scale in (1e2, 1e4):
        student, teacher = logits(9, 64, scale=scale), logits(9, 64, scale=scale)
        teacher[:4] = student[:4] + 1e-2 * torch.randn(4, 64)
        check_soft_target(student, teacher, backend, teachers=False, **keywords)


@some_divergences
def test_infinite_rows(backend, split, keywords):
    """NaN on one rank is NaN on all."""
    split(3, [10, 20, 10])
    student, teacher = logits(6, 40), logits(6, 40)
    student[0, 3], teacher[1, 15] = math.nan, math.nan
    student[2, 39], teacher[3, 0] = math.inf, math.inf
    student[4] = -math.inf
    student.requires_grad_()
    keywords = {**keywords, "reduction": "none", "backend": backend}
    loss = fastkd.soft_target_loss(student, teacher, **keywords)
    assert loss[:5].isnan().all()
    assert loss[5].isfinite()
    (gradient,) = torch.autograd.grad(loss.nan_to_num().sum(), student)
    assert gradient[5].isfinite().all()


@pytest.mark.parametrize("teacher_is", KINDS)
@every_divergence
def test_probabilities(split, keywords, teacher_is):
    """Whose kernels refuse; so does an ensemble's."""
    split(3)
    student, teacher = sides(teacher_is, 9, 40, torch.float32, torch.float32)
    keywords = {**keywords, "teacher_is": teacher_is}
    check_soft_target(student, teacher, "reference", temperature=2.0, **keywords)
    labels = some_labels(9, classes=40)
    check_distillation(student, teacher, labels, "reference", label_smoothing=0.1, **keywords)


@every_divergence
def test_several_teachers(split, keywords):
    split(3)
    student, teachers = logits(9, 40), [logits(9, 40), logits(9, 40, dtype=torch.bfloat16)]
    keywords = {**keywords, "teacher_weights": [1, 3], "temperature": 2.0}
    check_soft_target(student, teachers, "reference", **keywords)
    check_distillation(student, teachers, some_labels(9, classes=40), "reference", **keywords)


def test_kernels_take_one_teacher_of_logits(kernel_backend):
    student, p = logits(3, 10), fastkd.Probabilities(logits(3, 10).softmax(-1))
    for teacher in (p, [student, student]):
        with pytest.raises(
            fastkd.BackendUnavailableError, match="logits of a student and of one teacher"
        ):
            whole("soft_target_loss", Threads(2))(student, teacher, backend=kernel_backend)


@pytest.mark.parametrize("shape", [(0, 10), (0, 3, 10)])
def test_no_rows(backend, split, shape):
    split(2)
    check_soft_target(logits(*shape), logits(*shape), backend)


def test_every_row_ignored(backend, split):
    split(2)
    labels = torch.full((3,), -100)
    check_distillation(logits(3, 10), logits(3, 10), labels, backend, label_smoothing=0.1)


@some_divergences
def test_parts(backend, split, keywords):
    student, teacher = logits(9, 40).requires_grad_(), logits(9, 40)
    labels = some_labels(9, classes=40)
    keywords = {**keywords, "return_parts": True, "backend": backend, "normalizer": 7}
    expected = fastkd.distillation_loss(student, teacher, labels, **keywords)
    split(3)
    found = fastkd.distillation_loss(student, teacher, labels, **keywords)
    torch.testing.assert_close(tuple(found), tuple(expected))
    assert not found.hard.requires_grad
    assert not found.soft.requires_grad


@some_divergences
def test_a_weight_of_0_switches_its_term_off(backend, split, keywords):
    split(2)
    student, teacher = logits(4, 10), logits(4, 10)
    labels = torch.tensor([1, 2, 3, 4])
    keywords = {**keywords, "backend": backend}
    teacher[0, 0] = math.nan
    loss = fastkd.distillation_loss(student, teacher, labels, soft_weight=0.0, **keywords)
    hard = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(loss, 0.1 * hard)


@some_divergences
def test_no_gradient_is_no_other_loss(backend, keywords):
    student, teacher, cuts = logits(9, 40), logits(9, 40), [7, 33]
    loss = whole("soft_target_loss", Threads(2), cuts)
    with_gradient = loss(student.requires_grad_(), teacher, backend=backend, **keywords)
    with torch.no_grad():
        assert torch.equal(loss(student, teacher, backend=backend, **keywords), with_gradient)


@every_divergence
def test_repeats_are_equal(backend, keywords):
    """To the last bit, on every rank, which `whole` looks at."""
    student, teacher = logits(9, 400).requires_grad_(), logits(9, 400).requires_grad_()
    loss = whole("soft_target_loss", Threads(4), cuts_of(400, 4))
    found = []
    for _ in range(5):
        value = loss(student, teacher, backend=backend, **keywords)
        found.append((value, *torch.autograd.grad(value, (student, teacher))))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@some_divergences
def test_a_retained_graph(backend, keywords):
    """Any grad_output, more than once."""
    student, teacher = logits(9, 40).requires_grad_(), logits(9, 40).requires_grad_()
    value = whole("soft_target_loss", Threads(2), [13, 27])(
        student, teacher, backend=backend, **keywords
    )
    first = torch.autograd.grad(value, (student, teacher), retain_graph=True)
    second = torch.autograd.grad(value, (student, teacher), torch.tensor(2.0))
    torch.testing.assert_close(second, tuple(2 * g for g in first))


def shards(size, *tensors):
    return lambda rank: [x.chunk(size, -1)[rank] for x in tensors]


def test_derivatives_of_the_reference():
    """Second ones, too: every rank has those of the loss."""
    student, teacher = logits(3, 6, dtype=torch.float64), logits(3, 6, dtype=torch.float64)
    heat = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def second(s, t, heat, **group):
        loss = fastkd.soft_target_loss(s, t, temperature=heat, backend="reference", **group)
        first = torch.autograd.grad(loss, (s, t, heat), create_graph=True)
        return first, loss + sum(g.square().sum() for g in first[:2])

    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    expected_first, total = second(*leaves, heat)
    expected = torch.autograd.grad(total, (*leaves, heat))

    def on_rank(rank, group):
        s, t = [x.clone().requires_grad_() for x in shards(2, student, teacher)(rank)]
        own = heat.detach().clone().requires_grad_()
        first, total = second(s, t, own, group=group)
        return first, torch.autograd.grad(total, (s, t, own))

    found = Threads(2).run(on_rank)
    for order, wanted in enumerate((expected_first, expected)):
        for i in range(2):
            torch.testing.assert_close(torch.cat([x[order][i] for x in found], -1), wanted[i])
    for first, _ in found:
        torch.testing.assert_close(first[2], expected_first[2])


def test_a_second_derivative_of_kernels_raises(kernel_backend):
    def on_rank(rank, group):
        s, t = [x.clone().requires_grad_() for x in shards(2, student, teacher)(rank)]
        loss = fastkd.soft_target_loss(s, t, group=group, backend=kernel_backend)
        (first,) = torch.autograd.grad(loss, s, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated only once"):
            first.sum().backward()

    student, teacher = logits(3, 6), logits(3, 6)
    Threads(2).run(on_rank)


STUDENT, TEACHER = torch.zeros(3, 6), torch.zeros(3, 6)
DIFFERING = [
    (lambda rank: {"temperature": 1.0 + rank}, r"got temperatures \(\d.0, \d.0, 0\) on rank"),
    (lambda rank: {"divergence": ["jsd", "tvd"][rank]}, "got divergence"),
    (lambda rank: {"reduction": ["sum", "none"][rank]}, "got reduction"),
    (lambda rank: {"num_classes": 6 + rank}, r"got num_classes \[6, 7\]"),
    (lambda rank: {"num_classes": 13}, r"num_classes must lie in \[1, 12\], .* 12 and 12 classes"),
    (lambda rank: {"row_weight": [None, torch.ones(3)][rank]}, "got weights"),
    (lambda rank: {"student_logits": STUDENT[: 3 - rank]}, "must have the same shape|an error"),
    (lambda rank: {"student_logits": STUDENT.double() if rank else STUDENT}, "got dtypes"),
    (lambda rank: {"student_logits": STUDENT[:, : 6 - rank]}, "must have the same shape|an error"),
    (lambda rank: {"student_logits": STUDENT.clone().requires_grad_(rank > 0)}, "got learning"),
    (lambda rank: {"temperature": -1.0 if rank else 1.0}, "must be a finite number > 0|rank 1 .*"),
    (lambda rank: {"teacher_logits": 5 if rank else TEACHER}, "must be a tensor|rank 1 of the"),
    (lambda rank: {"mask": torch.ones(2 + rank) > 0}, "mask must have|rank 0 of the"),
    (lambda rank: {"inplace": True}, "inplace=True does not go with a group"),
    (lambda rank: {"backend": "reference" if rank else None}, "got backend"),
]


@pytest.mark.parametrize(("keywords", "message"), DIFFERING, ids=range(len(DIFFERING)))
def test_every_rank_raises(keywords, message):
    def on_rank(rank, group):
        call = {"student_logits": STUDENT, "teacher_logits": TEACHER, **keywords(rank)}
        with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
            fastkd.soft_target_loss(call.pop("student_logits"), **call, group=group)

    Threads(2).run(on_rank)


@pytest.mark.parametrize(
    ("student", "teacher"), [([3, 9], [4, 9]), ([6, 6], [5, 7]), ([6, 6], [7, 6])]
)
def test_shards_that_do_not_fit(student, teacher):
    """They may differ where no class exists, and only there."""

    def on_rank(rank, group):
        s, t = torch.zeros(3, student[rank]), torch.zeros(3, teacher[rank])
        with pytest.raises(ValueError, match=r"same classes of student and teacher, got shards"):
            fastkd.soft_target_loss(s, t, num_classes=12, group=group)

    Threads(2).run(on_rank)


@pytest.mark.parametrize("label", [-1, 12])
def test_a_label_that_is_no_class(backend, label):
    """Of all ranks' classes; the error has these."""
    labels = torch.tensor([0, label, 11])

    def on_rank(rank, group):
        call = STUDENT, TEACHER, labels
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 11\] .* got {label}"):
            fastkd.distillation_loss(*call, group=group, backend=backend)

    Threads(2).run(on_rank)


@pytest.mark.parametrize("keywords", [{}, {"divergence": "jsd"}], ids=name_of)
def test_operators_pass_opcheck(kernel_backend, keywords):
    """And have fakes."""
    calls = []

    def on_rank(rank, group):
        s, t = (x.clone().requires_grad_() for x in (student, teacher))
        with Recorder() as recorder:
            fastkd.distillation_loss(
                s, t, labels, group=group, backend=kernel_backend, num_classes=7, **keywords
            ).backward()
        calls.extend(recorder.calls)

    student, teacher, labels = logits(4, 10), logits(4, 10), torch.tensor([0, 6, -100, 3])
    Threads(1).run(on_rank)
    names = [str(function) for function, _ in calls]
    assert ("fastkd.soft_target_terms.default" in names) == bool(keywords)
    for function, args in calls:
        torch.library.opcheck(function, args)


def test_transforms_are_refused():
    def on_rank(rank, group):
        with pytest.raises(NotImplementedError, match=r"no torch\.func transform"):
            torch.func.grad(lambda s: fastkd.soft_target_loss(s, TEACHER, group=group))(STUDENT)

    Threads(2).run(on_rank)


@pytest.mark.parametrize("group", [3, "world", object()])
def test_what_is_no_group(group):
    with pytest.raises(TypeError, match=r"must be a torch\.distributed\.ProcessGroup .*, got "):
        fastkd.soft_target_loss(STUDENT, TEACHER, group=group)


def test_modules(backend):
    def on_rank(rank, group):
        s, t = shards(2, student, teacher)(rank)
        keywords = {"group": group, "backend": backend}
        soft = fastkd.nn.SoftTargetLoss(**keywords)
        assert soft.group is group
        soft.group = None
        with_all = soft(student, teacher)
        torch.testing.assert_close(with_all, expected[0])
        soft.group = group
        return soft(s, t), fastkd.nn.DistillationLoss(**keywords)(s, t, labels)

    student, teacher, labels = logits(4, 10), logits(4, 10), torch.tensor([0, 9, 4, 5])
    expected = (
        fastkd.soft_target_loss(student, teacher),
        fastkd.distillation_loss(student, teacher, labels),
    )
    for found in Threads(2).run(on_rank):
        torch.testing.assert_close(found, expected)

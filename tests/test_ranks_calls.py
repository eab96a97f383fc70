"""Calls over ranks, which are threads here: gradients, errors, compiled code, modules."""

import pytest
import torch
from agreement_logits import logits
from calls import Recorder
from divergences import DIVERGENCES, FEW, name_of
from split import Threads, cuts_of, whole

import fastkd

every_divergence = pytest.mark.parametrize("keywords", [{}, *DIVERGENCES], ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)


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

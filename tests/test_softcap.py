"""Kernels on capped logits: their gradients are those of what the logits were before.

A side is drawn capped, and what it was before is computed from it in float64, so that no rounding
of the logits counts. There autograd goes through the tanh.
"""

import functools
import importlib

import layouts
import pytest
import torch
from agreement import DTYPES, array, assert_gradient, assert_loss, leaf
from agreement_logits import some_labels
from divergences import FEW, name_of, sides
from temperatures import KINDS, NAMES, of_kind
from top_k import PAIRS, TRUE, split

import fastkd
from fastkd.parameters import SoftTarget

ALL = [{}, *FEW]
every_divergence = pytest.mark.parametrize("keywords", ALL, ids=name_of)
every_loss = pytest.mark.parametrize("name", ["soft_target_loss", "distillation_loss"])


def caps_of(*tensors):
    """A little above the largest logit of each side: its slope is small, and has digits."""
    return [(1.05 + 0.05 * i) * x.double().abs().max().item() for i, x in enumerate(tensors)]


def run(call, tensors, wanted, upstream):
    leaves = [leaf(x, i < wanted) for i, x in enumerate(tensors)]
    value = call(*leaves)
    gradients = torch.autograd.grad(value, leaves[:wanted], torch.full_like(value, upstream))
    return value, gradients


def capped(monkeypatch, caps):
    """The losses, which have no keyword for a softcap of logits, take the sides for capped ones."""
    of_sides = dict(zip(("softcap", "teacher_softcap"), caps, strict=False))

    def with_caps(**fields):
        return SoftTarget(**fields | of_sides)

    for module in ("soft_target", "distillation"):
        monkeypatch.setattr(
            importlib.import_module(f"fastkd.losses.{module}"), "SoftTarget", with_caps
        )


def check_capped(
    monkeypatch, call, tensors, caps, backend, *, each=None, upstream=1.7, **keywords
):  # fmt: skip
    """The first tensors are capped at `caps`, of which 0 is none. `call` takes all, and a backend.

    The student alone learns, and then the first `each` tensors, or all.
    """
    precise = [x.double() if x.is_floating_point() else x for x in tensors]
    before = [cap * (x / cap).atanh() if cap else x for x, cap in zip(precise, caps, strict=False)]

    def exact(*found):
        sides = zip(found, caps, strict=False)
        again = [cap * (x / cap).tanh() if cap else x for x, cap in sides]
        return call(*again, *found[len(caps) :], backend="reference", **keywords)

    for wanted in {1, len(tensors) if each is None else each}:
        expected = run(exact, [*before, *precise[len(caps) :]], wanted, upstream)
        with monkeypatch.context() as patch:
            capped(patch, caps)
            of_call = functools.partial(call, backend=backend, **keywords)
            value, gradients = run(of_call, tensors, wanted, upstream)
        size = 20 * max(value.numel(), 1)
        assert_loss(value, array(expected[0]), tensors, size)
        for found, wished in zip(gradients, expected[1], strict=True):
            assert_gradient(found, array(wished))


def call_of(name, labels, names=()):
    """The loss of two sides, and of temperatures that are tensors."""

    def call(student, teacher, *heat, **keywords):
        given = [labels] if name == "distillation_loss" else []
        named = dict(zip(names, heat, strict=True))
        return getattr(fastkd, name)(student, teacher, *given, **named, **keywords)

    return call


def smoothing(name):
    return {"label_smoothing": 0.1} if name == "distillation_loss" else {}


@pytest.mark.parametrize("dtypes", [(x, x) for x in DTYPES] + [(torch.bfloat16, torch.float32)])
@every_divergence
@every_loss
def test_divergences(kernel_backend, monkeypatch, name, keywords, dtypes):
    tensors = sides(6, 37, *dtypes, temperature=2.0)
    call = call_of(name, some_labels(6, classes=37))
    check_capped(
        monkeypatch, call, tensors, caps_of(*tensors), kernel_backend,
        temperature=2.0, **smoothing(name), **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("which", [0, 1])
@every_loss
def test_one_side(kernel_backend, monkeypatch, name, which):
    """The other one's softcap is 0, and its gradient that of its logits."""
    tensors = sides(6, 37, torch.float32, torch.float32)
    call, caps = call_of(name, some_labels(6, classes=37)), caps_of(*tensors)
    caps[which] = 0.0
    check_capped(monkeypatch, call, tensors, caps, kernel_backend)


@pytest.mark.parametrize("kind", KINDS)
@every_divergence
@every_loss
def test_temperatures(kernel_backend, monkeypatch, name, keywords, kind):
    """Those that are tensors get the gradient that they have without a softcap."""
    heat = of_kind(kind, (6, 37))
    numbers = {n: heat[n] for n in NAMES & {*heat} if not torch.is_tensor(heat[n])}
    names = [n for n in heat if torch.is_tensor(heat[n])]
    tensors = sides(6, 37, torch.float32, torch.float32, **heat)
    call = call_of(name, some_labels(6, classes=37), names)
    check_capped(
        monkeypatch, call, [*tensors, *(heat[n] for n in names)], caps_of(*tensors),
        kernel_backend, **numbers, **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"divergence": "jsd"}], ids=name_of)
def test_layouts(kernel_backend, monkeypatch, keywords, stepped, dim):
    tensors = sides(10, 37, torch.float32, torch.float32)
    tensors = [x.view(2, 5, 37).movedim(-1, dim).contiguous() for x in tensors]
    if stepped:
        tensors = [layouts.stepped(x) for x in tensors]
    call = call_of("soft_target_loss", None)
    check_capped(monkeypatch, call, tensors, caps_of(*tensors), kernel_backend, dim=dim, **keywords)


@pytest.mark.parametrize("classes", [2, 9, 130, 300, 4099, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_loss
def test_sizes(kernel_backend, monkeypatch, name, dtype, classes):
    tensors = sides(3, classes, dtype, dtype)
    labels = torch.tensor([classes - 1, -100, 0])
    check_capped(monkeypatch, call_of(name, labels), tensors, caps_of(*tensors), kernel_backend)


@pytest.mark.parametrize("keywords", [{}, *FEW[:3]], ids=name_of)
@pytest.mark.parametrize("kind", ["ensemble", "probabilities"])
@pytest.mark.parametrize("classes", [37, 5001])
def test_other_teachers(kernel_backend, monkeypatch, classes, kind, keywords):
    """These are not capped, and have gradients from torch's own operations."""
    student, *teachers = sides(4, classes, *[torch.float32] * 3)
    if kind == "probabilities":
        teachers = [teachers[0].softmax(-1)]

    def call(student, *others, **keywords):
        given = list(others) if kind == "ensemble" else fastkd.Probabilities(*others)
        return fastkd.soft_target_loss(student, given, **keywords)

    caps = caps_of(student)
    check_capped(monkeypatch, call, [student, *teachers], caps, kernel_backend, **keywords)


@every_loss
@pytest.mark.parametrize(
    "keywords",
    [
        {"reduction": "none"},
        {"mask": torch.tensor([True, False, True, True])},
        {"row_weight": torch.tensor([0.5, 2.0, 0.0, 1.0])},
        {"num_classes": 30},
        {"normalizer": 3.0, "divergence": "reverse_kl"},
    ],
    ids=lambda x: next(iter(x)),
)
def test_keywords(kernel_backend, monkeypatch, name, keywords):
    tensors = sides(4, 37, torch.float32, torch.float32)
    labels = some_labels(4, classes=30)
    for x in tensors:
        x[:, 30:] = 0.1  # what does not exist, as the case may be
    call = call_of(name, labels)
    check_capped(monkeypatch, call, tensors, caps_of(*tensors), kernel_backend, **keywords)


@every_loss
@pytest.mark.parametrize("classes", [37, 5001])
@pytest.mark.parametrize("keywords", [{}, {"divergence": "skew_kl"}], ids=name_of)
def test_in_place(kernel_backend, monkeypatch, name, classes, keywords):
    """Each logit is read once more before its gradient takes its place."""
    tensors = sides(4, classes, torch.float32, torch.float32)
    call = call_of(name, some_labels(4, classes=classes))

    def in_place(student, *others, backend, **keywords):
        if backend == "reference":
            return call(student, *others, backend=backend, **keywords)
        return call(student.clone(), *others, backend=backend, inplace=True, **keywords)

    check_capped(
        monkeypatch, in_place, tensors, caps_of(*tensors), kernel_backend, each=1, **keywords
    )


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("keywords", PAIRS, ids=name_of)
@pytest.mark.parametrize("classes", [37, 5001])
def test_top_k(kernel_backend, monkeypatch, classes, keywords, labelled):
    student, teacher = sides(4, classes, torch.float32, torch.float32)
    # The likeliest ones: of a bucket that has nearly all classes a float32 gradient has few digits.
    values, indices = teacher.topk(6)
    lse = teacher.logsumexp(-1) if keywords["tail"] in TRUE else None
    of_teacher, others = split(keywords)
    labels = some_labels(4, classes=classes)
    heat = 1 + torch.rand(4)

    def call(student, values, temperature, *of_lse, **of_call):
        lse = of_lse[0] if of_lse else None
        teacher = fastkd.TopK(values, indices, lse=lse, **of_teacher)
        # The teacher's own is 1, at which the lse is.
        of_call |= {"temperature": temperature, "teacher_temperature": 1.0}
        if labelled:
            return fastkd.distillation_loss(student, teacher, labels, **of_call)
        return fastkd.soft_target_loss(student, teacher, **of_call)

    tensors = [student, values, heat, *([] if lse is None else [lse])]
    check_capped(monkeypatch, call, tensors, caps_of(student), kernel_backend, **others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beside_the_softcap(kernel_backend, monkeypatch, dtype):
    """The slope has the digits that the logit has there: a square would lose them."""
    student, teacher = sides(3, 64, dtype, dtype)
    cap = 11.0
    student[:, :40] = cap * (1 - torch.logspace(-6, -1, 40, dtype=dtype))
    call = functools.partial(fastkd.soft_target_loss, backend=kernel_backend, reduction="sum")
    plain = run(call, [student, teacher], 1, 1.0)[1][0]
    capped(monkeypatch, [cap])
    found = run(call, [student, teacher], 1, 1.0)[1][0]
    exact = student.double() / cap
    slope = (1 - exact) * (1 + exact)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found.double(), plain.double() * slope, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [37, 5001])
def test_at_the_softcap_and_beyond(kernel_backend, monkeypatch, classes, dtype):
    """What was rounded to it, or beyond it, has a slope of 0."""
    student, teacher = sides(3, classes, dtype, dtype)
    cap = 12.03
    student = student.clamp(-11, 11)
    student[:, ::3] = torch.tensor(cap, dtype=dtype)
    student[:, 1::3] = torch.tensor(-12.1, dtype=dtype)
    capped(monkeypatch, [cap])
    for keywords in ({}, {"divergence": "jsd"}):
        call = functools.partial(fastkd.soft_target_loss, backend=kernel_backend, **keywords)
        (gradient,) = run(call, [student, teacher], 1, 1.0)[1]
        assert gradient[:, 2::3].all()
        assert (gradient[:, 1::3] == 0).all()
        slope = max(1 - (student[0, 0].item() / cap) ** 2, 0)
        assert (gradient[:, ::3].abs() <= slope + 1e-6).all()


def test_what_is_switched_off_shows_no_nan(kernel_backend, monkeypatch):
    student, teacher = sides(3, 37, torch.float32, torch.float32)
    student[1] = torch.nan
    capped(monkeypatch, [30.0, 30.0])
    call = functools.partial(
        fastkd.soft_target_loss, backend=kernel_backend, mask=torch.tensor([True, False, True])
    )
    for gradient in run(call, [student, teacher], 2, 1.0)[1]:
        assert (gradient[1] == 0).all()
        assert gradient[::2].isfinite().all()

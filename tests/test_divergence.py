"""The divergences other than forward KL, against the oracle."""

import math

import pytest
import torch
from agreement import DTYPES
from agreement_logits import check_distillation, check_soft_target, logits, some_labels
from divergences import BOUNDED, DIVERGENCES, FEW, name_of, sides
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck

import fastkd

every_divergence = pytest.mark.parametrize("keywords", DIVERGENCES, ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", FEW, ids=name_of)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES)
@every_divergence
def test_temperatures(backend, keywords, dtype, temperature):
    student, teacher = sides(9, 100, dtype, dtype, temperature=temperature)
    check_soft_target(student, teacher, backend, temperature=temperature, **keywords)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_reductions(backend, keywords, dtype, reduction):
    student, teacher = sides(9, 100, dtype, dtype, temperature=2.0)
    upstream = torch.randn(9) if reduction == "none" else 3.7
    check_soft_target(
        student, teacher, backend, upstream, temperature=2.0, reduction=reduction, **keywords
    )
    check_soft_target(student, teacher, backend, scale_t2=False, temperature=2.0, **keywords)


@pytest.mark.parametrize("classes", [2, 17, 256, 1000, 1025, 2500, 4200])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_class_counts_and_dims(backend, keywords, dtype, classes):
    student, teacher = sides(9, classes, dtype, dtype)
    check_soft_target(student, teacher, backend, **keywords)
    columns = student.t().contiguous(), teacher.t().contiguous()
    check_soft_target(*columns, backend, dim=0, **keywords)
    check_soft_target(*columns, backend, torch.randn(9), dim=0, reduction="none", **keywords)
    check_soft_target(columns[0].t(), teacher, backend, 3.0, **keywords)


@every_divergence
def test_peaked_logits_of_a_language_model(backend, keywords):
    student, teacher = sides(2, 151936, torch.bfloat16, torch.bfloat16, scale=2.0)
    student[0, 7] += 30
    teacher[1, -3] += 25
    teacher[1, 40000] += 25
    check_soft_target(student, teacher, backend, teachers=False, **keywords)
    check_soft_target(student, teacher, backend, 1024.0, teachers=False, **keywords)


@pytest.mark.parametrize("dtypes", [(0, 2), (3, 0), (1, 0), (2, 3)], ids=str)
@some_divergences
def test_mixed_dtypes(backend, keywords, dtypes):
    student, teacher = sides(9, 65, *(DTYPES[i] for i in dtypes))
    check_soft_target(student, teacher, backend, temperature=2.0, **keywords)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@some_divergences
def test_with_labels(backend, keywords, dtype, classes, temperature, smoothing):
    student, teacher = sides(9, classes, dtype, dtype, temperature=temperature)
    labels = some_labels(9, classes=classes)
    keywords = {**keywords, "temperature": temperature, "label_smoothing": smoothing}
    check_distillation(student, teacher, labels, backend, 3.0, **keywords)
    columns = student.t().contiguous(), teacher.t().contiguous()
    check_distillation(*columns, labels, backend, dim=0, reduction="none", **keywords)


@some_divergences
def test_parts(backend, keywords):
    student, teacher = sides(9, 40, torch.float32, torch.float32, temperature=2.0)
    keywords = {**keywords, "temperature": 2.0, "backend": backend}
    labels = torch.arange(9)
    parts = fastkd.distillation_loss(student, teacher, labels, return_parts=True, **keywords)
    torch.testing.assert_close(parts.soft, fastkd.soft_target_loss(student, teacher, **keywords))
    torch.testing.assert_close(parts.loss, 0.1 * parts.hard + 0.9 * parts.soft)


@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
@some_divergences
def test_several_teachers(backend, keywords, dtype, classes):
    student, *teachers = sides(9, classes, *[dtype] * 4)
    check_soft_target(student, teachers, backend, **keywords)
    columns = [x.t().contiguous() for x in (student, *teachers)]
    check_soft_target(columns[0], columns[1:], backend, 3.0, dim=0, **keywords)


def test_a_schedule_of_beta_compiles_twice(backend):
    torch._dynamo.reset()
    student, teacher = logits(4, 10), logits(4, 10)
    counter = CompileCounter()
    compiled = torch.compile(fastkd.soft_target_loss, fullgraph=True, backend=counter)
    keywords = {"divergence": "jsd", "backend": backend}
    for beta in (0.1, 0.2, 0.3, 0.7):
        actual = compiled(student, teacher, beta=beta, **keywords)
        torch.testing.assert_close(
            actual, fastkd.soft_target_loss(student, teacher, beta=beta, **keywords)
        )
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("classes", [40, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weights", [[3, 1], [1, 0]])
@some_divergences
def test_a_mean_that_underflows(backend, keywords, weights, dtype, classes, dim):
    """Where the student has probability all the same, and where a teacher excludes the class."""
    student, first, other = (logits(9, classes, dtype=dtype) for _ in range(3))
    first[:, 3:9], other[:, 3:7] = -300.0, -1000.0
    first[:, 8:11] = -math.inf
    first[5, :-2], other[5, :-3] = -1e30, -1e34
    tensors = [x.t().contiguous() if dim == 0 else x for x in (student, first, other)]
    keywords = {**keywords, "dim": dim, "teacher_weights": weights}
    if weights[1] == 0:
        tensors[0].movedim(dim, -1)[:, 8:11] = -math.inf
    check_soft_target(tensors[0], tensors[1:], backend, reduction="none", **keywords)
    check_soft_target(tensors[0], tensors[1:], backend, 3.0, **keywords)


@pytest.mark.parametrize("distance", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("classes", [10, 300, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_divergence
def test_sides_that_nearly_agree(backend, keywords, dtype, classes, temperature, distance):
    """But for the total variation, whose gradient rounding decides there."""
    teacher = logits(5, classes, dtype=torch.float64)
    student = (teacher + distance * torch.randn_like(teacher)).to(dtype)
    loss = fastkd.soft_target_loss(
        student, teacher.to(dtype), temperature=temperature, reduction="none", backend=backend,
        **keywords,
    )  # fmt: skip
    assert (loss > -2e-6 * temperature**2).all()
    if keywords["divergence"] != "tvd":
        keywords = {**keywords, "temperature": temperature}
        check_soft_target(student, teacher.to(dtype), backend, **keywords)


@every_divergence
def test_equal_sides_have_no_gradient(backend, keywords):
    student, teacher = logits(8, 1000).requires_grad_(), logits(8, 1000)
    teacher.copy_(student.detach())
    loss = fastkd.soft_target_loss(student, teacher, backend=backend, **keywords)
    loss.backward()
    assert abs(loss.item()) <= 2e-6
    assert student.grad.norm() <= 3e-6 / math.sqrt(8)


@pytest.mark.parametrize(
    ("keywords", "same"),
    [
        ({"divergence": "jsd", "beta": 0}, "forward_kl"),
        ({"divergence": "jsd", "beta": 1}, "reverse_kl"),
        ({"divergence": "skew_kl", "beta": 0.0}, "forward_kl"),
        ({"divergence": "skew_reverse_kl", "beta": 0.0}, "reverse_kl"),
    ],
    ids=str,
)
def test_ends_of_beta_are_the_divergences_that_they_stand_for(backend, keywords, same):
    tensors = logits(9, 40), logits(9, 40)
    found = fastkd.soft_target_loss(*tensors, backend=backend, **keywords)
    assert torch.equal(found, fastkd.soft_target_loss(*tensors, backend=backend, divergence=same))


def test_the_other_end_of_the_skew_divergences_is_nothing(backend):
    student, teacher = logits(9, 40).requires_grad_(), logits(9, 40)
    for name in ("skew_kl", "skew_reverse_kl"):
        loss = fastkd.soft_target_loss(student, teacher, divergence=name, beta=1, backend=backend)
        assert abs(loss) < 1e-6
        assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-7


@pytest.mark.parametrize("keywords", BOUNDED, ids=name_of)
def test_no_divergence_exceeds_what_it_can_be(backend, keywords):
    """Of sides that have no class in common."""
    beta = keywords.get("beta", 0.5)
    student, teacher = logits(3, 40), logits(3, 40)
    student[:, ::2], teacher[:, 1::2] = -math.inf, -math.inf
    loss = fastkd.soft_target_loss(student, teacher, backend=backend, **keywords)
    most = {"tvd": 1.0, "jsd": -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)}
    assert loss.item() == pytest.approx(most.get(keywords["divergence"], -math.log(beta)), rel=1e-6)


DERIVATIVES = [{}, {"reduction": "none", "dim": 1}, {"temperature": 3.0, "scale_t2": False}]


@pytest.mark.parametrize("others", DERIVATIVES, ids=str)
@pytest.mark.parametrize("teachers", [1, 2])
@every_divergence
def test_derivatives_of_the_reference(keywords, teachers, others):
    inputs = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(1 + teachers)]
    inputs = [x.requires_grad_() for x in inputs]

    def loss(s, *t):
        return fastkd.soft_target_loss(s, list(t), backend="reference", **keywords, **others)

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("others", DERIVATIVES, ids=str)
@some_divergences
def test_derivatives_of_a_kernel(kernel_backend, keywords, others):
    """Also the teacher's, alone and together with the student's."""
    inputs = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(2)]

    def loss(s, t):
        return fastkd.soft_target_loss(s, t, backend=kernel_backend, **keywords, **others)

    for wanted in ([0], [1], [0, 1]):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        assert gradcheck(loss, leaves)


BAD = [
    ({"divergence": "kl"}, "divergence must be one of 'forward_kl', 'reverse_kl'.*got 'kl'"),
    ({"divergence": None}, "divergence must be one of .*got None"),
    ({"divergence": "jsd", "beta": -0.1}, r"beta must be .*>= 0 and <= 1, got -0.1"),
    ({"divergence": "jsd", "beta": 1.5}, r"beta must be .*>= 0 and <= 1, got 1.5"),
    ({"divergence": "skew_kl", "beta": math.nan}, "beta must be .*got nan"),
    ({"divergence": "skew_kl", "beta": 1e-40}, "beta must be 0 or at least 1e-30, got 1e-40"),
    ({"divergence": "tvd", "beta": 0.9}, "beta belongs to .*'jsd'.*'tvd' it must stay 0.5, got"),
    ({"beta": 0.9}, "beta belongs to .*'forward_kl' it must stay 0.5, got 0.9"),
]


@pytest.mark.parametrize(("keywords", "words"), BAD, ids=str)
def test_errors(keywords, words):
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match=words):
        fastkd.soft_target_loss(x, x, **keywords)
    with pytest.raises(ValueError, match=words):
        fastkd.distillation_loss(x, x, torch.tensor([0, 1, 2]), **keywords)

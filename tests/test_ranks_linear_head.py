"""Linear heads whose classes are split over ranks, which are threads here, against the oracle."""

import math

import pytest
import torch
from conftest import DEVICE
from divergences import FEW, name_of
from linear_heads import NUMBERS, check_loss, head, labels_and_mask, other
from split import Threads, whole

import fastkd
from fastkd.ops import linear_head_sides

ROWS, CLASSES = (3, 5), 37
CUTS = [5, 0, 30, 2]
# A GPU rounds logits to float16; a CPU has no such product, and rounds gradients alone.
DTYPES = [("float64",) * 2]
if DEVICE == "cpu":
    DTYPES += [("float32", "float16"), ("float16",) * 2]
LOSSES = ["soft_target_loss", "distillation_loss"]
every_loss = pytest.mark.parametrize("name", LOSSES)
every_divergence = pytest.mark.parametrize("keywords", [{}, *FEW], ids=name_of)
some_divergences = pytest.mark.parametrize("keywords", [{}, {"divergence": "jsd"}], ids=name_of)


def logits_of(side, heat):
    if side.kind != "head":
        return side.tensors[0].double() / heat
    hidden, weight, *bias = (x.double() for x in side.tensors)
    found = side.numbers.get("scale", 1.0) * (hidden @ weight.T + (bias[0] if bias else 0))
    softcap = side.numbers.get("softcap")
    return (softcap * (found / softcap).tanh() if softcap else found) / heat


def sides(kinds=("head", "head"), dtypes=(torch.float32,) * 2, heat=1.0, classes=CLASSES):
    """A student and a teacher that nearly agree on no class, where tvd has its kink."""
    heat = torch.as_tensor(heat, dtype=torch.float64)
    heat = heat[..., None] if heat.ndim else heat
    for _ in range(50):
        found = []
        for kind, dtype, hidden in zip(kinds, dtypes, (8, 6), strict=True):
            numbers = NUMBERS if hidden == 8 else {"softcap": 5.0}
            if kind == "head":
                found.append(head(ROWS, classes, hidden, dtype=dtype, bias=hidden == 8, **numbers))
            else:
                found.append(other(kind, ROWS, classes, dtype=dtype))
        log_q, log_p = (logits_of(side, heat).log_softmax(-1) for side in found)
        if ((log_q - log_p).abs() > 1e-4).all():
            break
    return found


def of_rows(name):
    labels, mask = labels_and_mask(ROWS, CLASSES)
    return {"labels": labels, "mask": mask} if name == "distillation_loss" else {"mask": mask}


@pytest.mark.parametrize("kinds", [("head", "head"), ("head", "logits"), ("logits", "head")])
@pytest.mark.parametrize("size", [1, 2, 4])
@every_divergence
@every_loss
def test_divergences(backend, split, name, keywords, size, kinds):
    split(size, CUTS if size == 4 else None)
    check_loss(
        name, *sides(kinds, heat=2.0), backend, chunk_size=4, grad_output=1.7, temperature=2.0,
        **of_rows(name), **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@every_divergence
@every_loss
def test_dtypes_and_reductions(backend, split, name, keywords, reduction, dtypes):
    split(3)
    pair = sides(dtypes=[getattr(torch, dtype) for dtype in dtypes], heat=3.0)
    upstream = torch.rand(ROWS, dtype=torch.float64) if reduction == "none" else 2.3
    check_loss(
        name, *pair, backend, chunk_size=7, grad_output=upstream, reduction=reduction,
        temperature=3.0, **of_rows(name), **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("cuts", [[37], [0, 37], [37, 0, 0], [1, 36], [12, 13, 12], CUTS], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 4, 15, 16, None])
def test_cuts_and_chunk_sizes(backend, split, chunk_size, cuts):
    split(len(cuts), cuts)
    check_loss("soft_target_loss", *sides(), backend, chunk_size=chunk_size)


@pytest.mark.parametrize("numbers", [{}, {"scale": -0.3}, {"softcap": 2.0}, NUMBERS], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_heads(backend, split, bias, numbers):
    split(3)
    student = head(ROWS, CLASSES, 8, bias=bias, **numbers)
    teacher = head(ROWS, CLASSES, 5, bias=not bias, **numbers)
    check_loss("soft_target_loss", student, teacher, backend, chunk_size=4, grad_output=-2.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@some_divergences
def test_labels(backend, split, keywords, smoothing):
    """Also at the borders of shards."""
    split(4, CUTS)
    labels = torch.tensor([0, 4, 5, -100, 34, 35, 36, 20, 6, 35, 36, -100, 1, 2, 3]).view(ROWS)
    check_loss(
        "distillation_loss", *sides(heat=4.0), backend, labels=labels, chunk_size=4,
        label_smoothing=smoothing, temperature=4.0, **keywords,
    )  # fmt: skip


@every_divergence
@every_loss
def test_temperatures_that_learn(backend, split, name, keywords):
    split(3)
    for heat in (1 + torch.rand(ROWS), 1 + torch.rand(())):
        check_loss(
            name, *sides(heat=heat), backend, grad_output=1.3, chunk_size=4, temperature=heat,
            **of_rows(name), **keywords,
        )  # fmt: skip
    student, teacher = sides()
    named = {"temperature": torch.tensor(2.0), "teacher_temperature": 1 + torch.rand(ROWS)}
    check_loss(name, student, teacher, backend, chunk_size=4, **named, **of_rows(name))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@every_loss
def test_weights_of_rows(backend, split, name, reduction):
    split(3)
    weight = torch.rand(ROWS).masked_fill(torch.rand(ROWS) < 0.3, 0)
    upstream = torch.rand(ROWS, dtype=torch.float64) if reduction == "none" else 0.7
    check_loss(
        name, *sides(), backend, grad_output=upstream, row_weight=weight, chunk_size=4,
        reduction=reduction, **of_rows(name),
    )  # fmt: skip


def both(name, pair, size=3, **keywords):
    """The loss of one process, and that of ranks, each of the tensors of both sides."""
    student, teacher = pair
    count = len(student.tensors)
    given = [keywords.pop("labels")] if "labels" in keywords else []

    def of(function):
        return lambda *tensors, **others: function(
            student.of(tensors[:count]), teacher.of(tensors[count:]), *given,
            **{"chunk_size": 4, **keywords, **others},
        )  # fmt: skip

    return of(getattr(fastkd, name)), of(whole(name, Threads(size)))


def leaves_of(pair, count=None):
    tensors = [x for side in pair for x in side.tensors]
    return [x.clone().requires_grad_(i < (count or len(tensors))) for i, x in enumerate(tensors)]


def compare(functions, pair, count=None, upstream=3.0, **keywords):
    """Values and gradients of the first tensors, or of all."""
    found = []
    for function in functions:
        leaves = leaves_of(pair, count)
        value = function(*leaves, **keywords)
        wanted = [x for x in leaves if x.requires_grad]
        found.append((value, *torch.autograd.grad(value, wanted, torch.full_like(value, upstream))))
    torch.testing.assert_close(found[1], found[0])
    return found[1]


@every_loss
def test_weights_of_rows_learn(backend, name):
    pair, weight = sides(), torch.rand(ROWS)
    functions = both(name, pair, backend=backend, **of_rows(name))
    found = []
    for function in functions:
        leaves = [weight.clone().requires_grad_(), *leaves_of(pair, 3)]
        loss = function(*leaves[1:], row_weight=leaves[0])
        found.append(torch.autograd.grad(loss, leaves[:4]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("stored", [(37, 40), (40, 37), (45, 38)])
@some_divergences
@every_loss
def test_padded_vocabularies(backend, split, name, keywords, stored):
    """A rank may have padding and nothing else; what is padded may be NaN, and has no gradient."""
    pair = sides()
    labels = of_rows(name)
    for cuts in ([20, 17, 0], [10, 20, 7], [0, 37, 0]):
        expected = compare(
            [both(name, pair, backend=backend, **labels, **keywords)[0]] * 2, pair, upstream=1.0
        )
        split(3, cuts)
        padded = []
        for side, size in zip(pair, stored, strict=True):
            tensors = [x.clone() for x in side.tensors]
            for i in range(1, len(tensors)):
                shape = size - CLASSES, *tensors[i].shape[1:]
                tensors[i] = torch.cat([tensors[i], torch.full(shape, math.nan)])
            padded.append(type(side)(side.kind, tensors, side.numbers))
        function, _ = both(name, padded, backend=backend, num_classes=CLASSES, **labels, **keywords)
        leaves = leaves_of(padded)
        value = function(*leaves)
        found = torch.autograd.grad(value, leaves)
        torch.testing.assert_close(value, expected[0])
        for one, wanted in zip(found, expected[1:], strict=True):
            torch.testing.assert_close(one[: len(wanted)], wanted)
            assert not one[len(wanted) :].any()


@pytest.mark.parametrize("captures", [False, True])
@some_divergences
@every_loss
def test_rows_that_do_not_count_may_hold_anything(
    backend, split, name, keywords, captures, monkeypatch
):
    """Also where all rows are multiplied, as in a CUDA graph, and these are cleared first."""
    monkeypatch.setattr(linear_head_sides, "is_capturing", lambda device: captures)
    split(3)
    pair, labels = sides(), of_rows(name)
    labels["mask"][0, 0] = False
    counts = labels["mask"]
    if "labels" in labels:
        counts = counts & (labels["labels"] != -100)
    for side in pair:
        side.tensors[0][~counts] = torch.tensor([math.nan, math.inf])[torch.randint(2, (1,))]
    check_loss(name, *pair, backend, chunk_size=4, grad_output=2.0, **labels, **keywords)


def test_no_rows_and_rows_that_are_all_ignored(backend):
    labels = torch.full((4,), -100)
    for rows, given in (((0,), labels[:0]), ((2, 0), labels[:0].view(2, 0)), ((4,), labels)):
        pair = head(rows, 7, 4), head(rows, 7, 3)
        pair[0].tensors[0].fill_(math.nan)
        functions = both("distillation_loss", pair, labels=given, backend=backend)
        assert not any(x.any() for x in compare(functions, pair, 3))


@some_divergences
def test_parts(backend, keywords):
    labels = of_rows("distillation_loss")
    pair = sides()
    functions = both(
        "distillation_loss", pair, return_parts=True, backend=backend, **labels, **keywords
    )
    others = {"reduction": "none"}, {"normalizer": 3.0}, {"row_weight": torch.rand(ROWS)}, {}
    for of_call in others:
        expected, found = (function(*leaves_of(pair), **of_call) for function in functions)
        torch.testing.assert_close([*found], [*expected])
        assert [x.requires_grad for x in found] == [True, False, False]


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@some_divergences
def test_a_retained_graph(backend, keywords, reduction, count):
    """Backward again, and a run again: the same to the last bit."""
    pair = sides()
    _, loss = both("soft_target_loss", pair, backend=backend, reduction=reduction, **keywords)
    leaves = leaves_of(pair, count)
    value = loss(*leaves)
    upstream = torch.full_like(value, 0.3)
    first = torch.autograd.grad(value, leaves[:count], upstream, retain_graph=True)
    second = torch.autograd.grad(value, leaves[:count], upstream)
    again = torch.autograd.grad(loss(*leaves), leaves[:count], upstream)
    for x, y, z in zip(first, second, again, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    with torch.no_grad():
        assert torch.equal(loss(*leaves), value)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("learning", [[0], [1], [2], [3], [1, 4], [0, 3]], ids=str)
def test_some_tensors_learn(backend, reduction, learning):
    """Of hidden states, weight and bias of the student, and hidden states and weight."""
    pair = sides()
    found = []
    for function in both("soft_target_loss", pair, backend=backend, reduction=reduction):
        leaves = [x.detach().requires_grad_(i in learning) for i, x in enumerate(leaves_of(pair))]
        loss = function(*leaves)
        wanted = [leaves[i] for i in learning]
        found.append(torch.autograd.grad(loss, wanted, torch.full_like(loss, -0.7)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    """Each rank's classes are those of one process, rounded as these are."""
    pair = sides()
    functions = both("soft_target_loss", pair, backend=backend)

    def under_autocast(function):
        def call(*tensors):
            with torch.autocast(DEVICE, dtype=dtype):
                return function(*tensors)

        return call

    found = []
    for function in map(under_autocast, functions):
        leaves = leaves_of(pair, 3)
        loss = function(*leaves)
        found.append((loss, *torch.autograd.grad(loss, leaves[:3], torch.tensor(3.0))))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    for one, wanted in zip(found[1][1:], found[0][1:], strict=True):
        assert one.dtype == torch.float32
        assert (one - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_float32(backend, dtype, monkeypatch):
    """Chunks and ranks; in float16, with products as a GPU has them, without underflow."""
    monkeypatch.setattr(linear_head_sides, "product_dtype", lambda dtype, device: dtype)
    pair = sides(dtypes=(dtype, dtype))
    exact = [type(x)(x.kind, [t.double() for t in x.tensors], x.numbers) for x in pair]
    keywords = {"normalizer": torch.tensor(1e6), "chunk_size": 1, "backend": backend}
    found = []
    for tensors, which in ((exact, 0), (pair, 1)):
        function = both("soft_target_loss", tensors, **keywords)[which]
        leaves = leaves_of(tensors, 3)
        found.append(torch.autograd.grad(function(*leaves), leaves[:3], torch.tensor(2.0**15)))
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.01
    for wanted, one in zip(*found, strict=True):
        assert one.dtype == dtype
        assert (one.double() - wanted).norm() <= tolerance * wanted.norm()

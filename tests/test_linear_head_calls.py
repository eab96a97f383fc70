"""Calls with linear heads: errors, compiled code, transforms, modules, what is picked."""

import re

import pytest
import torch
from calls import Recorder
from linear_heads import NUMBERS, head, other
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree

import fastkd
from fastkd.ops import linear_head_chunks
from fastkd.ops.linear_head_chunks import Width, pick

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ROWS, CLASSES = (2, 3), 11
LABELS = torch.tensor([[1, -100, 10], [0, 3, -100]])
FORMS = {"soft_target_loss": (), "distillation_loss": (LABELS,)}
CALLS = [{}, {"reduction": "none"}, {"divergence": "jsd", "beta": 0.3}]
every_call = pytest.mark.parametrize("keywords", CALLS, ids=str)
every_loss = pytest.mark.parametrize("name", FORMS)


def sides(dtype=torch.float32):
    student = head(ROWS, CLASSES, 4, dtype=dtype, **NUMBERS)
    return student, head(ROWS, CLASSES, 6, dtype=dtype, bias=False)


def loss_of(name, backend, dtype=torch.float32, **keywords):
    """A loss of the tensors of two heads, and these."""
    student, teacher = sides(dtype)
    count = len(student.tensors)

    def loss(*tensors):
        return getattr(fastkd, name)(
            student.of(tensors[:count]), teacher.of(tensors[count:]), *FORMS[name],
            temperature=2.0, chunk_size=2, backend=backend, **keywords,
        )  # fmt: skip

    return loss, [*student.tensors, *teacher.tensors]


def gradients(loss, tensors, count=None, upstream=3.0):
    leaves = [x.clone().requires_grad_(i < (count or len(tensors))) for i, x in enumerate(tensors)]
    value = loss(*leaves)
    wanted = leaves[:count]
    return value, *torch.autograd.grad(value, wanted, torch.full_like(value, upstream))


def test_a_head_is_a_pytree():
    side = fastkd.LinearHead(torch.rand(4, 3), torch.rand(5, 3), scale=2.0, softcap=30.0)
    with pytest.raises(AttributeError):
        side.scale = 1.0
    moved = pytree.tree_map(lambda x: x.double(), [side])[0]
    assert moved.hidden.dtype == moved.weight.dtype == torch.float64
    assert (moved.bias, moved.scale, moved.softcap) == (None, 2.0, 30.0)
    with_bias = fastkd.LinearHead(torch.rand(4, 3), torch.rand(5, 3), torch.rand(5))
    assert len(pytree.tree_leaves(with_bias)) == 3


@every_loss
def test_errors(name):
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    logits, good = torch.randn(4, 5), fastkd.LinearHead(hidden, weight)
    labels = (torch.tensor([0, 1, 2, 3]),) if name == "distillation_loss" else ()

    def refuses(error, words, student, teacher, **keywords):
        with pytest.raises(error, match=re.escape(words)):
            getattr(fastkd, name)(student, teacher, *labels, **keywords)

    def make(*tensors, **numbers):
        return fastkd.LinearHead(*tensors, **numbers)

    refuses(ValueError, "chunk_size is how many rows", logits, logits, chunk_size=4)
    refuses(ValueError, "chunk_size must be at least 1, got 0", good, logits, chunk_size=0)
    refuses(TypeError, "chunk_size must be an int", good, logits, chunk_size=2.5)
    refuses(ValueError, "inplace=True writes over", good, logits, inplace=True)
    refuses(ValueError, "dim must be the last", good, logits, dim=0)
    refuses(
        TypeError, "student_logits.hidden must be a tensor, got list", make([1.0], weight), good
    )
    refuses(TypeError, "teacher_logits.weight must be float32", logits, make(hidden, weight.int()))
    refuses(ValueError, "(V, H), got (4, 3) and (5, 4)", make(hidden, torch.randn(5, 4)), logits)
    refuses(ValueError, "(V, H), got (4, 3) and (3,)", make(hidden, torch.randn(3)), logits)
    refuses(ValueError, "must have the shape (V,), (5,), got (4,)",
            make(hidden, weight, torch.randn(4)), logits)  # fmt: skip
    refuses(TypeError, "the same dtype where autocast is off, got torch.float32 and torch.float64",
            make(hidden, weight.double()), logits)  # fmt: skip
    refuses(ValueError, "must be on the same device, got cpu and meta",
            make(hidden, weight.to("meta")), logits)  # fmt: skip
    for scale in (float("inf"), float("nan")):
        refuses(ValueError, "student_logits.scale must be", make(hidden, weight, scale=scale), good)
    for softcap in (0.0, -1.0, float("nan")):
        refuses(ValueError, "teacher_logits.softcap must be a finite number > 0",
                logits, make(hidden, weight, softcap=softcap))  # fmt: skip
    refuses(TypeError, "teacher_logits[0] must be a tensor, got LinearHead", logits, [good])
    refuses(ValueError, "must have the same shape, got (4, 5) and (4, 6)", good,
            make(hidden, torch.randn(6, 3)))  # fmt: skip
    if labels:
        labels = (torch.tensor([0, 1, 2, 5]),)
        refuses(ValueError, "labels must lie in [0, 4]", good, logits)


def test_metrics_take_logits_alone():
    side = fastkd.LinearHead(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(TypeError, match="student_logits must be a tensor, got LinearHead"):
        fastkd.distillation_metrics(side, torch.randn(4, 5))


def test_explain(backend, monkeypatch):
    """What is picked follows from the memory that is free; what is given is honoured."""
    side = fastkd.LinearHead(torch.randn(4, 3), torch.randn(2**15, 3))
    call = fastkd.soft_target_loss, side, side
    gib = 2**30
    for free, size in ((64 * gib, 512), (2 * gib, 512), (gib, 512), (gib - 1, 256), (1, 16)):
        monkeypatch.setattr("fastkd.losses.linear_head.free_bytes", lambda device, n=free: n)
        answer = fastkd.explain(*call, backend=backend)
        assert answer.chosen == backend
        assert answer.notes[0].startswith(f"chunk_size={size} (picked, free memory: ")
        assert answer.notes[0] in str(answer)
        assert f"{size * 2**18 / 2**20:.1f} MiB" in answer.notes[0]
    answer = fastkd.explain(*call, chunk_size=7, backend=backend)
    assert answer.notes[0].startswith("chunk_size=7 (given)")
    logits = torch.randn(4, 5)
    assert fastkd.explain(fastkd.soft_target_loss, logits, logits).notes == ()


def test_free_memory(monkeypatch):
    """It is measured, or where nothing tells, enough is taken to be there."""
    assert 2**20 < linear_head_chunks.free_bytes(torch.device("cpu")) < 2**50
    assert linear_head_chunks.free_bytes(torch.device("meta")) is None
    assert pick(Width(4, 4), None) == 512
    assert pick(Width(2, 2), None) == 1024

    def missing(*_):
        raise OSError

    monkeypatch.setattr("builtins.open", missing)
    assert 2**20 < linear_head_chunks.free_bytes(torch.device("cpu")) < 2**50
    monkeypatch.setattr("os.sysconf", missing)
    assert linear_head_chunks.free_bytes(torch.device("cpu")) is None


@every_call
@every_loss
def test_derivatives(backend, name, keywords):
    loss, tensors = loss_of(name, backend, torch.float64, **keywords)
    inputs = [x.requires_grad_() for x in tensors]
    assert gradcheck(loss, inputs)
    if backend == "reference":
        assert gradgradcheck(loss, inputs)


@pytest.mark.parametrize("count", [3, 5])
@every_loss
def test_second_derivatives_raise(kernel_backend, name, count):
    loss, tensors = loss_of(name, kernel_backend)
    leaves = [x.requires_grad_(i < count) for i, x in enumerate(tensors)]
    found = torch.autograd.grad(loss(*leaves), leaves[:count], create_graph=True)
    with pytest.raises(RuntimeError, match=r'linear head.*backend="reference"'):
        sum(g.sum() for g in found).backward()


@pytest.mark.parametrize("count", [1, 3, 5])
@every_call
@every_loss
def test_compiled(backend, name, keywords, count):
    loss, tensors = loss_of(name, backend, **keywords)
    expected = gradients(loss, tensors, count)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, tensors, count), expected)


def test_heads_are_handed_to_compiled_code(backend):
    student, teacher = sides()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*heads):
        return fastkd.soft_target_loss(*heads, backend=backend)

    heads = student.of(student.tensors), teacher.of(teacher.tensors)
    torch.testing.assert_close(compiled(*heads), fastkd.soft_target_loss(*heads, backend=backend))


@pytest.mark.thorough
def test_inductor(kernel_backend):
    loss, tensors = loss_of("distillation_loss", kernel_backend)
    for count in (3, 5):
        compiled = torch.compile(loss, fullgraph=True)
        torch.testing.assert_close(
            gradients(compiled, tensors, count), gradients(loss, tensors, count)
        )


def test_exported(backend):
    class Model(torch.nn.Module):
        def forward(self, *heads):
            return fastkd.soft_target_loss(*heads, backend=backend)

    student, teacher = sides()
    heads = student.of(student.tensors), teacher.of(teacher.tensors)
    program = torch.export.export(Model(), heads)
    torch.testing.assert_close(program.module()(*heads), Model()(*heads))


@every_call
@every_loss
def test_operators_pass_opcheck(kernel_backend, name, keywords):
    with Recorder() as recorder:
        for count in (1, 3, 5):
            loss, tensors = loss_of(name, kernel_backend, **keywords)
            gradients(loss, tensors, count)
    ours = [call for call in recorder.calls if "linear_head" in call[0].name()]
    assert len(ours) >= 4
    recorder.calls = ours
    recorder.opcheck()


@pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")
@every_call
@every_loss
def test_transforms(name, keywords):
    if keywords.get("reduction") == "none":
        keywords = {"reduction": "sum"}
    loss, tensors = loss_of(name, None, **keywords)
    expected = gradients(loss, tensors)[1:]
    found = torch.func.grad(lambda *x: 3 * loss(*x), argnums=tuple(range(5)))(*tensors)
    torch.testing.assert_close(found, expected)
    hidden, *others = tensors
    found = torch.func.vmap(lambda x: loss(x, *others))(torch.stack([hidden, 2 * hidden]))
    torch.testing.assert_close(found, torch.stack([loss(*tensors), loss(2 * hidden, *others)]))
    _, tangent = torch.func.jvp(loss, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    torch.testing.assert_close(3 * tangent, sum(g.sum() for g in expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [3, 5])
@every_call
@every_loss
def test_two_backwards_and_two_runs_are_the_same(backend, name, keywords, dtype, count):
    loss, tensors = loss_of(name, backend, dtype, **keywords)
    leaves = [x.requires_grad_(i < count) for i, x in enumerate(tensors)]
    value = loss(*leaves)
    upstream = torch.full_like(value, 0.3)
    first = torch.autograd.grad(value, leaves[:count], upstream, retain_graph=True)
    second = torch.autograd.grad(value, leaves[:count], upstream)
    other = torch.autograd.grad(loss(*leaves), leaves[:count], upstream)
    for x, y, z in zip(first, second, other, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


@every_loss
def test_inputs_are_not_changed(backend, name):
    for teacher in ("head", "logits"):
        student, _ = sides()
        side = head(ROWS, CLASSES, 6) if teacher == "head" else other("logits", ROWS, CLASSES)
        tensors = [*student.tensors, *side.tensors]
        copies = [x.clone() for x in tensors]
        gradients(
            lambda *x, side=side, student=student: getattr(fastkd, name)(
                student.of(x[:3]), side.of(x[3:]), *FORMS[name], backend=backend
            ),
            tensors, 3,
        )  # fmt: skip
        for x, copy in zip(tensors, copies, strict=True):
            assert torch.equal(x, copy)


def test_modules(backend):
    student, teacher = sides()
    heads = student.of(student.tensors), teacher.of(teacher.tensors)
    keywords = {"temperature": 2.0, "chunk_size": 2, "backend": backend}
    found = fastkd.nn.SoftTargetLoss(**keywords)(*heads)
    torch.testing.assert_close(found, fastkd.soft_target_loss(*heads, **keywords))
    found = fastkd.nn.DistillationLoss(**keywords)(*heads, LABELS)
    torch.testing.assert_close(found, fastkd.distillation_loss(*heads, LABELS, **keywords))
    assert "chunk_size=2" in repr(fastkd.nn.SoftTargetLoss(**keywords))


def test_without_gradients_nothing_is_recorded(kernel_backend):
    loss, tensors = loss_of("distillation_loss", kernel_backend)
    with_gradients = loss(*[x.clone().requires_grad_() for x in tensors])
    assert with_gradients.requires_grad
    with torch.no_grad():
        found = loss(*[x.clone().requires_grad_() for x in tensors])
    torch.testing.assert_close(found, with_gradients.detach())
    with torch.inference_mode():
        torch.testing.assert_close(loss(*tensors), with_gradients.detach())

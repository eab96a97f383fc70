"""Linear heads in compiled and exported code, as operators of torch, and in its transforms."""

import pytest
import torch
from calls import Recorder
from linear_head_calls import every_call, every_loss, gradients, loss_of, sides

import fastkd

pytestmark = pytest.mark.usefixtures("fresh_compiler")


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

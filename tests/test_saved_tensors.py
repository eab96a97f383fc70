"""What is kept for backward: recomputed, offloaded, made in inference mode, or let go."""

import functools

import pytest
import torch
from calls import LOSSES, sample, variants
from torch.utils import checkpoint as ckpt

import fastkd

DTYPES = [torch.float32, torch.bfloat16]


def gradients(call, wrap, backend, students_only=False):
    """Of all tensors, of a loss that `wrap` calls; each is an intermediate result, as in a net."""
    count = call.students if students_only else len(call.tensors)
    leaves = [x.clone().requires_grad_(i < count) for i, x in enumerate(call.tensors)]
    loss = wrap(lambda *x: call(*(2 * y for y in x), backend=backend), leaves)
    loss.backward(torch.full_like(loss, 3.0))  # reentrant checkpointing knows no autograd.grad
    return loss, *(x.grad for x in leaves[:count])


def plainly(function, leaves):
    return function(*leaves)


def checkpointed(function, leaves):
    return ckpt.checkpoint(function, *leaves, use_reentrant=False)


def checkpointed_reentrantly(function, leaves):
    return ckpt.checkpoint(function, *leaves, use_reentrant=True)


def selectively(policy):
    contexts = functools.partial(ckpt.create_selective_checkpoint_contexts, policy)
    return lambda function, leaves: ckpt.checkpoint(
        function, *leaves, use_reentrant=False, context_fn=contexts
    )


def save_ours(_, operator, *args, **kwargs):
    ours = operator.namespace == "fastkd"
    return ckpt.CheckpointPolicy.MUST_SAVE if ours else ckpt.CheckpointPolicy.PREFER_RECOMPUTE


def save_the_others(_, operator, *args, **kwargs):
    ours = operator.namespace == "fastkd"
    return ckpt.CheckpointPolicy.PREFER_RECOMPUTE if ours else ckpt.CheckpointPolicy.MUST_SAVE


def offloaded(function, leaves):
    with torch.autograd.graph.save_on_cpu():
        return function(*leaves)


def packed(function, leaves):
    """Hooks that keep no tensor, and hand out another one each time."""
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        return function(*leaves)


WAYS = {
    "checkpoint": checkpointed,
    "reentrant": checkpointed_reentrantly,
    "selective, ours saved": selectively(save_ours),
    "selective, ours recomputed": selectively(save_the_others),
    "save_on_cpu": offloaded,
    "hooks": packed,
}


@pytest.mark.parametrize("students_only", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_checkpointing_and_offloading(backend, name, way, dtype, students_only):
    for call in variants(name, dtype):
        expected = gradients(call, plainly, backend, students_only)
        torch.testing.assert_close(gradients(call, WAYS[way], backend, students_only), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_checkpointing_in_compiled_code(kernel_backend, name, dtype):
    call = sample(name, dtype)
    expected = gradients(call, plainly, kernel_backend)
    torch._dynamo.reset()

    def compiled(function, leaves):
        inner = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
        return inner(function, leaves)

    torch.testing.assert_close(gradients(call, compiled, kernel_backend), expected)


def in_inference_mode(x):
    with torch.inference_mode():
        y = x + 0
    assert y.is_inference()
    return y


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_teachers_from_inference_mode(backend, name, dtype, retain):
    """And labels: the idiom of many training loops."""
    for call in variants(name, dtype):
        students, teachers = call.tensors[: call.students], call.tensors[call.students :]
        labels = {k: v for k, v in call.keywords.items() if k == "labels"}
        found = []
        for make in (torch.clone, in_inference_mode):
            leaves = [x.clone().requires_grad_() for x in students]
            keywords = {k: make(v) for k, v in labels.items()}
            loss = call(*leaves, *map(make, teachers), backend=backend, **keywords)
            for _ in range(1 + retain):
                cotangent = torch.full_like(loss, 0.3)
                last = torch.autograd.grad(loss, leaves, cotangent, retain_graph=retain)
            found.append((loss, last))
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["attention_transfer_loss", "hint_loss"])
def test_frozen_students_from_inference_mode(backend, name):
    """One stage learns, and another comes from inference mode."""
    call = sample(name)
    first, second = call.tensors, sample(name).tensors
    found = []
    for make in (torch.clone, in_inference_mode):
        leaf = first[0].clone().requires_grad_()
        loss = call.function([leaf, make(second[0])], [first[1], make(second[1])], backend=backend)
        found.append(torch.autograd.grad(loss, leaf, torch.tensor(0.3)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("make", [torch.clone, in_inference_mode])
def test_a_teacher_from_inference_mode_is_not_copied(kernel_backend, make):
    student, teacher = sample("soft_target_loss", torch.bfloat16).tensors
    teacher, kept = make(teacher), []

    def keep(x):
        kept.append(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        fastkd.soft_target_loss(student.requires_grad_(), teacher, backend=kernel_backend)
    assert teacher.untyped_storage().data_ptr() in kept


@pytest.mark.thorough
@pytest.mark.parametrize("name", LOSSES)
def test_inference_tensors_in_compiled_code(backend, name):
    call = sample(name)
    students, teachers = call.tensors[: call.students], call.tensors[call.students :]
    torch._dynamo.reset()

    def loss(*tensors):
        return call(*tensors, backend=backend)

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in students]
        value = function(*leaves, *map(in_inference_mode, teachers))
        found.append((value, torch.autograd.grad(value, leaves, torch.full_like(value, 0.3))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["soft_target_loss", "hint_loss"])
def test_compiled_code_that_would_save_an_inference_tensor_raises(kernel_backend, name):
    """Torch's own error, which names the remedy: compiled code cannot tell such a tensor."""
    student, teacher = sample(name, torch.bfloat16).tensors
    torch._dynamo.reset()
    compiled = torch.compile(getattr(fastkd, name), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="clone"):
        compiled(student.requires_grad_(), in_inference_mode(teacher), backend=kernel_backend)


@pytest.mark.parametrize("teachers", [1, 3])
def test_parts_for_a_log_keep_nothing_else(backend, teachers):
    student = torch.randn(512, 10, requires_grad=True)
    labels = torch.randint(10, (512,))
    parts = fastkd.distillation_loss(
        student, [torch.randn(512, 10) for _ in range(teachers)], labels,
        return_parts=True, backend=backend,
    )  # fmt: skip
    for part in (parts.loss, parts.hard, parts.soft):
        # The parts are two numbers beside one another.
        assert part.untyped_storage().nbytes() <= 2 * part.element_size()

"""What every loss promises of its gradients, on every backend."""

import itertools
import os
import weakref

import pytest
import torch
from agreement import DTYPES
from calls import LOSSES, sample, variants
from conftest import KERNEL_BACKENDS

pytestmark = pytest.mark.parametrize("name", LOSSES)


def bits(tensors):
    return [x.detach().flatten().view(torch.uint8).cpu().numpy().tobytes() for x in tensors]


def gradients(call, backend, grad_output=1.0, **keywords):
    leaves = call.leaves()
    loss = call(*leaves, backend=backend, **keywords)
    return torch.autograd.grad(loss, leaves, torch.full_like(loss, grad_output))


def test_every_combination_of_requires_grad(backend, name):
    call = sample(name)
    expected = gradients(call, backend, 3.0)
    for wanted in itertools.product([True, False], repeat=len(call.tensors)):
        leaves = [x.clone().requires_grad_(w) for x, w in zip(call.tensors, wanted, strict=True)]
        loss = call(*leaves, backend=backend)
        assert loss.requires_grad == any(wanted)
        if not any(wanted):
            continue
        loss.backward(torch.full_like(loss, 3.0))
        for leaf, gradient, is_wanted in zip(leaves, expected, wanted, strict=True):
            if is_wanted:
                torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-7)
            else:
                assert leaf.grad is None


def test_no_graph_where_grad_is_off(backend, name):
    call = sample(name)
    with torch.no_grad():
        loss = call(*call.leaves(), backend=backend)
    assert not loss.requires_grad
    with torch.inference_mode():
        assert torch.equal(call(backend=backend), loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retained_graph_gives_each_grad_output_its_gradient(backend, name, dtype):
    for call in variants(name, dtype):
        student, *rest = call.leaves()
        loss = call(student, *(x.detach() for x in rest), backend=backend)
        for grad_output in (3.0, 1.0, -2.0):
            cotangent = torch.full_like(loss, grad_output)
            (again,) = torch.autograd.grad(loss, student, cotangent, retain_graph=True)
            fresh = call(student, *(x.detach() for x in rest), backend=backend)
            (expected,) = torch.autograd.grad(fresh, student, cotangent)
            assert torch.equal(again, expected)
        # The last backward frees the graph and may reuse its memory.
        (last,) = torch.autograd.grad(loss, student, cotangent)
        assert torch.equal(last, expected)


def test_backward_twice_accumulates(backend, name):
    call = sample(name)
    leaves = call.leaves()
    loss = call(*leaves, backend=backend).sum()
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves]
    loss.backward()
    assert all(torch.equal(x.grad, 2 * g) for x, g in zip(leaves, once, strict=True))


def test_second_derivative_of_the_reference(name):
    call = sample(name, torch.float64)
    leaves = call.leaves()
    first = torch.autograd.grad(call(*leaves, backend="reference").sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert all(g.abs().sum() > 0 for g in second)


@pytest.mark.parametrize("count", [1, 2])
def test_second_derivative_of_a_kernel_names_the_remedy(kernel_backend, name, count):
    for call in variants(name):
        leaves = [x.clone().requires_grad_(index < count) for index, x in enumerate(call.tensors)]
        wanted = [x for x in leaves if x.requires_grad]
        loss = call(*leaves, backend=kernel_backend).square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        with pytest.raises(RuntimeError, match='backend="reference"'):
            torch.autograd.grad(sum(g.sum() for g in first), wanted)


def test_create_graph_alone_is_harmless(kernel_backend, name):
    call = sample(name)
    leaves = call.leaves()
    loss = call(*leaves, backend=kernel_backend).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(map(torch.equal, first, gradients(call, kernel_backend)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_never_changed(backend, name, dtype):
    for call in variants(name, dtype):
        call.tensors[0].view(-1)[3] = torch.nan
        leaves = call.leaves()
        before = bits(leaves)
        gradients = []
        for _ in range(2):
            loss = call(*leaves, backend=backend)
            gradients += torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0))
        assert bits(leaves) == before


def _kept(name, call):
    """Numbers besides inputs and gradient: of rows of logits, or of relations."""
    batch, channels = call.tensors[0].shape[:2]
    if name.startswith(("rkd", "similarity")):
        return 2 * batch**2 * call.students
    if name == "fsp_loss":
        # Gram matrices of both sides and their slopes; where layers differ in size, the larger one
        # widened and pooled, and where its maxima were.
        flows = batch * channels * call.tensors[1].shape[1]
        return 4 * flows + 4 * sum(x.numel() for x in call.tensors)
    # What torch's operations on slots keep is of these.
    return (16 + 16 * call.slots) * batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_for_backward(kernel_backend, name, dtype):
    """Besides the inputs and the gradient: rows for logits, positions for maps."""
    for call in variants(name, dtype):
        if name.startswith("attention"):
            tokens = [x.flatten(2).repeat(1, 64, 1).mT for x in call.tensors]
            call = call._replace(
                tensors=tuple(tokens), keywords={**call.keywords, "channel_dim": -1}
            )
            promised = 4 * tokens[0][..., 0].numel()
        else:
            promised = _kept(name, call)
        kept = {}

        def pack(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x
            return x

        for count in (call.students, len(call.tensors)):
            kept.clear()
            leaves = [x.requires_grad_(index < count) for index, x in enumerate(call.tensors)]
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                call(*leaves, backend=kernel_backend)
            whole = [x for x in kept.values() if any(x.shape == y.shape for y in leaves)]
            extra = sum(x.numel() for x in kept.values()) - sum(x.numel() for x in whole)
            assert len(whole) <= len(leaves) + call.students
            assert extra <= promised


def test_gradients_are_nobody_elses_memory(backend, name):
    call = sample(name)
    leaves = call.leaves()
    loss = call(*leaves, backend=backend).sum()
    found = [
        *torch.autograd.grad(loss, leaves, retain_graph=True),
        *torch.autograd.grad(loss, leaves, retain_graph=True),
        *torch.autograd.grad(loss, leaves),
    ]
    pointers = [x.untyped_storage().data_ptr() for x in (*leaves, *found)]
    assert len(set(pointers)) == len(pointers)


# An interpreter has one thread, and little to show.
RUNS = 10 if os.environ.get("TRITON_INTERPRET") == "1" else 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_runs_are_bitwise_equal(backend, name, dtype):
    for call in variants(name, dtype):
        runs = {
            tuple(bits([call(backend=backend), *gradients(call, backend, 1.7)]))
            for _ in range(RUNS if dtype == torch.float32 else 5)
        }
        assert len(runs) == 1


@pytest.fixture
def threads():
    count = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(count)


@pytest.mark.parametrize("kernel_backend", {"native"}.intersection(KERNEL_BACKENDS))
@pytest.mark.parametrize("rows", [1, 67])
def test_thread_counts_are_bitwise_equal(kernel_backend, name, threads, rows):
    """On tensors large enough to be shared out."""
    for call in variants(name):
        columns = 40 if call.tensors[0].ndim > 2 or name.startswith("rkd") else 3000
        enlarged = [x.repeat(rows, columns, *[2] * (x.ndim - 2)) for x in call.tensors]
        of_rows = {k: v for k, v in call.keywords.items() if torch.is_tensor(v) and v.ndim}
        keywords = {k: v.repeat(rows) for k, v in of_rows.items()}
        call = call._replace(tensors=tuple(x + torch.randn_like(x) for x in enlarged))
        runs = set()
        for count in (1, 2, 5):
            threads(count)
            loss = call(backend=kernel_backend, **keywords)
            runs.add(tuple(bits([loss, *gradients(call, kernel_backend, 1.7, **keywords)])))
        assert len(runs) == 1


def test_an_expanded_grad_output(backend, name):
    """What sum() hands back has stride 0: a kernel that reads a contiguous copy must keep it."""
    for call in variants(name, torch.float32):
        shape = call(backend=backend).shape
        cotangents = torch.tensor(2.5).expand(shape), torch.full(shape, 2.5)
        for _ in range(20):
            leaves = call.leaves()
            loss = call(*leaves, backend=backend)
            found = [torch.autograd.grad(loss, leaves, c, retain_graph=True) for c in cotangents]
            assert all(map(torch.equal, *found))


def test_composes_with_other_operations(backend, name):
    """The gradient of a scaled loss of scaled features, against the two factors by hand."""
    call = sample(name)
    leaves = call.leaves()
    loss = 3 * call(*(2 * x for x in leaves), backend=backend).sum()
    loss.backward()
    doubled = call._replace(tensors=tuple(2 * x for x in call.tensors))
    for x, gradient in zip(leaves, gradients(doubled, backend, 3.0), strict=True):
        torch.testing.assert_close(x.grad, 2 * gradient)


def test_an_unused_loss_leaves_no_gradient(backend, name):
    call = sample(name)
    leaves = call.leaves()
    call(*leaves, backend=backend)
    leaves[0].sum().backward()
    assert torch.equal(leaves[0].grad, torch.ones_like(leaves[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_backward_does_not_need_is_let_go(kernel_backend, name, dtype):
    call = sample(name, dtype)
    students = [x.clone().requires_grad_() for x in call.tensors[: call.students]]
    teachers = [x.clone() for x in call.tensors[call.students :]]
    loss = call(*students, *teachers, backend=kernel_backend)
    alive = [weakref.ref(x) for x in teachers]
    teachers.clear()
    assert [x() for x in alive] == [None] * len(alive)
    loss.sum().backward()
    assert all(x.grad.isfinite().all() for x in students)

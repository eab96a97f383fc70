"""torch.compile without graph breaks, and the operators as torch wants them."""

import pytest
import torch
from calls import LOSSES, operators_of, sample, variants
from torch._dynamo.backends.common import aot_autograd

import fastkd
from fastkd import operators
from fastkd.ops import metrics

pytestmark = pytest.mark.usefixtures("fresh_compiler")

DTYPES = [
    torch.float32,
    *(pytest.param(dtype, marks=pytest.mark.thorough) for dtype in (torch.float64, torch.bfloat16)),
]


def value_and_gradients(function, tensors, grad_output=1.0):
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    return loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, grad_output))


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


# What a compiler makes of the graph is torch's business; one call of each loss goes all the way.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(backend, name, dtype):
    for call in variants(name, dtype):
        call.keywords["backend"] = backend
        compiled = torch.compile(call.__call__, fullgraph=True, backend="aot_eager")
        assert_same(
            value_and_gradients(compiled, call.tensors, 3.0),
            value_and_gradients(call, call.tensors, 3.0),
        )
        torch._dynamo.reset()


@pytest.mark.thorough
@pytest.mark.parametrize("name", LOSSES)
def test_inductor(backend, name):
    call = sample(name)
    call.keywords["backend"] = backend
    compiled = torch.compile(call.__call__, fullgraph=True)
    assert_same(
        value_and_gradients(compiled, call.tensors, 3.0),
        value_and_gradients(call, call.tensors, 3.0),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_without_gradients(backend, name):
    call = sample(name)
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(*call.tensors, **call.keywords, backend=backend), call(backend=backend)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_student_alone(kernel_backend, name):
    """The path on which forward already computes the gradient."""
    call = sample(name)
    students, others = call.tensors[: call.students], call.tensors[call.students :]

    def loss(*student):
        return call(*student, *others, backend=kernel_backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(
        value_and_gradients(compiled, students, 0.3),
        value_and_gradients(loss, students, 0.3),
    )


def test_changed_arguments(backend):
    student, teacher = sample("soft_target_loss").tensors
    compiled = torch.compile(fastkd.soft_target_loss, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 2.0, 3.0, 4):
        for reduction in ("mean", "none"):
            keywords = {"temperature": temperature, "reduction": reduction, "backend": backend}
            actual = compiled(student, teacher, **keywords)
            torch.testing.assert_close(
                actual, fastkd.soft_target_loss(student, teacher, **keywords)
            )


@pytest.mark.thorough
@pytest.mark.parametrize("name", LOSSES)
def test_dynamic_shapes(backend, name):
    call = sample(name)
    compiled = torch.compile(
        lambda *x, **k: call.function(*x, backend=backend, **k),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for batch in (2, 3, 4):
        tensors = [x[:batch].repeat(3, *[1] * (x.ndim - 1)) for x in call.tensors]
        keywords = dict(call.keywords)
        if "labels" in keywords:
            keywords["labels"] = keywords["labels"][:batch].repeat(3)
        torch.testing.assert_close(
            compiled(*tensors, **keywords), call.function(*tensors, backend=backend, **keywords)
        )


def add_up_both(student, teacher, temperature):
    labels = torch.arange(len(student)) % student.shape[1]
    soft = fastkd.soft_target_loss(
        student, teacher, temperature=temperature, normalizer=3 * len(student)
    )
    hard = fastkd.distillation_loss(
        student, teacher, labels, temperature=2 * temperature, soft_weight=1 / len(student)
    )
    return soft + hard + fastkd.soft_target_loss(student, teacher, temperature=temperature)


def test_several_calls_with_unknown_numbers(backend):
    """Of one graph, whose sizes and temperature torch does not know."""
    compiled = torch.compile(add_up_both, fullgraph=True, dynamic=True, backend="aot_eager")
    with fastkd.use_backend(backend):
        for rows in (5, 6, 7):
            student, teacher = torch.randn(2, rows, 9).unbind()
            student.requires_grad_()
            results = []
            for function in (add_up_both, compiled):
                value = function(student, teacher, rows / 2)
                results.append((value, *torch.autograd.grad(value, student)))
            torch.testing.assert_close(*results)


@pytest.fixture
def compiled_operators():
    """Compiles a call for each run, if its guards fail; says which of our operators it holds."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    call = sample("attention_map")
    compiled = torch.compile(
        lambda x: call.function(x), fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )

    def operators():
        graphs.clear()
        compiled(*call.tensors)
        return [
            str(n.target)
            for graph in graphs
            for n in graph.graph.nodes
            if "fastkd" in str(n.target)
        ]

    return operators


KERNELS = ["fastkd.attention_map_forward.default"]


def test_a_compiled_function_follows_use_backend(kernel_backend, compiled_operators):
    assert compiled_operators() == KERNELS
    with fastkd.use_backend("reference"):
        assert compiled_operators() == []
    with fastkd.use_backend(kernel_backend):
        assert compiled_operators() == KERNELS


def test_a_compiled_function_follows_the_environment(
    kernel_backend, compiled_operators, monkeypatch
):
    assert compiled_operators() == KERNELS
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    assert compiled_operators() == []


@pytest.mark.parametrize("name", LOSSES)
def test_operators_pass_opcheck(kernel_backend, name):
    calls = operators_of(name, kernel_backend)
    assert calls
    for function, args in calls:
        torch.library.opcheck(function, args)


def test_every_operator_is_checked(kernel_backend):
    seen = {function for name in LOSSES for function, _ in operators_of(name, kernel_backend)}
    # Only compiled code calls the product, no leaf is overwritten, heads are no tensors, what has
    # no gradient is no loss, and no sample has a group. Their own tests check these:
    # test_product.py, test_inplace.py, test_linear_head_compiled.py, test_metrics_calls.py,
    # test_ranks_calls.py and test_ranks_top_k_calls.py.
    seen |= {
        torch.ops.fastkd.linear_head_forward.default,
        torch.ops.fastkd.linear_head_backward.default,
        torch.ops.fastkd.product.default,
        torch.ops.fastkd.soft_target_forward_.default,
        torch.ops.fastkd.soft_target_terms.default,
        torch.ops.fastkd.top_k_forward_.default,
        torch.ops.fastkd.top_k_sums.default,
        torch.ops.fastkd.top_k_shard_forward.default,
        torch.ops.fastkd.top_k_shard_backward.default,
        metrics.metrics.overload,
    }
    assert seen == set(operators.OPERATORS.values())


@pytest.mark.parametrize("name", LOSSES)
def test_export(kernel_backend, name):
    """A loss inside an exported program keeps its operators."""

    class Loss(torch.nn.Module):
        def forward(self, *tensors):
            return sample(name).function(*tensors, **call.keywords)

    call = sample(name)
    program = torch.export.export(Loss(), call.tensors)
    torch.testing.assert_close(program.module()(*call.tensors), call())

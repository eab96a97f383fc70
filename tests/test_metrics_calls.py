"""How metrics are called: errors, gradients, compilers, operators, threads, backends."""

import math

import pytest
import torch
from agreement_logits import logits, pair
from calls import Recorder
from conftest import BACKENDS, DEVICE
from layouts import sliced
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import operators

S, T = torch.randn(4, 10), torch.randn(4, 10)
META = torch.empty(4, 10, device="meta")
MASK = torch.tensor([True, False, True, True])


def calls():
    """Tensors and keywords that take other paths."""
    yield (S, T), {}
    yield (S, T), {"temperature": 2.0, "teacher_temperature": 3.0, "mask": MASK}
    yield (S, torch.randn(4, 12)), {"num_classes": 7}
    yield (S.bfloat16(), T), {"dim": 0}
    yield (S.double(), T.half()), {"mask": torch.zeros(10, dtype=torch.bool), "dim": 0}
    yield (torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)), {"dim": 1}


CASES = [
    ((S, T.long()), {}, TypeError, ["teacher_logits", "int64"]),
    ((S.tolist(), T), {}, TypeError, ["student_logits", "list"]),
    ((S, [T, T]), {}, TypeError, ["teacher_logits", "list"]),
    ((S, META), {}, ValueError, ["same device", "meta"]),
    ((S, T[:3]), {}, ValueError, ["same shape", "(4, 10)", "(3, 10)"]),
    ((S, T[:, :9]), {}, ValueError, ["same shape", "(4, 10)", "(4, 9)"]),
    ((S, T[:3]), {"num_classes": 5}, ValueError, ["but for the classes", "(4, 10)", "(3, 10)"]),
    ((S, T[0]), {"num_classes": 5}, ValueError, ["but for the classes", "(10,)"]),
    ((S[0, 0], T[0, 0]), {}, ValueError, ["at least one dimension", "()"]),
    ((S[:, :0], T[:, :0]), {}, ValueError, ["at least one class", "(4, 0)"]),
    ((S, T[:, :8]), {"num_classes": 9}, ValueError, ["num_classes", "[1, 8]", "10 and 8", "9"]),
    ((S, T), {"num_classes": 0}, ValueError, ["num_classes", "[1, 10]", "got 0"]),
    ((S, T), {"num_classes": -1}, ValueError, ["num_classes", "got -1"]),
    ((S, T), {"num_classes": 5.0}, TypeError, ["num_classes", "float"]),
    ((S, T), {"num_classes": True}, TypeError, ["num_classes", "bool"]),
    ((S, T), {"dim": 2}, ValueError, ["dim", "[-2, 1]", "2"]),
    ((S, T), {"temperature": 0}, ValueError, ["temperature", "> 0", "0"]),
    ((S, T), {"temperature": math.nan}, ValueError, ["temperature", "nan"]),
    ((S, T), {"temperature": torch.ones(())}, TypeError, ["temperature", "Tensor"]),
    ((S, T), {"teacher_temperature": -1.0}, ValueError, ["teacher_temperature", "> 0", "-1.0"]),
    ((S, T), {"teacher_temperature": "2"}, TypeError, ["teacher_temperature", "str"]),
    ((S, T), {"mask": MASK[:3]}, ValueError, ["mask", "(4,)", "(3,)"]),
    ((S, T), {"mask": MASK.long()}, TypeError, ["mask", "booleans", "int64"]),
    ((S, T), {"mask": [True] * 4}, TypeError, ["mask", "list"]),
    ((S, T), {"mask": MASK.to("meta")}, ValueError, ["same device", "mask"]),
    ((S, T), {"backend": "cuda"}, ValueError, ["backend", "'cuda'"]),
    ((S, T, 4.0), {}, TypeError, ["by name, as temperature=..."]),
    ((META, META), {"backend": "native"}, fastkd.BackendUnavailableError, ["meta"]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[3][0]}-{case[1]}"[:60])
def test_bad_arguments(case):
    tensors, keywords, error, words = case
    with pytest.raises(error) as caught:
        fastkd.distillation_metrics(*tensors, **keywords)
    assert type(caught.value) is error
    assert [word for word in words if word not in str(caught.value)] == []


def test_no_gradient_and_inputs_as_they_were(backend):
    for tensors, keywords in calls():
        leaves = [x.clone().requires_grad_() for x in tensors]
        before = [x.detach().clone() for x in leaves]
        found = fastkd.distillation_metrics(*leaves, backend=backend, **keywords)
        assert not any(value.requires_grad for value in found)
        assert all(map(torch.equal, leaves, before))
        plain = fastkd.distillation_metrics(*tensors, backend=backend, **keywords)
        with torch.inference_mode():
            other = fastkd.distillation_metrics(*tensors, backend=backend, **keywords)
        assert all(map(torch.equal, found, plain))
        assert all(map(torch.equal, found, other))


def test_two_runs_are_the_same_bit_by_bit(backend):
    student, teacher = pair(9, 3000)
    first = fastkd.distillation_metrics(student, teacher, backend=backend)
    for _ in range(5):
        again = fastkd.distillation_metrics(student, teacher, backend=backend)
        assert all(map(torch.equal, first, again))


@pytest.mark.skipif("native" not in BACKENDS or DEVICE != "cpu", reason="about the CPU's threads")
@pytest.mark.parametrize("shape", [(37, 1000), (3, 40000)])
def test_threads_change_nothing(shape):
    student, teacher = sliced(logits(*shape)), logits(*shape)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(fastkd.distillation_metrics(student, teacher, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("case", range(6))
def test_compile(backend, case, fresh_compiler):
    tensors, keywords = [*calls()][case]
    compiled = torch.compile(
        lambda s, t: fastkd.distillation_metrics(s, t, backend=backend, **keywords),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    expected = fastkd.distillation_metrics(*tensors, backend=backend, **keywords)
    found = compiled(*[x.clone().requires_grad_() for x in tensors])
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)


@pytest.mark.thorough
def test_compile_with_inductor(backend, fresh_compiler):
    compiled = torch.compile(fastkd.distillation_metrics, fullgraph=True)
    torch.testing.assert_close(
        compiled(S, T, backend=backend), fastkd.distillation_metrics(S, T, backend=backend)
    )


def test_a_schedule_compiles_twice(backend, fresh_compiler):
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def run(s, t, temperature):
        return fastkd.distillation_metrics(
            s, t, temperature=temperature, teacher_temperature=2 * temperature, backend=backend
        )

    compiled = torch.compile(run, fullgraph=True, backend=keep)
    for temperature in (1.5, 2.5, 3.5, 0.5):
        torch.testing.assert_close(compiled(S, T, temperature), run(S, T, temperature))
    assert len(graphs) == 2


def operator_calls(backend):
    with Recorder() as recorder:
        for tensors, keywords in calls():
            fastkd.distillation_metrics(*tensors, backend=backend, **keywords)
    assert recorder.calls
    return recorder.calls


def test_operators_pass_opcheck(kernel_backend):
    for function, args in operator_calls(kernel_backend):
        torch.library.opcheck(function, args)


def test_operators_have_fakes(kernel_backend):
    recorded = operator_calls(kernel_backend)
    with FakeTensorMode() as mode:
        for function, args in recorded:
            assert function in operators.OPERATORS.values()
            fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            with torch._C._DisableTorchDispatch():
                real = function(*args)
            for fake, value in zip(function(*fakes), real, strict=True):
                assert (fake.shape, fake.dtype) == (value.shape, value.dtype)
                assert fake.stride() == value.stride()


def test_export(kernel_backend):
    class Model(torch.nn.Module):
        def forward(self, s, t):
            return fastkd.distillation_metrics(s, t, backend=kernel_backend).overlap

    program = torch.export.export(Model(), (S, T))
    assert any("distillation_metrics" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(S, T), Model()(S, T))


def test_under_transforms_the_reference_serves():
    expected = fastkd.distillation_metrics(S, T, backend="reference")
    with pytest.warns(fastkd.FallbackWarning, match="transform"):
        found = torch.func.vmap(fastkd.distillation_metrics)(S, T)
    torch.testing.assert_close(tuple(found), tuple(expected))


def test_negated_and_zero_tensors(backend):
    """Which hold no values in memory."""
    imaginary = torch.complex(T, S).conj().imag
    assert imaginary.is_neg()
    torch.testing.assert_close(
        fastkd.distillation_metrics(imaginary, T, backend=backend),
        fastkd.distillation_metrics(-S, T, backend=backend),
    )
    zeros = torch._efficientzerotensor((4, 10))
    torch.testing.assert_close(
        fastkd.distillation_metrics(zeros, T, backend=backend),
        fastkd.distillation_metrics(torch.zeros(4, 10), T, backend=backend),
    )


def test_a_tangent_ends_here(backend):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(S, T)
        found = fastkd.distillation_metrics(dual, T, backend=backend)
        for value in found:
            assert torch.autograd.forward_ad.unpack_dual(value).tangent is None


def test_explain(backend):
    answer = fastkd.explain(fastkd.distillation_metrics, S, T, backend=backend)
    assert (answer.loss, answer.chosen) == ("distillation_metrics", backend)


@pytest.mark.filterwarnings("error")
def test_four_dimensions_warn_once():
    fastkd.losses.logits._warn_once_of_last_dim.cache_clear()
    pixels = torch.randn(2, 3, 4, 5)
    fastkd.distillation_metrics(pixels, pixels, dim=1, backend="reference")
    fastkd.distillation_metrics(pixels, pixels, dim=3, backend="reference")
    with pytest.raises(UserWarning, match="dim=1"):
        fastkd.distillation_metrics(pixels, pixels, backend="reference")

"""What only a GPU can show: streams, graphs and waiting; `test_cuda_large` has large tensors."""

import pytest
import torch
from agreement_features import features
from calls import LOSSES, sample, variants
from conftest import BACKENDS, DEVICE

import fastkd

if DEVICE == "cpu" or not torch.cuda.is_available():
    pytest.skip("needs a GPU, and FASTKD_TEST_DEVICE=cuda", allow_module_level=True)

CASES = [(name, backend) for name in LOSSES for backend in BACKENDS]
every_case = pytest.mark.parametrize(("name", "backend"), CASES)
DTYPES = [torch.float32, torch.bfloat16]
# Of torch.cuda._sleep: tens of milliseconds, in which the host queues everything that follows.
A_WHILE = 50_000_000


def run(call, leaves, backend, grad_output=2.0):
    """The loss and the gradients of the leaves."""
    loss = call(*leaves, backend=backend)
    cotangent = torch.full_like(loss, grad_output)
    wanted = [x for x in leaves if x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, cotangent)]


def student_alone(call):
    return [x.clone().requires_grad_(index == 0) for index, x in enumerate(call.tensors)]


def settings(name):
    """Calls and leaves: each variant in each dtype, with gradients of the student and of all."""
    for dtype in DTYPES:
        for call in variants(name, dtype):
            yield call, student_alone(call)
            yield call, call.leaves()


def assert_same(found, expected):
    for actual, other in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, other)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_loss_has_kernels(backend):
    for name in LOSSES:
        assert fastkd.explain(sample(name).__call__, backend=backend).chosen == backend


@every_case
def test_a_graph_follows_its_inputs(name, backend):
    for call, leaves in settings(name):
        graph, found = captured(lambda call=call, leaves=leaves: run(call, leaves, backend))
        for _ in range(3):
            for x in leaves:
                x.data.copy_(torch.randn_like(x))
            expected = run(call, leaves, backend)
            for x in found:
                x.fill_(torch.nan)
            graph.replay()
            assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_with_a_regressor(backend):
    student, weight, bias = (features(*s) for s in [(8, 16, 14, 14), (32, 16), (32,)])
    leaves, teacher = [x.requires_grad_() for x in (student, weight, bias)], features(8, 32, 14, 14)

    def step():
        loss = fastkd.hint_loss(
            leaves[0], teacher, regressor_weight=leaves[1], regressor_bias=leaves[2],
            backend=backend,
        )  # fmt: skip
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    graph, found = captured(step)
    for x in (*leaves, teacher):
        x.data.copy_(torch.randn_like(x))
    expected = step()
    graph.replay()
    assert_same(found, expected)


def captured(step):
    """`step` as a CUDA graph, after the warm-up on a side stream that torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@pytest.fixture
def waiting_is_an_error():
    def switch(mode):
        torch.cuda.set_sync_debug_mode(mode)

    yield switch
    switch("default")


@every_case
def test_the_host_never_waits(name, backend, waiting_is_an_error):
    calls = list(settings(name))
    for call, leaves in calls:
        run(call, leaves, backend)  # what is compiled or loaded when first used
    waiting_is_an_error("error")
    with pytest.raises(RuntimeError):
        calls[0][1][0].sum().item()
    for call, leaves in calls:
        run(call, leaves, backend)


@every_case
def test_kernels_run_on_the_current_stream(name, backend):
    """They see what the stream writes late, and not what was there before."""
    side = torch.cuda.Stream()
    for call, leaves in settings(name):
        expected = run(call, leaves, backend)
        values = [x.detach().clone() for x in leaves]
        for x in leaves:
            x.data.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(A_WHILE)
            for x, value in zip(leaves, values, strict=True):
                x.data.copy_(value)
            found = run(call, leaves, backend)
        side.synchronize()
        assert_same(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_case
def test_another_gpu_than_the_current_one(name, backend):
    for call, leaves in settings(name):
        expected = run(call, leaves, backend)
        keywords = {k: moved(v) for k, v in call.keywords.items()}
        others = [moved(x.detach()).requires_grad_(x.requires_grad) for x in leaves]
        found = run(call._replace(keywords=keywords), others, backend)
        assert_same([x.cuda(0) for x in found], expected)
    assert torch.cuda.current_device() == 0


def moved(value):
    return value.to("cuda:1") if isinstance(value, torch.Tensor) else value

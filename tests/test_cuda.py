"""What only a GPU can show: streams, graphs, waiting, memory, and very large tensors."""

import pytest
import torch
from agreement import features
from calls import LOSSES, sample, variants
from conftest import BACKENDS, DEVICE
from layouts import channels_last

import fastkd

if DEVICE == "cpu" or not torch.cuda.is_available():
    pytest.skip("needs a GPU, and FASTKD_TEST_DEVICE=cuda", allow_module_level=True)

# Losses that have kernels on a GPU; the others have the reference alone.
FUSED = ("hint_loss",)
CASES = [(name, b) for name in LOSSES for b in BACKENDS if b == "reference" or name in FUSED]
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


def large_pairs(dtype=torch.float32):
    """Of many blocks, one in two layouts, and a last one with an odd number of elements."""
    shapes = [(64, 128, 28, 28), (64, 64, 28, 28), (5, 33, 13, 13)]
    students, teachers = ([features(*s, dtype=dtype) for s in shapes] for _ in range(2))
    teachers[1] = channels_last(teachers[1])
    return [x.requires_grad_() for x in students], teachers


def hint(students, teachers, backend):
    return fastkd.hint_loss(students, teachers, backend=backend)


def test_the_table_above_names_all_that_have_kernels():
    for name in LOSSES:
        call = sample(name).__call__
        kernels = [b for b in ("native", "triton") if fastkd.explain(call, backend=b).chosen]
        assert bool(kernels) == (name in FUSED), kernels


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_do_not_disturb_each_other(backend):
    inputs = [large_pairs() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    expected, found = [], []
    for students, teachers in inputs:
        loss = hint(students, teachers, backend)
        expected.append([loss.detach(), *torch.autograd.grad(loss, students)])
    torch.cuda.synchronize()
    for _ in range(10):
        for index, (students, teachers) in enumerate(inputs):
            with torch.cuda.stream(streams[index]):
                loss = hint(students, teachers, backend)
                gradients = torch.autograd.grad(loss, students)
                found.append((index, [loss.detach(), *gradients]))
    torch.cuda.synchronize()
    for index, results in found:
        assert_same(results, expected[index])


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_memory_is_the_gradients_and_a_little(backend, dtype):
    students, teachers = large_pairs(dtype)
    for _ in range(2):
        for x in students:
            x.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        hint(students, teachers, backend).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = sum(x.nbytes for x in students)
    # A large block may be up to 2 MiB larger than what was asked for.
    assert gradients <= extra <= gradients + len(students) * 2**21 + 2**20


BEYOND_32_BITS = (2, 1025, 2**10, 2**10)


@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["alike", "across"])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_more_elements_than_32_bits_count(backend, layout):
    needed = 10 * 2 * torch.Size(BEYOND_32_BITS).numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    student = torch.zeros(BEYOND_32_BITS, dtype=torch.bfloat16)
    student[:, -1, -1, -1000:] = 3
    teacher = layout(torch.zeros_like(student))
    teacher[:, -1, -1, -1000:] = 1
    student.requires_grad_()
    loss = fastkd.hint_loss(student, teacher, reduction="sum", half=False, backend=backend)
    assert loss.item() == 2 * 1000 * 4
    (gradient,) = torch.autograd.grad(loss, student)
    assert (gradient[:, -1, -1, -1000:] == 4).all()
    assert (gradient != 0).sum().item() == 2 * 1000


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_large_runs_are_bitwise_equal(backend, dtype):
    students, teachers = large_pairs(dtype)
    first = None
    for _ in range(100):
        loss = hint(students, teachers, backend)
        results = [loss.detach(), *torch.autograd.grad(loss, students)]
        first = first or results
        assert all(map(torch.equal, results, first))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_retained_graph_of_large_tensors(backend, dtype):
    students, teachers = large_pairs(dtype)
    loss = hint(students, teachers, backend)
    for grad_output in (3.0, 1.0, -2.0):
        cotangent = torch.full_like(loss, grad_output)
        again = torch.autograd.grad(loss, students, cotangent, retain_graph=True)
        fresh = torch.autograd.grad(hint(students, teachers, backend), students, cotangent)
        assert all(map(torch.equal, again, fresh))
    last = torch.autograd.grad(loss, students, cotangent)
    assert all(map(torch.equal, last, fresh))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_grad_output_of_1_leaves_the_gradient_untouched(backend, dtype):
    """What forward wrote is replaced by another number: backward hands on that number."""
    students, teachers = large_pairs(dtype)
    inputs = {x.data_ptr() for x in (*students, *teachers)}
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = hint(students, teachers, backend)
    pointers = kept.keys() - inputs
    assert len(pointers) == len(students)
    for pointer in pointers:
        kept[pointer].data.fill_(7)
    kept.clear()
    loss.backward()
    assert {x.grad.data_ptr() for x in students} == pointers
    assert all((x.grad == 7).all() for x in students)

"""What only large tensors on a GPU show: memory, addresses, and the same bits each time."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from agreement_features import features
from agreement_logits import logits
from conftest import BACKENDS, DEVICE
from layouts import channels_last

import fastkd

if DEVICE == "cpu" or not torch.cuda.is_available():
    pytest.skip("needs a GPU, and FASTKD_TEST_DEVICE=cuda", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16]


class Large(NamedTuple):
    """A loss of a backend on tensors of many blocks."""

    loss: Callable
    students: list
    others: list

    def run(self, backend, grad_output=1.0):
        """The loss and the gradients of the students."""
        loss = self.loss(backend=backend)
        cotangent = torch.full_like(loss, grad_output)
        return [loss.detach(), *torch.autograd.grad(loss, self.students, cotangent)]


def large_hints(dtype=torch.float32):
    """In two layouts, and a last pair with an odd number of elements."""
    shapes = [(64, 128, 28, 28), (64, 64, 28, 28), (5, 33, 13, 13)]
    students, teachers = ([features(*s, dtype=dtype) for s in shapes] for _ in range(2))
    teachers[1] = channels_last(teachers[1])
    students = [x.requires_grad_() for x in students]
    return Large(partial(fastkd.hint_loss, students, teachers), students, teachers)


def large_attention(*shapes, dtype=torch.float32, **keywords):
    """In two layouts, and with other channels on the teacher's side."""
    students = [features(*s, dtype=dtype).requires_grad_() for s in shapes]
    teachers = [features(s[0], s[1] + 24, *s[2:], dtype=dtype) for s in shapes]
    teachers[-1] = channels_last(teachers[-1])
    loss = partial(fastkd.attention_transfer_loss, students, teachers, **keywords)
    return Large(loss, students, teachers)


def large_logits(name, shape, dtype=torch.float32):
    """The classes along dim 1; every third label is left out."""
    student, teacher = (logits(*shape, dtype=dtype) for _ in range(2))
    student.requires_grad_()
    others = [teacher]
    if name == "distillation_loss":
        labels = torch.randint(shape[1], (math.prod(shape) // shape[1],))
        labels[::3] = -100
        others.append(labels.view(shape[0], *shape[2:]))
    loss = partial(getattr(fastkd, name), student, *others, temperature=2.0, dim=1)
    return Large(loss, [student], others)


# A size of each regime of the kernels, and the classes across the positions.
REGIMES = [
    *((16384, 100), (2048, 1000), (256, 8000), (64, 32000), (32, 128256)),
    (8, 150, 32, 64),
]
SAMPLES = [(64, 128, 28, 28), (64, 64, 56, 56), (64, 512, 7, 7)]
MAPS = [(4, 96, 100, 100), (4, 33, 25, 42)]
ATTENTION = {
    "attention, samples": partial(large_attention, *SAMPLES),
    "attention, maps": partial(large_attention, *MAPS),
    "attention, maxima": partial(large_attention, *SAMPLES, kind="max_pow"),
}
LARGE = {
    "hint_loss": large_hints,
    **ATTENTION,
    **{
        f"{name} {shape}": partial(large_logits, name, shape)
        for name in ("soft_target_loss", "distillation_loss")
        for shape in REGIMES
    },
}
every_large_call = pytest.mark.parametrize("large", LARGE.values(), ids=LARGE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_kernel = pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])


@every_large_call
@every_backend
def test_two_streams_do_not_disturb_each_other(backend, large):
    calls = [large() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in calls]
    expected = [call.run(backend) for call in calls]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for index, call in enumerate(calls):
            with torch.cuda.stream(streams[index]):
                found.append((index, call.run(backend)))
    torch.cuda.synchronize()
    for index, results in found:
        assert all(map(torch.equal, results, expected[index]))


@every_dtype
@every_large_call
@every_kernel
def test_memory_is_the_gradients_and_a_little(backend, large, dtype):
    call = large(dtype=dtype)
    for _ in range(2):
        for x in call.students:
            x.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call.loss(backend=backend).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = sum(x.nbytes for x in call.students)
    # A large block may be up to 2 MiB larger than what was asked for.
    assert gradients <= extra <= gradients + len(call.students) * 2**21 + 2**20


def rounded_alike(found, expected):
    return torch.dist(found.double(), expected.double()) <= 2**-8 * expected.double().norm()


BEYOND_32_BITS = (2, 1025, 2**10, 2**10)


def skip_without_room(needed):
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")


@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["alike", "across"])
@every_kernel
def test_more_elements_than_32_bits_count(backend, layout):
    skip_without_room(10 * 2 * math.prod(BEYOND_32_BITS))
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


@pytest.mark.parametrize("kind", ["sum", "sum_pow", "max_pow"])
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["planes", "rows"])
@every_kernel
def test_more_features_than_32_bits_count(backend, layout, kind):
    """All are 0 but for the last channel's last positions."""
    skip_without_room(8 * 2 * math.prod(BEYOND_32_BITS))
    here = (slice(None), slice(-1, None), slice(-1, None), slice(-1000, None))
    student, teacher = (layout(torch.zeros(BEYOND_32_BITS, dtype=torch.bfloat16)) for _ in range(2))
    student[here], teacher[here] = features(2, 1, 1, 1000), features(2, 1, 1, 1000)
    exact, other = (x[here].double() for x in (student, teacher))
    loss_of = partial(fastkd.attention_transfer_loss, kind=kind, beta=1e3)
    expected = loss_of(exact.requires_grad_(), other, backend="reference")
    (wanted,) = torch.autograd.grad(expected, exact)

    loss = loss_of(student.requires_grad_(), teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    assert rounded_alike(gradient[here], wanted)
    gradient[here] = 0
    assert not gradient.any()


@pytest.mark.parametrize("shape", [(16400, 2**17), BEYOND_32_BITS], ids=["rows", "across"])
@every_kernel
def test_more_logits_than_32_bits_count(backend, shape):
    """Both sides are uniform, and agree, but for the student's last row."""
    skip_without_room(8 * math.prod(shape))
    student = torch.zeros(shape, dtype=torch.bfloat16)
    # One sample for all, to leave room.
    teacher = torch.zeros((1, *shape[1:]), dtype=torch.bfloat16).expand(shape)
    last = (-1, slice(None), *([-1] * (len(shape) - 2)))
    student[last][-500:] = 3
    loss_of = partial(fastkd.soft_target_loss, reduction="sum", dim=1)

    row = student[last].double()[None].requires_grad_()
    expected = loss_of(row, torch.zeros_like(row), backend="reference")
    (wanted,) = torch.autograd.grad(expected, row)

    student.requires_grad_()
    loss = loss_of(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient[last].double(), wanted[0], rtol=2**-8, atol=0)
    gradient[last] = 0
    assert gradient.abs_().max().item() < 1e-9


@every_dtype
@every_large_call
@every_backend
def test_a_hundred_large_runs_are_bitwise_equal(backend, large, dtype):
    call = large(dtype=dtype)
    first = call.run(backend)
    for _ in range(99):
        assert all(map(torch.equal, call.run(backend), first))


@every_dtype
@every_large_call
@every_backend
def test_a_retained_graph_of_large_tensors(backend, large, dtype):
    call = large(dtype=dtype)
    loss = call.loss(backend=backend)
    for grad_output in (3.0, 1.0, -2.0):
        cotangent = torch.full_like(loss, grad_output)
        again = torch.autograd.grad(loss, call.students, cotangent, retain_graph=True)
        _, *fresh = call.run(backend, grad_output)
        # For 1 a fresh one is forward's own, and half precision may round that the other way.
        same = rounded_alike if grad_output == 1 else torch.equal
        assert all(map(same, again, fresh))
    last = torch.autograd.grad(loss, call.students, cotangent)
    assert all(map(torch.equal, last, fresh))


@every_dtype
@pytest.mark.parametrize("large", [LARGE[name] for name in LARGE if name not in ATTENTION])
@every_kernel
def test_a_grad_output_of_1_leaves_the_gradient_untouched(backend, large, dtype):
    """What forward wrote is replaced by another number: backward hands on that number.

    Not of attention: where forward writes its gradients is up to a backend.
    """
    call = large(dtype=dtype)
    inputs = {x.data_ptr() for x in (*call.students, *call.others)}
    shapes = {x.shape for x in call.students}
    kept = {}

    def pack(x):
        # Gradients, and not the statistics of rows.
        if x.data_ptr() not in inputs and x.shape in shapes:
            kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = call.loss(backend=backend)
    pointers = set(kept)
    assert len(pointers) == len(call.students)
    for pointer in pointers:
        kept[pointer].data.fill_(7)
    kept.clear()
    loss.backward()
    assert {x.grad.data_ptr() for x in call.students} == pointers
    assert all((x.grad == 7).all() for x in call.students)

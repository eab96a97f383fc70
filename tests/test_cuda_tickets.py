"""Ticket counters of CUDA kernels: who counts where, and that every launch leaves them at 0."""

import threading

import pytest
import shim
import torch
from agreement import leaf
from agreement_logits import logits

import fastkd
from fastkd.kernels import native

if not shim.module():
    pytest.skip("needs the shim", allow_module_level=True)

PER_THREAD = 2  # cudaStreamPerThread
ALL = 1 << 16  # more than every test takes


@pytest.fixture(autouse=True)
def captured():
    shim.module().set_capturing(True)
    yield
    shim.module().set_capturing(False)


def losses():
    """Calls of every loss whose kernels have counters, with more blocks than one."""
    labels = torch.randint(40, (37,))
    return {
        "rows": lambda s, t: fastkd.soft_target_loss(s, t, backend="native"),
        "columns": lambda s, t: fastkd.soft_target_loss(s, t, dim=0, backend="native"),
        "labels": lambda s, t: fastkd.distillation_loss(s, t, labels, backend="native"),
        "teachers": lambda s, t: fastkd.soft_target_loss(s, [t, t.flip(1)], backend="native"),
        "hint": lambda s, t: fastkd.hint_loss(s, t, backend="native"),
        "attention": lambda s, t: fastkd.attention_transfer_loss(
            s.unflatten(1, (4, 10)), t.unflatten(1, (4, 10)), backend="native"
        ),
        "distances": lambda s, t: fastkd.rkd_distance_loss(s, t, backend="native"),
        "angles": lambda s, t: fastkd.rkd_angle_loss(s, t, backend="native"),
        "similarity": lambda s, t: fastkd.similarity_preserving_loss(s, t, backend="native"),
    }


@pytest.mark.parametrize("most", [0, 1, 2, 30, ALL])
def test_many_captured_launches(most):
    """Of all losses in turns: as long as there are counters, and beyond."""
    sides = logits(37, 40), logits(37, 40)
    calls = losses()
    shim.module().set_capturing(False)
    expected = {name: call(*sides) for name, call in calls.items()}
    shim.module().set_capturing(True)
    shim.module().restart_captured_counters(most)
    for _ in range(6):
        for name, call in calls.items():
            assert torch.equal(call(*sides), expected[name]), name


@pytest.mark.parametrize("name", losses())
def test_a_launch_leaves_its_counters_at_0(name):
    """As for a graph that is replayed: a call takes the counters of the one before."""
    call = losses()[name]
    for seed in range(4):
        shim.set_schedule(seed)
        student, teacher = leaf(logits(37, 40)), logits(37, 40)
        results = []
        for most in (ALL, ALL, 0):
            shim.module().restart_captured_counters(most)
            loss = call(student, teacher)
            results.append((loss.detach(), *torch.autograd.grad(loss, student)))
        for loss, gradient in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(gradient, results[0][1])


def pool(of_stream=8, streams=3, captured=100):
    return shim.module().CounterPool(of_stream, streams, captured)


def test_captured_launches_share_no_counters():
    counters = pool()
    assert [counters.take(0, n) for n in (40, 50, 10, 1)] == [24, 64, 114, None]
    counters.restart(50)
    assert [counters.take(0, n) for n in (51, 40, 11, 10, 1)] == [None, 24, None, 64, None]


def test_a_stream_has_counters_of_its_own():
    shim.module().set_capturing(False)
    counters = pool()
    streams = 0, 16, 32, 48
    assert [counters.take(stream, 8) for stream in streams * 2] == [0, 8, 16, None] * 2
    assert counters.take(0, 9) is None


def test_the_stream_of_each_thread_is_another():
    """Also of a thread that has ended, whose last launch may still run."""
    shim.module().set_capturing(False)
    counters, firsts = pool(1, 5), []
    for _ in range(6):
        thread = threading.Thread(
            target=lambda: firsts.extend(counters.take(PER_THREAD, 1) for _ in "ab")
        )
        thread.start()
        thread.join()
    assert firsts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, None, None]


def test_losses_on_the_stream_of_each_thread(monkeypatch):
    shim.module().set_capturing(False)
    monkeypatch.setattr(native, "place_of", lambda tensor: (0, PER_THREAD))
    student, teacher = logits(37, 40), logits(37, 40)
    results = []

    def work():
        results.extend(fastkd.soft_target_loss(student, teacher, backend="native") for _ in "abc")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 12
    assert all(torch.equal(result, results[0]) for result in results)

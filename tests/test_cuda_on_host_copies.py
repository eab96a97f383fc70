"""Asynchronous and bulk copies through the shim: each step of them that is missing shows."""

import re

import numpy as np
import pytest
from shim_kernels import SEEDS, THREAD, results_of, words, wrong


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies(shim, size, depth):
    x = words(7, 64, size // 4)
    assert wrong(shim, x, shim.staged, x, depth, depth) == 0
    for zeros in range(1, size + 1):
        expected = x.copy()
        expected.view(np.uint8)[..., size - zeros :] = 0
        np.testing.assert_array_equal(shim.staged(x, depth, depth, zeros=zeros), expected)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("step", ["wait", "commit", "before_read", "before_reuse"])
def test_missing_step_of_copies_shows(shim, step, depth):
    x = words(7, 64, 4)
    assert wrong(shim, x, shim.staged, x, depth, depth, **{step: False}) > 0


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_waiting_for_too_few_copies_shows(shim, depth):
    x = words(7, 64, 4)
    assert wrong(shim, x, shim.staged, x, depth, depth + 1) > 0


def test_no_more_than_8_groups_of_copies_are_left(shim):
    x = words(12, 64, 1)
    assert wrong(shim, x, shim.staged, x, 8, 9) == 0
    assert wrong(shim, x, shim.staged, x, 7, 8) > 0


def test_copies_arrive_early_or_late(shim):
    """Before the source changes or after it, and with the wait at the latest."""
    seen = set()
    for seed in SEEDS:
        shim.set_schedule(seed)
        seen.add(tuple("never" if np.isnan(x) else int(x) for x in shim.changed()))
    assert seen == {(1, 1, 1), ("never", 2, 2), ("never", "never", 2)}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_bulk_copies(shim, depth):
    x = words(7, 64, 4)
    assert wrong(shim, x, shim.staged_in_bulk, x, depth) == 0


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("wait", r"expect twice in a phase|copy is under way when the block's last thread ends"),
        ("before_reuse", r"deadlock:\n.* waits at mbarrier_wait|expect twice in a phase"),
        ("after_init", r"mbarrier_wait before mbarrier_init"),
    ],
)
def test_missing_step_of_bulk_copies_shows(shim, step, reason, depth):
    """Numbers are wrong, or something else is."""
    x = words(9, 64, 4)
    results = list(results_of(shim, shim.staged_in_bulk, x, depth, **{step: False}))
    reasons = [result for result in results if isinstance(result, str)]
    assert any(isinstance(result, str) or (result != x).any() for result in results)
    assert all(re.search(reason, given) for given in reasons)


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("more", [-16, 16])
def test_expecting_another_number_of_bytes_raises(shim, depth, more):
    """At the first wait."""
    x = words(1, 64, 4)
    for result in results_of(shim, shim.staged_in_bulk, x, depth, more_bytes=more):
        assert re.match(rf"deadlock:\n.*{THREAD} waits at mbarrier_wait \(64 of", result)


def test_waiting_for_the_other_phase_shows(shim):
    """It was complete before the first one, or never is."""
    x = words(1, 64, 4)
    results = list(results_of(shim, shim.staged_in_bulk, x, 0, other_parity=True))
    assert all(isinstance(result, str) or (result != x).any() for result in results)
    assert any("waits at mbarrier_wait" in result for result in results if type(result) is str)


def test_bulk_copy_that_outlives_its_block_raises(shim):
    late = [result for result in results_of(shim, shim.misuse, "bulk copy left alone") if result]
    assert late
    assert all("a bulk copy is under way when the block's last thread ends" in x for x in late)


def test_bulk_copies_arrive_early_or_late(shim):
    """Before the source changes or after it, and with the wait at the latest."""
    seen = set()
    for seed in SEEDS:
        shim.set_schedule(seed)
        seen.add(tuple("never" if np.isnan(x) else int(x) for x in shim.changed_in_bulk()))
    assert seen == {(1, 1, 1), ("never", 2, 2), ("never", "never", 2)}


def exchanged(blocks, rounds):
    numbers = 100 * np.arange(rounds)[:, None] + np.arange(blocks)
    return np.broadcast_to(numbers, (blocks, rounds, blocks))


@pytest.mark.parametrize("blocks", [1, 2, 5, 8])
def test_messages_between_blocks(shim, blocks):
    assert wrong(shim, exchanged(blocks, 7), shim.exchange, blocks, 7) == 0


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ({"wait": False}, r"expect twice in a phase|when the block's last thread ends"),
        ({"after_init": False}, r"mbarrier_init|threads have all ended"),
        ({"more_bytes": -16}, r"deadlock:\n.* waits at mbarrier_wait|last thread ends|all ended"),
        ({"more_bytes": 16}, r"deadlock:\n.* waits at mbarrier_wait"),
    ],
)
def test_wrong_step_of_messages_shows(shim, steps, reason):
    results = list(results_of(shim, shim.exchange, 4, 7, **steps))
    reasons = [result for result in results if isinstance(result, str)]
    assert reasons
    assert all(re.search(reason, given) for given in reasons)

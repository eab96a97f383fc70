"""The shim that runs CUDA kernels on the CPU: what is right passes, and what is missing shows."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from shim_kernels import BUILT, SEEDS, THREAD, values, wrong


@pytest.mark.parametrize(
    "blocks, rounds, threads", [(1, 1, 32), (2, 3, 256), (7, 4, 96), (3, 2, 1024)]
)
def test_block_sum(shim, blocks, rounds, threads):
    x = values(blocks, rounds, threads)
    assert wrong(shim, x.sum(-1), shim.block_sums, x) == 0


@pytest.mark.parametrize("barrier", ["before_read", "before_reuse"])
def test_missing_syncthreads_shows(shim, barrier):
    x = values(2, 4, 128)
    assert wrong(shim, x.sum(-1), shim.block_sums, x, **{barrier: False}) > 0


NEIGHBOURS = np.arange(5 * 96).reshape(5, 48, 2)[..., ::-1].reshape(5, 96)


def test_syncwarp(shim):
    assert wrong(shim, NEIGHBOURS, shim.neighbours, 5, 96) == 0


@pytest.mark.parametrize("barrier", ["before_read", "before_reuse"])
def test_missing_syncwarp_shows(shim, barrier):
    assert wrong(shim, NEIGHBOURS, shim.neighbours, 5, 96, **{barrier: False}) > 0


def ring(blocks, threads, cluster):
    """What each thread finds in the shared memory of the next block of its cluster."""
    numbers = np.arange(blocks * threads).reshape(-1, cluster, threads)
    return np.roll(numbers, -1, axis=1).reshape(blocks, threads)


@pytest.mark.parametrize("map_early", [False, True])
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
def test_cluster(shim, cluster, map_early):
    expected = ring(16, 64, cluster)
    assert wrong(shim, expected, shim.ring, 16, 64, cluster, map_early=map_early) == 0


@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_missing_cluster_barrier_before_reading_shows(shim, cluster):
    expected = ring(16, 64, cluster)
    assert wrong(shim, expected, shim.ring, 16, 64, cluster, before_read=False) > 0


@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_missing_cluster_barrier_before_exit_raises(shim, cluster):
    with pytest.raises(RuntimeError, match=r"map_shared to block \d, whose threads have all ended"):
        wrong(shim, None, shim.ring, 16, 64, cluster, before_exit=False)


def test_missing_cluster_barrier_before_exit_shows(shim):
    if shim.sanitized:
        pytest.skip("AddressSanitizer ends the process")
    expected = ring(16, 64, 4)
    assert wrong(shim, expected, shim.ring, 16, 64, 4, before_exit=False, map_early=True) > 0


def test_writing_to_a_block_that_ended_raises(shim):
    if shim.sanitized:
        pytest.skip("AddressSanitizer ends the process")
    with pytest.raises(RuntimeError, match="written after the block's last thread ended"):
        for _ in SEEDS:
            shim.misuse("write after end")


@pytest.mark.parametrize(
    "call", ["misuse('overrun')", "ring(16, 64, 4, before_exit=False, map_early=True)"]
)
def test_address_sanitizer_knows_the_ends_of_shared_memory(shim, call):
    if not shim.sanitized:
        pytest.skip("built without AddressSanitizer")
    script = f"import shim_kernels as k; m = k.load(); [m.{call} for _ in k.SEEDS]"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env={**os.environ, "FASTKD_SHIM_TEST_PATH": str(BUILT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr


def test_last_block(shim):
    x = values(9, 64)
    assert wrong(shim, [(x**2).sum(), 0], shim.last_block, x) == 0
    assert wrong(shim, [(x**2).sum(), 0], shim.last_block, x, before_ticket=False) > 0


def chain(blocks, threads):
    return np.broadcast_to(np.arange(1, blocks + 1)[:, None], (blocks, threads))


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 30])
def test_blocks_that_wait_for_what_others_count(shim, blocks):
    """More than are resident at a time: those that wait were drawn after those they wait for."""
    assert wrong(shim, chain(blocks, 64), shim.chain, blocks, 64) == 0


@pytest.mark.parametrize("step", ["waits", "before_count"])
def test_missing_step_of_waiting_for_a_count_shows(shim, step):
    assert wrong(shim, chain(9, 64), shim.chain, 9, 64, **{step: False}) > 0


def test_waiting_for_what_nobody_counts_raises(shim):
    for seed in SEEDS:
        shim.set_schedule(seed)
        with pytest.raises(
            RuntimeError, match=rf"deadlock:(\n.*)*{THREAD} waits at wait_for \(1 of"
        ):
            shim.chain(3, 64, counts=False)
    assert (shim.chain(3, 64) == chain(3, 64)).all()


def shuffled(x, kind, mask, argument, width):
    result = x.copy()
    for lane in range(32):
        if not mask >> lane & 1:
            continue
        first = lane // width * width
        source = {
            "i": first + argument % width,
            "u": lane - argument if lane - argument >= first else lane,
            "d": lane + argument if lane + argument < first + width else lane,
            "x": lane ^ argument if lane ^ argument < first + width else lane,
        }[kind]
        result[lane] = x[source]
    return result


@pytest.mark.parametrize(
    "kind, mask, argument, width",
    [
        *((kind, 0xFFFFFFFF, argument, 32) for kind in "iudx" for argument in (0, 1, 5, 16, 31)),
        *((kind, 0xFFFFFFFF, argument, 8) for kind in "iudx" for argument in (0, 3, 7, 12)),
        *((kind, 0x00FF0F00, argument, 4) for kind in "iudx" for argument in (1, 2)),
        ("x", 0x0000FFFF, 8, 32),
        ("i", 0x80000001, 31, 32),
    ],
)
def test_shuffle(shim, kind, mask, argument, width):
    bits = torch.randint(-(2**63), 2**63 - 1, (32,)).numpy()
    for call, x in [
        (shim.shuffle_int, bits.astype(np.int32)),
        (shim.shuffle_float, bits.astype(np.float32)),
        (shim.shuffle_double, bits.astype(np.float64)),
        (shim.shuffle_long, bits.astype(np.uint64)),
    ]:
        expected = shuffled(x, kind, mask, argument, width)
        np.testing.assert_array_equal(call(x, kind, mask, argument, width), expected)


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x00FF0F00])
@pytest.mark.parametrize("predicates", [0, 1, 0x0000FFFF, 0xFFFFFFFF, 0x80000001, 0x12345678])
def test_vote(shim, predicates, mask):
    ballot, some, every, count, block_some, block_every = shim.votes(predicates, mask)
    own = np.array([mask if mask >> lane & 1 else ~mask & 0xFFFFFFFF for lane in range(32)])
    np.testing.assert_array_equal(ballot, own & predicates)
    np.testing.assert_array_equal(some, (own & predicates) != 0)
    np.testing.assert_array_equal(every, (own & predicates) == own)
    assert (count == predicates.bit_count()).all()
    assert (block_some == (predicates != 0)).all()
    assert (block_every == (predicates == 0xFFFFFFFF)).all()


def test_schedule_follows_from_the_seed(shim):
    def orders(seed):
        shim.set_schedule(seed)
        return [shim.order(6, 64, 2).tolist() for _ in range(3)]

    first = orders(1)
    assert orders(1) == first
    assert first[0] != first[1] != first[2]
    assert orders(2)[0] not in first


def test_schedule_is_unfair(shim):
    """Some block is through before another begins, some warp is at a barrier before another."""
    blocks_ahead = warps_ahead = 0
    for seed in SEEDS:
        shim.set_schedule(seed)
        order = shim.order(4, 64, 3)
        blocks = [np.flatnonzero(order // 64 == block) for block in range(4)]
        blocks_ahead += min(b.max() for b in blocks) < max(b.min() for b in blocks)
        first_round = order[blocks[0][:64]]
        warps_ahead += len(set(first_round[:32] // 32)) == 1
    assert blocks_ahead > 0 and warps_ahead > 0


def test_grid_barrier_of_a_cooperative_launch(shim):
    shim.set_multiprocessors(5)
    assert (shim.grid_barrier(10, 64) == 10).all()


def test_atomics(shim):
    assert shim.atomics(3, 64) == {
        "sum": 192 * 191 // 2,
        "greatest": 191,
        "least": 0,
        "tickets": 192 % 10,
        "long_sum": 192 << 40,
        "exchanged": 7,
        "swapped": 192,
        "greatest_int": 91,
    }


def test_every_thread_of_a_grid_runs_once(shim):
    assert (shim.places(3, 4, 2, 5, 2, 7) == 1).all()


def test_threads_that_ended_are_not_waited_for(shim):
    for seed in SEEDS:
        shim.set_schedule(seed)
        assert (shim.leavers(64, 21) == 21).all()


def test_shared_memory_starts_as_nan(shim):
    assert np.isnan(shim.garbage())


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "divergent barrier",
            r"deadlock:\n.*\n.*thread \(32, 0, 0\) waits at cluster_wait \(32 of",
        ),
        ("divergent barrier", r"deadlock:\n.*, thread \(0, 0, 0\) waits at __syncthreads \(32 of"),
        ("absent lane", r"deadlock:\n.*, thread \(0, 0, 0\) waits at __shfl_xor_sync \(31 of"),
        ("absent lane", r"deadlock:\n.*\n.*, thread \(5, 0, 0\) waits at __syncthreads \(1 of"),
        ("ended lane", rf"{THREAD}: __shfl_xor_sync names lanes that have ended"),
        ("outside mask", rf"{THREAD}: __shfl_sync reads lane 5, which its mask leaves out"),
        ("left out", r"thread \((0|32), 0, 0\): __syncwarp with a mask that leaves the caller out"),
        ("odd width", rf"{THREAD}: __shfl_sync with a width of 12"),
        ("mixed barriers", rf"{THREAD}: __syncthreads\w* where others of the block wait at"),
        ("wait alone", rf"{THREAD}: cluster_wait without cluster_arrive"),
        ("arrive twice", rf"{THREAD}: cluster_arrive twice"),
        ("map elsewhere", rf"{THREAD}: map_shared of what is not in the block's shared memory"),
        ("map too far", rf"{THREAD}: map_shared to block 2 of a cluster of 2"),
        ("misaligned", rf"{THREAD}: 0x\w+ is not a multiple of the access's 16 bytes"),
        ("wait at misaligned", rf"{THREAD}: 0x\w+ is not a multiple of the access's 4 bytes"),
        ("copy 12 bytes", rf"{THREAD}: __pipeline_memcpy_async of 12 bytes"),
        ("copy too many zeros", rf"{THREAD}: __pipeline_memcpy_async zeroes 5 of 4 bytes"),
        *(
            (what, rf"{THREAD}: .*_async to what is not in the block's shared memory")
            for what in ("copy elsewhere", "copy overrun", "copy to another block")
        ),
        ("copy from shared", rf"{THREAD}: __pipeline_memcpy_async from shared memory"),
        ("copy to misaligned", rf"{THREAD}: 0x\w+ is not a multiple of the access's 16 bytes"),
        ("copy from misaligned", rf"{THREAD}: 0x\w+ is not a multiple of the access's 8 bytes"),
        ("bulk copy 8 bytes", rf"{THREAD}: copy_bulk of 8 bytes"),
        ("bulk copy nothing", rf"{THREAD}: copy_bulk of 0 bytes"),
        *(
            (what, rf"{THREAD}: copy_bulk to what is not in the block's shared memory")
            for what in ("bulk copy elsewhere", "bulk copy overrun")
        ),
        ("bulk copy from shared", rf"{THREAD}: copy_bulk from shared memory"),
        *(
            (f"bulk copy {end} misaligned", rf"{THREAD}: 0x\w+ is not a multiple of .* 16 bytes")
            for end in ("to", "from")
        ),
        ("wait before init", rf"{THREAD}: mbarrier_wait before mbarrier_init"),
        ("expect twice", rf"{THREAD}: mbarrier_expect twice in a phase"),
        ("mbarrier elsewhere", rf"{THREAD}: mbarrier_wait of what is not in the block's shared"),
        ("mbarrier misaligned", rf"{THREAD}: 0x\w+ is not a multiple of the access's 8 bytes"),
    ],
)
def test_misuse_raises(shim, what, message):
    for seed in SEEDS:
        shim.set_schedule(seed)
        with pytest.raises(RuntimeError, match=message):
            shim.misuse(what)
    x = values(2, 3, 64)
    np.testing.assert_array_equal(shim.block_sums(x), x.sum(-1))

"""The shim that runs CUDA kernels on the CPU: what is right passes, and what is missing shows."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BUILD = Path(__file__).parent.parent / "build" / "cuda_on_host"
BUILT = Path(
    os.environ.get("FASTKD_SHIM_TEST_PATH")
    or next(BUILD.glob("_shim_test*.so"), BUILD / "_shim_test*.so")
).resolve()
SEEDS = range(40)
THREAD = r"block \(\d, 0, 0\), thread \(\d+, 0, 0\)"


def load():
    spec = importlib.util.spec_from_file_location("_shim_test", BUILT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built():
    if not BUILT.exists():
        pytest.fail(f"{BUILT} is missing: `make cuda-on-host` builds it", pytrace=False)
    return load()


@pytest.fixture
def shim(built):
    built.set_schedule(torch.initial_seed())
    yield built
    built.set_multiprocessors(2)
    built.set_capability(9, 0)


def wrong(shim, expected, call, *args, **kwargs):
    """In how many of some schedules a kernel's result is not the expected one."""
    count = 0
    for seed in SEEDS:
        shim.set_schedule(seed)
        count += not np.array_equal(call(*args, **kwargs), expected)
    return count


def values(*shape):
    """Whole numbers, so that sums are exact in every order."""
    return torch.randint(1, 1000, shape).double().numpy()


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
    script = f"import test_cuda_on_host as t; m = t.load(); [m.{call} for _ in t.SEEDS]"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env={**os.environ, "FASTKD_SHIM_TEST_PATH": str(BUILT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr


def words(*shape):
    return torch.randint(2**32, shape).numpy().astype(np.uint32)


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


def results_of(shim, call, *args, **kwargs):
    """What becomes of a call in some schedules: the result, or why there is none."""
    for seed in SEEDS:
        shim.set_schedule(seed)
        try:
            yield call(*args, **kwargs)
        except RuntimeError as error:
            yield str(error)


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


KIB = 1 << 10


@pytest.mark.parametrize(
    "launch, error",
    [
        ({}, "cudaSuccess"),
        ({"blocks": 0}, "cudaErrorInvalidConfiguration"),
        ({"threads": 0}, "cudaErrorInvalidConfiguration"),
        ({"threads": 1024}, "cudaSuccess"),
        ({"threads": 1025}, "cudaErrorInvalidConfiguration"),
        ({"shared_bytes": 48 * KIB}, "cudaSuccess"),
        ({"shared_bytes": 48 * KIB + 1}, "cudaErrorInvalidValue"),
        ({"shared_bytes": 227 * KIB, "allowed_shared": 227 * KIB}, "cudaSuccess"),
        ({"allowed_shared": 227 * KIB + 1}, "cudaErrorInvalidValue"),
        ({"blocks": 8, "cluster": 8}, "cudaSuccess"),
        ({"blocks": 9, "cluster": 8}, "cudaErrorInvalidClusterSize"),
        ({"blocks": 8, "cluster": 0}, "cudaErrorInvalidClusterSize"),
        ({"blocks": 16, "cluster": 16}, "cudaErrorInvalidClusterSize"),
        ({"blocks": 16, "cluster": 16, "non_portable": True}, "cudaSuccess"),
        ({"blocks": 32, "cluster": 32, "non_portable": True}, "cudaErrorInvalidClusterSize"),
        ({"blocks": 4, "cooperative": True}, "cudaSuccess"),
        ({"blocks": 5, "cooperative": True}, "cudaErrorCooperativeLaunchTooLarge"),
    ],
)
def test_launch_errors(shim, launch, error):
    assert shim.launch_error(**launch) == error
    assert shim.last_errors() == [error, error, "cudaSuccess"]


@pytest.mark.parametrize(
    "multiprocessors, configuration, occupancy",
    [
        (2, (256, 0, 1), (2, 4)),
        (6, (256, 0, 4), (2, 3)),
        (8, (512, 128 * KIB, 4), (1, 2)),  # shared memory for one block
        (8, (512, 100 * KIB, 4), (2, 4)),
        (8, (512, 113 * KIB, 4), (2, 4)),
        (8, (512, 113 * KIB + 1, 4), (1, 2)),
        (132, (512, 128 * KIB, 8), (1, 16)),
        (132, (512, 128 * KIB, 16, True), (1, 8)),
        (132, (512, 128 * KIB, 16), (1, "cudaErrorInvalidClusterSize")),
        (132, (512, 128 * KIB, 9), (1, "cudaErrorInvalidClusterSize")),
        (132, (512, 128 * KIB, 12, True), (1, 11)),
        (132, (512, 128 * KIB, 17, True), (1, "cudaErrorInvalidClusterSize")),
        (2, (512, 128 * KIB, 16, True), (1, 1)),  # what may be launched fits
        (2, (1025, 0, 2), (0, "cudaErrorInvalidConfiguration")),
    ],
)
def test_occupancy(shim, multiprocessors, configuration, occupancy):
    shim.set_multiprocessors(multiprocessors)
    assert shim.occupancy(*configuration) == occupancy


def test_occupancy_of_clusters_needs_their_size(shim):
    assert shim.occupancy(256, 0, 0) == (2, "cudaErrorInvalidClusterSize")


@pytest.mark.parametrize(
    "capability, threads, shared_kib, most",
    [
        ((8, 0), 2048, 164, 0),
        ((8, 6), 1536, 100, 0),
        ((8, 9), 1536, 100, 0),
        ((9, 0), 2048, 228, 16),
        ((10, 0), 2048, 228, 16),
        ((12, 0), 1536, 100, 8),
    ],
)
def test_capability(shim, capability, threads, shared_kib, most):
    """Limits of each chip; `most` blocks make a cluster."""
    shim.set_capability(*capability)
    assert shim.device() == {
        "multiprocessors": 2,
        "major": capability[0],
        "minor": capability[1],
        "threads": threads,
        "shared_bytes": shared_kib * KIB,
        "shared_bytes_of_block": (shared_kib - 1) * KIB,
        "clusters": int(most > 0),
    }
    assert shim.occupancy(1024, 0, 1)[0] == threads // 1024
    assert shim.occupancy(32, 49 * KIB, 1)[0] == (2 if shared_kib >= 100 else 1)
    assert shim.occupancy(32, (shared_kib - 1) * KIB, 1)[0] == 1
    assert shim.occupancy(32, shared_kib * KIB, 1)[0] == 0

    at_most = (shared_kib - 1) * KIB
    assert shim.launch_error(shared_bytes=at_most, allowed_shared=at_most) == "cudaSuccess"
    assert shim.launch_error(allowed_shared=at_most + 1) == "cudaErrorInvalidValue"

    for cluster in (1, 2, 8, 16):
        _, clusters = shim.occupancy(32, 0, cluster, True)
        assert clusters == (
            max(1, 4 // cluster) if cluster <= most else "cudaErrorInvalidClusterSize"
        )
    for cluster in (2, 8, 16):
        error = shim.launch_error(blocks=cluster, cluster=cluster, non_portable=True)
        assert error == ("cudaSuccess" if cluster <= most else "cudaErrorInvalidClusterSize")
    assert shim.launch_error(blocks=3) == "cudaSuccess"


def test_unknown_capability_raises(shim):
    with pytest.raises(ValueError, match=r"no chip of capability 3\.5"):
        shim.set_capability(3, 5)
    assert shim.device()["major"] == 9


def test_a_new_chip_forgets_what_kernels_asked_for(shim):
    shim.launch_error(allowed_shared=200 * KIB, non_portable=True)
    shim.set_capability(8, 6)
    assert shim.allowed() == (48 * KIB, False)


@pytest.mark.parametrize("kind, dtype", [("float", np.float32), ("double", np.float64)])
def test_numbers(shim, kind, dtype):
    x = np.array([0.3, 1, 7.5, 0, -0.7, -np.inf, np.inf, np.nan], dtype)
    with np.errstate(all="ignore"):
        expected = [np.exp(x), np.exp2(x), np.log(x), np.log2(x), np.fmax(x, 1), np.fmin(x, 1)]
        expected += [x * x + 1, 1 / np.sqrt(x), np.abs(x), np.isfinite(x), np.isnan(x)]
    got = getattr(shim, f"numbers_{kind}")(x)
    np.testing.assert_allclose(got, np.stack(expected, -1), rtol=4 * np.finfo(x.dtype).eps)


def test_functions_of_floats(shim):
    pairs = shim.float_pairs(np.array([0.3, 1, 7.5, 0, -0.7, np.inf, np.nan]))
    np.testing.assert_array_equal(pairs[..., 0], pairs[..., 1])


def test_accesses_with_a_hint(shim):
    floats, integers = values(64, 4).astype(np.float32), words(64, 4)
    floats_got, integers_got = shim.hints(floats, integers)
    np.testing.assert_array_equal(floats_got, floats[:, ::-1])
    np.testing.assert_array_equal(integers_got, integers[:, ::-1])


EVERY = np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("dtype, name", [(torch.float16, "half"), (torch.bfloat16, "bfloat16")])
def test_conversion(shim, dtype, name):
    every = torch.from_numpy(EVERY.view(np.int16)).view(dtype).float()
    widened = getattr(shim, f"{name}_to_float")(EVERY)
    np.testing.assert_array_equal(widened, every.numpy())
    np.testing.assert_array_equal(np.signbit(widened[EVERY << 1 == 0]), [False, True])

    # Every number, half way to the next one, and a float's last place to either side of both.
    exact = every[every.isfinite()].double().sort().values
    points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, torch.tensor([65520.0])]).float()
    infinity = torch.tensor(torch.inf)
    near = [points, points.nextafter(infinity), points.nextafter(-infinity)]
    any_bits = torch.randint(-(2**31), 2**31, (10**6,)).int().view(torch.float32)
    x = torch.cat([*near, any_bits, -points, infinity[None], -infinity[None]])
    narrowed = getattr(shim, f"float_to_{name}")(x.numpy())
    expected = x.to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = x.isnan().numpy()
    assert nan.any()
    np.testing.assert_array_equal(narrowed[~nan], expected[~nan])
    assert (narrowed[nan] == 0x7FFF).all()

"""What the shim says of a chip: launches that fail, occupancy, compute capabilities."""

import pytest

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

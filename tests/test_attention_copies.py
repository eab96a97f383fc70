"""Features with contiguous channels, which chips with bulk copies fold from shared memory."""

import math

import layouts
import pytest
import shim
import torch
from agreement_features import check_map, check_transfer, features

import fastkd
from fastkd.kernels import native

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
KINDS = [("sum", 1.0), ("sum_pow", 2.0), ("sum_pow", 2.7), ("max_pow", 2.0), ("max_pow", 3.0)]
WITHOUT_BULK_COPIES = 1  # a device of the shim

# The chips with clusters are those with bulk copies.
pytestmark = pytest.mark.with_clusters

every_kind = pytest.mark.parametrize(("kind", "p"), KINDS)
needs_shim = pytest.mark.skipif(not shim.module(), reason="needs the shim")

# A copy has up to 16 KiB of a small call, or four positions where these have more.
COPIES_OF_A_SAMPLE = [
    (F32, (3, 4, 37), 1),
    (F32, (1, 8, 1), 1),
    (F32, (2, 24, 7, 7), 1),
    (F32, (2, 64, 64), 1),
    (F32, (2, 64, 65), 2),
    (F32, (1, 64, 191), 3),
    (F32, (2, 512, 7, 7), 7),
    (F32, (2, 1028, 5), 2),
    (F32, (1, 2048, 3, 3), 3),
    (F32, (2, 513 * 8, 1), 1),
    (F32, (1, 8192, 1), 1),
    (F32, (70, 8, 3), 1),
    (BF16, (2, 8, 2049), 3),
    (F16, (2, 24, 7, 7), 1),
    (BF16, (2, 512, 7, 7), 4),
    (F16, (1, 520, 127), 9),
    (BF16, (2, 513 * 8, 3), 1),
    (F16, (1, 4096, 2, 3), 2),
]
COPIED = [(dtype, shape) for dtype, shape, _ in COPIES_OF_A_SAMPLE]
# A normalised map of one position is 1.
SEVERAL_POSITIONS = [(dtype, shape) for dtype, shape in COPIED if math.prod(shape[2:]) > 1]


def copied(shape, dtype):
    return layouts.channels_last(features(*shape, dtype=dtype))


def moved(x, gap, of="position"):
    """The same features, each position or sample followed by a gap, or all of them after one."""
    tokens = x.movedim(1, -1)
    if of == "position":
        memory = x.new_full((*tokens.shape[:-1], x.shape[1] + gap), math.nan)
        view = memory[..., : x.shape[1]]
    elif of == "sample":
        memory = x.new_full((len(x), x[0].numel() + gap), math.nan)
        view = memory[:, : x[0].numel()].view(tokens.shape)
    else:
        view = x.new_full((x.numel() + gap,), math.nan)[gap:].view(tokens.shape)
    return view.copy_(tokens).movedim(-1, 1)


def copies_of(x):
    """How many a map takes, for each sample."""
    before = shim.module().bulk_copies_begun()
    fastkd.attention_map(x, backend="native")
    return (shim.module().bulk_copies_begun() - before) / len(x)


@needs_shim
@pytest.mark.parametrize(("dtype", "shape", "copies"), COPIES_OF_A_SAMPLE)
def test_number_of_copies(monkeypatch, dtype, shape, copies):
    x = copied(shape, dtype)
    assert copies_of(x) == copies
    assert copies_of(moved(x, 16, "sample")) == copies
    assert copies_of(moved(x, 8, "all")) == copies
    monkeypatch.setattr(native, "place_of", lambda tensor: (WITHOUT_BULK_COPIES, 0))
    assert copies_of(x) == 0


@needs_shim
@pytest.mark.parametrize(
    "x",
    [
        features(2, 8, 7, 7),
        copied((2, 8, 7, 7), F64),
        copied((2, 6, 7, 7), F32),
        copied((2, 12, 7, 7), BF16),
        copied((2, 2052, 5), F32),
        copied((2, 8196, 1), F32),
        moved(features(2, 8, 7, 7), 1, "all"),
        moved(features(2, 8, 7, 7), 2, "sample"),
        moved(features(2, 8, 7, 7), 4),
        copied((2, 8, 7, 7), F32)[:, :, 1:-1, 1:-1],
    ],
    ids=lambda x: f"{x.dtype}-{tuple(x.shape)}-{x.stride()}",
)
def test_features_that_no_bulk_copy_reads(x):
    assert copies_of(x) == 0
    check_map(x, "native", normalize=False)


@pytest.mark.gpu_sizes
@every_kind
@pytest.mark.parametrize(("dtype", "shape"), COPIED)
def test_maps(backend, dtype, shape, kind, p):
    x = copied(shape, dtype)
    for y in (x, moved(x, 16, "sample"), moved(x, 8, "all")):
        check_map(y, backend, kind=kind, p=p, normalize=False)
    check_map(x.movedim(1, -1), backend, kind=kind, p=p, normalize=False, channel_dim=-1)


@pytest.mark.gpu_sizes
@every_kind
@pytest.mark.parametrize(("dtype", "shape"), SEVERAL_POSITIONS)
def test_transfer(backend, dtype, shape, kind, p):
    """Beside a teacher of another layout, and with one that is copied, too."""
    student = copied(shape, dtype)
    others = features(shape[0], 3, *shape[2:]), copied((shape[0], 16, *shape[2:]), F16)
    for teacher in others:
        check_transfer(student, teacher, backend, kind=kind, p=p)
    check_transfer([student, *others], [others[1], student, others[0]], backend, kind=kind, p=p)


@pytest.mark.gpu_sizes
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize(("dtype", "shape"), COPIED)
def test_ties_and_nan_of_the_maximum(backend, dtype, shape):
    x = torch.randint(-2, 3, shape).to(dtype)
    check_map(layouts.channels_last(x), backend, kind="max_pow", normalize=False)
    for value in (math.nan, -math.inf):
        x[torch.rand(shape) < 4 / shape[1]] = value
        check_map(layouts.channels_last(x), backend, kind="max_pow", normalize=False)


@needs_shim
@every_kind
@pytest.mark.parametrize(("dtype", "shape"), COPIED)
def test_maps_are_those_of_a_chip_without_bulk_copies(monkeypatch, dtype, shape, kind, p):
    """Bit for bit, in any order of threads and copies."""
    x = copied(shape, dtype)
    maps = []
    for device in (0, 0, 0, WITHOUT_BULK_COPIES):
        monkeypatch.setattr(native, "place_of", lambda tensor, at=device: (at, 0))
        shim.set_schedule(torch.initial_seed() + len(maps))
        maps.append(fastkd.attention_map(x, kind=kind, p=p, normalize=False, backend="native"))
    assert all(torch.equal(one, maps[0]) for one in maps[1:])

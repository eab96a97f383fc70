"""From which sizes on CPU kernels take another way: what tests lower, and what users have."""

import pytest
import thresholds
import torch
from conftest import BACKENDS

import fastkd

pytestmark = [
    pytest.mark.skipif("native" not in BACKENDS, reason="native is not under test"),
    pytest.mark.at_defaults,
]
MIB = 1 << 20


def test_what_users_have():
    """docs/performance.md has what was measured with them."""
    assert thresholds.module().thresholds() == {
        "past_cache": 8 * MIB, "huge_page": 2 * MIB, "per_thread": 16384,
        "block": 1024, "few_classes": 256,
        "column_classes": 4096, "column_rows": 8, "columns": 128,
        "map_chunk": 4096, "map_piece": 65536, "map_page": 4096, "samples_ahead": 4,
        "hint_piece": 32768, "hint_stretch": 1024,
        "bins": 128, "depth": 128, "tile": 16,
    }  # fmt: skip


def test_tests_lower_all_of_them():
    assert list(thresholds.LOWERED) == list(thresholds.DEFAULTS)


def test_each_is_set_by_itself():
    module = thresholds.module()
    for name, values in thresholds.LOWERED.items():
        for value in values:
            module.set_thresholds(**{name: value})
            assert module.thresholds() == {**thresholds.DEFAULTS, name: value}
        module.set_thresholds(**{name: thresholds.DEFAULTS[name]})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"wall": 1}, "there is no threshold wall"),
        ({"block": 24}, "block must be a multiple of 16 from 16 to 1024, got 24"),
        ({"block": 2048}, "from 16 to 1024, got 2048"),
        ({"columns": 0}, "columns must be a multiple of 16 from 16 to"),
        ({"huge_page": 100}, "huge_page must be a multiple of 4096"),
        ({"per_thread": 0}, "per_thread must be a multiple of 1 from 1 to"),
        ({"past_cache": -1}, "past_cache must be a multiple of 1 from 0 to"),
        ({"hint_stretch": 1025}, "hint_stretch must be a multiple of 1 from 1 to 1024, got 1025"),
    ],
)
def test_what_none_can_be(values, message):
    with pytest.raises(ValueError, match=message):
        thresholds.module().set_thresholds(**values)
    assert thresholds.module().thresholds() == thresholds.DEFAULTS


def test_blocks_are_as_many_as_the_threshold_makes():
    """Lowered thresholds reach the kernels: sums of other blocks round differently."""
    student, teacher = torch.randn(2, 64, 1000)
    losses = []
    for block in (1024, 16):
        thresholds.module().set_thresholds(block=block)
        losses.append(fastkd.soft_target_loss(student, teacher, reduction="none", backend="native"))
    torch.testing.assert_close(*losses)
    assert not torch.equal(*losses)

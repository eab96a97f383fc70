"""The sizes from which on CPU kernels take another way, lowered so that small tensors take it."""

import random

from fastkd.kernels import compiled

# Beside the defaults. Some lie a little off the vectors' widths; a block must have whole ones.
LOWERED = {
    "past_cache": [0, 0, 0, 2000],
    "huge_page": [4096],
    "per_thread": [1, 50],
    "block": [16, 32, 80],
    "few_classes": [0, 0, 5],
    "column_classes": [0, 5],
    "column_rows": [1, 2],
    "columns": [16, 32],
    "map_chunk": [1, 7, 16, 33],
    "map_piece": [1, 16, 37, 100],
    "map_page": [0, 64],
    "samples_ahead": [1],
    "hint_piece": [1, 16, 45, 100],
    "hint_stretch": [1, 16, 23, 64],
    "bins": [1, 16, 20],
    "depth": [1, 3],
    "tile": [1, 2, 3],
}


def module():
    """The compiled module, if it is there and has CPU kernels."""
    loaded = compiled.load()
    return loaded if hasattr(loaded, "set_thresholds") else None


def lowered(seed):
    """Of each threshold one of its values, three times in four a lowered one."""
    draw = random.Random(seed)
    return {
        name: draw.choice(LOWERED[name]) if draw.random() < 0.75 else default
        for name, default in DEFAULTS.items()
    }


def use(seed):
    """Those that the seed draws from now on, or the defaults for None."""
    if DEFAULTS:
        module().set_thresholds(**(DEFAULTS if seed is None else lowered(seed)))


DEFAULTS = module().thresholds() if module() else {}

"""The teacher's most likely tokens at every position of the training text, in two files."""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_methods import Cached

# 4 bytes a token, where a float32 logit of each of the vocabulary is 4 times its size.
VALUE, INDEX = np.float16, np.uint16


class TopKCache:
    """Log-probabilities and indices, (windows, length, k) each, read window by window."""

    def __init__(self, folder: Path) -> None:
        self.log_probabilities, self.indices = (
            np.load(path, mmap_mode="r") for path in _files(folder)
        )

    @classmethod
    def write(
        cls, folder: Path, logits: Iterable[Tensor], windows: int, length: int, k: int
    ) -> "TopKCache":
        """Keep the `k` largest of `logits`, which come as (some windows, length, vocabulary)."""
        shape = (windows, length, k)
        values, indices = (
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            for path, dtype in zip(_files(folder), (VALUE, INDEX), strict=True)
        )
        place = 0
        for some in logits:
            if some.shape[-1] > np.iinfo(INDEX).max + 1:
                raise ValueError(f"expected at most 65,536 tokens, got {some.shape[-1]:,}")
            kept = some.log_softmax(-1).topk(k)
            values[place : place + len(some)] = kept.values.numpy()
            indices[place : place + len(some)] = kept.indices.numpy()
            place += len(some)
        for array in (values, indices):
            array.flush()
        return cls(folder)

    def __getitem__(self, windows: Tensor) -> Cached:
        """What a loss reads of these windows: half-precision values, 32-bit indices."""
        places = windows.numpy()
        return Cached(
            torch.from_numpy(self.log_probabilities[places]),
            torch.from_numpy(self.indices[places].astype(np.int32)),
        )

    @property
    def probability(self) -> float:
        """Of the tokens that are kept at a position, in the mean."""
        some = (np.exp(x.astype(np.float32)).sum() for x in self.log_probabilities)
        return float(sum(some) / math.prod(self.log_probabilities.shape[:2]))

    @property
    def bytes(self) -> int:
        return self.log_probabilities.nbytes + self.indices.nbytes


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / "top-k-log-probabilities.npy", folder / "top-k-indices.npy"

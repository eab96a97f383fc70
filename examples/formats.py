"""The two file formats of the classic image sets: IDX (MNIST) and the python batches of CIFAR."""

import codecs
import gzip
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


class DataError(Exception):
    """The images cannot be read; the message says which files, where, and what to do."""


def read_idx(path: Path) -> Tensor:
    """One IDX file of unsigned bytes, gzipped or not: magic number, sizes, then the values."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it begins {content[:4]!r}")
    start = 4 + 4 * content[3]
    sizes = np.frombuffer(content[4:start], ">u4").astype(int).tolist()
    values = np.frombuffer(content[start:], np.uint8)
    if len(values) != math.prod(sizes):
        raise DataError(f"{path} holds {len(values)} values and announces {sizes}")
    return torch.from_numpy(values.reshape(sizes).copy())


class _ArrayUnpickler(pickle.Unpickler):
    """Lets in what arrays are made of, and nothing else: a pickle can run any code it names."""

    allowed: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a CIFAR batch")
        return self.allowed[name]


def read_cifar(path: Path, label_key: bytes) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, 32, 32) and labels of one batch: a dictionary that Python 2 pickled."""
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        pixels = torch.from_numpy(batch[b"data"]).reshape(-1, 3, 32, 32)
        return pixels, torch.tensor(batch[label_key])
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{path} has no images with {label_key.decode()}: {error}") from error

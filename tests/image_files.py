"""Writes image files as the data sets have them, for the tests of `examples/`."""

import gzip
import io
import pickle
import struct

import numpy as np

import data


def write_idx(path, array):
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content += array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what the real batches hold."""

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


def write_batch(path, pixels, label_key, labels):
    file = io.BytesIO()
    batch = {b"batch_label": b"a batch", label_key: labels, b"data": pixels.reshape(-1, 3072)}
    Python2Pickler(file, protocol=2).dump(batch)
    path.write_bytes(file.getvalue().replace(b"numpy._core.", b"numpy.core."))


def write_mnist(folder):
    """IDX files, half of them compressed; returns what is in them: training, test."""
    random, content = np.random.default_rng(), []
    for split, suffix, count in (("train", "", 40), ("t10k", ".gz", 20)):
        pixels = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", labels)
        content.append((pixels, labels))
    return content


def write_cifar(folder, name):
    """The batches of CIFAR-10 or CIFAR-100; returns the training pixels and labels."""
    random = np.random.default_rng()
    key = b"labels" if name == "cifar10" else b"fine_labels"
    folder = folder / data.SOURCES[name].subfolder
    folder.mkdir()
    pixels, labels = [], []
    for file in (*data.SOURCES[name].train, *data.SOURCES[name].test):
        pixels.append(random.integers(0, 256, (10, 3, 32, 32), np.uint8))
        labels.append(list(range(10)))
        write_batch(folder / file, pixels[-1], key, labels[-1])
    return np.concatenate(pixels[:-1]), np.concatenate(labels[:-1])

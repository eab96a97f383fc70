"""Images to distil on: the digits bundled with scikit-learn, or files that the user already has.

Nothing is downloaded. Pixels stay bytes, as the files hold them, until a batch is normalised.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from formats import DataError, read_cifar, read_idx

# One split for every run; few training images, so that a teacher has something to add.
SPLIT_SEED = 0
TRAINING_DIGITS = 500


@dataclass(frozen=True)
class Images:
    pixels: Tensor  # (N, channels, height, width), uint8
    labels: Tensor  # (N,), int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> "Images":
        return Images(self.pixels[chosen], self.labels[chosen])

    def batches(self, size: int) -> "Iterator[Images]":
        for start in range(0, len(self), size):
            yield Images(self.pixels[start : start + size], self.labels[start : start + size])

    def shuffled(self, size: int, steps: int, seed: int) -> Iterator[Tensor]:
        """Which images make up each of `steps` batches: epochs without their incomplete batch."""
        generator = torch.Generator().manual_seed(seed)
        order: list[Tensor] = []
        for _ in range(steps):
            if not order:
                # To the device once an epoch: an index on the CPU would be copied at every step.
                everyone = torch.randperm(len(self), generator=generator).to(self.labels.device)
                order = [chosen for chosen in everyone.split(size) if len(chosen) == size]
            yield order.pop()

    def to(self, device: torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))

    def split(self, count: int) -> tuple["Images", "Images"]:
        """`count` images and all others, each with the classes in their proportions."""
        first, second = train_test_split(
            np.arange(len(self)), train_size=count, stratify=self.labels, random_state=SPLIT_SEED
        )
        return self[torch.from_numpy(first)], self[torch.from_numpy(second)]

    def at_most(self, count: int | None) -> "Images":
        return self if count is None or len(self) <= count else self.split(count)[0]


@dataclass(frozen=True)
class Dataset:
    name: str
    train: Images
    test: Images
    classes: int
    augment: bool = False  # random crops and flips

    def to(self, device: torch.device) -> "Dataset":
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def at_most(self, count: int) -> "Dataset":
        return replace(self, train=self.train.at_most(count), test=self.test.at_most(count))


@dataclass(frozen=True)
class Source:
    """The files of a data set, where torchvision unpacks them, and where they come from."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    subfolder: str
    origin: str


_IDX = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
_FASHION = "https://github.com/zalandoresearch/fashion-mnist"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
SOURCES = {
    "fashion-mnist": Source(*_IDX, "FashionMNIST/raw", _FASHION),
    "mnist": Source(*_IDX, "MNIST/raw", "http://yann.lecun.com/exdb/mnist"),
    "cifar10": Source(_BATCHES, ("test_batch",), "cifar-10-batches-py", _CIFAR),
    "cifar100": Source(("train",), ("test",), "cifar-100-python", _CIFAR),
}
NAMES = ("digits", *SOURCES)


def load(name: str, folder: Path | None = None) -> Dataset:
    """Data set `name`; all but the digits are read from `folder`."""
    if name == "digits":
        if folder is not None:
            raise DataError("the digits come with scikit-learn and are read from no --data-dir")
        return _digits()
    if folder is None:
        raise DataError(f"{name} needs --data-dir, the folder of {_wanted(name)}")
    train, test = _find(name, folder)
    if name == "cifar10":
        return Dataset(name, _cifar(train, b"labels"), _cifar(test, b"labels"), 10, augment=True)
    if name == "cifar100":
        key = b"fine_labels"
        return Dataset(name, _cifar(train, key), _cifar(test, key), 100, augment=True)
    return Dataset(name, _idx(*train), _idx(*test), 10)


def _digits() -> Dataset:
    digits = load_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    train, test = Images(pixels, torch.from_numpy(digits.target)).split(TRAINING_DIGITS)
    return Dataset("digits", train, test, 10)


def _idx(pixel_path: Path, label_path: Path) -> Images:
    pixels, labels = read_idx(pixel_path), read_idx(label_path)
    if pixels.dim() != 3 or labels.shape != pixels.shape[:1]:
        raise DataError(
            f"{pixel_path.parent}: expected (N, height, width) images and (N,) labels,"
            f" got {tuple(pixels.shape)} and {tuple(labels.shape)}"
        )
    return Images(pixels.unsqueeze(1), labels.long())


def _cifar(paths: list[Path], label_key: bytes) -> Images:
    pixels, labels = zip(*(read_cifar(path, label_key) for path in paths), strict=True)
    return Images(torch.cat(pixels), torch.cat(labels))


def _find(name: str, folder: Path) -> tuple[list[Path], list[Path]]:
    """The training and the test files, in `folder` or in the subfolder that is customary."""
    source = SOURCES[name]
    subfolder = folder / source.subfolder
    place = subfolder if subfolder.is_dir() else folder
    files: dict[str, Path] = {}
    for file in source.train + source.test:
        # Only IDX files are commonly left compressed one by one.
        for path in (place / file, place / f"{file}.gz")[: 2 if name.endswith("mnist") else 1]:
            if path.is_file():
                files.setdefault(file, path)
    missing = [file for file in source.train + source.test if file not in files]
    if missing:
        raise DataError(
            f"{name}: no {', '.join(missing)} in {place.resolve()}; wanted are {_wanted(name)}"
        )
    return [files[file] for file in source.train], [files[file] for file in source.test]


def _wanted(name: str) -> str:
    source = SOURCES[name]
    packed = " (.gz or not)" if name.endswith("mnist") else ""
    return f"{', '.join(source.train + source.test)}{packed}, from {source.origin}"


class Normalize:
    """Bytes to floats of mean 0 and deviation 1 in each channel of the training images."""

    def __init__(self, train: Images) -> None:
        pixels = train.pixels.float()
        self.mean = pixels.mean((0, 2, 3), keepdim=True)
        self.std = pixels.std((0, 2, 3), keepdim=True)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() - self.mean) / self.std


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Each image shifted by up to `padding` pixels either way, and mirrored half of the time."""
    count, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, count, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = left + torch.arange(width, device=device)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(count, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[:, None, None]
    padded = F.pad(images, [padding] * 4)
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]

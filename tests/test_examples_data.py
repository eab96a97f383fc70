"""The images of `examples/`: readers of their files, normalisation, crops."""

import pickle
import struct
import subprocess

import numpy as np
import pytest
import torch
from image_files import write_cifar, write_mnist

import data
from formats import DataError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files(tmp_path, name):
    train, test = write_mnist(tmp_path)
    dataset = data.load(name, tmp_path)
    for images, (pixels, labels) in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(images.pixels[:, 0], pixels)
        np.testing.assert_array_equal(images.labels, labels)
    assert dataset.classes == 10
    assert not dataset.augment


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "above"])
def test_cifar_batches(tmp_path, name, classes, inside):
    pixels, labels = write_cifar(tmp_path, name)
    dataset = data.load(name, tmp_path / data.SOURCES[name].subfolder if inside else tmp_path)
    np.testing.assert_array_equal(dataset.train.pixels, pixels)
    np.testing.assert_array_equal(dataset.train.labels, labels)
    assert len(dataset.test) == 10
    assert dataset.classes == classes
    assert dataset.augment


def test_only_what_is_missing_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"^mnist: no train-labels-idx1-ubyte in "):
        data.load("mnist", tmp_path)


def test_digits_take_no_folder(tmp_path):
    with pytest.raises(DataError, match="no --data-dir"):
        data.load("digits", tmp_path)


def test_other_data_needs_a_folder():
    with pytest.raises(DataError, match=r"cifar10 needs --data-dir.*data_batch_1.*cs\.toronto"):
        data.load("cifar10")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "not an IDX file"),
        (b"", "not an IDX file"),
        (struct.pack(">HBBI", 0, 8, 1, 40) + bytes(39), "holds 39 values and announces"),
        (struct.pack(">HBBI", 0, 8, 1, 39) + bytes(39), "expected .* got"),
    ],
)
def test_damaged_idx_file(tmp_path, content, message):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.load("mnist", tmp_path)


def test_damaged_gzip(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(subprocess.Popen), "Popen does not belong"),
        (pickle.dumps({}, protocol=2), "no images with labels"),
        (b"", "cannot be read"),
        (b"<html>not found</html>", "cannot be read"),
    ],
)
def test_damaged_batch(tmp_path, content, message):
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.load("cifar10", tmp_path)


def test_digits_are_split_by_class():
    digits = data.load("digits")
    assert len(digits.train) + len(digits.test) == 1797
    everyone = torch.bincount(torch.cat([digits.train.labels, digits.test.labels]))
    share = len(digits.train) / 1797
    assert (torch.bincount(digits.train.labels) - share * everyone).abs().max() <= 1
    assert torch.equal(data.load("digits").train.pixels, digits.train.pixels)


def test_normalized_images_have_no_mean_and_unit_deviation():
    train = data.load("digits").train
    images = data.Normalize(train)(train.pixels)
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0))


def test_crops_are_windows_of_the_padded_image():
    image = torch.arange(1.0, 2 * 5 * 5 + 1).reshape(1, 2, 5, 5)
    crops = data.random_crop_and_flip(image.expand(200, -1, -1, -1), padding=1)
    padded = torch.nn.functional.pad(image[0], [1] * 4)
    windows = [padded[:, i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    windows += [window.flip(2) for window in windows]
    counts = [sum(torch.equal(crop, window) for crop in crops) for window in windows]
    assert sum(counts) == 200
    assert sum(count > 0 for count in counts) > 9

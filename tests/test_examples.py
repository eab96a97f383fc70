"""The distillation of `examples/`: its program, its readers of image files, its networks."""

import dataclasses
import gzip
import io
import itertools
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import compare  # noqa: E402
import compare_methods  # noqa: E402
import compare_training  # noqa: E402
import data  # noqa: E402
import distill  # noqa: E402
from compare_methods import PAIRS  # noqa: E402
from compare_training import TEACHER_RUN, Experiment  # noqa: E402
from features import Output  # noqa: E402
from formats import DataError  # noqa: E402
from methods import (  # noqa: E402
    ALONE,
    ATTENTION,
    METHODS,
    attention_and_soft_targets,
    soft_targets,
)
from models import parameter_count, residual_network, wide_residual_network  # noqa: E402
from results import Spread  # noqa: E402
from training import RECIPES, Recipe, Trainer  # noqa: E402

TINY = Recipe(2, 50, (2, 3, 4), 1, (4, 6, 8), 1)


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.fixture
def mnist(tmp_path):
    """A folder of IDX files, half of them compressed, and what is in them."""
    random, content = np.random.default_rng(), {}
    for split, suffix, count in (("train", "", 40), ("t10k", ".gz", 20)):
        pixels = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", pixels)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", labels)
        content[split] = pixels, labels
    return tmp_path, content["train"], content["t10k"]


@pytest.fixture
def cifar(tmp_path):
    """Writes the batches of CIFAR-10 or CIFAR-100; returns the training pixels and labels."""

    def write(name):
        random = np.random.default_rng()
        key = b"labels" if name == "cifar10" else b"fine_labels"
        folder = tmp_path / data.SOURCES[name].subfolder
        folder.mkdir()
        pixels, labels = [], []
        for file in (*data.SOURCES[name].train, *data.SOURCES[name].test):
            pixels.append(random.integers(0, 256, (10, 3, 32, 32), np.uint8))
            labels.append(list(range(10)))
            write_batch(folder / file, pixels[-1], key, labels[-1])
        return np.concatenate(pixels[:-1]), np.concatenate(labels[:-1])

    return write


@pytest.mark.thorough
def test_quick_run_writes_everything(tmp_path):
    command = [sys.executable, ROOT / "examples" / "distill.py", "--quick", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for picture in ("accuracy.png", "attention.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["students"]] == [method.name for method in METHODS]
    assert all(len(row["accuracies"]) == distill.QUICK_SEEDS for row in results["students"])
    assert results["teacher"]["accuracies"][0] > 90
    for row in (results["teacher"], *results["students"]):
        assert f"{row['accuracy']['mean']:.2f}" in run.stdout
        assert 0 < row["loss_seconds"] < row["seconds"]
    assert set(results["backends"].values()) <= {"native", "reference"}


def test_channels_last_and_amp_reach_the_losses(tmp_path, monkeypatch):
    seen = []

    def loss(student, teacher, labels):
        features = [*student.features, *teacher.features]
        seen.append(student.logits.dtype == features[0].dtype == torch.bfloat16)
        seen.append(all(x.is_contiguous(memory_format=torch.channels_last) for x in features))
        return attention_and_soft_targets(student, teacher, labels)

    monkeypatch.setattr(distill, "METHODS", (ALONE, ATTENTION._replace(loss=loss)))
    monkeypatch.setattr(distill, "draw_attention", lambda results, path: None)
    arguments = f"--quick --seeds 1 --epochs 2 --amp --channels-last --output {tmp_path}"
    distill.main(arguments.split())
    assert seen == [True, True] * 20
    recipe = json.loads((tmp_path / "results.json").read_text())["recipe"]
    assert recipe["amp"]
    assert recipe["channels_last"]


@pytest.mark.thorough
def test_options_are_honoured(tmp_path, capsys):
    arguments = "--quick --seeds 1 --epochs 1 --backend reference --device cpu --output"
    distill.main([*arguments.split(), str(tmp_path / "new" / "folder")])
    results = json.loads((tmp_path / "new" / "folder" / "results.json").read_text())
    assert set(results["backends"].values()) == {"reference"}
    assert "backend reference" in capsys.readouterr().out
    assert results["recipe"]["epochs"] == 1
    assert [len(row["accuracies"]) for row in results["students"]] == [1] * len(METHODS)
    assert results["test_images"] == distill.QUICK_IMAGES


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files(mnist, name):
    folder, train, test = mnist
    dataset = data.load(name, folder)
    for images, (pixels, labels) in ((dataset.train, train), (dataset.test, test)):
        np.testing.assert_array_equal(images.pixels[:, 0], pixels)
        np.testing.assert_array_equal(images.labels, labels)
    assert dataset.classes == 10
    assert not dataset.augment


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "above"])
def test_cifar_batches(cifar, tmp_path, name, classes, inside):
    pixels, labels = cifar(name)
    dataset = data.load(name, tmp_path / data.SOURCES[name].subfolder if inside else tmp_path)
    np.testing.assert_array_equal(dataset.train.pixels, pixels)
    np.testing.assert_array_equal(dataset.train.labels, labels)
    assert len(dataset.test) == 10
    assert dataset.classes == classes
    assert dataset.augment


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_files_are_distilled_from(name, mnist, cifar, tmp_path, monkeypatch):
    if name == "cifar10":
        cifar(name)
    small = Recipe(2, 25, (2, 3, 4), 1, (4, 6, 8), 1)
    monkeypatch.setitem(distill.RECIPES, name, small)
    output = tmp_path / "output"
    distill.main(f"--data {name} --data-dir {tmp_path} --seeds 2 --output {output}".split())
    assert json.loads((output / "results.json").read_text())["data"] == name
    assert (output / "attention.png").exists()


@pytest.mark.parametrize("name", data.SOURCES)
def test_missing_files_are_named(name, tmp_path):
    with pytest.raises(SystemExit) as failure:
        distill.main(["--data", name, "--data-dir", str(tmp_path)])
    source = data.SOURCES[name]
    for expected in (*source.train, *source.test, str(tmp_path), source.origin):
        assert expected in failure.value.code


def test_only_what_is_missing_is_named(mnist):
    folder, _, _ = mnist
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"^mnist: no train-labels-idx1-ubyte in "):
        data.load("mnist", folder)


@pytest.mark.thorough
def test_missing_files_end_the_program(tmp_path):
    command = [sys.executable, ROOT / "examples" / "distill.py", "--data", "mnist"]
    run = subprocess.run([*command, "--data-dir", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("distill.py: error: mnist: no train-images-idx3-ubyte")
    assert "Traceback" not in run.stderr


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
def test_damaged_idx_file(mnist, content, message):
    folder, _, _ = mnist
    (folder / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.load("mnist", folder)


def test_damaged_gzip(mnist):
    folder, _, _ = mnist
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz cannot be read"):
        data.load("mnist", folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(subprocess.Popen), "Popen does not belong"),
        (pickle.dumps({}, protocol=2), "no images with labels"),
        (b"", "cannot be read"),
        (b"<html>not found</html>", "cannot be read"),
    ],
)
def test_damaged_batch(cifar, tmp_path, content, message):
    cifar("cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--backend tritn", "'native', 'triton', 'reference', got 'tritn'"),
        ("--device cuda:99", "argument --device: cuda:99: "),
        ("--device nowhere", "argument --device: nowhere: "),
        ("--seeds 0", "expected a whole number of at least 1, got '0'"),
        ("--epochs many", "expected a whole number of at least 1, got 'many'"),
        ("--data imagenet", "invalid choice: 'imagenet'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as failure:
        distill.main(arguments.split())
    assert failure.value.code == 2
    assert message in capsys.readouterr().err


def test_backend_that_cannot_serve_ends_the_program(tmp_path):
    with pytest.raises(SystemExit) as failure:
        distill.main(["--quick", "--backend", "triton", "--output", str(tmp_path)])
    assert "triton" in failure.value.code
    assert not (tmp_path / "results.json").exists()


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


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (28, 1), (32, 3)])
def test_student_features_have_the_sizes_of_the_teacher(size, channels):
    images = torch.randn(2, channels, size, size)
    recipe = RECIPES["digits"]
    teacher = residual_network(channels, size, 10, recipe.teacher_widths, recipe.teacher_blocks)
    student = residual_network(channels, size, 10, recipe.student_widths, recipe.student_blocks)
    for theirs, ours in zip(teacher(images).features, student(images).features, strict=True):
        assert theirs.shape[2:] == ours.shape[2:]
        assert theirs.shape[1] > ours.shape[1]
    assert student(images).logits.shape == (2, 10)


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", ["compile", "ddp"])
def test_features_survive(wrap, process_group):
    network = residual_network(1, 8, 10, (2, 3, 4), 1)
    wrapped = (
        torch.compile(network, fullgraph=True, backend="aot_eager")
        if wrap == "compile"
        else torch.nn.parallel.DistributedDataParallel(network)
    )
    output = wrapped(torch.randn(4, 1, 8, 8))
    assert [feature.shape[1] for feature in output.features] == [2, 3, 4]
    (output.logits.sum() + sum(feature.square().sum() for feature in output.features)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_every_method_takes_the_same_steps():
    trainer = Trainer(data.load("digits").at_most(100), TINY, torch.device("cpu"))
    teacher = trainer.teacher(0).network
    for method in METHODS:
        steps = []
        trainer.on_step = lambda steps=steps: steps.append(None)
        trainer.student(method, 0, teacher)
        assert len(steps) == trainer.steps == 4


def test_cutting_the_graph_leaves_the_gradient_alone():
    trainer = Trainer(data.load("digits").at_most(50), TINY, torch.device("cpu"))
    network = residual_network(1, 8, 10, (2, 3, 4), 1)
    images, labels = torch.randn(50, 1, 8, 8), torch.arange(50) % 10
    target = Output(torch.randn(50, 10), [])

    def loss(student, teacher, labels):
        return soft_targets(student, teacher, labels) + student.features[1].square().mean()

    loss(network(images), target, labels).backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    assert trainer._backward(network(images), target, labels, loss) > 0
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_spread_is_of_the_sample():
    assert f"{Spread.of([1.0, 2.0, 3.0]):.1f}" == "2.0 ± 1.00"
    assert f"{Spread.of([1.0]):+.2f}" == "+1.00"


def comparison(output, arguments=""):
    compare.main(f"--quick --epochs 1 --workers 1 --output {output} {arguments}".split())
    return json.loads((output / "results.json").read_text())


@pytest.fixture
def compared(tmp_path):
    """A trainer of the comparison on few digits, with a teacher."""
    experiment = Experiment("digits", None, 64, 50, 2, 2, torch.device("cpu"), None)
    trainer = compare_training.Trainer(experiment, tmp_path)
    trainer.train(TEACHER_RUN)
    return trainer


def test_comparison_writes_everything(tmp_path, capsys):
    found = comparison(tmp_path)
    printed = capsys.readouterr().out
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    names = [method.name for method in compare_methods.METHODS]
    assert [pair["name"] for pair in found["pairs"]] == [p.name for p in PAIRS.values()]
    for pair in found["pairs"]:
        assert [row["name"] for row in pair["rows"]] == ["teacher", *names]
        assert pair["student_parameters"] < pair["teacher_parameters"]
        alone = pair["rows"][1]["accuracy"]["mean"]
        for row in pair["rows"][2:]:
            assert row["gain"]["mean"] == pytest.approx(row["accuracy"]["mean"] - alone)
            assert f"{row['accuracy']['mean']:.2f}" in printed
    assert set(found["backends"]) == {*names} - {"student"}
    assert "CIFAR-100" not in printed


def test_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    train, done = compare_training.Trainer.train, []

    def interrupted(trainer, run):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run)
        return train(trainer, run)

    monkeypatch.setattr(compare_training.Trainer, "train", interrupted)
    arguments = "--pairs depthwise --methods student KD AT --seeds 2"
    with pytest.raises(SystemExit, match="goes on"):
        comparison(tmp_path, arguments)
    first = done.copy()
    done.clear()
    monkeypatch.setattr(
        compare_training.Trainer,
        "train",
        lambda trainer, run: done.append(run) or train(trainer, run),
    )
    found = comparison(tmp_path, arguments)
    assert len(first) == 3
    assert len(done) == 4
    assert not {*first} & {*done}
    done.clear()
    assert comparison(tmp_path, arguments) == found
    assert not done


def test_a_training_is_not_found_under_other_settings(compared, monkeypatch):
    store, folder = compared.store, compared.store.folder
    run = compare_training.Run("depthwise", "SP", 0)
    store.keep(run, compare_training.Result(90.0, 1.0))
    moved = dataclasses.replace(compared.experiment, data_dir=Path("elsewhere"))
    longer = dataclasses.replace(compared.experiment, epochs=3)
    assert compare_training.Store(moved, folder).result(run) == store.result(run)
    assert compare_training.Store(longer, folder).result(run) is None
    assert store.result(dataclasses.replace(run, seed=1)) is None
    methods = [method._replace(recipe="other") for method in compare_methods.METHODS]
    monkeypatch.setattr(compare_training, "METHODS", methods)
    assert store.result(run) is None


def test_comparison_quotes_the_literature_on_its_data(cifar, tmp_path, capsys):
    cifar("cifar100")
    pair = "--pairs WRN-16-2 --methods student RKD"
    found = comparison(tmp_path / "output", f"--data cifar100 --data-dir {tmp_path} {pair}")
    quoted = [row["literature"] for row in found["pairs"][0]["rows"]]
    assert quoted == [75.61, 73.26, 73.35]
    printed = capsys.readouterr().out
    assert all(f"{figure:.2f}" in printed for figure in quoted)


def test_comparison_trains_equally_long_whatever_came_before(compared, monkeypatch):
    monkeypatch.setattr(
        compare_training.Trainer,
        "accuracy",
        lambda self, network: sum(float(p.detach().double().sum()) for p in network.parameters()),
    )
    other = compare_training.Trainer(compared.experiment, compared.store.folder)
    for method in compare_methods.METHODS:
        steps, run = [], compare_training.Run("depthwise", method.name, 1)
        compared.on_steps = steps.append
        first = compared.train(run)
        assert sum(steps) == compared.steps == 2
        if method.name == "FitNet":
            assert other.train(run).accuracy == first.accuracy


def test_comparison_has_the_weights_of_the_released_code():
    torch.manual_seed(0)
    student, teacher = (
        Output(torch.randn(4, 10), [torch.randn(4, c, 6, 6) for c in (2, 4, 8, 8)]) for _ in "st"
    )
    labels = torch.arange(4)
    pairs = list(zip(student.features, teacher.features, strict=True))

    def normalized(x):
        return torch.nn.functional.normalize(x.square().mean(1).flatten(1))

    def flow(a, b):
        return torch.einsum("bchw,bdhw->bcd", a, b) / 36

    mse = torch.nn.functional.mse_loss
    hint = compare_methods.Hint(student, teacher)
    expected = {
        compare_methods.attention: 1000 * sum(mse(*map(normalized, p)) for p in pairs[1:]),
        compare_methods.flow: 0.1
        * sum(
            mse(flow(s, after_s), flow(t, after_t))
            for (s, t), (after_s, after_t) in itertools.pairwise(pairs)
        ),
        hint: 100 * mse(hint.regressor(student.features[2]), teacher.features[2]),
    }
    base = torch.nn.functional.cross_entropy(student.logits, labels)
    for loss, term in expected.items():
        torch.testing.assert_close(loss(student, teacher, labels), base + term)


def test_wide_residual_networks_are_those_of_the_paper():
    parameters = [
        parameter_count(wide_residual_network(3, 32, 100, depth, 16)) for depth in (40, 16)
    ]
    assert parameters == [2_255_156, 703_284]


def test_students_of_the_comparison_have_the_channels_of_the_teacher(compared):
    images = torch.randn(2, 1, 8, 8)
    shapes = [
        [feature.shape for feature in compared.network(name, 0)(images).features]
        for name in (compare_methods.TEACHER, *PAIRS)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("augment", [False, True])
def test_targets_are_what_the_teacher_says_of_the_images(compared, augment):
    compared.data = dataclasses.replace(compared.data, augment=augment)
    chosen = torch.randperm(len(compared.data.train))[:9]
    images = compared.images(compared.data.train.pixels[chosen])
    found, expected = compared._target(images, chosen), compared.teacher(images)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found.features, expected.features, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not found.logits.requires_grad

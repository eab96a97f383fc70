"""The distillation of `examples/`: its program, its networks, its trainer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from image_files import write_cifar, write_mnist

import data
import distill
from features import Output
from methods import ALONE, ATTENTION, METHODS, attention_and_soft_targets, soft_targets
from models import residual_network
from results import Spread
from training import RECIPES, Recipe, Trainer

ROOT = Path(__file__).parents[1]
TINY = Recipe(2, 50, (2, 3, 4), 1, (4, 6, 8), 1)

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_files_are_distilled_from(name, tmp_path, monkeypatch):
    if name == "cifar10":
        write_cifar(tmp_path, name)
    else:
        write_mnist(tmp_path)
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


@pytest.mark.thorough
def test_missing_files_end_the_program(tmp_path):
    command = [sys.executable, ROOT / "examples" / "distill.py", "--data", "mnist"]
    run = subprocess.run([*command, "--data-dir", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("distill.py: error: mnist: no train-images-idx3-ubyte")
    assert "Traceback" not in run.stderr


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
    assert f"{Spread.of([1.0, 2.0, 3.0]):.3f}" == "2.000 ± 1.000"
    assert f"{Spread.of([1.0, 2.0, 3.0]):+.2f}" == "+2.00 ± 1.00"
    assert f"{Spread.of([1.0]):+.2f}" == "+1.00"

"""The comparison of methods in `examples/`: its program, its trainings, its losses."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from image_files import write_cifar

import compare
import compare_methods
import compare_training
from compare_methods import PAIRS
from compare_training import TEACHER_RUN, Experiment
from features import Output
from models import parameter_count, wide_residual_network

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_comparison_quotes_the_literature_on_its_data(tmp_path, capsys):
    write_cifar(tmp_path, "cifar100")
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

"""The distillation of language models in `examples/`: model, cache, losses, program."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llm
import llm_memory
import llm_report
from llm_cache import TopKCache
from llm_memory import Memory
from llm_methods import ALONE, METHODS, TOP_K, Cached, Head
from llm_model import LanguageModel, Size
from llm_text import Corpus
from llm_tokens import PADDING, Vocabulary
from llm_training import Experiment, Recipe, Result, Run, Text, Trainer

ROOT = Path(__file__).parents[1]
TEXT = b"the cat sat on the mat, the cat ate the rat; 1234 cats\n    \xc3\xa9t\xc3\xa9\n" * 20

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trainer(tmp_path):
    """On few tokens, with a teacher that has not learnt anything, and its cache."""
    experiment = Experiment(
        vocabulary=300,
        text_bytes=None,
        length=16,
        teacher=Recipe(Size(1, 12, 2), 4, 2, 3e-3),
        student=Recipe(Size(1, 8, 2), 4, 12, 4e-3),
        backend=None,
    )
    corpus = Corpus([TEXT, TEXT[:99]], [TEXT[7:207]])
    text = Text.of(corpus, Vocabulary.learn(corpus.train, 300), experiment.length)
    trainer = Trainer.on(text, experiment, tmp_path)
    trainer.train_teacher()
    trainer.write_cache()
    return trainer


def test_the_model_does_not_see_what_follows():
    model = LanguageModel(300, 16, Size(2, 8, 2))
    inputs = torch.randint(300, (3, 16))
    changed = inputs.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 300
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_cache_has_the_most_likely_tokens(tmp_path):
    logits = 3 * torch.randn(7, 5, 50)
    cache = TopKCache.write(tmp_path, logits.split(3), 7, 5, 4)
    chosen = torch.tensor([6, 0, 3])
    found = TopKCache(tmp_path)[chosen]
    expected = logits.log_softmax(-1).topk(4)
    assert torch.equal(found.indices, expected.indices[chosen].int())
    assert torch.equal(found.log_probabilities, expected.values[chosen].half())
    assert cache.bytes == 7 * 5 * 4 * 4
    mean = expected.values.exp().sum(-1).mean().item()
    assert cache.probability == pytest.approx(mean, rel=2e-3)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < cache.bytes + 1000


def test_cache_refuses_what_its_indices_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="65,536 tokens, got 65,537"):
        TopKCache.write(tmp_path, [torch.zeros(1, 1, 65_537)], 1, 1, 2)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_losses_are_those_of_eager_statements(method):
    labels = torch.randint(200, (3, 8))
    labels[torch.rand(3, 8) < 0.3] = PADDING
    labels[0, 0] = 5
    teacher = Head(torch.randn(3, 8, 12), torch.randn(200, 12) / 2)
    kept = teacher.logits.log_softmax(-1).topk(TOP_K)
    cached = Cached(kept.values.half(), kept.indices.int())
    target = {"head": teacher, "cache": cached, None: None}[method.teacher]
    hidden, weight = torch.randn(3, 8, 6), torch.randn(200, 6)
    found = []
    for loss in (method.loss, method.eager):
        student = Head(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        value = loss(student, target, labels)
        value.backward()
        found.append((value.detach(), *(side.grad for side in student)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert not found[0][1][labels == PADDING].any()


def test_bits_are_counted_per_byte(trainer):
    model = trainer.model(Size(1, 8, 2))
    model.head.data.zero_()
    tokens = (trainer.text.held_out[1] != PADDING).sum().item()
    expected = tokens * math.log2(trainer.text.vocabulary) / 200
    assert trainer.bits_per_byte(model) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_learns_in_as_many_steps(trainer, method, monkeypatch):
    steps = []
    trainer.on_steps = steps.append
    untrained = trainer.bits_per_byte(trainer.model(trainer.experiment.student.size))
    result = trainer.train(Run(method.name, 1))
    assert sum(steps) == trainer.experiment.student.steps
    assert result.bits_per_byte < untrained
    assert result.tokens_per_second > 0
    assert trainer.train(Run(method.name, 1)).bits_per_byte == result.bits_per_byte


def test_what_a_student_is_shown_is_what_the_teacher_says(trainer):
    chosen = torch.tensor([4, 1])
    teacher, cached = (trainer._target(needed, chosen) for needed in ("head", "cache"))
    assert not any(side.requires_grad for side in teacher)
    expected = teacher.logits.log_softmax(-1).gather(-1, cached.indices.long())
    torch.testing.assert_close(cached.log_probabilities.float(), expected, atol=5e-3, rtol=1e-3)
    assert trainer._target(None, chosen) is None


def test_memory_is_measured_of_every_method(monkeypatch):
    monkeypatch.setattr(llm_memory, "VOCABULARY", 20_000)
    found = dict(llm_memory.measure(4, 64, (8, 8)))
    assert list(found) == [method.name for method in METHODS]
    assert found[ALONE.name].fastkd is None
    for method in METHODS[1:]:
        memory = found[method.name]
        # The logits of the batch alone are 20 MB.
        assert memory.eager > 40e6, method.name
        assert memory.fastkd < memory.eager, method.name


def test_table_and_picture_show_what_was_found(trainer, tmp_path, capsys):
    results = {
        Run(name, seed): Result(value + 0.1 * seed, 1234.5)
        for name, value in (("student alone", 2.5), ("JSD", 2.0))
        for seed in range(2)
    }
    memory = {"student alone": Memory(100_000_000, None), "JSD": Memory(300_000_000, 70_000_000)}
    served = {"JSD": "native"}
    teacher = Result(1.75, 999.0)
    report = llm_report.Report.of(trainer, served, 0.5, teacher, results, memory)
    llm_report.print_table(report)
    printed = capsys.readouterr().out
    for shown in (
        "1.750",
        "2.550 ± 0.071",
        "2.050 ± 0.071",
        "+0.500 ± 0.000",
        "1,234",
        "300",
        "70",
    ):
        assert shown in printed
    assert "backend native: JSD" in printed
    llm_report.draw(report, tmp_path / "llm.png")
    assert (tmp_path / "llm.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(json.dumps(report.as_json()))
    assert found["rows"][1]["gain"]["mean"] == pytest.approx(0.5)
    assert found["rows"][0]["gain"] is None
    assert found["student"]["size"] == {"layers": 1, "width": 8, "heads": 2}


@pytest.mark.thorough
def test_quick_run_writes_everything(tmp_path):
    command = [sys.executable, ROOT / "examples" / "llm.py", "--quick", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert (tmp_path / "llm.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == [method.name for method in METHODS]
    for row in found["rows"]:
        assert len(row["values"]) == llm.QUICK_SEEDS
        assert f"{row['bits_per_byte']['mean']:.3f}" in run.stdout
        assert row["bits_per_byte"]["mean"] < 8
    assert set(found["backends"]) == {method.name for method in METHODS} - {ALONE.name}


@pytest.mark.thorough
def test_options_are_honoured(tmp_path):
    methods = "--methods JSD --seeds 2 --steps 3 --teacher-steps 4 --vocabulary 256 --workers 1"
    llm.main(f"--quick {methods} --backend reference --output {tmp_path}".split())
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(row["name"], len(row["values"])) for row in found["rows"]] == [("JSD", 2)]
    assert (found["student"]["steps"], found["teacher"]["steps"]) == (3, 4)
    assert found["vocabulary"] == 256
    assert set(found["backends"].values()) == {"reference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--backend tritn", "'native', 'triton', 'reference', got 'tritn'"),
        ("--vocabulary 255", "expected 256 to 65536 tokens, got 255"),
        ("--seeds 0", "expected a whole number of at least 1, got '0'"),
        ("--methods KD", "invalid choice: 'KD'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as failure:
        llm.main(arguments.split())
    assert failure.value.code == 2
    assert message in capsys.readouterr().err


def test_backend_that_cannot_serve_ends_the_program(tmp_path):
    with pytest.raises(SystemExit) as failure:
        llm.main(["--quick", "--backend", "triton", "--output", str(tmp_path)])
    assert "triton" in failure.value.code
    assert not (tmp_path / "results.json").exists()
